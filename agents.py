"""The agents of a sweep on this machine: one for each device, how they are ended, and why one failed."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from analysis.files import InputError

END_SECONDS = 120  # what an agent that is stopped gets for its runs' uploads
GANG = [sys.executable, "-m", "gang"]
TIED = ["setpriv", "--pdeathsig", "TERM"]  # before a command: it ends when this process is killed
ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b.*|.*?train\.py: .+)$", re.MULTILINE)


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


class Early:
    """A gang that is started before its sweep exists (gang/early.py), which does what comes before a first update.

    As a context it ends, unless it has become an agent. It holds the server's `line`.
    """

    def __init__(self, sweep: dict, calls: list[list[str]], gang: bool, gpus: list[str], line: int):
        self.process = subprocess.Popen(
            [*TIED, *GANG, "-"],
            # Only what takes longer than two seconds gets a bar.
            env=os.environ | {"TQDM_DELAY": "2"} | ({"CUDA_VISIBLE_DEVICES": gpus[0]} if gpus else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=[line],
        )
        self.say({"sweep": sweep, "calls": calls, "gang": gang}, last=not gang)  # without a gang it ends then

    def __enter__(self) -> "Early":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()

    def say(self, what: dict, last: bool) -> None:
        with contextlib.suppress(BrokenPipeError):  # killed meanwhile: its exit code says so
            print(json.dumps(what, default=str), file=self.process.stdin, flush=True)
            if last:
                self.process.stdin.close()

    def fault(self) -> str | None:
        """What the runs or the gang would refuse before their first step; where no gang is to follow, it ends then."""
        if answer := self.process.stdout.readline():
            if self.process.stdin.closed:
                self.process.wait()  # the first run needs its memory
            return json.loads(answer)
        raise InputError(f"the check of what the runs read has ended with exit code {self.process.wait()}")

    def become(self, words: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
        """Let it go on as `python -m gang WORDS`."""
        log.write_text("")
        self.say({"words": words, "environment": environment, "log": str(log)}, last=True)
        return self.process


@contextlib.contextmanager
def agents(
    sweep: str, output: Path, command: list[str], gpus: list[str], line: int, early: Early | None = None
) -> Iterator[list]:
    """One agent per visible GPU, one on a CPU, each writing to `output`/agent-N.log and holding the server's line."""
    processes: list[subprocess.Popen] = []
    # Each has a wandb-core of its own: the one of this process would die with it, and their rows with that.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    try:
        for index, gpu in enumerate(gpus or [None]):
            environment = inherited | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
            path = output / f"agent-{index}.log"
            if index == 0 and early and command[: len(GANG)] == GANG:
                processes.append(early.become([*command[len(GANG) :], sweep], environment, path))
                continue
            with open(path, "w") as log:
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
