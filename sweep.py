"""What stands in sweep.yaml: read, checked before anything is made, and created as `wandb sweep` does."""

import argparse
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import guides
import inputs
from agents import TIED, last_line
from analysis.files import InputError
from local_server import Server
from progress import varied

PROJECT = "learning-rate-exploration"  # where neither the sweep nor WANDB_PROJECT names one
WANDB = [sys.executable, "-m", "wandb"]


def read_yaml(path: Path, flag: str) -> dict:
    try:
        return inputs.read_yaml(path, flag)
    except inputs.InputError as error:
        raise InputError(str(error)) from error


def read(path: Path) -> dict:
    """The sweep's configuration; InputError for whatever can be known to be wrong before the sweep is created."""
    sweep = read_yaml(path, "--sweep")
    if not isinstance(sweep.get("parameters"), dict):
        raise InputError(f"--sweep {path}: no parameters; see sweep.yaml for the form")
    for key in (*sweep, *sweep["parameters"]):
        if not isinstance(key, str):
            raise InputError(f"{path}: the key {key} is no text to YAML; write it in quotes")
    for name, parameter in sweep["parameters"].items():
        values = parameter.get("values", [parameter.get("value")]) if isinstance(parameter, dict) else None
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: {name}: write `values: [...]` or `value: ...`, as in sweep.yaml")
        for value in (*values, parameter.get("min"), parameter.get("max")):
            if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value, re.IGNORECASE):
                raise InputError(f"{path}: {name}: {value} is a string to YAML; write {float(value):.1e}")
    for key in ("name", "project", "entity"):
        if not isinstance(sweep.get(key), str | None):
            raise InputError(f"{path}: {key}: {sweep[key]} is no text to YAML; write it in quotes")
    if not isinstance(command := sweep.get("command") or [], list):
        raise InputError(f"{path}: command: {command}: write a list of words, as in sweep.yaml")
    cap = sweep.get("run_cap")
    if cap is not None and not (type(cap) is int and cap > 0):
        raise InputError(f"{path}: run_cap: {cap} must be a whole number from 1 up")
    if cap is None and sweep.get("method") in ("random", "bayes"):
        raise InputError(f"{path}: method: {sweep['method']} has no end of its own; add run_cap: N, the number of runs")
    if not isinstance(program := sweep.get("program", ""), str):
        raise InputError(f"{path}: program: {program}: write a file's name, as in sweep.yaml")
    if program and not Path(program).is_file():
        raise InputError(f"{path}: program: {program}: there is no such file")
    if (recipe := recipe_of(sweep)) is not None:
        read_yaml(recipe, f"{path}: --config")
    check_points(path, sweep)
    return sweep


def check_points(path: Path, sweep: dict) -> None:
    """Raise InputError for what train.py would refuse before its slow imports."""
    points = calls(sweep)
    if points and "${args}" not in (sweep.get("command") or ["${args}"]):
        raise InputError(f"{path}: command: write ${{args}} where train.py is to get what varies, as in sweep.yaml")
    words = [str(word).partition("=")[0].removeprefix("--").replace("-", "_") for word in sweep.get("command") or ()]
    for name, spec in sweep["parameters"].items() if points else ():
        if "parameters" in spec:
            raise InputError(f"{path}: {name}: train.py takes one value; write `values: [...]` or `value: ...`")
        if name in words:
            raise InputError(f"{path}: {name} stands in command as well; leave out one of them")
    for arguments in points:
        try:
            inputs.check(arguments)
        except inputs.InputError as error:
            raise InputError(f"{path}: {error}") from error


def listed(spec: dict) -> list:
    """The values of a parameter; none if it has a distribution."""
    return spec.get("values", [spec["value"]] if "value" in spec else [])


def near_bounds(spec: dict) -> list[float]:
    inside = (spec["max"] - spec["min"]) / 1000  # the bounds themselves need not be among what is drawn
    return [spec["min"] + inside, spec["max"] - inside]


def two_deviations(spec: dict) -> list[float]:
    mean, deviation = spec.get("mu", 0), spec.get("sigma", 1)
    return [mean - 2 * deviation, mean + 2 * deviation]


LIKELY = {
    "int_uniform": lambda spec: [spec["min"], spec["max"]],
    "uniform": near_bounds,
    "log_uniform_values": near_bounds,
    "inv_log_uniform_values": near_bounds,
    "log_uniform": lambda spec: list(map(math.exp, near_bounds(spec))),
    "normal": two_deviations,
    "log_normal": lambda spec: list(map(math.exp, two_deviations(spec))),
}  # of a distribution two values that it may well draw


def tried(spec: dict) -> list:
    """The values of a parameter, or two that its distribution may well draw, as far as it is one of LIKELY."""
    whole = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
    kind = spec.get("distribution", "int_uniform" if whole else "uniform")
    shape = str(kind).removeprefix("q_")
    if listed(spec) or shape not in LIKELY:
        return listed(spec)
    try:
        ends, q = LIKELY[shape](spec), spec.get("q", 1.0)
        return ends if kind == shape else [round(end / q) * q for end in ends]  # as W&B: whole only if q is
    except (ArithmeticError, LookupError, TypeError, ValueError):  # bounds that no server draws from: it says why
        return []


def calls(sweep: dict) -> list[list[str]]:
    """The arguments that train.py gets with each value of each parameter, the others at their first.

    None if the sweep runs another program.
    """
    words = [str(word) for word in sweep.get("command") or ("${program}", "${args}")]
    programs = [Path(str(sweep.get("program")) if word == "${program}" else word).name for word in words]
    if "train.py" not in programs:
        return []
    flags = words[programs.index("train.py") + 1 :]
    axes = {name: values for name, spec in sweep["parameters"].items() if (values := tried(spec))}
    first = {name: values[0] for name, values in axes.items()}
    found = []
    for point in (first, *(first | {name: value} for name, values in axes.items() for value in values[1:])):
        given = [f"--{name}={value}" for name, value in point.items()]
        found.append([word for flag in flags for word in (given if flag == "${args}" else [flag])])
    return found


def runs_of(sweep: dict) -> float:
    """How many runs the sweep will have; infinite if that is not known before the server has it."""
    counts = [len(listed(spec)) or math.inf for spec in sweep["parameters"].values()]
    return min(math.prod(counts) if sweep.get("method") == "grid" else math.inf, sweep.get("run_cap") or math.inf)


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


def of_guides(sweep: dict) -> dict:
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


def create(path: Path, sweep: dict, server: Server | None) -> str:
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
