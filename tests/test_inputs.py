"""inputs.py: train.py's help, and what it refuses before its slow imports and before anything is made."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import inputs
import train
from settings import Parser

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "starter/model"


@pytest.fixture
def folder(tmp_path):
    """A working folder with a model, rows and a recipe, for each fault to spoil, and a torch that nobody can import."""
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: ./model\ndataset_name: rows.jsonl\nmax_steps: 4\n")
    (tmp_path / "slow/torch").mkdir(parents=True)
    (tmp_path / "slow/torch/__init__.py").write_text("raise SystemExit('torch was imported')\n")
    return tmp_path


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder / "slow"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def add(line: str):
    def change(folder: Path) -> None:
        with open(folder / "recipe.yaml", "a") as recipe:
            recipe.write(line + "\n")

    return change


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def rename(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (remove("recipe.yaml"), [], "--config recipe.yaml: No such file"),
        (write("recipe.yaml", "- 1\n"), [], "expected `key: value` lines"),
        (write("recipe.yaml", ""), [], "expected `key: value` lines"),
        (write("recipe.yaml", "1: 2\n"), [], "expected `key: value` lines"),
        (write("recipe.yaml", BOMB), [], "stand for more than 100,000 values"),
        (write("recipe.yaml", "a: &a [*a]\n"), [], "stand for more than 100,000 values"),
        (write("recipe.yaml", "a: [\n"), [], "--config recipe.yaml: while parsing"),
        (write("recipe.yaml", "a: " + "[" * 5000), [], "--config recipe.yaml: .*recursion"),
        (write("recipe.yaml", "a: " + "1" * 99_998), [], "100,001 bytes; the most is 100,000"),
        (lambda folder: (folder / "recipe.yaml").write_bytes(b"\xff"), [], "--config recipe.yaml: .*can't decode"),
        (write("recipe.yaml", "model_name_or_path: ./model\n"), [], "model_name_or_path and dataset_name are needed"),
        (write("recipe.yaml", "dataset_name: rows.jsonl\n"), [], "model_name_or_path and dataset_name are needed"),
        (add("env: {WANDB_API_KEY: x}"), [], "remove the block env"),
        (None, ["--config"], "argument --config: expected one argument"),
        (None, ["--config=."], "--config .: Is a directory"),
        (None, ["--model_name_or_path", "./modle"], "model_name_or_path ./modle: no such folder"),
        (None, ["--model_name_or_path=a/b/c"], "model_name_or_path a/b/c: no such folder"),
        (None, ["--model-name-or-path=rows.jsonl"], "rows.jsonl is a file; give the model's folder"),
        (remove("model/config.json"), [], "a folder without config.json; give one that save_pretrained"),
        (rename("model/config.json", "model/adapter_config.json"), [], "it holds an adapter; give its base model"),
        (remove("model/model.safetensors"), [], r"a folder without \*.safetensors; copy the model's weights"),
        (rename("model/model.safetensors", "model/pytorch_model.bin"), [], "save it anew with save_pretrained"),
        (remove("model/tokenizer.json", "model/tokenizer_config.json"), [], "a folder without a tokenizer"),
        (remove("rows.jsonl"), [], "dataset_name rows.jsonl: no such file or folder"),
        (rename("rows.jsonl", "rows.txt"), ["--dataset_name", "rows.txt"], "ends in .jsonl, .json, .csv, .parquet"),
        (None, ["--dataset_test_split", "test.csv"], "dataset_test_split test.csv: no such file"),
        (None, ["--dataset_train_split", "./train.json"], "dataset_train_split ./train.json: no such file"),
        (None, ["--max_steps", "0", "--num_train_epochs=1"], "max_steps: 0 trains nothing"),
        (None, ["--max_steps=-1"], "max_steps: -1 trains nothing; give the number of steps, or num_train_epochs"),
        (None, ["--max_steps=-5", "--num_train_epochs=1"], "max_steps: -5 trains nothing"),
        (None, ["--learning_rate", "0"], "learning_rate: 0 cannot be; give a number above 0"),
        (None, ["--learning_rate=-1e-4"], "learning_rate: -1e-4 cannot be"),
        (None, ["--learning_rate", "inf"], "learning_rate: inf is not a finite number"),
        (None, ["--learning_rate", "nan"], "learning_rate: nan is not a finite number"),
        (add("learning_rate: .nan"), [], "learning_rate: nan is not a finite number"),
        (add("weight_decay: .inf"), [], "weight_decay: inf is not a finite number"),
        (add("lora_r: 0"), [], "lora_r: 0 cannot be"),
        (None, ["--lora_alpha", "-16"], "lora_alpha: -16 cannot be"),
        (None, ["--per_device_eval_batch_size=0"], "per_device_eval_batch_size: 0 cannot be"),
        (None, ["--seed", "-1"], "seed: -1 cannot be; give a whole number from 0 to 4294967295"),
        (add(f"seed: 1{'0' * 400}"), [], "seed: 10*0 is not a finite number"),
        (add("data_seed: 4294967296"), [], "data_seed: 4294967296 cannot be; give a whole number from 0 to 4294967295"),
        (add("weight_decay: -0.1"), [], "weight_decay: -0.1 cannot be; give a number from 0 up"),
        (None, ["--lora_dropout=1.5"], "lora_dropout: 1.5 cannot be; give a number from 0 to 1"),
        (None, ["--max_length", "0"], "max_length: 0 cannot be"),
    ],
)
def test_a_plain_mistake_is_one_line_at_once(spoil, flags, message, folder):
    if spoil:
        spoil(folder)
    before = sorted(folder.rglob("*"))
    result = call(folder, "--config", "recipe.yaml", *flags) if flags[:1] != ["--config"] else call(folder, *flags)
    assert result.returncode == 2, result.stderr
    assert re.match(f"train.py: .*{message}", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "flags",
    [["--max_steps=-1", "--num_train_epochs=2"],
     ["--model_name_or_path=gpt2", "--dataset_name=owner/rows", "--max_steps=1", "--lora_r=1", "--seed=4294967295"]],
)  # fmt: skip
def test_what_is_right_goes_on_to_the_slow_imports(flags, folder):
    result = call(folder, "--config=recipe.yaml", *flags)
    assert (result.returncode, result.stderr) == (1, "torch was imported\n")


def test_what_is_no_number_is_left_to_trls_parser():
    settings = {"max_steps": "many", "learning_rate": [1e-4], "lora_r": None}
    inputs.check_numbers(settings)
    with pytest.raises(inputs.InputError, match="weight_decay: inf is not a finite number"):
        inputs.check_numbers(settings | {"weight_decay": math.inf})


def test_a_flag_is_a_whole_word():
    words = ["--help", "--conf=no.yaml", "--model_name=a", "--dataset_name=b"]
    with pytest.raises(inputs.InputError, match="model_name_or_path and dataset_name are needed"):
        inputs.check(words)


def test_an_alias_counts_as_often_as_it_stands():
    assert inputs.expanded(yaml.compose("a: &x [1, 2]\nb: *x\n"), {}) == 1 + 2 * (1 + 3)


def test_of_an_error_its_first_line_is_told():
    assert inputs.first_line(ValueError("\nno such thing.\nmore\n")) == "no such thing"
    assert inputs.first_line(ValueError()) == "ValueError"


def test_the_help_shows_what_matters_without_the_slow_imports(folder):
    for flag in ("--help", "-h"):
        result = call(folder, flag)
        assert result.returncode == 0 and result.stderr == ""
        for key in inputs.FLAGS:
            assert f"\n  --{key} " in result.stdout
    assert len(inputs.FLAGS) < 20 and max(map(len, result.stdout.splitlines())) <= 120


def test_the_help_tells_the_defaults_of_the_configurations():
    # Of two flags for one key, --load_in_4bit and --no_load_in_4bit, argparse takes the first one's default.
    defaults = {action.dest: action.default for action in reversed(Parser()._actions)}
    shown = {key: default for key, (default, _) in inputs.FLAGS.items() if key != "config"}
    assert shown == {key: defaults[key] for key in shown}


def test_all_flags_are_behind_help_all(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help-all"])
    train.main()
    printed = capsys.readouterr().out
    assert {"--adapter_dtype", "--weight_decay", "--lora_dropout", "--dataset_revision"} <= set(printed.split())
