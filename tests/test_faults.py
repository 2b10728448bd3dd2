"""Whatever ends at whatever moment: no row and no file is lost, nothing is left working, one command goes on.

FAULTS=120 REAL_FAULTS=96 python -m pytest tests/test_faults.py -n 4 -rP     # more moments than CI takes
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
    print("uploads", flush=True)
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


def wait(condition, seconds: float = 300) -> None:
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
    assert process.wait(300) == 130
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
    assert process.wait(300) == 130
    assert not processes_in(checkout)
    runs = json.loads((checkout / "outputs/latest/all_results.json").read_text())["runs"]
    assert [run["state"] for run in runs if run["config"]["pause"] == 0] == ["finished"]


def test_who_cannot_wait_for_a_stalled_server_interrupts_twice(checkout, toy_sweep):
    process = start(checkout, "--sweep", toy_sweep(0.1, pause=0.5), "--one-by-one")
    os.kill(int((checkout / "outputs/local_wandb/lock").read_text()), signal.SIGSTOP)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(2)
    assert process.wait(300) == 130
    printed = (checkout / "printed").read_text()
    assert "killed; rows that had not been sent are lost" in printed and "To go on: " in printed
    assert "Traceback" not in printed
    wait(lambda: not processes_in(checkout))


@pytest.mark.parametrize(
    "command", [["train.py", "--config", "recipes/starter.yaml"], ["-m", "gang", "a/b/c"], ["-m", "analysis", "x"]]
)
def test_ctrl_c_in_the_slow_imports_is_silent(command):
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait(lambda: "numpy" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


def test_a_server_that_dies_comes_back_and_the_run_loses_nothing(checkout, toy_sweep):
    process = start(checkout, "--sweep", toy_sweep(0.1, pause=0.2), "--one-by-one")
    lock = checkout / "outputs/local_wandb/lock"
    first = int(lock.read_text())
    os.kill(first, signal.SIGKILL)
    assert process.wait(300) == 0, (checkout / "printed").read_text()
    assert "the local server has died; it serves again" in (checkout / "printed").read_text()
    assert steps(checkout, 0.1) == list(range(1, 41))
    assert not processes_in(checkout)


VICTIMS = {  # of which the command line tells
    "the server": r"^\S+python\S* -m local_wandb",
    "its keeper": r"^bash -c",
    "experiment.py": r"experiment\.py",
    "the agent": r"-m wandb agent",
    "the gang": r"-m gang",
    "the training": r"toy\.py|^python train\.py",
    "the analysis": r"-m analysis",
}


def moments(*works: str) -> list[tuple[str, str]]:
    """What can be killed, and when: the server and experiment.py always, `works` while they live."""
    always = ("the server", "its keeper", "experiment.py")
    alive = {"start-up": works[:1], "training": works, "upload": works, "analysis": ("the analysis",)}
    return [(victim, phase) for phase, more in alive.items() for victim in (*more, *always)]


def working(checkout: Path, victim: str) -> list[int]:
    found = processes_in(checkout).items()
    return [pid for pid, command in found if re.search(VICTIMS[victim], command)]


def end(checkout: Path, process: subprocess.Popen, victim: str, phase: str, begun: str, draw: random.Random) -> None:
    """Send a signal to a process a while after a phase has begun, which words in the agent's log tell."""
    log, delay = checkout / "outputs/latest/agent-0.log", draw.uniform(0, 15 if phase == "start-up" else 2)

    def due() -> bool:
        if process.poll() is not None or phase == "start-up":
            return True
        if phase == "analysis":
            return bool(working(checkout, "the analysis"))
        return log.exists() and re.search(begun, log.read_text()) is not None

    wait(due, 600)
    time.sleep(delay)
    number, hit = draw.choice([signal.SIGKILL, signal.SIGTERM]), working(checkout, victim)
    for pid in hit:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    print(f"{victim}, {phase}, {number.name} after {delay:.1f} s, hit {len(hit)}")


def goes_on(checkout: Path, process: subprocess.Popen, experiment, resume: list[str], anew: list[str | Path]) -> None:
    """What experiment.py has left is complete, or one command makes it so: to resume, or the first one."""
    code = process.wait(600)
    wait(lambda: not processes_in(checkout), 300)
    said, log = (checkout / "printed").read_text(), checkout / "outputs/latest/agent-0.log"
    assert "Traceback" not in said, said
    if code:
        known = (checkout / "outputs/latest").exists()
        again = experiment(*(resume if known else anew))
        found = sorted(set(re.findall(r"goes on after step \d+", log.read_text())))
        print(f"exit code {code}; then {'; '.join(found) or 'from the beginning'}")
        assert again.returncode == 0, f"{said}\n--- again\n{again.stdout}{again.stderr}\n{log.read_text()}"
    assert not processes_in(checkout)


@pytest.mark.parametrize("seed", range(int(os.environ.get("FAULTS", 4))))
def test_any_process_may_end_at_any_moment(seed, checkout, toy_sweep, experiment):
    draw = random.Random(seed)
    victim, phase = draw.choice(moments("the agent", "the training"))
    arguments = ["--sweep", toy_sweep(0.1, 0.01, pause=0.05), "--one-by-one"]
    process = launch(checkout, *arguments)
    end(checkout, process, victim, phase, "uploads" if phase == "upload" else "Syncing run", draw)
    goes_on(checkout, process, experiment, ["--resume", "--retry-failed", "--one-by-one"], arguments)
    assert steps(checkout, 0.1) == steps(checkout, 0.01) == list(range(1, 41))


@pytest.mark.parametrize("seed", range(int(os.environ.get("REAL_FAULTS", 2))))
def test_real_training_may_end_at_any_moment(seed, checkout, experiment):
    """As above, of gangs and of train.py in turn: it goes on from checkpoints, and no row is lost or doubled."""
    alone = ["--one-by-one"] if seed % 3 == 2 else []
    draw = random.Random(seed)
    victim, phase = draw.choice(moments("the agent", "the training") if alone else moments("the gang"))
    step = 10 if phase == "upload" else draw.randrange(10)
    recipe = yaml.safe_load((ROOT / "recipes/starter.yaml").read_text())
    recipe |= {"max_steps": 10, "per_device_train_batch_size": 2}
    recipe |= {"dataset_train_split": "train[:64]", "dataset_test_split": "test[:8]"}
    (checkout / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    sweep["parameters"]["learning_rate"]["values"] = [1.0e-3, 5.0e-3]
    sweep["command"] = ["recipe.yaml" if word == "recipes/starter.yaml" else word for word in sweep["command"]]
    (checkout / "two.yaml").write_text(yaml.safe_dump(sweep))
    often = (ROOT / "checkpoint.py").read_text().replace("SECONDS = 60.0", "SECONDS = 0.5")
    (checkout / "checkpoint.py").unlink()  # a link
    (checkout / "checkpoint.py").write_text(often.replace("SHARE = 0.01", "SHARE = 1"))
    process = launch(checkout, "--sweep", "two.yaml", *alone)
    end(checkout, process, victim, phase, rf"step {step} of 10|\b{step}/10 ", draw)
    goes_on(checkout, process, experiment, ["--resume", *alone], ["--sweep", "two.yaml", *alone])
    for rate in (0.001, 0.005):
        runs = json.loads((checkout / f"outputs/latest/lr_{rate}/run_data.json").read_text())["runs"]
        (run,) = [run for run in runs if run["state"] == "finished"]
        assert sorted(run["files"]) == ["eval_nll.json", "generations.json"]
        rows = [row["train/global_step"] for row in run["history"] if "train/loss" in row]
        assert rows == list(range(1, 11))
        evaluated = [row["train/global_step"] for row in run["history"] if "eval/loss" in row]
        assert evaluated == sorted(evaluation_steps(10))
