"""What the user wrote, checked as far as that is possible without torch, whose import takes seconds.

train.py asks here before its other imports, so that its help and a wrong file name are answered at once.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

USAGE = "train.py --config RECIPE [--KEY VALUE ...]"
# The flags that matter first: the default, which is train.py's (a test compares them), and the meaning.
FLAGS = {
    "config": (None, "the recipe: a YAML file of these flags; a flag given here wins"),
    "model_name_or_path": (None, "the base model: a folder, or a name on the Hub"),
    "model_revision": ("main", "branch, tag or commit of a model on the Hub"),
    "dataset_name": (None, "rows of messages, prompt + completion, or text: a folder, a file, or a name on the Hub"),
    "dataset_train_split": ("train", "rows to train on: a split or a slice, e.g. train[:-400]"),
    "dataset_test_split": ("test", "rows for the evaluations: a split, a slice, or a file"),
    "assistant_only_loss": (False, "messages: the loss counts the answers' tokens, not the questions'"),
    "max_length": (1024, "tokens of a row; the rest is cut off"),
    "learning_rate": (2e-5, "the peak; what sweep.yaml varies"),
    "warmup_steps": (0.03, "steps up to the peak, or a share of all steps"),
    "lr_scheduler_type": ("constant_with_warmup", "what the rate does after the warm-up, e.g. cosine"),
    "max_steps": (-1, "optimizer steps; -1: as many as num_train_epochs (3) takes"),
    "per_device_train_batch_size": (8, "rows of a step on each GPU"),
    "gradient_accumulation_steps": (1, "times that many"),
    "lora_r": (16, "rank of the adapter"),
    "lora_alpha": (32, "the adapter's output is scaled by lora_alpha / lora_r"),
    "load_in_4bit": (True, "keep the frozen base in 4 bits (QLoRA)"),
    "seed": (42, "of the data's order and of the adapter's start"),
    "output_dir": ("outputs/adapters", "where the adapter goes, in a folder of its own"),
}
DATA_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}  # suffix and `datasets` builder
POSITIVE = (
    "learning_rate",
    "max_length",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lora_r",
    "lora_alpha",
    "adam_epsilon",
)

SEEDS = (f"whole number from 0 to {2**32 - 1}", 2**32 - 1)  # NumPy's
RANGES = {  # from 0
    "seed": SEEDS,
    "data_seed": SEEDS,
    "lora_dropout": ("number from 0 to 1", 1),
    "weight_decay": ("number from 0 up", math.inf),  # below, the weights would grow by themselves
}
LARGEST_FILE, MOST_NODES = 100_000, 100_000  # bytes of a YAML file, and nodes once its aliases are written out


class InputError(Exception):
    """Something the user wrote is wrong; the message names it and says what would be right."""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def answer_at_once(description: str, arguments: list[str]) -> None:
    """Print the help, or what is plainly wrong, and exit; return if there is nothing to say."""
    if "--help" in arguments or "-h" in arguments:
        print(f"usage: {USAGE}\n\n{description}")
        for key, (default, meaning) in FLAGS.items():
            print(f"  --{key:<29} {meaning}" + ("" if default is None else f" (default: {default})"))
        print("\nEvery key of TRL's SFTConfig, ModelConfig and ScriptArguments is a flag: --help-all")
        sys.exit(0)
    if "--help-all" in arguments:
        return
    try:
        check(arguments)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def read_yaml(path: Path, flag: str) -> dict:
    """A mapping from a YAML file. InputError, before anything is expanded, for one that would not fit in memory."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(f"{flag} {path}: {path.stat().st_size:,} bytes; the most is {LARGEST_FILE:,}")
        text = path.read_text(encoding="utf-8")
        if expanded(yaml.compose(text, yaml.SafeLoader), {}) > MOST_NODES:
            raise InputError(f"{flag} {path}: its aliases (*name) stand for more than {MOST_NODES:,} values")
        content = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{flag} {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path}: expected `key: value` lines")
    return content


def expanded(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many nodes there are below this one when every alias is written out; infinite for one inside itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = itertools.chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(expanded(part, known) for part in flat)
    return known[id(node)]


def split(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The recipe's path, as --config FILE or --config=FILE gives it, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        given, flags = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    return given.config, flags


def read(arguments: list[str]) -> tuple[dict, list[str]]:
    """The recipe's settings, and the arguments beside it."""
    path, flags = split(arguments)
    if path is None:
        return {}, flags
    recipe = read_yaml(path, "--config")
    if not all(isinstance(key, str) for key in recipe):
        raise InputError(f"--config {path}: expected `key: value` lines, one per setting")
    if "env" in recipe:
        raise InputError(f"--config {path}: remove the block env, which would set environment variables")
    return recipe, flags


def check(arguments: list[str]) -> None:
    """Raise InputError for a recipe, model folder, data file or number that cannot be right."""
    recipe, flags = read(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for key in {*FLAGS, *POSITIVE, *RANGES}:
        parser.add_argument(f"--{key}", f"--{key.replace('_', '-')}", dest=key, nargs="?", default=argparse.SUPPRESS)
    settings = recipe | vars(parser.parse_known_args(flags)[0])
    if not settings.get("model_name_or_path") or not settings.get("dataset_name"):
        raise InputError("model_name_or_path and dataset_name are needed; a recipe sets them: --config RECIPE")
    check_model_folder(str(settings["model_name_or_path"]))
    check_data_file("dataset_name", str(settings["dataset_name"]))
    for key in ("dataset_train_split", "dataset_test_split"):
        if Path(split := str(settings.get(key, ""))).suffix in DATA_FORMATS:
            check_data_file(key, split)
    check_numbers(settings)


def check_model_folder(name: str) -> None:
    """Raise InputError unless a model that is named by its path is a folder with all of a model."""
    folder = Path(name)
    if is_path(name) and not folder.exists():
        raise InputError(f"model_name_or_path {name}: no such folder")
    if folder.is_file():
        raise InputError(f"model_name_or_path {name} is a file; give the model's folder")
    if not folder.is_dir():
        return
    missing = f"model_name_or_path {name} is a folder without"
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        hint = "it holds an adapter; give its base model" if adapter else "give one that save_pretrained has written"
        raise InputError(f"{missing} config.json; {hint}")
    if not any(folder.glob("*.safetensors")):
        hint = "save it anew with save_pretrained" if any(folder.glob("*.bin")) else "copy the model's weights there"
        raise InputError(f"{missing} *.safetensors; {hint}")
    if not any(file for pattern in ("token*", "vocab*", "spiece*", "*.tiktoken") for file in folder.glob(pattern)):
        raise InputError(f"{missing} a tokenizer; copy the model's tokenizer.json and tokenizer_config.json there")


def check_data_file(key: str, name: str) -> None:
    if is_path(name) and not Path(name).exists():
        raise InputError(f"{key} {name}: no such file or folder")
    if Path(name).is_file() and Path(name).suffix not in DATA_FORMATS:
        raise InputError(f"{key} {name}: give a file that ends in {', '.join(DATA_FORMATS)}, or a folder of such files")


def is_path(name: str) -> bool:
    """Whether a name cannot be one of the Hub's, which are NAME or OWNER/NAME."""
    return Path(name).suffix in DATA_FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1


def check_numbers(settings: Mapping) -> None:
    """Raise InputError for a number with which nothing could be trained; what is no number is left to TRL's parser."""
    numbers = {}
    numeric = {*POSITIVE, *RANGES, *(key for key, (default, _) in FLAGS.items() if type(default) in (int, float))}
    for key, value in settings.items():
        try:
            numbers[key] = float(str(value)) if key in numeric or isinstance(value, float) else 0.0
        except ValueError:
            continue
        if not math.isfinite(numbers[key]):
            raise InputError(f"{key}: {value} is not a finite number")
    for key, (kind, most) in RANGES.items():
        if not 0 <= numbers.get(key, 0) <= most:
            raise InputError(f"{key}: {settings[key]} cannot be; give a {kind}")
    for key in POSITIVE:
        if numbers.get(key, 1) <= 0:
            raise InputError(f"{key}: {settings[key]} cannot be; give a number above 0")
    if numbers.get("max_steps", 1) <= 0 and not (numbers["max_steps"] == -1 and "num_train_epochs" in settings):
        hint = "give the number of steps, or num_train_epochs alone"
        raise InputError(f"max_steps: {settings['max_steps']} trains nothing; {hint}")
