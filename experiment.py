"""The whole experiment in one command: sweep, agents, report.

    python experiment.py [--sweep sweep.yaml]
    python experiment.py --refine [--budget N] [--sweep sweep.yaml]
    python experiment.py --guides [--sweep sweep.yaml]
    python experiment.py --resume [SWEEP] [--retry-failed]

Creates the sweep from sweep.yaml, runs one agent per visible GPU (one on a CPU) until the grid is done and writes the
report to outputs/NAME-ID, which outputs/latest points to. The agent is the gang, which trains several configurations at
once, or with --one-by-one W&B's own. With --refine a search for the best rate follows, each round of it a sweep, until
it is found or N runs (as many as the grid's) are spent. With --guides the sweep is of what guides recommend,
recipes/guides.yaml, on the same recipe and seeds; the last experiment, if of that recipe, joins its report. Without
--server cloud everything stays on this machine, in outputs/local_wandb.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from agents import GANG, TIED, Early, agents, causes, devices, refusals
from analysis import folder
from analysis.files import InputError, save
from analysis.folder import LATEST, OUTPUTS
from local_server import Server
from progress import AGAIN, LIVE, Progress, ended, label, varied
from sweep import (
    WANDB,
    calls,
    check_refinable,
    create,
    of_guides,
    read,
    read_yaml,
    recipe_of,
    runs_of,
    wandb_sweep,
)

LOCAL_DATA = OUTPUTS / "local_wandb"
ABOUT = "experiment.json"  # what --resume needs to know of an experiment, in its output folder
POLL_SECONDS = {"local": 3, "cloud": 15}  # how often the runs' state is read; W&B's cloud limits requests
READ = re.compile(r"^(train \(.*?)\nthe first row;", re.MULTILINE | re.DOTALL)  # what a run says of its data


def last_of_recipe(recipe: Path | None, server: str) -> list[str]:
    """The sweeps of the last experiment, if it was of this recipe and on this server; else none."""
    try:
        about = json.loads((LATEST / ABOUT).read_text())
        same = recipe is not None and (LATEST / folder.RECIPE).read_bytes() == recipe.read_bytes()
    except (OSError, ValueError):
        return []
    if not same or about["server"] != server:
        return []
    return [about["sweep"], *about.get("rounds", []), *about.get("beside", [])]


def last_attempts(runs: list[dict], sweep: dict) -> list[dict]:
    """The runs without those that were lost and whose point was offered again; a random sweep may draw one twice."""
    points = [[run["config"].get(name) for name in sweep["parameters"]] for run in runs]
    return [run for i, run in enumerate(runs, 1) if run["state"] not in AGAIN or points[i - 1] not in points[i:]]


class Report:
    """`python -m analysis`: again as runs end, so that their behaviour shows while others train, and a last time."""

    def __init__(self, sweeps: list[str], output: Path, total: int | None):
        self.command = [*TIED, sys.executable, "-m", "analysis", *sweeps, "--output", str(output)]
        self.output, self.total, self.over = output, total, 0
        self.process: subprocess.Popen | None = None

    def follow(self, runs: list[dict]) -> None:
        """Start it beside the agents, at the lowest priority, if more runs are over than when it last began."""
        over = sum(run["state"] not in LIVE for run in runs)
        if self.over < over != self.total and (self.process is None or self.process.poll() is not None):
            self.over = over
            quiet = subprocess.DEVNULL  # what it says of runs that go on; the last one is heard
            self.process = subprocess.Popen(["nice", "-n", "19", *self.command], stdout=quiet, stderr=quiet)

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()

    def finish(self) -> int:
        """The report of all runs; returns the exit code. An earlier one, which could wait long for a turn, ends."""
        self.stop()
        return subprocess.run(self.command).returncode


def watch(states, progress: Progress, processes: list, server: Server | None, poll_seconds: float, report: Report):
    """Show the runs until the agents have ended. Nothing that the server does or fails to do ends an agent."""
    asked, read = 0.0, None
    while any(process.poll() is None for process in processes):
        time.sleep(0.5)
        if time.monotonic() - asked < poll_seconds:
            continue
        asked = time.monotonic()
        if read is None and (read := READ.search((report.output / "agent-0.log").read_text(errors="replace"))):
            progress.say(read[1])
        if server and not server.serves():
            progress.say(f"the local server has died; {server.revive()}")
        progress.show(runs := states())
        report.follow(runs or [])


def broken(runs: list[dict], total: int | None, sweep: dict) -> list[str]:
    """One line for each point of the sweep that has no finished run."""
    keys = varied(sweep)
    lines = [f"{label(run, keys)}: {ended(run)}" for run in runs if run["state"] != "finished"]
    axes = [spec.get("values", [spec["value"]] if "value" in spec else []) for spec in sweep["parameters"].values()]
    tried = [[run["config"].get(name) for name in sweep["parameters"]] for run in runs]
    if sweep.get("method") == "grid" and total == math.prod(map(len, axes)):
        missing = [point for point in itertools.product(*axes) if list(point) not in tried]
        points = (dict(zip(sweep["parameters"], point, strict=True)) for point in missing)
        return lines + [f"{label({'name': '', 'config': point}, keys)}: no run" for point in points]
    return lines + ([f"{total - len(runs)} runs of {total} are missing"] if total and total > len(runs) else [])


class Experiment:
    """A sweep, new or resumed, and its output folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.sweep, self.output = options, None, options.output
        self.config = None if options.resume else read(options.sweep)
        self.report: Report | None = None
        self.beside: list[str] = []  # sweeps that join the report
        self.rounds: list[str] = []  # sweeps of the search for the best rate
        self.refine, self.budget = options.refine, options.budget
        if options.refine and self.config:
            check_refinable(str(options.sweep), self.config)
        if options.guides:
            self.config = of_guides(self.config)
            self.beside = last_of_recipe(recipe_of(self.config), options.server)
        if options.resume:
            self.sweep, self.output = remembered(options)
            if self.output and (about := self.output / ABOUT).is_file():
                known = json.loads(about.read_text())
                self.beside, self.rounds = known.get("beside", []), known.get("rounds", [])
                self.refine = self.refine or known.get("refine", False)
                self.budget = self.budget or known.get("budget")
        self.poll_seconds = POLL_SECONDS[options.server]
        folder.check_latest()
        writable(self.output or OUTPUTS)
        self.gpus = devices()

    def run(self, server: Server | None) -> int:
        """Everything from the sweep to the report, round by round; returns the exit code."""
        try:
            with self.early(server.line if server else 2) as early:
                return self.work(server, early)
        except (KeyboardInterrupt, SystemExit):
            if self.report:
                self.report.stop()
            if self.sweep:
                print(f"stopped; rows and checkpoints are kept. To go on: {self.again()}", file=sys.stderr)
            raise

    def early(self, line: int):
        """For a new sweep the process that checks what its runs read, and then is its first gang."""
        if self.config is None:
            return contextlib.nullcontext()
        gang = not self.options.one_by_one and runs_of(self.config) > (len(self.gpus) or 1)
        arguments = calls(self.config)
        return Early(self.config, arguments, gang, self.gpus, line) if gang or arguments else contextlib.nullcontext()

    def work(self, server: Server | None, early: Early | None) -> int:
        from analysis import pull  # W&B's client takes a second to import, in which the server starts

        if server:
            server.ready()
        if early and (fault := early.fault()):
            raise InputError(f"{self.options.sweep}: {fault}")
        if self.sweep is None:
            self.sweep = self.create(server)
        api = pull.connect()
        grid = pull.find(api, self.sweep)
        self.config = grid.config
        if self.refine:
            check_refinable(self.sweep, self.config)
        self.output = self.output or folder.of_sweeps(grid.name, grid.id)
        self.remember()
        again = bool(self.options.resume)
        while (code := self.train(api, server, again, early)) == 0 and self.refine and (path := self.next_round()):
            self.rounds.append(create(path, read_yaml(path, "--refine"), server))
            self.remember()
            again, early = False, None
        if self.options.server == "local":
            print(f"to see the runs again: python -m local_wandb --data {LOCAL_DATA}")
        return code

    def train(self, api, server: Server | None, again: bool, early: Early | None) -> int:
        """The agents of the newest sweep until it is done, and the report; returns the exit code."""
        from analysis import pull

        newest = [self.sweep, *self.rounds][-1]
        sweep = pull.find(api, newest)
        print(f"sweep: {newest} (others may join: wandb agent {newest})")
        print(f"watch: {server.page(sweep.url) if server else sweep.url}", flush=True)
        if again:
            if self.options.retry_failed:
                for run in [run for run in sweep.runs if run.state in ("failed", "crashed", "killed")]:
                    run.delete()  # W&B's own way to have a point of a grid offered again
            wandb_sweep(["--resume", newest], server)
        gpus, total = self.gpus, sweep.expected_run_count

        def states() -> list[dict] | None:
            runs = pull.states(api, newest)
            return runs and last_attempts(runs, sweep.config)

        progress = Progress(total, varied(sweep.config))
        self.report = Report([*self.beside, self.sweep, *self.rounds], self.output, total)
        command = self.agent(total, len(gpus) or 1)
        with agents(newest, self.output, command, gpus, server.line if server else 2, early) as processes:
            watch(states, progress, processes, server, self.poll_seconds, self.report)
        for _ in range(20):  # about ten minutes of a server that does not answer
            if (runs := states()) is not None:
                progress.close(runs)
                return self.finish(runs, total, sweep.config, processes)
            time.sleep(1)
            if server and not server.serves():
                server.revive()
        raise InputError(f"the server does not answer; for the report: {self.again()}")

    def next_round(self) -> Path | None:
        """The file of the search's next round, or None if it is over; says what it asks, or why it stops."""
        from analysis import followups, refinement, rounds, runs, study

        known = study.build(*runs.load(self.output))
        left = rounds.budget_left(known, self.budget)
        found = rounds.following(known, left)
        if not isinstance(found, refinement.Round):
            print(f"search: {found.why if found else 'No run has reached an end.'}")
            return None
        entity, project, _ = self.sweep.split("/")
        sweep = followups.round_of(known, found) | {"entity": entity, "project": project}
        asked = len(found.rates) * len(found.seeds)
        print(f"search, {sweep['name']}: {found.asked} ({asked} of the {left} runs that are left)", flush=True)
        path = self.output / followups.sweep_file(sweep["name"])
        save(path, followups.to_yaml(sweep))
        return path

    def create(self, server: Server | None) -> str:
        """The sweep of the file, or one of the guides, whose file the report keeps."""
        if not self.options.guides:
            return create(self.options.sweep, self.config, server)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "guides.yaml")
            path.write_text(yaml.safe_dump(self.config, sort_keys=False))
            return create(path, self.config, server)

    def agent(self, total: int | None, count: int) -> list[str]:
        if self.options.one_by_one or (total is not None and total <= count):
            print("one run at a time on each device (wandb agent)", flush=True)
            return [*WANDB, "agent", "--forward-signals"]
        print("several runs at once on each device (python -m gang; --one-by-one for wandb agent)", flush=True)
        # One gang measures what pays; several must leave each other a share.
        share = ["--size", str(math.ceil(total / count))] if total and count > 1 else []
        return [*GANG, *share]

    def finish(self, runs: list[dict], total: int | None, sweep: dict, processes: list) -> int:
        """Name what went wrong, and write the report of what there is."""
        refused, failed = refusals(self.output, processes), broken(runs, total, sweep)
        trained, ill = any(run["step"] is not None for run in runs), any(process.returncode for process in processes)
        if refused and not trained:
            failed = []  # nothing was tried
        for line in [*refused, *failed, *(causes(self.output, processes) if (failed or ill) and not refused else [])]:
            print(line, file=sys.stderr)
        if failed:
            print(f"to try these again: {self.again('--retry-failed')}", file=sys.stderr)
        code = 0
        if trained:
            if code := self.report.finish():
                print(f"no report; to try again: {self.again()}", file=sys.stderr)
        else:
            print("no run has logged anything: no report", file=sys.stderr)
        if refused and not trained:
            return 2
        return 1 if refused or failed or ill or not trained or code < 0 else code  # below 0: ended by a signal

    def remember(self) -> None:
        """Make the output folder, with the recipe as used and what --resume needs, and point outputs/latest to it."""
        self.output.mkdir(parents=True, exist_ok=True)
        recipe, copy = recipe_of(self.config), self.output / folder.RECIPE
        if recipe and recipe.is_file() and recipe.resolve() != copy.resolve():
            if self.options.resume and copy.is_file() and copy.read_bytes() != recipe.read_bytes():
                raise InputError(f"{recipe} is not what this sweep began with, {copy}: its runs would not compare")
            shutil.copy(recipe, copy)
        about = {"sweep": self.sweep, "server": self.options.server, "beside": self.beside}
        if self.refine:
            about |= {"refine": True, "budget": self.budget, "rounds": self.rounds}
        save(self.output / ABOUT, json.dumps(about) + "\n")
        folder.link_latest(self.output)

    def again(self, *more: str) -> str:
        """The command that goes on with this experiment."""
        place = ["--output", str(self.options.output)] if self.options.output else []
        server = ["--server", "cloud"] if self.options.server == "cloud" else []
        search = ["--refine"] if self.refine else []
        search += ["--budget", str(self.budget)] if self.budget else []
        words = ["python", "experiment.py", "--resume", self.sweep, *more, *search, *place, *server]
        return " ".join(words + (["--one-by-one"] if self.options.one_by_one else []))


def remembered(options: argparse.Namespace) -> tuple[str, Path | None]:
    """The sweep to resume and its output folder, None where this machine does not know it."""
    if options.resume != "latest":
        if options.resume.count("/") != 2:
            raise InputError(f"--resume {options.resume}: give ENTITY/PROJECT/SWEEP, or nothing for the last one")
        known = sorted(OUTPUTS.glob(f"*-{options.resume.rpartition('/')[2]}/{ABOUT}"))
        return options.resume, options.output or (known[0].parent if known else None)
    try:
        about = json.loads((LATEST / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--resume: no experiment at {LATEST} ({error}); give ENTITY/PROJECT/SWEEP") from error
    options.server = about["server"]
    return about["sweep"], options.output or OUTPUTS / os.readlink(LATEST)


def writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}; choose a writable directory") from error


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together."""
    if options.retry_failed and not options.resume:
        raise InputError("--retry-failed needs --resume")
    if options.guides and options.resume:
        raise InputError("--resume knows what it goes on with: leave out --guides")
    if options.guides and options.refine:
        raise InputError("--guides has no grid of rates to refine: run --refine first, then --guides beside it")
    if options.budget is not None and not options.refine:
        raise InputError("--budget needs --refine")
    if options.budget is not None and options.budget < 1:
        raise InputError(f"--budget {options.budget}: give the number of runs for the search, from 1 up")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=["local", "cloud"], default="local", help="cloud: your own W&B login")
    parser.add_argument("--sweep", type=Path, default=Path("sweep.yaml"), help="default: %(default)s")
    parser.add_argument("--guides", action="store_true", help="what guides recommend, in place of the sweep's rates")
    parser.add_argument("--refine", action="store_true", help="search on from the grid to the best rate")
    parser.add_argument("--budget", type=int, metavar="N", help="runs of that search, default: as many as the grid's")
    parser.add_argument("--output", type=Path, help="default: outputs/NAME-ID, of the sweep")
    parser.add_argument("--one-by-one", action="store_true", help="plain agents, one run at a time on each device")
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="SWEEP", help="go on with ENTITY/PROJECT/SWEEP, or the last one"
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="with --resume: delete failed runs and run them anew"
    )
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # as an exception, so that agents and server are ended too
    # The sweep's command starts `python`: let it be this one.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        check_options(options)
        experiment = Experiment(options)
        if options.server == "cloud":
            if os.environ.get("WANDB_MODE", "online") != "online":
                raise InputError("WANDB_MODE: unset it; the report reads the runs from the server")
            prepare_environment()
            return experiment.run(None)
        key = os.environ.get("WANDB_API_KEY")
        for name in [name for name in os.environ if name.startswith("WANDB_") and not name.endswith("_DIR")]:
            del os.environ[name]  # meant for another server
        prepare_environment()
        with Server(LOCAL_DATA, key) as server:
            return experiment.run(server)
    except InputError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def prepare_environment() -> None:
    """What the agents and their runs inherit."""
    os.environ["WANDB_MODE"] = "online"  # or a `wandb offline` of long ago would train into nothing
    os.environ["WANDB_AGENT_DISABLE_FLAPPING"] = "true"  # W&B's agent would leave out the points after three failures
    os.environ["WANDB_AGENT_MAX_INITIAL_FAILURES"] = "1000000"
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_HTTP_TIMEOUT"):
        os.environ.setdefault(name, "600")  # seconds that the server may be away before a run, or W&B's agent, gives up
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # libraries' words to their own authors, in every run's log


if __name__ == "__main__":
    sys.exit(main())
