"""The whole flow with W&B's own client against local_wandb: sweep, agent, train.py, analysis."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import experiment as experiment_module

ROOT = Path(__file__).parent.parent


def run_data(output: Path, rate: str) -> dict:
    (run,) = json.loads((output / f"lr_{rate}" / "run_data.json").read_text())["runs"]
    return run


@pytest.mark.parametrize("agent", [[], ["--one-by-one"]], ids=["gang", "wandb agent"])
def test_one_command_fills_in_the_report_with_a_diverged_run(agent, experiment, checkout, tiny_sweep):
    """A rate of 1e30 makes the loss after the second step NaN; the run ends, keeps its rows and is called diverged."""
    result = experiment("--sweep", tiny_sweep(2.0e-4, 1.0e30), *agent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert re.search(r"^learning_rate=1e\+30: diverged at step 2, step 2 of 3, loss \d", result.stdout, re.MULTILINE), (
        result.stdout
    )
    assert re.search(r"^learning_rate=0.0002: finished, step 3 of 3, loss \d", result.stdout, re.MULTILINE)
    sweep = re.search(r"^sweep: local/learning-rate-exploration/(\w+) ", result.stdout, re.MULTILINE)[1]
    output = checkout / "outputs" / f"starter-model-starter-data-learning_rate-{sweep}"
    assert (checkout / "outputs/latest").resolve() == output
    assert yaml.safe_load((output / "recipe.yaml").read_text())["max_steps"] == 3
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


def test_of_the_tries_of_a_point_the_last_one_counts_and_a_point_that_was_drawn_twice_counts_twice():
    states = ["crashed", "finished", "finished", "failed", "preempted"]
    runs = [{"state": state, "config": {"seed": 0}} for state in states]
    assert experiment_module.last_attempts(runs, {"parameters": {"seed": {}}}) == runs[1:]


def test_a_wrong_file_name_is_one_line_and_imports_nothing_slow(experiment, checkout, tmp_path):
    result = experiment("--sweep", "no.yaml")
    assert result.returncode == 2
    assert "--sweep no.yaml: No such file" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list((checkout).glob("outputs/*"))
    slow = "import sys, experiment; print(sorted({'torch', 'wandb', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", slow], cwd=checkout, text=True) == "[]\n"


def test_an_unwritable_output_directory_is_named(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    result = experiment("--output", tmp_path / "file" / "out")
    assert result.returncode == 2
    assert "choose a writable directory" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("more", [["--guides"], ["--refine", "--one-by-one"]], ids=" ".join)
def test_what_a_run_would_refuse_makes_no_sweep(more, experiment, checkout, tiny_sweep, tmp_path):
    path, recipe = tiny_sweep(2.0e-4, 1.0e-3), tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "max_step: 3\n")
    result = experiment("--sweep", path, *more)
    assert result.returncode == 2
    assert result.stderr == f"experiment: {path}: unknown key 'max_step'; did you mean 'max_steps'?\n"
    assert [path.name for path in checkout.glob("outputs/*")] == ["local_wandb"]


def test_what_train_refuses_is_shown(experiment, tiny_sweep):
    """What is known only when the server has drawn it."""
    path = tiny_sweep(2.0e-4)
    drawn = "max_length: {distribution: q_beta, a: 9000, q: 1}"  # 1, which no check foresees
    text = path.read_text().replace("parameters:", f"run_cap: 1\nparameters:\n  {drawn}")
    path.write_text(text.replace("method: grid", "method: random"))
    result = experiment("--sweep", path)
    assert result.returncode == 2
    assert "no row has an answer within max_length:" in result.stderr
    assert "no run has logged anything: no report" in result.stderr


def test_a_point_that_nobody_ran_is_named():
    sweep = {"method": "grid", "parameters": {"learning_rate": {"values": [1, 2.0, 3]}, "seed": {"value": 0}}}
    done = {"state": "finished", "config": {"learning_rate": 2, "seed": 0, "r": 8}}
    lines = experiment_module.broken([done], 3, sweep)
    assert lines == ["learning_rate=1: no run", "learning_rate=3: no run"]
    sweep["parameters"]["learning_rate"] = {"min": 1, "max": 3}
    assert experiment_module.broken([done], 3, sweep) == ["2 runs of 3 are missing"]
    assert experiment_module.broken([done], 1, sweep) == []


def test_nothing_to_resume_is_named(experiment):
    result = experiment("--resume")
    assert result.returncode == 2 and "--resume: no experiment at outputs/latest" in result.stderr
    assert len(result.stderr.splitlines()) == 1
