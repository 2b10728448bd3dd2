"""Where an interrupted run goes on: Hugging Face's checkpoints, with the measurements of train.py beside them.

A checkpoint is a folder checkpoint-STEP in the run's own folder, as `transformers.Trainer` writes it. It is whole once
it holds ABOUT, which is written last; then the one before is deleted. A run that ends well deletes its last one.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback, TrainerState
from transformers.integrations import WandbCallback

from inputs import InputError

SECONDS = 60.0  # of training that a killed run may lose
SHARE = 0.01  # of the time that checkpoints may take; where one takes longer, they are further apart
ABOUT = "run.json"
PLACES = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint")  # settings that change no number


class Interruption:
    """SIGINT and SIGTERM, which wait for a checkpoint while a run trains. A second one does not wait."""

    def __init__(self):
        self.code: int | None = None  # the exit code that was asked for
        self.training = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.arrive)

    def arrive(self, number: int, _) -> None:
        if not self.training or self.code is not None:
            sys.exit(128 + number)
        self.code = 128 + number

    @contextmanager
    def waits(self, over: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Within, whoever trains asks for `code` after each step; once that is `over` what is left takes moments."""
        self.training = True
        try:
            yield
        finally:
            self.training = False
            code, self.code = self.code, None
        if code is not None and not over():
            sys.exit(code)


interruption = Interruption()


@contextmanager
def preempting(run) -> Iterator[None]:
    """Tell W&B of a run that is interrupted: its sweep offers it again, to be resumed."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        run.mark_preempting()
        raise


def identity(data, training, base) -> dict:
    """All settings that could change a number, as JSON has them: only a run that has the same may go on."""
    settings = vars(data) | training.to_dict() | vars(base)
    return json.loads(json.dumps({key: settings[key] for key in settings if key not in PLACES}, default=str))


class Pace:
    """When the next checkpoint is due."""

    def __init__(self):
        self.saved, self.cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        return time.monotonic() - self.saved > max(SECONDS, self.cost / SHARE)

    def save(self, begun: float) -> None:
        self.saved = time.monotonic()
        self.cost = self.saved - begun


@dataclass
class Checkpoint:
    """One that is whole, and what its ABOUT says."""

    folder: Path
    about: dict

    @property
    def step(self) -> int:
        return int(self.folder.name.rpartition("-")[2])

    def move(self, run_folder: str | Path) -> bool:
        """Into the folder of the run that goes on with it; False if another has taken it."""
        old, new = self.folder, Path(run_folder, self.folder.name)
        if new != old:
            new.parent.mkdir(exist_ok=True)
            try:
                os.rename(old, new)
            except FileNotFoundError:
                return False
            with suppress(OSError):  # the lost run has left more there
                old.parent.rmdir()
            self.folder = new
        return True

    @property
    def at_the_end(self) -> bool:
        """Whether no step is left; from there Hugging Face's trainer would take one too many."""
        return self.step >= self.state().max_steps

    def state(self) -> TrainerState:
        return TrainerState.load_from_json(str(self.folder / "trainer_state.json"))


def read(folder: Path) -> Checkpoint:
    return Checkpoint(folder, json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def find(training, settings: dict, run_id: str | None, sweep: str | None) -> Checkpoint | None:
    """What a run can go on with: its own last checkpoint, or that of a lost run of the sweep with the same settings.

    A run that was killed cannot say that it would go on: its sweep gives the same configuration to a new run.
    """
    if training.world_size > 1:
        return None
    if training.resume_from_checkpoint:
        folder = Path(training.resume_from_checkpoint)
        if not (folder / ABOUT).is_file():
            raise InputError(f"resume_from_checkpoint {folder}: no {ABOUT} there; give a checkpoint-STEP of train.py")
        if read(folder).at_the_end:
            raise InputError(f"resume_from_checkpoint {folder}: no step is left after it; give an earlier one")
        return read(folder)
    found = []
    for path in Path(training.output_dir).glob(f"*/checkpoint-*/{ABOUT}"):
        with suppress(FileNotFoundError):  # its run, if it lives, has written the next one
            one = read(path.parent)
            own, akin = one.about["run"] == run_id, sweep is not None and one.about["sweep"] == sweep
            if one.at_the_end:
                continue
            if (own or akin) and one.about["settings"] == settings:
                found.append((own, one.step, str(one.folder), one))
            elif own:
                print(f"{one.folder} has other settings: the run begins anew", flush=True)
    return max(found, default=(None,))[-1]


class Rows:
    """The history of a run, row by row from its first; those that the run has already, resumed, are not sent again."""

    def __init__(self, run):
        self.run, self.count, self.there = run, 0, run.starting_step

    def log(self, row: dict) -> None:
        self.count += 1
        if self.count > self.there:
            self.run.log(row)


class Keeper(TrainerCallback):
    """Saves a run of `train.Trainer` from time to time, and when the process is asked to end; and restores it."""

    def __init__(self, trainer, watch, about: dict, resumed: Checkpoint | None = None):
        self.trainer, self.watch, self.about, self.resumed = trainer, watch, about, resumed
        self.pace, self.begun = Pace(), 0.0

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def on_train_begin(self, args, state, control, **_):
        if self.resumed is None:
            return
        args.eval_on_start = False  # it was
        about, trainer, watch = self.resumed.about, self.trainer, self.watch
        if about["data_fingerprint"] != self.about["data_fingerprint"]:
            raise InputError(f"the data are not what {self.resumed.folder} was trained on; delete it to begin anew")
        trainer.example_losses, trainer.first_batch_hash = about["example_losses"], about["first_batch_hash"]
        watch.seconds = about["train_seconds"]
        for key in ("diverged_at_step", "out_of_memory"):  # of an attempt after this step
            if watch.run.summary.get(key) is not None:
                del watch.run.summary[key]
        # Its rows once more, for those that keep them: what a killed run had not sent yet comes before what follows.
        for row in state.log_history:
            past = TrainerState(global_step=row["step"])
            logs = {key: value for key, value in row.items() if key != "step"}
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, WandbCallback) or callback is watch:
                    callback.on_log(args, past, control, model=trainer.model, logs=logs)
        trainer._total_train_tokens = int(watch.tokens)
        print(f"goes on after step {self.resumed.step}, from {self.resumed.folder}", flush=True)

    def on_step_end(self, args, state, control, **_):
        if args.world_size > 1:  # several processes would have to agree when
            if interruption.code is not None:
                sys.exit(interruption.code)
        elif state.global_step < state.max_steps and (interruption.code is not None or self.pace.due):
            control.should_save = True

    def on_log(self, args, state, control, **_):
        self.begun = time.monotonic()  # of saving, which follows

    on_evaluate = on_log

    def on_save(self, args, state, control, **_):
        if self.watch.diverged_at_step is None:
            self.complete(state.global_step)
            self.pace.save(self.begun)
            if interruption.code is not None and state.global_step < state.max_steps:
                sys.exit(interruption.code)

    def complete(self, step: int) -> None:
        """Write what makes the checkpoint of this step whole, and delete those before."""
        trainer = self.trainer
        about = self.about | {
            "train_seconds": self.watch.seconds,
            "first_batch_hash": trainer.first_batch_hash,
            "example_losses": trainer.example_losses,
        }
        folder = self.folder / f"checkpoint-{step}"
        unfinished = folder / f"{ABOUT}.unfinished"
        unfinished.write_text(json.dumps(about), encoding="utf-8")
        os.replace(unfinished, folder / ABOUT)
        self.remove(but=folder)

    def remove(self, but: Path | None = None) -> None:
        """Delete the run's checkpoints, unless the recipe asks for them."""
        if self.trainer.args.save_strategy == "no":
            for folder in self.folder.glob("checkpoint-*"):
                if folder != but:
                    shutil.rmtree(folder)
