"""What the training runs recorded, read from `lr_*/run_data.json`.

Reading repairs what it can (strings for numbers, duplicate steps, missing columns) and says so in `Run.notes`.
"""

import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from analysis.files import InputError, number, save, to_json
from analysis.words import plural

# History columns that the analysis reads, by the names that Hugging Face's W&B callback and train.py write.
COLUMNS = (
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "train/num_tokens",
    "train/epoch",
    "eval/loss",
    "eval/update_ratio",
    "eval/stable_rank",
    "_runtime",
)
STEP = "train/global_step"
EVERY_ROW = ("_runtime", "train/epoch")  # in the rows of evaluations too, so twice at such a step

EXACT = 2**53  # below it floats tell whole numbers apart

OUT_OF_MEMORY = "out of memory"  # the state of a run whose summary says so; to W&B it failed

COMPLETE = 0.95  # share of the planned steps from which a run has an end to report (science: class "incomplete")
TAIL = 0.10  # share of the steps whose mean train loss is "final" ...
NEAR_PASS = 0.10  # share of a pass within which an evaluation stands for its end
TAIL_STEPS = 10  # ... and at least so many steps, since one batch alone is noise


@dataclass(frozen=True)
class Series:
    """One recorded quantity: steps (n,), strictly increasing, and values (n,), non-finite ones kept."""

    step: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    @property
    def finite(self) -> "Series":
        keep = np.isfinite(self.value)
        return Series(self.step[keep], self.value[keep])

    def between(self, first: float, last: float) -> "Series":
        keep = (self.step >= first) & (self.step <= last)
        return Series(self.step[keep], self.value[keep])


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))


@dataclass(frozen=True)
class EvalNLL:
    """Summed negative log-likelihood of each eval example: steps (K,), tokens (N,), nll (K, N), in nats.

    module (N,) numbers the module that each example is from; None where the data name none.
    """

    steps: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray
    module: np.ndarray | None = None

    def at(self, step: int) -> np.ndarray | None:
        """NLL of each example (N,) at this step; None if it was not recorded or is not finite."""
        place = np.flatnonzero(self.steps == step)
        return self.nll[place[-1]] if len(place) and np.isfinite(self.nll[place[-1]]).all() else None


@dataclass(frozen=True)
class Checkpoint:
    """The eval loss of one run at one step, and where recorded the summed NLL of each example (N,), in nats."""

    step: int
    loss: float
    nll: np.ndarray | None


@dataclass(eq=False)
class Run:
    """One training run as recorded; every state, every row, NaN included."""

    id: str
    name: str
    state: str
    sweep: str
    created_at: str
    config: dict
    summary: dict
    history: dict[str, Series]
    eval_nll: EvalNLL | None
    generations: list[dict]
    notes: list[str] = field(default_factory=list)
    planned_steps: int | None = None  # the recipe's max_steps, else (set by `load`) the longest run's last step
    commit: str | None = None  # of the code, where W&B could tell it
    fault_step: int | None = None  # where an instrument fault ended it (set by `before`); rows from there on are gone

    def __getitem__(self, column: str) -> Series:
        """One of COLUMNS, empty where the run has none; KeyError for any other."""
        if column not in COLUMNS:
            raise KeyError(column)
        return self.history.get(column, EMPTY)

    @cached_property
    def learning_rate(self) -> float | None:
        return learning_rate(self.config)

    @cached_property
    def seed(self) -> int | None:
        seed = number(self.config.get("seed"))
        return int(seed) if seed is not None and math.isfinite(seed) else None

    @cached_property
    def last_step(self) -> int:
        return max((int(s.step[-1]) for s in (self["train/loss"], self["eval/loss"]) if len(s)), default=0)

    @property
    def complete(self) -> bool:
        return bool(self.planned_steps) and self.last_step >= COMPLETE * self.planned_steps

    @property
    def warmup_steps(self) -> int:
        """Warm-up in steps; a value below 1 is a share of the planned steps, as in transformers 5."""
        steps = number(self.config.get("warmup_steps")) or 0.0
        if not 0 <= steps < EXACT:
            return 0
        return math.ceil(steps * (self.planned_steps or 0)) if steps < 1 else int(steps)

    @property
    def diverged_at_step(self) -> int | None:
        step = number(self.summary.get("diverged_at_step"))
        return int(step) if step is not None and math.isfinite(step) else None

    @cached_property
    def base_loss(self) -> float | None:
        """l0: eval loss at step 0, before the first update, in nats per token."""
        series = self["eval/loss"]
        return float(series.value[0]) if len(series) and series.step[0] == 0 and np.isfinite(series.value[0]) else None

    @property
    def final_eval_loss(self) -> float | None:
        """E: eval loss at the end, in nats per token; NaN if it was not finite; None if the run has no end."""
        series = self["eval/loss"].between(COMPLETE * self.planned_steps, np.inf) if self.planned_steps else EMPTY
        return float(series.value[-1]) if len(series) else None

    @property
    def final_train_loss(self) -> float | None:
        """Mean of the finite per-step losses over the last 10 % of the steps (at least 10); None if the run has no end.

        Not the Trainer's `train_loss`, which is the mean over the whole run.
        """
        if not self.complete:
            return None
        tail = (
            self["train/loss"].between(self.last_step - max(TAIL_STEPS, TAIL * self.planned_steps) + 1, np.inf).finite
        )
        return float(tail.value.mean()) if len(tail) else None

    @cached_property
    def seconds_per_step(self) -> float | None:
        """Median wall time of an optimiser step in seconds, evaluations left out; else train_runtime over steps."""
        runtime, train = self["_runtime"], self["train/loss"]
        common = np.isin(runtime.step, train.step)
        step, seconds = runtime.step[common], runtime.value[common]
        if len(step) > 2:
            pace = np.diff(seconds) / np.diff(step)
            pace = pace[np.isfinite(pace) & (pace > 0)]
            if len(pace):
                return float(np.median(pace))
        total = number(self.summary.get("train_runtime", self.summary.get("train/train_runtime")))
        return total / self.last_step if total and self.last_step else None

    @cached_property
    def steps_per_pass(self) -> float | None:
        """Optimiser steps in one pass over the training examples (an epoch); None if not recorded."""
        epoch = self["train/epoch"].finite
        return float(epoch.step[-1] / epoch.value[-1]) if len(epoch) and epoch.value[-1] > 0 else None

    @property
    def passes(self) -> float | None:
        """Passes over the training examples by the last step."""
        return self.last_step / self.steps_per_pass if self.steps_per_pass else None

    @property
    def train_examples(self) -> int | None:
        """Rows of the training set; of older records steps per pass times batch size, right to within one batch."""
        known = number(self.config.get("train_examples"))
        keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
        batch = math.prod(number(self.config.get(key)) or 0.0 for key in keys)
        rows = known if known is not None else (self.steps_per_pass or 0.0) * batch
        return round(rows) if 0 < rows < EXACT else None

    @cached_property
    def not_finite_step(self) -> int | None:
        """The first step with a train loss, gradient norm or eval loss that is not finite."""
        columns = [self[name] for name in ("train/loss", "train/grad_norm", "eval/loss")]
        bad = [int(s.step[np.argmin(np.isfinite(s.value))]) for s in columns if not np.isfinite(s.value).all()]
        return min(bad, default=None)

    def before(self, step: int) -> "Run":
        """The run as it was before an instrument fault at `step`: later rows left out, which its notes say."""
        cut = {name: series.between(-1, step - 1) for name, series in self.history.items()}
        nll, note = self.eval_nll, f"rows from step {step} on left out: an instrument fault, see the checks"
        keep = None if nll is None else nll.steps < step
        nll = replace(nll, steps=nll.steps[keep], nll=nll.nll[keep]) if nll is not None and keep.any() else None
        return replace(self, history=cut, eval_nll=nll, notes=[*self.notes, note], fault_step=step)

    def at(self, step: int) -> Checkpoint | None:
        """The evaluation at this step, if there was one and it was finite."""
        series = self["eval/loss"].between(step, step).finite
        if not len(series):
            return None
        return Checkpoint(step, float(series.value[0]), self.eval_nll.at(step) if self.eval_nll else None)

    @property
    def end(self) -> Checkpoint | None:
        """The last evaluation of a run that reached its end; None if there is none or it is not finite."""
        loss = self.final_eval_loss
        return self.at(int(self["eval/loss"].step[-1])) if loss is not None and math.isfinite(loss) else None

    @property
    def best(self) -> Checkpoint | None:
        """The evaluation with the lowest loss after step 0: selected on the eval set, so a little too low."""
        series = self["eval/loss"].finite.between(1, np.inf)
        return self.at(int(series.step[series.value.argmin()])) if len(series) else None

    @property
    def last(self) -> Checkpoint | None:
        """The last finite evaluation of a run, wherever it ended."""
        series = self["eval/loss"].finite
        return self.at(int(series.step[-1])) if len(series) else None

    @property
    def one_pass(self) -> Checkpoint | None:
        """The evaluation nearest to the end of the first pass over the training examples; None if none is near it."""
        end = self.steps_per_pass
        if end is None or self.last_step < COMPLETE * end:
            return None
        series = self["eval/loss"].finite.between((1 - NEAR_PASS) * end, (1 + NEAR_PASS) * end)
        return self.at(int(series.step[np.abs(series.step - end).argmin()])) if len(series) else None


def read_run(record: dict) -> Run:
    """A Run from one record of `run_data.json`; what had to be repaired is listed in its notes."""
    notes: list[str] = []
    config = record.get("config") if isinstance(record.get("config"), dict) else {}
    summary = record.get("summary") if isinstance(record.get("summary"), dict) else {}
    files = record.get("files") if isinstance(record.get("files"), dict) else {}
    run = Run(
        id=str(record.get("id", "?")),
        name=str(record.get("name") or record.get("id", "?")),
        state=OUT_OF_MEMORY if summary.get("out_of_memory") else str(record.get("state", "unknown")),
        sweep=str(record.get("sweep", "")),
        created_at=str(record.get("created_at") or ""),
        config=config,
        summary=summary,
        history=read_history(record.get("history"), notes),
        eval_nll=read_eval_nll(files.get("eval_nll.json"), notes),
        generations=[g for g in as_list(files.get("generations.json")) if isinstance(g, dict)],
        notes=notes,
        commit=record.get("commit"),
    )
    if summary.get("out_of_memory"):
        notes.append(f"{OUT_OF_MEMORY}: {summary['out_of_memory']}")
    if summary.get("no_answers"):
        notes.append(f"no sample answers: {summary['no_answers']}")
    planned = number(config.get("max_steps"))
    run.planned_steps = int(planned) if planned is not None and 1 <= planned < EXACT else None
    if run.learning_rate is None:
        notes.append(f"no usable learning rate in its config ({config.get('learning_rate')!r})")
    notes += [f"no {column} recorded" for column in ("train/loss", "eval/loss") if not len(run[column])]
    return run


def as_list(value: object) -> list:
    return value if isinstance(value, list) else []


def read_history(rows: object, notes: list[str]) -> dict[str, Series]:
    """Columns as Series over train/global_step; of rows that repeat a step (a resumed run) the last one counts."""
    rows = [row for row in as_list(rows) if isinstance(row, dict)]
    if rows and not any(STEP in row for row in rows):
        notes.append(f"no {STEP} recorded: W&B's own _step, the count of log calls, is the x axis")
    step = numbers([row.get(STEP, row.get("_step")) for row in rows])
    history, repeated, unreadable = {}, 0, 0
    for column in COLUMNS:
        cells = [row.get(column) for row in rows]
        present = np.array([cell is not None for cell in cells], bool) & (step >= 0) & (step < EXACT)
        values = numbers([cell for cell, here in zip(cells, present, strict=True) if here])
        readable = ~np.isnan(values)
        for place in np.flatnonzero(~readable):
            readable[place] = is_nan(cells[np.flatnonzero(present)[place]])
        unreadable += int((~readable).sum())
        at, values = step[present][readable].astype(np.int64), values[readable]
        if not len(at):
            continue
        # Of records of one step the last counts, so unique looks from the end.
        unique, from_end = np.unique(at[::-1], return_index=True)
        repeated = max(repeated, len(at) - len(unique)) if column not in EVERY_ROW else repeated
        history[column] = Series(unique, values[::-1][from_end])
    if repeated:
        notes.append(f"{plural(repeated, 'step')} recorded more than once (a resumed run): the last record counts")
    if unreadable:
        notes.append(f"{plural(unreadable, 'value')} of the history not a number: left out")
    return history


def numbers(cells: list) -> np.ndarray:
    """(n,) floats; NaN for what is missing or no number."""
    try:
        return np.array(cells, dtype=float).reshape(len(cells))
    except (TypeError, ValueError, OverflowError):
        return np.array([math.nan if (value := number(cell)) is None else value for cell in cells])


def is_nan(cell: object) -> bool:
    """Whether a cell says NaN, rather than being no number."""
    value = number(cell)
    return value is not None and math.isnan(value)


def read_eval_nll(data: Any, notes: list[str]) -> EvalNLL | None:
    """The per-example losses of `eval_nll.json`; None, with a note, if absent or of an unexpected shape."""
    if data is None:
        return None
    try:
        steps, tokens = np.array(data["steps"], float), np.array(data["tokens"], float)
        nll = np.array([[number(x) for x in row] for row in data["nll"]], dtype=float)
        if nll.shape != (len(steps), len(tokens)) or not len(steps) or not (tokens > 0).any():
            raise ValueError
        names = data.get("module")
        if names is not None and len(names) != len(tokens):
            raise ValueError
        module = None if names is None else np.unique([str(name) for name in names], return_inverse=True)[1]
        return EvalNLL(steps, tokens, nll, module)
    except (TypeError, ValueError, KeyError, AttributeError):
        notes.append("eval_nll.json is not {steps: [K], tokens: [N], nll: [K][N]}: per-example statistics leave it out")
        return None


def learning_rate(config: dict) -> float | None:
    """The learning rate of a config; None unless it is a positive, finite number."""
    rate = number(config.get("learning_rate"))
    return rate if rate is not None and math.isfinite(rate) and rate > 0 else None


def rate_directory(rate: float | None) -> str:
    """The directory of one rate: lr_1e-05, lr_0.0002, ...; lr_unknown for runs without one."""
    return "lr_unknown" if rate is None else f"lr_{rate}"


def merge(directories: list[Path], output: Path) -> None:
    """Write the run data of several output directories into one, each run once.

    Raises InputError naming a directory without run data or a file that is not whole; then nothing has been written.
    """
    merged: dict[str, dict] = {}
    for directory in directories:
        for path in run_data(directory):
            data = read_run_data(path)
            part = merged.setdefault(path.parent.name, {"sweeps": {}, "runs": {}})
            part["sweeps"] |= {sweep["id"]: sweep for sweep in data["sweeps"]}
            part["runs"] |= {(run.get("sweep"), run.get("id")): run for run in data["runs"]}
    for name, part in merged.items():
        whole = {key: list(found.values()) for key, found in part.items()}
        save(output / name / "run_data.json", to_json(whole, lines=4))


def run_data(directory: Path) -> list[Path]:
    """The run data files of an output directory. Raises InputError if it has none."""
    paths = sorted(directory.glob("lr_*/run_data.json"))
    if not paths:
        raise InputError(
            f"{directory} has no lr_*/run_data.json: give a sweep as ENTITY/PROJECT/SWEEP, or an output directory"
        )
    return paths


def read_run_data(path: Path) -> dict:
    """{"sweeps": [...], "runs": [...]} of one file. Raises InputError if it is not whole."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(sweep["id"], str) for sweep in data["sweeps"]) or not all(
            isinstance(run, dict) for run in data["runs"]
        ):
            raise ValueError("no sweeps and runs")
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not whole run data ({what}): pull its sweep again") from None
    return data


def load(directory: Path) -> tuple[list[dict], list[Run]]:
    """The sweeps and runs of an output directory, runs by learning rate, seed and age.

    Raises InputError naming a directory without run data or a file that is not whole.
    """
    sweeps: dict[str, dict] = {}
    runs: list[Run] = []
    for path in run_data(directory):
        data = read_run_data(path)
        sweeps |= {sweep["id"]: sweep for sweep in data["sweeps"]}
        runs += map(read_run, data["runs"])
    longest = max((run.last_step for run in runs), default=0)
    for run in runs:
        if run.planned_steps is None and longest:
            run.planned_steps = longest
            run.notes.append(f"no max_steps in its config: the longest run's last step, {longest}, is taken as planned")
    runs.sort(key=lambda r: (r.learning_rate is None, r.learning_rate, r.seed is None, r.seed, r.created_at, r.id))
    return list(sweeps.values()), runs
