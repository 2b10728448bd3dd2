"""experiment.py --refine: the search's rounds as sweeps, by W&B's own agent, with a training that takes no time."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from experiment import Report, last_of_recipe

# Any program that logs as train.py does; its eval loss is lowest at 5e-4.
TOY = """
import math, pathlib, sys, time, wandb
point = {key: float(value) for key, value in (word[2:].split("=") for word in sys.argv[1:] if "=" in word)}
with wandb.init(config={"max_steps": 20, "seed": int(point.get("seed", 0))}) as run:
    pathlib.Path(f"began-{run.id}").touch()
    for step in range(21):
        loss = 5 - (2 - math.log10(point["learning_rate"] / 5e-4) ** 2) * step / 20
        run.log({"train/global_step": step, "train/loss": loss, "eval/loss": loss})
        time.sleep(point["pause"] / 20)
"""


@pytest.fixture
def toy(checkout):
    """A grid of two rates in a checkout, each run a moment."""
    (checkout / "toy.py").write_text(TOY)
    parameters = {"learning_rate": {"values": [1.0e-4, 1.0e-3]}, "pause": {"value": 0.2}}
    sweep = {"program": "toy.py", "method": "grid", "name": "toy", "parameters": parameters}
    (checkout / "toy.yaml").write_text(yaml.safe_dump(sweep))
    return checkout


def about(checkout) -> dict:
    path = checkout / "outputs/latest/experiment.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_a_killed_search_goes_on_to_its_end(toy, experiment):
    command = [sys.executable, "experiment.py", "--sweep", "toy.yaml", "--refine", "--budget", "3", "--one-by-one"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with open(toy / "printed", "w") as printed:
        process = subprocess.Popen(command, cwd=toy, env=plain, stdout=printed, stderr=printed)
    deadline = time.monotonic() + 300
    while len(list(toy.glob("began-*"))) < 3:  # the grid's two, and the first run of round-1
        assert time.monotonic() < deadline and process.poll() is None, (toy / "printed").read_text()
        time.sleep(0.1)
    process.kill()
    process.wait()
    (begun,) = about(toy)["rounds"]

    result = experiment("--resume", "--one-by-one")
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = about(toy)["rounds"]
    assert first == begun
    asked = r"^search, round-2: Is [\d.e-]+ better than 3.2e-4\? \(1 of the 1 runs that are left\)$"
    assert re.search(asked, result.stdout, re.MULTILINE), result.stdout
    assert "search: The budget ends before" in result.stdout

    output = toy / "outputs/latest"
    story = json.loads((output / "all_results.json").read_text())["search"]
    assert [(x["name"], len(x["rates"])) for x in story["rounds"]] == [("grid", 2), ("round-1", 2), ("round-2", 1)]
    (at,) = {len(run["history"]) for run in finished(output)}
    assert at == 21 and len(finished(output)) == 5
    for number, sweep in ((1, first), (2, second)):
        config = yaml.safe_load((output / f"sweeps/round-{number}.yaml").read_text())
        assert config["method"] == "grid" and config["parameters"]["pause"] == {"value": 0.2}
        assert config["description"] == story["rounds"][number]["asked"]
        assert (config["entity"], config["project"]) == tuple(sweep.split("/")[:2])
    assert "### The search for the best rate" in (output / "README.md").read_text()


def finished(output) -> list[dict]:
    runs = [run for path in output.glob("lr_*/run_data.json") for run in json.loads(path.read_text())["runs"]]
    return [run for run in runs if run["state"] == "finished"]


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ("--budget 3", {}, "--budget needs --refine"),
        ("--refine --budget 0", {}, "--budget 0: give the number of runs"),
        ("--refine --guides", {}, "--guides has no grid of rates to refine"),
        ("--refine", {"max_steps": {"values": [10, 20]}}, "--refine: toy.yaml varies max_steps"),
        ("--refine", {"learning_rate": {"min": 1.0e-4, "max": 1.0e-3}}, "--refine: toy.yaml is no grid"),
    ],
)
def test_what_cannot_be_refined_is_one_line(options, changed, message, toy, experiment):
    sweep = yaml.safe_load((toy / "toy.yaml").read_text())
    sweep["parameters"] |= changed
    if "min" in sweep["parameters"]["learning_rate"]:
        sweep |= {"method": "random", "run_cap": 2}
    (toy / "toy.yaml").write_text(yaml.safe_dump(sweep))
    result = experiment("--sweep", "toy.yaml", *options.split())
    assert result.returncode == 2 and result.stderr.startswith(f"experiment: {message}")
    assert len(result.stderr.splitlines()) == 1 and not list(toy.glob("outputs/*"))


def test_guides_are_set_against_the_refined_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    latest = tmp_path / "outputs/latest"
    latest.mkdir(parents=True)
    (latest / "recipe.yaml").write_text("max_steps: 3\n")
    sweeps = {"sweep": "a/b/grid", "rounds": ["a/b/one", "a/b/two"], "beside": ["a/b/other"]}
    (latest / "experiment.json").write_text(json.dumps({"server": "local", **sweeps}))
    assert last_of_recipe(latest / "recipe.yaml", "local") == ["a/b/grid", "a/b/one", "a/b/two", "a/b/other"]
    assert last_of_recipe(latest / "recipe.yaml", "cloud") == []


def test_the_last_report_does_not_wait_for_an_earlier_one(tmp_path):
    report = Report([], tmp_path, None)
    report.process = subprocess.Popen(["sleep", "60"])
    report.command = ["true"]
    assert report.finish() == 0
    assert report.process.returncode == -signal.SIGTERM
