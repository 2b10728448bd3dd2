"""The whole experiment in one command: sweep, agents, report.

    python experiment.py

Creates the sweep from sweep.yaml, runs one agent per visible GPU (one on a CPU) until the grid is done and writes the
report. The agent is the gang, which trains several configurations at once, or with --one-by-one W&B's own. Without
--server cloud everything stays on this machine, in outputs/local_wandb.
"""

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from analysis import pull
from analysis.files import InputError

LOCAL_DATA = Path("outputs/local_wandb")
STARTER_DATA = Path("starter/data/test.jsonl")
POLL_SECONDS = {"local": 3, "cloud": 15}  # how often the runs' state is read; W&B's cloud limits requests
LINE_SECONDS = 15  # how often a log that is no terminal gets a line
END_SECONDS = 120  # what an agent that is stopped gets for its runs' uploads
WANDB = [sys.executable, "-m", "wandb"]


def read_sweep(path: Path) -> dict:
    """The sweep's configuration; InputError if it cannot be read or a number in it is a string."""
    try:
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--sweep {path}: {' '.join(str(error).split())}") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise InputError(f"--sweep {path}: no parameters; see sweep.yaml for the form")
    for name, parameter in sweep["parameters"].items():
        values = parameter.get("values", [parameter.get("value")]) if isinstance(parameter, dict) else None
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: {name}: write `values: [...]` or `value: ...`, as in sweep.yaml")
        for value in (*values, parameter.get("min"), parameter.get("max")):
            if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value, re.IGNORECASE):
                raise InputError(f"{path}: {name}: {value} is a string to YAML; write {float(value):.1e}")
    return sweep


def grid_size(sweep: dict) -> int | None:
    """The number of points of a grid, None where the sweep has no end of its own."""
    cap = sweep.get("run_cap")
    if sweep.get("method") != "grid":
        return cap
    points = math.prod(len(parameter.get("values", [None])) for parameter in sweep["parameters"].values())
    return min(points, cap or points)


@contextmanager
def local_server() -> Iterator[dict[str, str]]:
    """Run local_wandb on a free port; yields the variables that point W&B's client at it."""
    command = [sys.executable, "-m", "local_wandb", "--data", str(LOCAL_DATA)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        lines = [process.stdout.readline().strip() for _ in range(3)]
        if not all(lines):
            raise InputError("local_wandb did not start; its own message is above")
        variables = dict(line.removeprefix("export ").split("=", 1) for line in lines[:2])
        print(lines[2].removeprefix("# "), flush=True)
        # Rows every 2 seconds instead of 15, so that a killed run loses little; nothing is sent to W&B.
        yield variables | {"WANDB_ERROR_REPORTING": "false", "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "2"}
    finally:
        process.terminate()
        process.wait()


def create_sweep(path: Path, sweep: dict) -> str:
    """`wandb sweep FILE`; returns ENTITY/PROJECT/SWEEP."""
    project = [] if "project" in sweep else ["--project", "learning-rate-exploration"]
    command = [*WANDB, "sweep", *project, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = re.search(r"wandb agent (\S+/\S+/\S+)", result.stdout + result.stderr)
    if result.returncode or not found:
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise InputError(f"wandb sweep {path}: {lines[-1] if lines else 'no answer'}")
    return found[1]


@contextmanager
def agents(sweep: str, output: Path, command: list[str]) -> Iterator[list[subprocess.Popen]]:
    """One agent per visible GPU, one on a CPU, each writing to `output`/agent-N.log."""
    processes: list[subprocess.Popen] = []
    try:
        for index in range(devices()):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            device = visible[index] if index < len(visible) and visible[index] else str(index)
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if torch.cuda.is_available() else {})
            with open(output / f"agent-{index}.log", "w") as log:
                process = subprocess.Popen(
                    [*command, sweep],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.terminate()  # both kinds of agent let their runs finish the upload first
        for process in processes:
            try:
                process.wait(END_SECONDS)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def devices() -> int:
    return max(1, torch.cuda.device_count())


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def watch(sweep: str, total: int | None, processes: list[subprocess.Popen], poll_seconds: float) -> None:
    """Print which run of how many, its step, loss and an estimate of the time left, until the agents end."""
    api = pull.connect()
    start, printed, seen = time.monotonic(), 0.0, -1
    while any(process.poll() is None for process in processes):
        time.sleep(poll_seconds)
        runs = pull.states(api, sweep)
        if runs is None:  # the server is busy or away; the runs go on, and so does the next question
            continue
        ended = sum(run["state"] not in ("running", "pending") for run in runs)
        training = [run for run in runs if run["state"] == "running" and run["step"] is not None and run["steps"]]
        done = ended + sum(run["step"] / run["steps"] for run in training)
        elapsed = time.monotonic() - start
        parts = [f"run {min(ended + 1, total or len(runs))} of {total or '?'}"]
        for run in training:
            loss = "" if run["loss"] is None else f", loss {run['loss']:.3f}"
            parts.append(f"{run['name']}: step {run['step']:.0f} of {run['steps']:.0f}{loss}")
        if total and done > 0.02:
            parts.append(f"about {duration(elapsed * (total - done) / done)} left")
        line = " · ".join(parts if training else [*parts, "starting"])
        if sys.stdout.isatty():
            print("\r\033[K" + line, end="", flush=True)
        elif time.monotonic() - printed > LINE_SECONDS or ended > seen:
            printed, seen = time.monotonic(), ended
            print(line, flush=True)
    print(f"\nthe agents ended after {duration(time.monotonic() - start)}")


def errors(output: Path, processes: list[subprocess.Popen]) -> list[str]:
    """The one-line messages with which train.py or the gang refused its input, without repeats."""
    messages = []
    for index, process in enumerate(processes):
        log = (output / f"agent-{index}.log").read_text(errors="replace")
        messages += re.findall(r"^.*?(train\.py: .*)$", log, re.MULTILINE)
        messages += re.findall(r"^gang: .*$", log, re.MULTILINE)[-1:] if process.returncode == 2 else []
    return list(dict.fromkeys(messages))


def run(options: argparse.Namespace) -> int:
    config = read_sweep(options.sweep)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.output).close()
    except OSError as error:
        raise InputError(f"--output {options.output}: {error.strerror}; choose a writable directory") from error
    if not STARTER_DATA.exists():
        subprocess.run([sys.executable, "-m", "starter.docstrings"], check=True)
    sweep = create_sweep(options.sweep, config)
    print(f"sweep: {sweep} (others may join: wandb agent {sweep})", flush=True)
    total = grid_size(config)
    if options.one_by_one or (total is not None and total <= devices()):
        command = [*WANDB, "agent", "--forward-signals"]
        print("one run at a time on each device (wandb agent)", flush=True)
    else:
        command = [sys.executable, "-m", "gang"]
        if total and devices() > 1:  # one gang measures what pays; several must leave each other a share
            command += ["--size", str(math.ceil(total / devices()))]
        print("several runs at once on each device (python -m gang; --one-by-one for wandb agent)", flush=True)
    with agents(sweep, options.output, command) as processes:
        watch(sweep, total, processes, POLL_SECONDS[options.server])
    refused = errors(options.output, processes)
    for message in refused:
        print(message, file=sys.stderr)
    failed = [index for index, process in enumerate(processes) if process.returncode and not refused]
    for index in failed:
        log = options.output / f"agent-{index}.log"
        print(f"agent {index} ended with exit code {processes[index].returncode}: see {log}", file=sys.stderr)
    code = subprocess.run([sys.executable, "-m", "analysis", sweep, "--output", str(options.output)]).returncode
    if options.server == "local":
        print(f"to compare the runs again: python -m local_wandb --data {LOCAL_DATA}")
    return code or (2 if refused else 1 if failed else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=["local", "cloud"], default="local", help="cloud: your own W&B login")
    parser.add_argument("--sweep", type=Path, default=Path("sweep.yaml"), help="default: %(default)s")
    default = Path("outputs/learning_rate_exploration")
    parser.add_argument("--output", type=Path, default=default, help="default: %(default)s")
    parser.add_argument("--one-by-one", action="store_true", help="plain agents, one run at a time on each device")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # as an exception, so that agents and server are ended too
    # The sweep's command starts `python`: let it be this one.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        if options.server == "cloud":
            if os.environ.get("WANDB_MODE", "online") != "online":
                raise InputError("WANDB_MODE: unset it; the report reads the runs from the server")
            return run(options)
        for name in [name for name in os.environ if name.startswith("WANDB_") and not name.endswith("_DIR")]:
            del os.environ[name]  # meant for another server
        with local_server() as variables:
            os.environ.update(variables)
            return run(options)
    except InputError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what the runs logged is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
