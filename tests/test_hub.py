"""Models and data sets of the Hub, through the real huggingface_hub and datasets, from a Hub on loopback."""

import json
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

import data
from inputs import InputError
from model import check_model
from settings import BaseConfig
from tests.hub import Hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL_CHUNK = 500_000  # bytes; smaller than the starter's weights, so that a broken download has something to resume


def rows(first: int, last: int) -> bytes:
    """Rows first to last of the data sets here, as JSON lines."""
    turns = [("user", "{n} + 1?"), ("assistant", "{n} and one")]
    messages = [[{"role": role, "content": text.format(n=n)} for role, text in turns] for n in range(first, last)]
    return "".join(json.dumps({"messages": row}) + "\n" for row in messages).encode()


@pytest.fixture(scope="module")
def hub():
    """A Hub with acme/base (the starter) and acme/chat, each with an older revision v1, and all that can be amiss."""
    hub = Hub()
    model = {path.name: path.read_bytes() for path in (ROOT / "starter/model").iterdir()}
    for name in ("acme/base", "acme/broken", "acme/half"):
        hub.repository("models", name).commit(model, "v1")
        hub.repository("models", name).commit(model | {"README.md": b"newer"})
    chat = hub.repository("datasets", "acme/chat")
    chat.commit({"train.jsonl": rows(0, 40), "test.jsonl": rows(40, 60)}, "v1")
    chat.commit({"train.jsonl": rows(0, 80), "test.jsonl": rows(80, 120)})
    hub.repository("models", "acme/weightless").commit({k: v for k, v in model.items() if "safetensors" not in k})
    hub.repository("models", "acme/speechless").commit({k: v for k, v in model.items() if "token" not in k})
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6892304\n"
    hub.repository("models", "acme/pointer").commit(model | {"model.safetensors": pointer})
    for kind in ("models", "datasets"):
        hub.repository(kind, "acme/gated").gated = 401
        hub.repository(kind, "acme/closed").gated = 403
        hub.repository(kind, "acme/bare").commit({"README.md": b"nothing here"})
    hub.repository("models", "acme/old").renamed = "acme/base"
    hub.repository("datasets", "acme/old").renamed = "acme/chat"
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def online(hub, home):
    """A process whose Hugging Face libraries know this Hub alone; they read their environment when imported."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", hub.url)
        environment.setenv("HF_HOME", str(home))
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(small_chunks).result()
    with pool:
        yield pool


def small_chunks() -> None:
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = SMALL_CHUNK


def go_offline() -> None:
    """What HF_HUB_OFFLINE=1 sets at import."""
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def model(name: str, revision: str = "main") -> str:
    """In the client: the model's commit, or the line that refuses it."""
    base = BaseConfig(model_name_or_path=name, model_revision=revision)
    try:
        check_model(base)
    except InputError as error:
        return str(error)
    return base.model_revision


def splits(name: str, revision: str | None = None) -> tuple[int, int, str] | str:
    """In the client: rows for training, rows for the evaluation and the data set's commit, or the refusing line."""
    config = data.DataConfig(dataset_name=name, dataset_revision=revision)
    try:
        found = data.load_splits(config)
    except data.InputError as error:
        return str(error)
    return *map(len, found), config.dataset_revision


def test_revisions_give_their_commits(hub, online):
    for name in ("acme/base", "acme/old"):
        commits = hub.repository("models", "acme/base").commits
        assert [online.submit(model, name, revision).result() for revision in ("v1", "main")] == list(commits)
    for name in ("acme/chat", "acme/old"):  # the Hub redirects from the old name
        old, new = hub.repository("datasets", "acme/chat").commits
        assert online.submit(splits, name, "v1").result() == (40, 20, old)
        assert online.submit(splits, name).result() == (80, 40, new)
        assert online.submit(splits, name, old).result() == (40, 20, old)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, online, home):
    asked = len(hub.requests)
    hub.cut = 1
    expected = hub.repository("models", "acme/broken").references["main"]
    assert online.submit(model, "acme/broken").result() == expected
    ranges = [held for method, path, held in hub.requests[asked:] if path.startswith("/lfs/") and held]
    assert ranges and all(int(held[6:-1]) >= SMALL_CHUNK for held in ranges)
    (weights,) = home.glob(f"hub/models--acme--broken/snapshots/{expected}/model.safetensors")
    assert weights.read_bytes() == (ROOT / "starter/model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("acme/missing", "main", "is not a valid model identifier"),
        ("acme/base", "v9", "v9 is not a valid git identifier"),
        ("acme/gated", "main", "gated repo.*hf auth login"),
        ("acme/closed", "main", "gated repo.*ask for access"),
        ("acme/bare", "main", "config.json"),
        ("acme/weightless", "main", "model.safetensors"),
        ("acme/speechless", "main", "tokenizer"),
        ("acme/pointer", "main", "header"),
    ],
)
def test_an_unfit_model_is_one_line(online, name, revision, message):
    line = online.submit(model, name, revision).result()
    assert line.startswith(f"model_name_or_path {name!r}: ") and "\n" not in line
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("acme/missing", None, "doesn't exist on the Hub"),
        ("acme/chat", "v9", "Revision 'v9' doesn't exist"),
        ("acme/gated", None, "gated.*hf auth login"),
        ("acme/closed", None, "gated.*ask for access"),
        ("acme/bare", None, "doesn't contain any data files"),
    ],
)
def test_an_unfit_data_set_is_one_line(online, name, revision, message):
    line = online.submit(splits, name, revision).result()
    assert line.startswith(f"dataset_name {name}: ") and "\n" not in line
    assert re.search(message, line), line


@pytest.fixture(scope="module")
def offline(hub, online):
    """The same process, after the Hub has gone."""
    for revision in ("v1", "main"):
        online.submit(model, "acme/base", revision).result()
        online.submit(splits, "acme/chat", revision).result()
    hub.cut = 1_000
    half = online.submit(model, "acme/half").result()
    assert half.startswith("model_name_or_path 'acme/half': peer closed connection"), half
    hub.stop()
    online.submit(go_offline).result()
    return online


def test_the_cache_gives_the_revision_that_is_asked_for_or_refuses(hub, offline):
    old, new = hub.repository("models", "acme/base").commits
    assert [offline.submit(model, "acme/base", revision).result() for revision in ("v1", "main")] == [old, new]
    old, new = hub.repository("datasets", "acme/chat").commits
    assert offline.submit(splits, "acme/chat").result() == (80, 40, new)
    for revision in ("v1", old):  # datasets itself would give the newest rows
        line = offline.submit(splits, "acme/chat", revision).result()
        assert f"the cache gives commit {new[:7]}, but revision {revision} is {old[:7]}" in line
    assert "find" in offline.submit(model, "acme/half").result()
    assert "acme/elsewhere" in offline.submit(splits, "acme/elsewhere").result()


def test_a_run_from_the_cache_records_both_commits(hub, home, offline, server, tmp_path):
    flags = ["--config", "recipes/starter.yaml", "--model_name_or_path", "acme/base", "--dataset_name", "acme/chat"]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path)]
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "WANDB_PROJECT": "hub"}
    result = server.run(sys.executable, "train.py", *flags, *small, cwd=ROOT, env=variables, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "train (train): 80 rows" in result.stdout and "⟦0 and one" in result.stdout
    (folder,) = tmp_path.iterdir()
    code = "import json, sys, wandb; print(json.dumps(dict(wandb.Api().run(sys.argv[1]).config)))"
    config = json.loads(server.run(sys.executable, "-c", code, f"local/hub/{folder.name.split('-')[-1]}").stdout)
    assert config["model_revision"] == list(hub.repository("models", "acme/base").commits)[-1]
    assert config["dataset_revision"] == list(hub.repository("datasets", "acme/chat").commits)[-1]
