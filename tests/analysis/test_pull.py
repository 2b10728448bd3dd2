"""Pulling with the real client from the local server: what was logged is what is analysed, and twice is the same."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from analysis import pull
from analysis.files import InputError
from analysis.pull import read_files
from tests.analysis import simulate

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"WANDB_PROJECT": "analysis", "PYTHONPATH": str(ROOT)}
RATES = {2e-4: "good", 1e-3: "cut", 5e-3: "stopped"}


def analyse(server, *arguments, **environment):
    return server.run(sys.executable, "-m", "analysis", *arguments, env=ENVIRONMENT | environment)


def log(server, rates):
    """Log simulated runs with the real client; returns the sweep's path."""
    rates = json.dumps({str(rate): kind for rate, kind in rates.items()})
    done = server.run(sys.executable, "-m", "tests.analysis.log_sweep", rates, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sweep(server):
    return log(server, RATES)


def test_a_sweep_comes_whole_twice_the_same_and_its_classes_go_back(server, sweep, tmp_path):
    for name in ("a/out", "b/out"):
        done = analyse(server, sweep, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert "3 runs read" in done.stdout
    trees = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("a", "b")
    ]
    assert trees[0] == trees[1]
    for rate, kind in RATES.items():
        logged = simulate.record(kind, rate, planned=100, examples=20)
        data = json.loads((tmp_path / f"a/out/lr_{rate}/run_data.json").read_text())
        run = data["runs"][0]
        assert len(run["history"]) == len(logged["history"])
        assert run["files"] == logged["files"] and run["state"] == logged["state"].replace("crashed", "failed")
        assert run["config"]["adapted_modules"] == logged["config"]["adapted_modules"]
    assert run["history"][-1]["train/loss"] == "Infinity" or run["history"][-2]["train/loss"] == "Infinity"
    offline = analyse(server, tmp_path / "a/out", WANDB_BASE_URL="http://127.0.0.1:9")
    assert offline.returncode == 0
    assert trees[0] == {
        path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()
    }
    entity, project, _ = sweep.split("/")
    runs = f"wandb.Api().runs('{entity}/{project}', lazy=False)"
    script = f"import wandb\nfor run in {runs}: print(run.summary_metrics.get('behavior'))"
    written = server.run(sys.executable, "-c", script, env=ENVIRONMENT).stdout
    assert set(written.split("\n")) >= {"stable, good", "incomplete", "diverged"}


def test_the_summary_of_a_run_that_goes_on_keeps_what_came_since_it_was_read(api):
    """W&B's public API writes a summary whole, as it was when the run was read."""
    read = wandb.init(project="analysis-live", mode="online")
    run = wandb.Api().run(read.path)
    read.summary["diverged_at_step"] = 2
    now = wandb.Api().run(read.path)
    deadline = time.monotonic() + 300
    while "diverged_at_step" not in now.summary_metrics and time.monotonic() < deadline:
        time.sleep(0.1)
        now.load(force=True)
    assert run.state == "running"
    pull.write_back([run], {run.id: "incomplete"})
    run.load(force=True)
    read.finish()
    assert run.summary_metrics["diverged_at_step"] == 2


ALIASES = """
import json, sys, wandb
api, found = wandb.Api(), {}
for run in api.sweep(sys.argv[1]).runs:
    artifact = api.artifact(f"{run.entity}/{run.project}/model-{run.id}:latest")
    found[run.config["learning_rate"]] = artifact.aliases
    if run.config["learning_rate"] in map(float, sys.argv[2:]):
        artifact.aliases.append("best")
        artifact.save()
print(json.dumps(found))
"""


def test_a_server_that_is_too_busy_costs_the_alias_alone(monkeypatch, capsys):
    def busy(timeout):
        raise wandb.errors.AuthenticationError("the service process is busy")

    monkeypatch.setattr(pull.wandb, "Api", busy)
    pull.mark_best([SimpleNamespace(state="finished")], "own")
    assert (
        capsys.readouterr().out == "the alias 'best' stays off the best adapter in W&B: the service process is busy\n"
    )


def test_the_best_adapter_alone_has_the_alias_best(server, sweep, tmp_path):
    def aliases(*add: float) -> dict[str, list]:
        done = server.run(sys.executable, "-c", ALIASES, sweep, *map(str, add), env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    aliases(1e-3, 5e-3)  # as former winners
    assert analyse(server, sweep, "--output", tmp_path).returncode == 0
    found = aliases()
    assert {rate for rate, names in found.items() if "best" in names} == {"0.0002"}
    assert all({"latest", "final_model"} <= set(names) for names in found.values())


def test_without_an_output_the_folder_has_the_sweeps_name_and_latest_links_there(server, sweep, tmp_path):
    done = server.run(sys.executable, "-m", "analysis", sweep, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    latest = tmp_path / "outputs/latest"
    assert latest.is_symlink() and latest.resolve().name == f"simulated-{sweep.split('/')[-1]}"
    assert (latest / "README.md").exists()


def test_a_file_that_a_run_has_not_is_no_news(api, capsys):
    """W&B answers a name that it has no file of, too: with a size of 0 and the MD5 "0"."""
    run = api.create_run(project="analysis-files")
    assert [file.md5 for file in run.files(["eval_nll.json"])] == ["0"]
    assert read_files(run) == {} and capsys.readouterr().out == ""


def test_data_of_another_sweep_are_kept_aside(server, sweep, tmp_path):
    simulate.study(tmp_path, rates={2e-4: "slow", 3e-3: "good"}, planned=100, examples=5)
    before = (tmp_path / "lr_0.0002/run_data.json").read_bytes()
    done = analyse(server, sweep, "--output", tmp_path)
    assert "lr_0.003/run_data.json holds another sweep, sw1: moved to" in done.stdout
    assert (tmp_path / "previous/sw1/lr_0.0002/run_data.json").read_bytes() == before
    assert (tmp_path / "previous/sw1/lr_0.003/run_data.json").exists()
    assert not (tmp_path / "lr_0.003/run_data.json").exists()


def test_what_a_sweep_has_under_another_rate_now_is_superseded(tmp_path, capsys):
    """A run that has just begun has no configuration, and so no rate."""
    for rate, sweep in (("unknown", "one"), ("0.1", "one"), ("0.2", "two")):
        folder = tmp_path / f"lr_{rate}"
        folder.mkdir()
        (folder / "run_data.json").write_text(json.dumps({"sweeps": [{"id": sweep}]}))
    pull.set_aside(tmp_path, {"one"}, {"lr_0.1"})
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("run_data.json"))
    assert left == ["lr_0.1/run_data.json", "previous/two/lr_0.2/run_data.json"]
    assert "unknown" not in capsys.readouterr().out


def test_a_sweep_and_its_refinement_merge(server, sweep, tmp_path):
    assert analyse(server, sweep, "--output", tmp_path, "--refine").returncode == 0
    rates = yaml.safe_load((tmp_path / "sweeps/round-1.yaml").read_text())["parameters"]["learning_rate"]["values"]
    second = log(server, dict.fromkeys(rates, "suboptimal"))
    done = analyse(server, sweep, second, "--output", tmp_path)
    found = json.loads((tmp_path / "all_results.json").read_text())
    assert done.returncode == 0 and [s["id"] for s in found["sweeps"]] == [p.split("/")[-1] for p in (sweep, second)]
    assert {row["learning_rate"] for row in found["rates"]} == {*RATES, *rates}
    assert next(c for c in found["checks"] if c["check"] == "rates = grid")["passed"]


@pytest.mark.parametrize(
    ("path", "environment", "words"),
    [
        ("local/analysis/nothere", {}, "no sweep local/analysis/nothere"),
        ("local/none/x", {"WANDB_BASE_URL": "http://127.0.0.1:9"}, "cannot reach the W&B server http://127.0.0.1:9"),
        ("local/none/x", {"WANDB_API_KEY": ""}, "WANDB_API_KEY"),
    ],
    ids=["unknown sweep", "unreachable server", "no key"],
)
def test_bad_input_is_one_line_and_exit_2(server, tmp_path, path, environment, words):
    done = analyse(server, path, "--output", tmp_path, **environment)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_output_that_cannot_be_written_is_named(server, sweep, tmp_path):
    (tmp_path / "file").write_text("")
    done = analyse(server, sweep, "--output", tmp_path / "file" / "out")
    assert done.returncode == 2 and "cannot write" in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_goes_away_is_one_line():
    def sweep(path: str):
        raise WandbApiFailedError("wandb-core gave up")

    gone = SimpleNamespace(settings={"base_url": "http://gone"}, sweep=sweep)
    with pytest.raises(InputError, match=r"no sweep a/b/c on http://gone \(wandb-core gave up\)"):
        pull.find(gone, "a/b/c")
