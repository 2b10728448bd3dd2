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
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from analysis import pull
from analysis.runs import InputError

LOCAL_DATA = Path("outputs/local_wandb")
STARTER_DATA = Path("starter/data/test.jsonl")
POLL_SECONDS, LINE_SECONDS = 3, 15  # how often the state is read; how often a log that is no terminal gets a line
WANDB = [sys.executable, "-m", "wandb"]


def read_sweep(path: Path) -> dict:
    """The sweep's configuration; InputError if it cannot be read or a number in it is a string."""
    try:
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--sweep {path}: {' '.join(str(error).split())}") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise InputError(f"--sweep {path}: no parameters; see sweep.yaml for the form")
    for name, parameter in sweep["parameters"].items():
        for value in parameter.get("values", []):
            if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", value, re.IGNORECASE):
                raise InputError(f"{path}: {name}: {value} is a string to YAML; write {float(value):.1e}")
    return sweep


def grid_size(sweep: dict) -> int | None:
    """The number of points of a grid, None where the sweep has no end of its own."""
    if sweep.get("method") != "grid":
        return sweep.get("run_cap")
    return math.prod(len(parameter.get("values", [None])) for parameter in sweep["parameters"].values())


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


def create_sweep(path: Path) -> str:
    """`wandb sweep FILE`; returns ENTITY/PROJECT/SWEEP."""
    project = [] if "project" in read_sweep(path) else ["--project", "learning-rate-exploration"]
    result = subprocess.run([*WANDB, "sweep", *project, str(path)], capture_output=True, text=True)
    found = re.search(r"wandb agent (\S+/\S+/\S+)", result.stdout + result.stderr)
    if result.returncode or not found:
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise InputError(f"wandb sweep {path}: {lines[-1] if lines else 'no answer'}")
    return found[1]


@contextmanager
def agents(sweep: str, output: Path, command: list[str]) -> Iterator[list[subprocess.Popen]]:
    """One agent per visible GPU, one on a CPU, each writing to `output`/agent-N.log."""
    processes = []
    for index in range(devices()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        device = visible[index] if index < len(visible) and visible[index] else str(index)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if torch.cuda.is_available() else {})
        with open(output / f"agent-{index}.log", "w") as log:
            process = subprocess.Popen(
                [*command, sweep],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()  # with --forward-signals the agent lets its run finish its upload first
        for process in processes:
            process.wait()


def devices() -> int:
    return max(1, torch.cuda.device_count())


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def watch(sweep: str, total: int | None, processes: list[subprocess.Popen]) -> None:
    """Print which run of how many, its step, loss and an estimate of the time left, until the agents end."""
    api = pull.connect()
    entity, project, sweep_id = sweep.split("/")
    start, printed, seen = time.monotonic(), 0.0, -1
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
        api.flush()  # it would answer from its cache
        runs = list(api.runs(f"{entity}/{project}", {"sweep": sweep_id}, per_page=200, lazy=False))
        ended = [run for run in runs if run.state not in ("running", "pending")]
        done, parts = float(len(ended)), []
        for run in runs:
            step, steps = run.summary.get("train/global_step"), run.config.get("max_steps")
            if run.state != "running" or step is None or not steps:
                continue
            done += step / steps
            loss = run.summary.get("train/loss")
            parts.append(f"{run.name}: step {step:.0f} of {steps}" + (f", loss {loss:.3f}" if loss is not None else ""))
        elapsed = time.monotonic() - start
        left = [f"about {duration(elapsed * (total - done) / done)} left"] if total and done > 0.02 else []
        line = " · ".join(
            [f"run {min(len(ended) + 1, total or len(runs))} of {total or '?'}", *(parts or ["starting"]), *left]
        )
        if sys.stdout.isatty():
            print("\r\033[K" + line, end="", flush=True)
        elif time.monotonic() - printed > LINE_SECONDS or len(ended) > seen:
            printed, seen = time.monotonic(), len(ended)
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
    sweep_config = read_sweep(options.sweep)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {options.output}: {error.strerror}; choose a writable directory") from error
    if not STARTER_DATA.exists():
        subprocess.run([sys.executable, "-m", "starter.docstrings"], check=True)
    sweep = create_sweep(options.sweep)
    print(f"sweep: {sweep} (others may join: wandb agent {sweep})", flush=True)
    total = grid_size(sweep_config)
    if options.one_by_one or (total is not None and total <= devices()):
        command = [*WANDB, "agent", "--forward-signals"]
        print("one run at a time on each device (wandb agent)", flush=True)
    else:
        command = [sys.executable, "-m", "gang"]
        print("several runs at once on each device (python -m gang; --one-by-one for wandb agent)", flush=True)
    with agents(sweep, options.output, command) as processes:
        watch(sweep, total, processes)
    refused = errors(options.output, processes)
    for message in refused:
        print(message, file=sys.stderr)
    code = subprocess.run([sys.executable, "-m", "analysis", sweep, "--output", str(options.output)]).returncode
    if options.server == "local":
        print(f"to compare the runs again: python -m local_wandb --data {LOCAL_DATA}")
    return code or (2 if refused else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=["local", "cloud"], default="local", help="cloud: your own W&B login")
    parser.add_argument("--sweep", type=Path, default=Path("sweep.yaml"), help="default: %(default)s")
    default = Path("outputs/learning_rate_exploration")
    parser.add_argument("--output", type=Path, default=default, help="default: %(default)s")
    parser.add_argument("--one-by-one", action="store_true", help="plain agents, one run at a time on each device")
    options = parser.parse_args()
    # The sweep's command starts `python`: let it be this one.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        if options.server == "cloud":
            return run(options)
        with local_server() as variables:
            os.environ.update(variables)
            return run(options)
    except InputError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; finished runs are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
