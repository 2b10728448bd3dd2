"""sweep.yaml as it is read: what the project has passes, and each mistake is named before anything is made."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

import sweep
from analysis.files import InputError

ROOT = Path(__file__).parent.parent

RATES = "parameters: {learning_rate: {values: [1.0e-5]}}\n"
TRAIN = "program: train.py\ncommand: [python, '${program}', --config, recipes/starter.yaml, '${args}']\n"


def drawn(name: str, how: str) -> str:
    return f"method: random\nrun_cap: 2\nparameters: {{{name}: {{{how}}}}}"


NINE = "".join(f"{letter}: &{letter} [{', '.join([f'*{before}'] * 9)}]\n" for before, letter in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("parameters: {learning_rate: {values: [1e-5]}}", "learning_rate: 1e-5 is a string to YAML; write 1.0e-05"),
        ("parameters: {learning_rate: {value: 1e-5}}", "learning_rate: 1e-5 is a string to YAML; write 1.0e-05"),
        ("parameters: {learning_rate: [1.0e-5]}", "learning_rate: write `values: [...]`"),
        ("parameters: {learning_rate: {values: null}}", "learning_rate: write `values: [...]`"),
        (TRAIN + "parameters: {learning_rate: {values: [1.0e-5, 0]}}", "learning_rate: 0 cannot be"),
        (TRAIN + "parameters: {learning_rate: {values: [-1.0e-5]}}", "learning_rate: -1e-05 cannot be"),
        (TRAIN + "parameters: {learning_rate: {values: [.inf]}}", "learning_rate: inf is not a finite number"),
        (TRAIN + "parameters: {learning_rate: {values: [.nan]}}", "learning_rate: nan is not a finite number"),
        (TRAIN + drawn("learning_rate", "distribution: normal, sigma: 0.001"), "learning_rate: -0.002 cannot be"),
        (TRAIN + drawn("learning_rate", "distribution: q_uniform, min: 0.0001, max: 0.1"), "learning_rate: 0.0 cannot"),
        (TRAIN + drawn("lora_r", "distribution: q_log_uniform_values, min: 1, max: 64, q: 4"), "lora_r: 0 cannot be"),
        (TRAIN + drawn("lora_r", "distribution: q_normal, mu: 8, sigma: 4, q: 2"), "lora_r: 0 cannot be"),
        (TRAIN + "parameters: {max_steps: {values: [10, 0]}}", "max_steps: 0 trains nothing"),
        (TRAIN + "parameters: {model_name_or_path: {values: [./no]}}", "model_name_or_path ./no: no such folder"),
        ("program: train.py\n" + RATES, "model_name_or_path and dataset_name are needed"),
        (RATES + "run_cap: two", "run_cap: two must be a whole number"),
        (RATES + "run_cap: 0", "run_cap: 0 must be a whole number"),
        (RATES + "method: random", "method: random has no end of its own; add run_cap"),
        (RATES + "program: trian.py", "program: trian.py: there is no such file"),
        (RATES + "command: [x, --config, no.yaml]", "--config no.yaml: No such file"),
        (RATES + "command: [x, --config=no.yaml]", "--config no.yaml: No such file"),
        (RATES + "name: 20261201", "name: 20261201 is no text to YAML; write it in quotes"),
        (RATES + "command: python train.py", "command: python train.py: write a list of words"),
        (TRAIN + RATES.replace("values", "parameters"), "learning_rate: train.py takes one value"),
        (
            TRAIN.replace("starter.yaml,", "starter.yaml, --learning-rate=0.1,") + RATES,
            "learning_rate stands in command",
        ),
        (RATES + "program: [train.py]", "program: ['train.py']: write a file's name"),
        (RATES + "program:", "program: None: write a file's name"),
        ("parameters: {2026-12-01: {value: 1}}", "the key 2026-12-01 is no text to YAML; write it in quotes"),
        (RATES + "1: a", "the key 1 is no text to YAML"),
        (TRAIN.replace(", '${args}'", "") + RATES, "command: write ${args} where train.py is to get what varies"),
        (RATES + "command: [x, --config, README.md]", "--config README.md: "),
        ("- 1", "expected `key: value` lines"),
        ("", "expected `key: value` lines"),
        ("a: 1", "no parameters"),
        ("a: [", "while parsing a flow node"),
        ("a: &a [1]\n" + NINE, "its aliases (*name) stand for more than 100,000 values"),
        ("a: &a [*a]", "its aliases (*name) stand for more than 100,000 values"),
        ("a: " + "[" * 5000, "recursion"),
        ("a: " + "1" * 100_000, "100,003 bytes; the most is 100,000"),
    ],
)
def test_a_bad_sweep_file_is_named(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        sweep.read(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_sweeps_of_the_project_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sweep.read(Path("sweep.yaml"))["project"] == sweep.PROJECT
    few = tmp_path / "sweep.yaml"
    few.write_text("rates: &rates [1.0e-5, 1.0e-4]\nparameters: {learning_rate: {values: *rates}}\n")
    assert sweep.read(few)["parameters"]["learning_rate"]["values"] == [1.0e-5, 1.0e-4]


@pytest.mark.parametrize(
    ("more", "runs"),
    [
        ({}, 6),
        ({"run_cap": 4}, 4),
        ({"method": "random", "run_cap": 7}, 7),
        ({"parameters": {"learning_rate": {"value": 1.0e-5}, "lora_r": {"min": 4, "max": 6}}}, float("inf")),
    ],
)
def test_how_many_runs_there_will_be_is_known_or_not(more, runs):
    values = {"learning_rate": {"values": [1.0e-5, 1.0e-4]}, "seed": {"values": [0, 1, 2]}}
    assert sweep.runs_of({"method": "grid", "parameters": values} | more) == runs


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ({"distribution": "normal", "mu": 0.5, "sigma": 0.125}, [0.25, 0.75]),
        ({"distribution": "inv_log_uniform_values", "min": 1.0, "max": 1001.0}, [2.0, 1000.0]),
        ({"distribution": "q_uniform", "min": 4, "max": 64}, [4.0, 64.0]),
        ({"distribution": "q_uniform", "min": 4, "max": 64, "q": 4}, [4, 64]),
        ({"distribution": "q_uniform", "min": 4, "max": 64, "q": 0}, []),
        ({"distribution": "q_uniform", "min": math.nan, "max": 64}, []),
        ({"distribution": "normal", "mu": "1e-5"}, []),
        ({"distribution": "log_normal", "sigma": 0}, [1.0, 1.0]),
        ({"distribution": "q_log_uniform", "min": 0, "max": 1}, [1.0, 3.0]),
        ({"distribution": "log_uniform", "min": 0, "max": 1000}, []),
        ({"distribution": "beta"}, []),
        ({"distribution": "uniform", "min": 0}, []),
    ],
)
def test_of_a_distribution_likely_values_are_tried(spec, values):
    assert list(map(repr, sweep.tried(spec))) == list(map(repr, values))  # 4.0 is no rank, 4 is
