"""An interrupted run goes on: equal to one that nobody interrupted, in the same W&B run, without a gap or a double."""

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from transformers.integrations import WandbCallback

import checkpoint
import train
from data import load_split
from inputs import InputError
from settings import parse
from tests.test_faults import processes_in, wait

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL = ["--config", "recipes/starter.yaml", "--max_steps", "6", "--per_device_train_batch_size", "2"]


class Config(dict):
    """run.config, as far as train.py uses it."""

    def update(self, values, allow_val_change=None):
        super().update(values)


class InterruptAfter(train.TrainerCallback):
    """The signal arrives within the step after this one."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def rows(state) -> list[dict]:
    """What was logged, without times."""
    log = state.log_history
    return [{key: x for key, x in row.items() if "runtime" not in key and "per_second" not in key} for row in log]


def trained(folder: Path, *flags: str, callbacks=(), resume=False) -> train.Trainer:
    """A trainer of nine rows that has come to its end, or to an interruption."""
    settings = [*SMALL, "--report_to", "none", "--output_dir", str(folder), *flags]
    data, training, base = parse(settings)
    identity = checkpoint.identity(data, training, base)
    found = checkpoint.find(training, identity, "own", None) if resume else None
    assert bool(found) == resume
    trainer = train.Trainer(base, training, *(load_split(data, split) for split in ("train[:9]", "test[:8]")))
    training.output_dir = str(folder / "own")
    run = SimpleNamespace(id="own", sweep_id="sweep", starting_step=0, config=Config(), summary={"diverged_at_step": 5})
    train.watch_run(trainer, run, {"data_fingerprint": "same"}, identity, found)
    for callback in callbacks:
        trainer.add_callback(callback)
    with checkpoint.interruption.waits(lambda: trainer.state.global_step == trainer.state.max_steps):
        trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
    assert not resume or "diverged_at_step" not in run.summary
    return trainer


@pytest.fixture
def signals():
    """This process takes signals as train.py and a gang do."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    checkpoint.interruption.install()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def in_project(monkeypatch, signals):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


BFLOAT16 = ["--adapter_dtype", "bfloat16", "--gradient_accumulation_steps", "2"]
COSINE = ["--lr_scheduler_type", "cosine", "--freeze_a", "true", "--lora_dropout", "0.1"]


@pytest.mark.parametrize("flags", [[], BFLOAT16, COSINE], ids=["plain", "bfloat16", "cosine, frozen A, dropout"])
def test_a_resumed_run_equals_the_uninterrupted_one(flags, tmp_path, in_project):
    """Every column of every row, and the NLL of every example."""
    whole = trained(tmp_path / "whole", *flags)
    assert not list((tmp_path / "whole").glob("own/*"))  # no checkpoint before its time
    with pytest.raises(SystemExit) as exit:
        trained(tmp_path / "parts", *flags, callbacks=[InterruptAfter(2)])
    assert exit.value.code == 143
    assert [path.name for path in (tmp_path / "parts/own").iterdir()] == ["checkpoint-3"]
    parts = trained(tmp_path / "parts", *flags, resume=True)
    assert [sorted(row) for row in rows(parts.state)] == [sorted(row) for row in rows(whole.state)]
    for mine, row in zip(rows(parts.state), rows(whole.state), strict=True):
        assert mine == pytest.approx(row, rel=1e-6), row["step"]
    assert parts.example_losses == whole.example_losses and parts.first_batch_hash == whole.first_batch_hash


def test_who_is_interrupted_in_the_last_step_comes_to_its_end(tmp_path, in_project):
    """And no run goes on after that step from what its recipe has saved there."""
    flags = ["--save_strategy", "steps", "--save_steps", "3"]
    assert rows(trained(tmp_path / "none", callbacks=[InterruptAfter(5)]).state)[-1]["step"] == 6
    assert not list((tmp_path / "none").glob("own/*"))
    trained(tmp_path, *flags, callbacks=[InterruptAfter(5)])
    last = tmp_path / "own" / "checkpoint-6"
    assert last.is_dir() and trained(tmp_path, *flags, resume=True).state.log_history[-1]["step"] == 6
    with pytest.raises(InputError, match="no step is left after it"):
        checkpoint.find(parse([*SMALL, "--resume_from_checkpoint", str(last)])[1], {}, None, None)


def test_a_checkpoint_is_whole_or_none_and_of_the_same_settings(tmp_path, in_project, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    trained(tmp_path)
    (kept,) = (tmp_path / "own").iterdir()  # each deletes the one before it; there is none at the end, which is near
    assert kept.name == "checkpoint-5"

    def found(*flags: str, run_id: str = "own", sweep: str | None = None):
        data, training, base = parse([*SMALL, "--report_to", "none", "--output_dir", str(tmp_path), *flags])
        return checkpoint.find(training, checkpoint.identity(data, training, base), run_id, sweep)

    assert found().step == 5
    assert found(run_id="other") is None is found(run_id="other", sweep="another")
    assert found(run_id="other", sweep="sweep").step == 5
    assert checkpoint.find(SimpleNamespace(world_size=2), {}, None, None) is None
    assert found("--learning_rate", "1e-3") is None and "other settings: the run begins anew" in capsys.readouterr().out
    assert found("--resume_from_checkpoint", str(kept), run_id="other").step == 5
    (kept / checkpoint.ABOUT).rename(kept / "run.json.unfinished")
    assert found() is None
    with pytest.raises(InputError, match=r"no run\.json there; give a checkpoint-STEP"):
        found("--resume_from_checkpoint", str(kept))


def test_a_checkpoint_goes_to_the_first_run_that_goes_on_with_it(tmp_path):
    lost = tmp_path / "lost" / "checkpoint-5"
    lost.mkdir(parents=True)
    (tmp_path / "new").mkdir()
    one, other = checkpoint.Checkpoint(lost, {}), checkpoint.Checkpoint(lost, {})
    for _ in range(2):  # it may lie there already
        assert one.move(tmp_path / "new") and one.folder == tmp_path / "new" / "checkpoint-5"
    assert one.folder.is_dir() and not lost.parent.exists()
    assert not other.move(tmp_path / "other")


def test_a_signal_waits_while_a_run_trains_and_a_second_one_does_not():
    interruption = checkpoint.Interruption()
    with pytest.raises(SystemExit, match="130"):
        interruption.arrive(signal.SIGINT, None)
    with pytest.raises(SystemExit, match="143"), interruption.waits():
        interruption.arrive(signal.SIGTERM, None)
        with pytest.raises(SystemExit, match="130"):
            interruption.arrive(signal.SIGINT, None)
    with interruption.waits():
        pass  # what was asked for has been done
    with pytest.raises(SystemExit, match="143"):
        interruption.arrive(signal.SIGTERM, None)


@pytest.mark.parametrize(("error", "times"), [(SystemExit, 1), (KeyboardInterrupt, 1), (ValueError, 0)])
def test_wandb_is_told_of_an_interruption_alone(error, times):
    told = []
    with pytest.raises(error), checkpoint.preempting(SimpleNamespace(mark_preempting=lambda: told.append(1))):
        raise error
    assert len(told) == times


def test_checkpoints_keep_their_pace(monkeypatch):
    """At least a minute apart, and never more than a hundredth of the time."""
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    pace = checkpoint.Pace()
    clock[0] = 60
    assert not pace.due
    clock[0] += 1
    assert pace.due
    clock[0] += 3
    pace.save(clock[0] - 3)
    clock[0] += 300
    assert not pace.due
    clock[0] += 1
    assert pace.due


def test_a_resumed_run_gets_the_rows_that_it_lacks():
    sent = []
    rows = checkpoint.Rows(SimpleNamespace(starting_step=2, log=sent.append))
    for number in range(4):
        rows.log({"row": number})
    assert sent == [{"row": 2}, {"row": 3}]


class Callback(train.TrainerCallback):
    """That of a trainer, where it should not be asked; or W&B's, which keeps what it is asked to log."""

    def on_log(self, args, state, control, logs, **_):
        self.told.append((state.global_step, logs))


class Wandb(Callback, WandbCallback):
    def __init__(self):
        self.told = []


def keeper(fingerprint: str = "same", **settings) -> checkpoint.Keeper:
    """Of a run whose trainer has two callbacks, resumed from its second step."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(**settings), model=None, callback_handler=SimpleNamespace(callbacks=[Callback(), Wandb()])
    )
    about = {"data_fingerprint": "same", "example_losses": {}, "first_batch_hash": "", "train_seconds": 1.0}
    resumed = checkpoint.Checkpoint(Path("checkpoint-2"), about)
    watch = SimpleNamespace(run=SimpleNamespace(summary={}), tokens=7.0)
    return checkpoint.Keeper(trainer, watch, {"data_fingerprint": fingerprint}, resumed)


def test_wandb_is_told_again_what_was_logged_before_the_checkpoint():
    subject = keeper()
    state = SimpleNamespace(log_history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
    subject.on_train_begin(subject.trainer.args, state, None)
    assert subject.trainer.callback_handler.callbacks[1].told == [(1, {"loss": 2.0}), (2, {"loss": 1.5})]
    for other in ("other", "zero"):
        with pytest.raises(InputError, match="the data are not what checkpoint-2 was trained on"):
            keeper(other).on_train_begin(SimpleNamespace(), state, None)


def test_several_processes_end_at_once(monkeypatch):
    args, control = SimpleNamespace(world_size=2), SimpleNamespace()
    keeper().on_step_end(args, None, control)
    monkeypatch.setattr(checkpoint.interruption, "code", 143)
    with pytest.raises(SystemExit, match="143"):
        keeper().on_step_end(args, None, control)
    assert control == SimpleNamespace()


@pytest.mark.parametrize(("strategy", "left"), [("no", []), ("epoch", [True]), ("steps", [True])])
def test_checkpoints_that_the_recipe_asks_for_stay(strategy, left, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    keeper(save_strategy=strategy, output_dir=str(tmp_path)).remove()
    assert [path.is_dir() for path in tmp_path.iterdir()] == left


@pytest.fixture
def agent(server, checkout, tmp_path):
    """Starts W&B's own agent on a sweep of one run of 24 steps, in a checkout; returns its process and the sweep."""

    def start(project: str, *flags: str) -> tuple[subprocess.Popen, str]:
        recipe = yaml.safe_load((ROOT / "recipes/starter.yaml").read_text())
        recipe |= {"max_steps": 24, "per_device_train_batch_size": 2, "dataset_test_split": "test[:8]"}
        (checkout / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = ["${env}", "python", "train.py", "--config", "recipe.yaml", *flags, "${args}"]
        sweep = {"program": "train.py", "method": "grid", "command": command}
        sweep["parameters"] = {"learning_rate": {"values": [1.0e-3]}}
        (checkout / "one.yaml").write_text(yaml.safe_dump(sweep))
        environment = server.env | {"WANDB_PROJECT": project, "WANDB_DIR": str(tmp_path)}
        printed = server.run("wandb", "sweep", "one.yaml", cwd=checkout, env=environment).stderr
        path = printed.rpartition("wandb agent ")[2].split()[0]
        with open(checkout / "agent.log", "w") as log:
            command = ["wandb", "agent", path]
            return subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log), path

    return start


def fresh(path: str) -> wandb.apis.public.Sweep:
    return wandb.Api().sweep(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_killed_goes_on_from_its_checkpoint(number, agent, api, checkout):
    """The same W&B run after a preemption; after a kill, of which nobody can tell W&B, a new one with all rows."""
    often = ["--save_strategy", "steps", "--save_steps", "1"] if number == signal.SIGKILL else []
    process, path = agent(f"killed-{number}", *often)
    saved = checkout / "outputs/adapters"
    wait(lambda: [run for run in fresh(path).runs if run.summary.get("train/global_step", 0) > 4])
    (first,) = fresh(path).runs
    (training,) = [pid for pid, command in processes_in(checkout).items() if command.startswith("python train.py")]
    os.kill(training, number)
    assert process.wait(300) == 0, (checkout / "agent.log").read_text()
    assert "goes on after step" in (checkout / "agent.log").read_text()
    runs = {run.id: run for run in fresh(path).runs}
    if number == signal.SIGTERM:
        assert list(runs) == [first.id]
        assert not list(saved.glob("*/checkpoint-*"))
    else:
        assert [runs.pop(first.id).state] == ["crashed"]
    (run,) = runs.values()
    logged = [(row["train/global_step"], "train/loss" in row) for row in run.scan_history()]
    evaluations = [(step, False) for step in train.evaluation_steps(24)]
    assert run.state == "finished" and logged.pop() == (24, False)  # the last row has the epoch alone
    assert sorted(logged) == sorted([(step, True) for step in range(1, 25)] + evaluations)
    assert run.summary["train/global_step"] == 24 and run.summary["train_seconds"] > 0
    assert 0.01 < run.summary["peak_memory_gib"] < 64
