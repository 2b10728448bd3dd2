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
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

import guides
import inputs
from analysis import folder
from analysis.files import InputError, save
from analysis.folder import LATEST, OUTPUTS
from local_server import Server
from progress import LIVE, Progress, ended, label, varied

LOCAL_DATA = OUTPUTS / "local_wandb"
ABOUT = "experiment.json"  # what --resume needs to know of an experiment, in its output folder
PROJECT = "learning-rate-exploration"  # where neither the sweep nor WANDB_PROJECT names one
POLL_SECONDS = {"local": 3, "cloud": 15}  # how often the runs' state is read; W&B's cloud limits requests
END_SECONDS = 120  # what an agent that is stopped gets for its runs' uploads
WANDB = [sys.executable, "-m", "wandb"]
TIED = ["setpriv", "--pdeathsig", "TERM"]  # before a command: it ends when this process is killed
READ = re.compile(r"^(train \(.*?)\nthe first row;", re.MULTILINE | re.DOTALL)  # what a run says of its data
ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b.*|.*?train\.py: .+)$", re.MULTILINE)


def read_yaml(path: Path, flag: str) -> dict:
    try:
        return inputs.read_yaml(path, flag)
    except inputs.InputError as error:
        raise InputError(str(error)) from error


def read_sweep(path: Path) -> dict:
    """The sweep's configuration; InputError for whatever can be known to be wrong before the sweep is created."""
    sweep = read_yaml(path, "--sweep")
    if not isinstance(sweep.get("parameters"), dict):
        raise InputError(f"--sweep {path}: no parameters; see sweep.yaml for the form")
    for name, parameter in sweep["parameters"].items():
        values = parameter.get("values", [parameter.get("value")]) if isinstance(parameter, dict) else None
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: {name}: write `values: [...]` or `value: ...`, as in sweep.yaml")
        for value in (*values, parameter.get("min"), parameter.get("max")):
            if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value, re.IGNORECASE):
                raise InputError(f"{path}: {name}: {value} is a string to YAML; write {float(value):.1e}")
    cap = sweep.get("run_cap")
    if cap is not None and not (type(cap) is int and cap > 0):
        raise InputError(f"{path}: run_cap: {cap} must be a whole number from 1 up")
    if cap is None and sweep.get("method") in ("random", "bayes"):
        raise InputError(f"{path}: method: {sweep['method']} has no end of its own; add run_cap: N, the number of runs")
    if (program := sweep.get("program")) and not Path(program).is_file():
        raise InputError(f"{path}: program: {program}: there is no such file")
    if (recipe := recipe_of(sweep)) is not None:
        read_yaml(recipe, f"{path}: --config")
    check_points(path, sweep)
    return sweep


def check_points(path: Path, sweep: dict) -> None:
    """Raise InputError for what train.py would refuse, with each value that a parameter takes."""
    for name in sweep["parameters"]:
        for arguments in calls(sweep, [name]):
            try:
                inputs.check(arguments)
            except inputs.InputError as error:
                raise InputError(f"{path}: {error}") from error


def check_rows(path: Path, sweep: dict) -> None:
    """Raise InputError for rows that train.py would refuse."""
    import data  # here, since it takes a second

    names = [name for name in sweep["parameters"] if name.startswith("dataset_") or name == "assistant_only_loss"]
    for arguments in calls(sweep, names):
        try:
            data.check(arguments)
        except inputs.InputError as error:
            raise InputError(f"{path}: {error}") from error


def calls(sweep: dict, names: list[str]) -> list[list[str]]:
    """The arguments that train.py gets with each value of these parameters; none if the sweep runs another program."""
    words = [str(word) for word in sweep.get("command") or ("${program}", "${args}")]
    programs = [Path(str(sweep.get("program")) if word == "${program}" else word).name for word in words]
    if "train.py" not in programs:
        return []
    flags = words[programs.index("train.py") + 1 :]
    parameters = [sweep["parameters"][name] for name in names]
    found = []
    for point in itertools.product(*(parameter.get("values", [parameter.get("value")]) for parameter in parameters)):
        given = [f"--{name}={value}" for name, value in zip(names, point, strict=True) if value is not None]
        found.append([word for flag in flags for word in (given if flag == "${args}" else [flag])])
    return found


def recipe_of(sweep: dict) -> Path | None:
    """The recipe that the sweep's command names."""
    try:
        return inputs.split([str(word) for word in sweep.get("command") or ()])[0]
    except inputs.InputError as error:
        raise InputError(f"command: {error}") from error


def check_refinable(name: str, sweep: dict) -> None:
    """Raise InputError for a sweep in which the search for the best rate would have to choose more than a rate."""
    if others := [key for key in varied(sweep) if key not in ("learning_rate", "seed")]:
        raise InputError(f"--refine: {name} varies {others[0]}; give it one `value`, or leave out --refine")
    if sweep.get("method") != "grid" or "learning_rate" not in sweep["parameters"]:
        raise InputError(f"--refine: {name} is no grid over learning_rate; sweep.yaml has the form")


def sweep_of_guides(sweep: dict) -> dict:
    """A sweep of the guides that mean something for its model, with the recipe, seeds and constants of this one."""
    words = [str(word) for word in sweep.get("command") or ()]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--model_revision", default="main")
    recipe, flags = inputs.read([word for word in words if not word.startswith("$")])
    parser.set_defaults(**{key: recipe[key] for key in ("model_name_or_path", "model_revision") if key in recipe})
    model = parser.parse_known_args(flags)[0]
    names, refused = guides.applicable(str(model.model_name_or_path), model.model_revision)
    for line in refused:
        print(f"left out: {line}", flush=True)
    kept = {
        key: spec
        for key, spec in sweep["parameters"].items()
        if key == "seed" or ("value" in spec and key not in guides.SETTINGS)
    }
    about = {key: sweep[key] for key in ("program", "project", "entity", "metric", "command") if key in sweep}
    return {"name": "guides", **about, "method": "grid", "parameters": {"guide": {"values": names}} | kept}


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


def create_sweep(path: Path, sweep: dict, server: Server | None) -> str:
    """`wandb sweep FILE`; returns ENTITY/PROJECT/SWEEP."""
    project = [] if "project" in sweep or "WANDB_PROJECT" in os.environ else ["--project", PROJECT]
    name = [] if sweep.get("name") else ["--name", title(sweep)]
    printed = wandb_sweep([*name, *project, str(path)], server)
    if found := re.search(r"wandb agent (\S+/\S+/\S+)", printed):
        return found[1]
    raise InputError(f"wandb sweep {path}: {last_line(printed)}")


def title(sweep: dict) -> str:
    """What a sweep without a name is called: its model, its data, and what varies."""
    recipe = recipe_of(sweep)
    fixed = read_yaml(recipe, "--config") if recipe else {}
    paths = [Path(str(fixed[key])).parts[-2:] for key in ("model_name_or_path", "dataset_name") if key in fixed]
    names = ["/".join(part for part in path if part not in ("/", "..")) for path in paths]
    return f"{', '.join(names)}: {', '.join(varied(sweep))}".removeprefix(": ")


def wandb_sweep(arguments: list[str], server: Server | None) -> str:
    """What `wandb sweep` prints. It asks on while there is no server, so one that dies meanwhile is revived."""
    command = [*TIED, *WANDB, "sweep", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while process.poll() is None:
            time.sleep(0.1)
            if server and not server.serves():
                server.revive()
    finally:
        process.terminate()
    printed = process.stdout.read()
    if process.returncode:
        raise InputError(f"wandb sweep {' '.join(arguments)}: {last_line(printed)}")
    return printed


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no answer")


def devices() -> list[str]:
    """The visible GPUs, as CUDA_VISIBLE_DEVICES names them; none on a CPU. (torch would take seconds to say it.)"""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return []
    gpus = re.findall(r"^GPU (\d+):", listed, re.MULTILINE)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not gpus:
        return gpus
    names = (name.strip() for name in visible.split(","))
    # As CUDA does, up to the first name that means none.
    return list(itertools.takewhile(lambda name: name in gpus or name.startswith(("GPU-", "MIG-")), names))


@contextlib.contextmanager
def agents(sweep: str, output: Path, command: list[str], gpus: list[str], line: int) -> Iterator[list]:
    """One agent per visible GPU, one on a CPU, each writing to `output`/agent-N.log and holding the server's line."""
    processes: list[subprocess.Popen] = []
    # Each has a wandb-core of its own: the one of this process would die with it, and their rows with that.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    try:
        for index, gpu in enumerate(gpus or [None]):
            environment = inherited | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
            with open(output / f"agent-{index}.log", "w") as log:
                process = subprocess.Popen(
                    [*TIED, *command, sweep],  # it does not train on with nobody watching
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[line],
                )
            processes.append(process)
        yield processes
    finally:
        if any(process.poll() is None for process in processes):
            print("\nstopping; the runs send their last rows (Ctrl-C again gives these up)", file=sys.stderr)
        try:
            for process in processes:
                # Both kinds of agent let their runs finish the upload first; one that was killed may have left its run.
                left = session(process.pid)
                send(signal.SIGTERM, [pid for pid, parent in left.items() if parent not in left])
            deadline = time.monotonic() + END_SECONDS
            while any(process.poll() is None or session(process.pid) for process in processes):
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.2)
        except (TimeoutError, KeyboardInterrupt, SystemExit):
            print("killed; rows that had not been sent are lost", file=sys.stderr)
            for process in processes:
                send(signal.SIGKILL, session(process.pid))


def send(number: int, processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def session(leader: int) -> dict[int, int]:
    """What an agent has started and still works, and each one's parent: its session, and the wandb-core of each."""
    parents, found = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            state, parent, _, number = stat.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
                if int(number) == leader:
                    found[int(stat.parent.name)] = int(parent)
    return found | {pid: parent for pid, parent in parents.items() if parent in found}


def last_attempts(runs: list[dict], sweep: dict) -> list[dict]:
    """The runs without those whose point was offered again."""
    return list({json.dumps([run["config"].get(name) for name in sweep["parameters"]]): run for run in runs}.values())


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


def refusals(output: Path, processes: list[subprocess.Popen]) -> list[str]:
    """The one-line messages with which train.py or the gang refused its input, without repeats."""
    messages = []
    for index, process in enumerate(processes):
        log = (output / f"agent-{index}.log").read_text(errors="replace")
        messages += re.findall(r"^.*?(train\.py: .*)$", log, re.MULTILINE)
        messages += re.findall(r"^gang: .*$", log, re.MULTILINE)[-1:] if process.returncode == 2 else []
    return list(dict.fromkeys(messages))


def causes(output: Path, processes: list[subprocess.Popen]) -> list[str]:
    """For each agent that failed, or in whose log a run did: the last line that says why, and where to read on."""
    lines = []
    for index, process in enumerate(processes):
        path = output / f"agent-{index}.log"
        log = path.read_text(errors="replace")
        found = ERROR.findall(log)
        if process.returncode < 0:
            killed = signal.Signals(-process.returncode).name
            hint = ", as the system does when memory runs out" if killed == "SIGKILL" else ""
            lines.append(f"agent {index} was ended by {killed}{hint} (its log: {path})")
        elif process.returncode or found:
            code = f"ended with exit code {process.returncode}" if process.returncode else "went on after a failure"
            lines.append(f"agent {index} {code}: {(found or [last_line(log)])[-1].strip()} (all of it: {path})")
    return lines


class Experiment:
    """A sweep, new or resumed, and its output folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.sweep, self.output = options, None, options.output
        self.config = None if options.resume else read_sweep(options.sweep)
        self.report: Report | None = None
        self.beside: list[str] = []  # sweeps that join the report
        self.rounds: list[str] = []  # sweeps of the search for the best rate
        self.refine, self.budget = options.refine, options.budget
        if options.refine and self.config:
            check_refinable(str(options.sweep), self.config)
        if options.guides:
            self.config = sweep_of_guides(self.config)
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
        if not options.resume:
            check_rows(options.sweep, self.config)

    def run(self, server: Server | None) -> int:
        """Everything from the sweep to the report, round by round; returns the exit code."""
        try:
            return self.work(server)
        except (KeyboardInterrupt, SystemExit):
            if self.report:
                self.report.stop()
            if self.sweep:
                print(f"stopped; rows and checkpoints are kept. To go on: {self.again()}", file=sys.stderr)
            raise

    def work(self, server: Server | None) -> int:
        from analysis import pull  # W&B's client takes a second to import, in which the server starts

        if server:
            server.ready()
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
        while (code := self.train(api, server, again)) == 0 and self.refine and (path := self.next_round()):
            self.rounds.append(create_sweep(path, read_yaml(path, "--refine"), server))
            self.remember()
            again = False
        if self.options.server == "local":
            print(f"to see the runs again: python -m local_wandb --data {LOCAL_DATA}")
        return code

    def train(self, api, server: Server | None, again: bool) -> int:
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
        gpus, total = devices(), sweep.expected_run_count

        def states() -> list[dict] | None:
            runs = pull.states(api, newest)
            return runs and last_attempts(runs, sweep.config)

        progress = Progress(total, varied(sweep.config))
        self.report = Report([*self.beside, self.sweep, *self.rounds], self.output, total)
        command = self.agent(total, len(gpus) or 1)
        with agents(newest, self.output, command, gpus, server.line if server else 2) as processes:
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
        from analysis import followups, refinement, runs, search, study

        known = study.build(*runs.load(self.output))
        left = search.budget_left(known, self.budget)
        found = search.following(known, left)
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
            return create_sweep(self.options.sweep, self.config, server)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "guides.yaml")
            path.write_text(yaml.safe_dump(self.config, sort_keys=False))
            return create_sweep(path, self.config, server)

    def agent(self, total: int | None, count: int) -> list[str]:
        if self.options.one_by_one or (total is not None and total <= count):
            print("one run at a time on each device (wandb agent)", flush=True)
            return [*WANDB, "agent", "--forward-signals"]
        print("several runs at once on each device (python -m gang; --one-by-one for wandb agent)", flush=True)
        # One gang measures what pays; several must leave each other a share.
        share = ["--size", str(math.ceil(total / count))] if total and count > 1 else []
        return [sys.executable, "-m", "gang", *share]

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
