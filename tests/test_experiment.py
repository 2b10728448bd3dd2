"""The whole flow with W&B's own client against local_wandb: sweep, agent, train.py, analysis."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TINY = {"max_steps": 3, "per_device_train_batch_size": 2, "dataset_test_split": "test[:8]"}


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


def run_data(output: Path, rate: str) -> dict:
    (run,) = json.loads((output / f"lr_{rate}" / "run_data.json").read_text())["runs"]
    return run


@pytest.fixture
def experiment(checkout):
    """Runs experiment.py with these arguments, in a checkout of its own."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "experiment.py", *map(str, arguments)]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        return subprocess.run(command, cwd=checkout, env=plain | environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("agent", [[], ["--one-by-one"]], ids=["gang", "wandb agent"])
def test_one_command_fills_in_the_report_with_a_diverged_run(agent, experiment, tiny_sweep, tmp_path):
    """A rate of 1e30 makes the loss after the second step NaN; the run ends, keeps its rows and is called diverged."""
    output = tmp_path / "out"
    result = experiment("--sweep", tiny_sweep(2.0e-4, 1.0e30), "--output", output, *agent)
    assert result.returncode == 0, result.stdout + result.stderr
    good, bad = run_data(output, "0.0002"), run_data(output, "1e+30")

    assert good["state"] == bad["state"] == "finished"
    # Step 1 has rate 0, as warm-up starts there; step 2 takes the adapter to infinity, and its evaluation shows it.
    assert bad["summary"]["diverged_at_step"] == 2 and "diverged_at_step" not in good["summary"]
    assert [row["eval/loss"] for row in bad["history"] if "eval/loss" in row][-1] == "NaN"
    start = [next(row["eval/loss"] for row in run["history"] if "eval/loss" in row) for run in (good, bad)]
    assert start[0] == start[1]
    assert good["summary"]["first_batch_hash"] == bad["summary"]["first_batch_hash"]
    assert len(good["files"]["generations.json"]) == 5
    nll = good["files"]["eval_nll.json"]
    assert nll["steps"][0] == 0 and nll["steps"][-1] == 3 and len(nll["nll"][-1]) == len(nll["tokens"]) == 8
    rates = [row["train/learning_rate"] for row in good["history"] if "train/learning_rate" in row]
    assert max(rates) == 2.0e-4 and len(rates) == 3

    report = (output / "README.md").read_text()
    assert re.search(r"1e\+?30.*diverged", report)
    assert (output / "lr_comparison.png").stat().st_size > 10_000


def readme_commands(flow: str) -> list[str]:
    """The command lines of the README's section on a flow."""
    section = (ROOT / "README.md").read_text().split(f"### {flow}\n")[1].split("\n#")[0]
    block = section.split("```bash\n")[1].split("```")[0]
    return [line.split(" #")[0].strip() for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("flow", ["Local, no account", "Cloud", "Offline, then sync"])
def test_the_flows_of_the_readme(flow, tiny_sweep, server, checkout, tmp_path):
    """Each line as it stands, but for the sweep's file, its id and the output directory; local_wandb is the cloud."""
    sweep, output = None, tmp_path / "out"
    elsewhere = ("local_wandb", "activate", "wandb login")
    commands = [command for command in readme_commands(flow) if not any(word in command for word in elsewhere)]
    assert any("analysis" in command or "experiment.py" in command for command in commands)
    for command in commands:
        command = command.replace("sweep.yaml", str(tiny_sweep(2.0e-4))).replace("ENTITY/PROJECT/SWEEP", sweep or "")
        command += f" --output {output}" if "analysis" in command or "experiment" in command else ""
        environment = server.env | {"WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "flows"}
        command = command.replace("wandb/offline-run-*", f"{tmp_path}/wandb/offline-run-*")
        result = subprocess.run(
            ["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, command + "\n" + result.stdout + result.stderr
        if command.startswith("wandb sweep"):
            sweep = re.search(r"wandb agent (\S+)", result.stdout + result.stderr)[1]
    run = run_data(output, "0.0002")
    assert run["state"] == "finished"
    assert len([row for row in run["history"] if "train/loss" in row]) == 3
    assert len(run["files"]["generations.json"]) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("parameters: {learning_rate: {values: [1e-5]}}", "learning_rate: 1e-5 is a string to YAML; write 1.0e-05"),
        ("parameters: {learning_rate: {value: 1e-5}}", "learning_rate: 1e-5 is a string to YAML; write 1.0e-05"),
        ("parameters: {learning_rate: [1.0e-5]}", "learning_rate: write `values: [...]`"),
        ("parameters: {learning_rate: {values: null}}", "learning_rate: write `values: [...]`"),
        ("- 1", "no parameters"),
        ("a: [", "while parsing a flow node"),
    ],
)
def test_a_bad_sweep_file_is_named(content, message, experiment, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    result = experiment("--sweep", path, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_an_unwritable_output_directory_is_named(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    result = experiment("--output", tmp_path / "file" / "out")
    assert result.returncode == 2
    assert "choose a writable directory" in result.stderr and len(result.stderr.splitlines()) == 1


def test_what_train_refuses_is_shown(experiment, tiny_sweep, tmp_path):
    path = tiny_sweep(2.0e-4)
    path.write_text(path.read_text().replace("learning_rate:", "learnig_rate:"))
    result = experiment("--sweep", path, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert "unknown key 'learnig_rate'; did you mean 'learning_rate'?" in result.stderr
