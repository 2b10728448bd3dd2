"""What an experiment shows while its agents work: a line per run on a terminal; in a log what has changed."""

import math
import shutil
import sys
import time

LINE_SECONDS = 15  # how often a log that is no terminal gets a line
LIVE = ("running", "pending", "preempting")
AGAIN = ("crashed", "preempted")  # the machine's fault: the server offers the point again


def varied(sweep: dict) -> list[str]:
    """The parameters of a sweep that its runs may differ in."""
    return [key for key, spec in sweep["parameters"].items() if "value" not in spec]


def label(run: dict, keys: list[str]) -> str:
    """What tells this run from the others, as train.py names it."""
    return " ".join(f"{key}={run['config'][key]}" for key in keys if key in run["config"]) or run["name"]


def phase(run: dict) -> str:
    """A run's state in W&B's words, but for what is told apart while W&B says "running"."""
    if run["diverged"] is not None:
        return f"diverged at step {run['diverged']:.0f}"
    if run["state"] not in LIVE:
        return run["state"]
    if run["step"] is None:
        return "starting"
    return "uploading" if run["step"] == run["steps"] else "training"


def ended(run: dict) -> str:
    """How far a run came and how it ended, once no agent works."""
    state = "lost" if run["state"] in LIVE else phase(run) if run["state"] == "finished" else run["state"]
    loss = f"loss {run['loss']:.3f}" if run["loss"] is not None else ""
    return ", ".join(filter(None, [state, steps(run), loss]))


def steps(run: dict) -> str:
    if run["step"] is None:
        return ""
    return f"step {run['step']:.0f}" + (f" of {run['steps']:.0f}" if run["steps"] else "")


def share(run: dict) -> float:
    """How much of a run is done; one that ended early is done."""
    if run["state"] in LIVE:
        return (run["step"] or 0) / (run["steps"] or math.inf)
    return 0.0 if run["state"] in AGAIN else 1.0


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


class Progress:
    """`total` runs are expected, None if nobody knows; `keys` name the parameters that differ."""

    def __init__(self, total: int | None, keys: list[str]):
        self.total, self.keys = total, keys
        self.terminal = sys.stdout.isatty()
        self.lines = 0  # on the terminal, to be drawn over
        self.printed = 0.0
        self.told: dict[str, str] = {}  # run id -> the end that a log has been told of
        self.since: tuple[float, float] | None = None  # when training began to be seen, and what was done by then

    def show(self, runs: list[dict] | None) -> None:
        """`runs` as pull.states gives them; None if the server does not answer."""
        if self.terminal:
            self.draw([*self.table(runs or []), self.summary(runs)])
            return
        self.tell(runs or [])
        if time.monotonic() - self.printed > LINE_SECONDS:
            self.printed = time.monotonic()
            rows = [" ".join(row.split()) for row in self.table([run for run in runs or [] if run["state"] in LIVE])]
            print(" · ".join([self.summary(runs), *rows]), flush=True)

    def close(self, runs: list[dict]) -> None:
        """How the runs stand when the agents have ended."""
        if self.terminal:
            self.draw(self.table(runs))
        else:
            self.tell(runs)

    def tell(self, runs: list[dict]) -> None:
        """A line for each run that has ended since the last time."""
        for run in runs:
            if run["state"] not in LIVE and self.told.get(run["id"]) != run["state"]:
                self.told[run["id"]] = run["state"]
                print(f"{label(run, self.keys)}: {ended(run)}", flush=True)

    def table(self, runs: list[dict]) -> list[str]:
        """A line for each run: what varies, step, loss, phase."""
        names = [label(run, self.keys) for run in runs]
        width = max(map(len, names), default=0)
        rows = []
        for name, run in zip(names, runs, strict=True):
            loss = f"loss {run['loss']:6.3f}" if run["loss"] is not None else ""
            rows.append(f"{name:{width}}  {steps(run):17}  {loss:11}  {phase(run)}".rstrip())
        return rows

    def summary(self, runs: list[dict] | None) -> str:
        """How many runs are done, and the time that is left or what is being waited for."""
        if runs is None:
            return "the server does not answer just now; the runs go on"
        over = sum(run["state"] not in LIVE + AGAIN for run in runs)
        counted = f"{over} of {self.total or '?'} runs done"
        phases = [phase(run) for run in runs if run["state"] in LIVE]
        if "training" in phases:
            return " · ".join(filter(None, [counted, self.left(runs)]))
        if "starting" in phases or not self.total or over < self.total - len(phases):
            return f"{counted} · starting"
        return f"{counted} · {'uploading the last results' if phases else 'the agents are ending'}"

    def left(self, runs: list[dict]) -> str | None:
        """An estimate from the pace since training was first seen."""
        done = sum(map(share, runs))
        now = time.monotonic()
        if self.since is None:
            self.since = now, done
        gained = done - self.since[1]
        if not self.total or gained < 0.02 * self.total:
            return None
        return f"about {duration(max(0.0, (now - self.since[0]) * (self.total - done) / gained))} left"

    def draw(self, lines: list[str]) -> None:
        """Draw over what was drawn last, cut to the terminal's size so that it can be drawn over again."""
        columns, height = shutil.get_terminal_size()
        lines = [line[: columns - 1] for line in lines[-(height - 1) :]]
        up = f"\033[{self.lines}A\r\033[J" if self.lines else ""
        print(up + "\n".join(lines), flush=True)
        self.lines = len(lines)

    def say(self, line: str) -> None:
        """A line that stays."""
        print(line, flush=True)
        self.lines = 0
