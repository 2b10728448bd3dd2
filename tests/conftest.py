"""One local_wandb for all tests: the real client against it is the test double, never a mock of wandb."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import wandb
import yaml
from hypothesis import HealthCheck, settings

# Property tests share two cores with everything else: no deadlines, no complaints about slow draws.
settings.register_profile("shared", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

ROOT = Path(__file__).parent.parent
TINY = {"max_steps": 3, "per_device_train_batch_size": 2, "dataset_test_split": "test[:8]"}
PROCESSES = {"browser", "checkout", "server"}  # fixtures whose tests start servers, clients or an experiment: slow
HUGGING_FACE = tempfile.TemporaryDirectory(prefix="huggingface-")  # neither the user's cache nor another worker's
os.environ["HF_HOME"] = HUGGING_FACE.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not PROCESSES.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@dataclass
class Server:
    """A local_wandb in a process of its own, and the environment of a client that talks to it."""

    data: Path
    process: subprocess.Popen
    url: str
    key: str
    page: str
    env: dict[str, str]

    def run(
        self, *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
    ):
        """Runs a client command to its end, e.g. run("wandb", "sweep", file); its output is text."""
        return subprocess.run(
            command, cwd=cwd or self.data, env=self.env | (env or {}), capture_output=True, text=True, timeout=timeout
        )

    def stop(self) -> None:
        """Ends it as Ctrl-C would, and closes its pipe."""
        self.process.terminate()
        self.process.communicate(timeout=120)


def start(data: Path, *options: str, env: dict[str, str] | None = None) -> Server:
    """A local_wandb on a free port; its data, log and its clients' files lie in `data`."""
    data.mkdir(parents=True, exist_ok=True)
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | (env or {})
    with open(data / "server.log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "local_wandb", "--data", str(data), *options],
            cwd=ROOT, env=plain, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    printed = [process.stdout.readline().strip() for _ in range(3)]
    exports = dict(line.removeprefix("export ").partition("=")[::2] for line in printed[:2])
    assert exports.get("WANDB_BASE_URL"), (data / "server.log").read_text()
    client = plain | exports
    client |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{plain['PATH']}",
        "WANDB_ENTITY": "local",
        "WANDB_PROJECT": "test",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "2",
        "WANDB_SILENT": "false",
    }
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        folder = data / "client" / variable.lower()
        folder.mkdir(parents=True, exist_ok=True)
        client[variable] = str(folder)
    page = printed[2].removeprefix("# compare runs: ")
    return Server(data, process, exports["WANDB_BASE_URL"], exports["WANDB_API_KEY"], page, client)


@pytest.fixture
def checkout(tmp_path):
    """A folder to run the project's commands in: its files by links, and an outputs/ of its own."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("outputs", "wandb", "analysis"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "analysis", folder / "analysis")  # no link: a report names files as seen from its own place
    return folder


@pytest.fixture
def experiment(checkout):
    """Runs experiment.py with these arguments, in a checkout of its own."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "experiment.py", *map(str, arguments)]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        return subprocess.run(command, cwd=checkout, env=plain, capture_output=True, text=True)

    return run


@pytest.fixture
def tiny_sweep(tmp_path):
    """sweep.yaml with other rates and a recipe of three steps; returns a function of the rates."""

    def write(*rates: float) -> Path:
        recipe = tmp_path / "recipe.yaml"
        starter = yaml.safe_load((ROOT / "recipes/starter.yaml").read_text())
        recipe.write_text(yaml.safe_dump(starter | TINY))
        sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
        sweep["parameters"]["learning_rate"]["values"] = list(rates)
        sweep["command"][sweep["command"].index("recipes/starter.yaml")] = str(recipe)
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(sweep))
        return path

    return write


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The server that tests share: use a project of your own (WANDB_PROJECT) where others could disturb you."""
    server = start(tmp_path_factory.mktemp("local_wandb"))
    yield server
    server.stop()


@pytest.fixture
def api(server, monkeypatch, tmp_path):
    """wandb.Api() of this process, whose wandb talks to the server and writes below tmp_path."""
    for name, value in server.env.items():
        if name.startswith("WANDB_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield wandb.Api()
    wandb.teardown()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """wandb of this process writes below tmp_path and asks nobody, whatever a test before has told it."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # which forgets the environment of before
    yield
    wandb.teardown()
