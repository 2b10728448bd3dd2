"""Whatever ends at whatever moment: no row and no file is lost, nothing is left working, one command goes on.

FAULTS=200 GANG_FAULTS=50 python -m pytest tests/test_faults.py -n 4     # more moments than CI takes
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from train import evaluation_steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

# A training that takes no time: any program that logs as train.py does, though it has no checkpoints and begins anew.
TOY = """
import json, pathlib, signal, sys, time, wandb
def interrupted(*_):
    if wandb.run:
        wandb.run.mark_preempting()
    sys.exit(143)
signal.signal(signal.SIGTERM, interrupted)
point = dict(word[2:].split("=") for word in sys.argv[1:] if "=" in word)
with wandb.init(config={"max_steps": 40}) as run:
    for step in range(1, 41):
        run.log({"train/global_step": step, "train/loss": 1 / step})
        time.sleep(float(point["pause"]))
    file = pathlib.Path(run.dir, "generations.json")
    file.write_text(json.dumps([]))
    run.save(str(file), base_path=run.dir, policy="now")
    if float(point["learning_rate"]) > 0.1:
        raise ValueError("this rate is too high")
"""


@pytest.fixture
def toy_sweep(checkout):
    """Writes a sweep of these rates, whose runs take 40 `pause`s; returns its path."""

    def write(*rates: float, pause: float = 0.0) -> Path:
        (checkout / "toy.py").write_text(TOY)
        parameters = {"learning_rate": {"values": list(rates)}, "pause": {"value": pause}}
        sweep = {"program": "toy.py", "method": "grid", "name": "toy", "parameters": parameters}
        path = checkout / "toy.yaml"
        path.write_text(yaml.safe_dump(sweep))
        return path

    return write


def launch(checkout: Path, *arguments: str | Path) -> subprocess.Popen:
    """experiment.py in the checkout, not waited for; what it prints goes to checkout/printed."""
    command = [sys.executable, "experiment.py", *map(str, arguments)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with open(checkout / "printed", "w") as printed:
        return subprocess.Popen(command, cwd=checkout, env=plain, stdout=printed, stderr=printed)


def start(checkout: Path, *arguments: str | Path) -> subprocess.Popen:
    """As launch, once a run has begun to log."""
    process, log = launch(checkout, *arguments), checkout / "outputs/latest/agent-0.log"
    wait(lambda: log.exists() and "Syncing run" in log.read_text())
    return process


def wait(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def processes_in(folder: Path) -> dict[int, str]:
    """What still works in a folder, whoever started it: process id -> command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(process / "cwd")) == folder:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def steps(checkout: Path, rate: float) -> list[int]:
    """The steps of the rows of this rate's last run, as the report's data have them."""
    *_, run = json.loads((checkout / f"outputs/latest/lr_{rate}/run_data.json").read_text())["runs"]
    assert run["state"] == "finished" and run["files"] == {"generations.json": []}
    return [row["train/global_step"] for row in run["history"]]


def test_a_failed_point_is_named_with_its_cause_and_can_be_tried_again(experiment, checkout, toy_sweep):
    sweep, recipe = toy_sweep(0.2, 0.01), checkout / "recipe.yaml"
    (checkout / "wandb").mkdir()
    (checkout / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # as `wandb offline` leaves it
    recipe.write_text("max_steps: 40\n")
    sweep.write_text(sweep.read_text() + "command: [python, toy.py, --config, recipe.yaml, '${args}']\n")
    result = experiment("--sweep", sweep, "--one-by-one")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "learning_rate=0.2: failed, step 40 of 40, loss 0.025" in result.stderr
    assert "learning_rate=0.01: finished, step 40 of 40, loss 0.025" in result.stdout
    cause = "agent 0 went on after a failure: ValueError: this rate is too high (all of it: outputs/toy-"
    assert cause in result.stderr
    again = re.search(r"^to try these again: python (experiment.py .*)$", result.stderr, re.MULTILINE)[1]
    recipe.write_text("max_steps: 41\n")
    result = experiment(*again.split()[1:])
    assert result.returncode == 2 and "recipe.yaml is not what this sweep began with" in result.stderr
    recipe.write_text("max_steps: 40\n")
    (checkout / "toy.py").write_text(TOY.replace("> 0.1", "> 0.3"))
    result = experiment(*again.split()[1:])
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list((checkout / "outputs").glob("toy-*"))) == 1


def test_a_killed_experiment_leaves_no_orphan_and_no_lost_row(checkout, toy_sweep, experiment):
    process = start(checkout, "--sweep", toy_sweep(0.1, pause=0.5), "--one-by-one")
    process.kill()
    process.wait()
    wait(lambda: not processes_in(checkout))  # the agent ends its run, which sends its rows; then the server ends
    (checkout / "toy.py").write_text(TOY.replace("time.sleep(", "("))
    result = experiment("--resume", "--one-by-one")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "learning_rate=0.1: finished, step 40 of 40" in result.stdout


def test_an_interrupted_experiment_says_how_to_go_on(checkout, toy_sweep, experiment):
    process = start(checkout, "--sweep", toy_sweep(0.1, pause=0.5), "--one-by-one")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not processes_in(checkout)
    printed = (checkout / "printed").read_text()
    assert "stopping; the runs send their last rows (Ctrl-C again gives these up)" in printed
    assert re.search(r"To go on: python experiment.py --resume local/[\w/-]+ --one-by-one$", printed)
    assert "Traceback" not in printed


def test_the_report_follows_the_runs_that_have_ended(checkout, toy_sweep):
    sweep = toy_sweep(0.01)
    sweep.write_text(sweep.read_text().replace("value: 0.0", "values: [0.0, 5.0]"))
    process = start(checkout, "--sweep", sweep, "--one-by-one")
    wait(lambda: (checkout / "outputs/latest/report.html").exists())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not processes_in(checkout)
    runs = json.loads((checkout / "outputs/latest/all_results.json").read_text())["runs"]
    assert [run["state"] for run in runs if run["config"]["pause"] == 0] == ["finished"]


def test_who_cannot_wait_for_a_stalled_server_interrupts_twice(checkout, toy_sweep):
    process = start(checkout, "--sweep", toy_sweep(0.1, pause=0.5), "--one-by-one")
    os.kill(int((checkout / "outputs/local_wandb/lock").read_text()), signal.SIGSTOP)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(2)
    assert process.wait(60) == 130
    printed = (checkout / "printed").read_text()
    assert "killed; rows that had not been sent are lost" in printed and "To go on: " in printed
    assert "Traceback" not in printed
    wait(lambda: not processes_in(checkout))


def test_a_server_that_dies_comes_back_and_the_run_loses_nothing(checkout, toy_sweep):
    process = start(checkout, "--sweep", toy_sweep(0.1, pause=0.2), "--one-by-one")
    lock = checkout / "outputs/local_wandb/lock"
    first = int(lock.read_text())
    os.kill(first, signal.SIGKILL)
    assert process.wait(120) == 0, (checkout / "printed").read_text()
    assert "the local server has died; it serves again" in (checkout / "printed").read_text()
    assert steps(checkout, 0.1) == list(range(1, 41))
    assert not processes_in(checkout)


VICTIMS = {  # of which the command line tells
    "the server": r"^\S+python\S* -m local_wandb",
    "the server's keeper": r"^bash -c",
    "the agent": r"-m wandb agent",
    "the training": r"toy\.py",
    "experiment.py": r"experiment\.py",
    "the analysis": r"-m analysis",
}


@pytest.mark.parametrize("seed", range(int(os.environ.get("FAULTS", 4))))
def test_any_process_may_end_at_any_moment(seed, checkout, toy_sweep, experiment):
    draw = random.Random(seed)
    victim, number = draw.choice(list(VICTIMS)), draw.choice([signal.SIGKILL, signal.SIGTERM])
    moment = draw.uniform(0, 25)
    arguments = ["--sweep", toy_sweep(0.1, 0.01, pause=0.1), "--one-by-one"]
    process, begun = launch(checkout, *arguments), time.monotonic()
    while process.poll() is None and time.monotonic() < begun + moment:
        time.sleep(0.05)
    hit = [pid for pid, command in processes_in(checkout).items() if re.search(VICTIMS[victim], command)]
    for pid in hit:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    code = process.wait(300)
    wait(lambda: not processes_in(checkout))
    said = (checkout / "printed").read_text()
    print(f"{victim}, {number.name} after {moment:.1f} s, hit {len(hit)}, exit code {code}")
    assert "Traceback" not in said, said
    if code:
        known = (checkout / "outputs/latest").exists()
        again = experiment(*(["--resume", "--retry-failed", "--one-by-one"] if known else arguments))
        assert again.returncode == 0, f"{said}\n--- again\n{again.stdout}{again.stderr}"
    assert steps(checkout, 0.1) == steps(checkout, 0.01) == list(range(1, 41))
    assert not processes_in(checkout)


GANG_VICTIMS = VICTIMS | {"the gang": r"-m gang"}


@pytest.mark.parametrize("seed", range(int(os.environ.get("GANG_FAULTS", 2))))
def test_a_gang_may_end_at_any_moment(seed, checkout, experiment):
    """As above with real training: what was interrupted goes on from its checkpoints, and no row is lost or doubled."""
    draw = random.Random(seed)
    victim = draw.choice(["the gang", "the gang", "the server", "experiment.py", "the analysis"])
    number, evaluations = draw.choice([signal.SIGKILL, signal.SIGTERM]), sorted(evaluation_steps(20))
    step, delay = draw.choice([None, *evaluations]), draw.uniform(0, 2)
    recipe = yaml.safe_load((ROOT / "recipes/starter.yaml").read_text())
    recipe |= {"max_steps": 20, "per_device_train_batch_size": 2, "dataset_test_split": "test[:8]"}
    (checkout / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    sweep["parameters"]["learning_rate"]["values"] = [1.0e-3, 5.0e-3]
    sweep["command"] = ["recipe.yaml" if word == "recipes/starter.yaml" else word for word in sweep["command"]]
    (checkout / "two.yaml").write_text(yaml.safe_dump(sweep))
    often = (
        (ROOT / "checkpoint.py")
        .read_text()
        .replace("SECONDS = 60.0", "SECONDS = 1.0")
        .replace("SHARE = 0.01", "SHARE = 1")
    )
    (checkout / "checkpoint.py").unlink()  # a link
    (checkout / "checkpoint.py").write_text(often)
    process, log = launch(checkout, "--sweep", "two.yaml"), checkout / "outputs/latest/agent-0.log"

    def hit() -> list[int]:
        found = processes_in(checkout).items()
        return [pid for pid, command in found if re.search(GANG_VICTIMS[victim], command)]

    def due() -> bool:
        if process.poll() is not None or victim == "the analysis":
            return process.poll() is not None or bool(hit())
        reached = f"gang: step {step} of 20" if step is not None else ""
        return log.exists() and reached in log.read_text()

    wait(due, 600)
    time.sleep(delay)
    pids = hit()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    code = process.wait(600)
    wait(lambda: not processes_in(checkout), 300)
    said = (checkout / "printed").read_text()
    print(f"{victim}, {number.name} {delay:.1f} s after step {step}, hit {len(pids)}, exit code {code}")
    assert "Traceback" not in said, said
    if code:
        again = experiment("--resume")
        print("; ".join(sorted(set(re.findall(r"goes on after step \d+", log.read_text())))) or "from the beginning")
        assert again.returncode == 0, f"{said}\n--- again\n{again.stdout}{again.stderr}\n{log.read_text()}"
    for rate in (0.001, 0.005):
        runs = json.loads((checkout / f"outputs/latest/lr_{rate}/run_data.json").read_text())["runs"]
        (run,) = [run for run in runs if run["state"] == "finished"]
        assert sorted(run["files"]) == ["eval_nll.json", "generations.json"]
        rows = [row["train/global_step"] for row in run["history"] if "train/loss" in row]
        assert rows == list(range(1, 21))
        assert [row["train/global_step"] for row in run["history"] if "eval/loss" in row] == evaluations
    assert not processes_in(checkout)
