"""The rows that a run reads: two splits of a Hub data set, of a local folder, or files of one's own.

dataset_name: my/folder        with train.jsonl and test.jsonl
dataset_name: my/train.jsonl   and dataset_test_split: my/test.jsonl
dataset_name: my/rows.jsonl    and slices: train[:-400] and train[-400:] as the two splits
dataset_name: owner/name       on the Hub, with dataset_revision
"""

import csv
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from datasets import Dataset, Features, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from pyarrow import compute
from trl import ScriptArguments

from inputs import DATA_FORMATS, InputError, first_line

ROW_FORMATS = (("messages",), ("prompt", "completion"), ("text",))
BUILT_IN = Path("starter/data")
SHOWN_CHARACTERS = 300  # of a question and of an answer, in the row that a run shows


@dataclass
class DataConfig(ScriptArguments):
    """TRL's ScriptArguments; a split may be a slice, such as train[-400:], or a file of its own."""

    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})


def load_splits(data: DataConfig, assistant_only_loss: bool = False) -> tuple[Dataset, Dataset]:
    """The rows for training and for the evaluations; of a Hub data set both at one commit, noted in the revision."""
    train = load_split(data, data.dataset_train_split, assistant_only_loss)
    data.dataset_revision = commit(cache_file(train)) or data.dataset_revision
    return train, load_split(data, data.dataset_test_split, assistant_only_loss)


def make_built_in() -> None:
    """The starter's data, once: of several processes the first makes them and the others wait."""
    made = BUILT_IN / "test.jsonl"  # the last that is written
    if made.exists() or not BUILT_IN.parent.is_dir():
        return
    folder = os.open(BUILT_IN.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not made.exists():
            subprocess.run([sys.executable, "-m", "starter.docstrings"], check=True)
    finally:
        os.close(folder)


def load_split(data: DataConfig, split: str, assistant_only_loss: bool = False) -> Dataset:
    """One split of a Hub data set, of a local folder or of a file; InputError if it is missing or unfit."""
    source, part, name = data.dataset_name, split, f"dataset_name {data.dataset_name}"
    if Path(split).suffix in DATA_FORMATS:
        source, part, name = split, "train", split
    path = Path(source)
    if path == BUILT_IN:
        make_built_in()
    try:
        if path.is_file():
            dataset = load_dataset(DATA_FORMATS[path.suffix], data_files=source, split=part, **csv_options(path))
        else:
            if path.is_dir():
                check_folder(path, data.dataset_config)
            options = {"revision": data.dataset_revision} | csv_options(path)
            dataset = load_dataset(source, data.dataset_config, split=part, **options)
    except InputError:
        raise
    except Exception as error:  # datasets raises a dozen types; each says in its first line what it missed
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        fault = broken_file(path) or first_line(cause or error)
        raise InputError(f"{name}: {fault}{advice(source, error)}") from error
    if not path.exists():
        check_commit(data, dataset)
    try:
        check_rows(dataset, assistant_only_loss)
    except InputError as error:
        raise InputError(f"{name}, {part}: {error}") from None
    except UnicodeDecodeError:  # nobody has looked at the text until here
        raise InputError(f"{name}: {broken_file(path) or 'not in UTF-8'}") from None
    return dataset


def check_folder(folder: Path, configuration: str | None) -> None:
    """Raise InputError for files of which `datasets` would make one split, or none, without being told to."""
    if (folder / "README.md").exists() and "configs:" in (folder / "README.md").read_text(encoding="utf-8"):
        return  # it says itself which file belongs to which split
    splits = load_dataset_builder(str(folder), configuration).config.data_files
    taken = [Path(file).relative_to(os.path.realpath(folder)) for files in splits.values() for file in files]
    unclear = {file.relative_to(folder) for file in data_files(folder)} - set(taken)
    if len(taken) > 1 and list(splits) == ["train"]:
        unclear |= {file for file in taken if "train" not in str(file)}
    if unclear:
        listed = ", ".join(sorted(map(str, unclear)))
        hint = "name the files train.jsonl and test.jsonl, or give two: dataset_name and, as a path, dataset_test_split"
        raise InputError(f"dataset_name {folder}: {listed}: to train on or to test on? {hint}")


def csv_options(path: Path) -> dict:
    """How `datasets` reads CSV files: all as text, or the answers 5, 007 and None would be numbers and nothing."""
    files = data_files(path)
    if {file.suffix for file in files} != {".csv"}:
        return {}
    columns = {file: sorted(header(file)) for file in files}
    for file, names in columns.items():
        if names != columns[files[0]]:
            raise InputError(f"{file}: columns {', '.join(names)}: all files of a data set need the same columns")
    text = Features({name: Value("string") for name in columns[files[0]]})
    return {"features": text, "keep_default_na": False, "na_values": [""]}


def header(file: Path) -> list[str]:
    """The first line of a CSV file that is not blank. Were the next one longer, pandas would shift its fields."""
    csv.field_size_limit(sys.maxsize)  # a row may be long; 131,072 characters is Python's limit
    with open(file, encoding="utf-8-sig", newline="") as lines:
        filled = filter(None, csv.reader(lines))
        if not (names := next(filled, None)):
            raise InputError(f"{file} is empty")
        if len(row := next(filled, names)) > len(names):
            hint = "a text with a comma needs quotes"
            raise InputError(f"{file}: the first row has {len(row)} fields and the header {len(names)}; {hint}")
    return names


def data_files(path: Path) -> list[Path]:
    """The file, or those of the folder that may hold rows."""
    files = [path] if path.is_file() else sorted(path.rglob("[!.]*"))
    return [file for file in files if file.suffix in DATA_FORMATS]


def broken_file(path: Path) -> str | None:
    """What is wrong with a local file, by file and line; None if it is not seen here."""
    for file in data_files(path):
        if not file.stat().st_size:
            return f"{file} is empty"
        if file.suffix == ".jsonl":
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        if line.strip() and not isinstance(json.loads(line.rstrip()), dict):
                            return f"{file}, line {number}: a row is an object, {{...}}"
                    except json.JSONDecodeError as error:
                        return f"{file}, line {number}, column {error.colno}: {error.msg}"
                    except UnicodeDecodeError:
                        return f"{file}, line {number}: not in UTF-8"
    return None


def advice(source: str, error: Exception) -> str:
    if "gated" in str(error):
        return f"; ask for access at https://huggingface.co/datasets/{source} and log in: hf auth login"
    if "Couldn't cast" in str(error.__cause__):
        return ": all files of a data set need the same columns"
    if "Unknown split" in str(error) and Path(source).is_file():
        return "; slice the file, as train[:-400] and train[-400:], or give a second file as dataset_test_split"
    return "" if Path(source).exists() else "; give a local folder, a file, or the name of a Hub data set"


def row_format(dataset: Dataset) -> tuple[str, ...]:
    """The columns that TRL will read; InputError if it would find none."""
    for columns in ROW_FORMATS:
        if set(columns) <= set(dataset.column_names):
            return columns
    found = ", ".join(dataset.column_names)
    raise InputError(f"columns {found}; TRL needs messages, prompt + completion, or text")


def check_rows(dataset: Dataset, assistant_only_loss: bool) -> None:
    """Raise InputError for a split without rows, or for its first row with which TRL would fail."""
    if not len(dataset):
        raise InputError("no rows")
    columns = row_format(dataset)
    conversational = is_conversational(dataset)
    if columns == ("messages",) and not conversational:
        raise InputError("messages: a list of turns is expected; .jsonl and .parquet can hold one, .csv cannot")
    if assistant_only_loss and not conversational:
        counted = "every token" if columns == ("text",) else "the completion's tokens"
        rows = " + ".join(columns)
        raise InputError(f"assistant_only_loss: true needs messages; of {rows} {counted} count: set it to false")
    for number, row in enumerate(dataset.select_columns(list(columns)), 1):
        turns = [turn for value in row.values() for turn in (value if isinstance(value, list) else [value])]
        for turn in turns:
            text = turn.get("content") if isinstance(turn, dict) else turn
            if not isinstance(text, str) and not (isinstance(turn, dict) and turn.get("tool_calls")):
                raise InputError(f"row {number}: {text!r} stands where text is expected")
            if isinstance(turn, dict) and not turn.get("role"):
                raise InputError(f"row {number}: a turn without a role; give each one, such as user or assistant")
        if len({type(value) for value in row.values()}) > 1:
            raise InputError(f"row {number}: of {' and '.join(columns)} one is text and one a list of turns")
        if isinstance(next(iter(row.values())), list) != conversational:
            raise InputError(f"row {number}: text where others have a list of turns, or the other way round")
        if assistant_only_loss and not any(turn["role"] == "assistant" for turn in turns):
            raise InputError(f"row {number}: no turn of the assistant, so assistant_only_loss has nothing to count")


def is_conversational(dataset: Dataset) -> bool:
    """Whether the rows are turns of a conversation, for which the model needs a chat template."""
    return isinstance(dataset[0][row_format(dataset)[0]], list)


def check_commit(data: DataConfig, dataset: Dataset) -> None:
    """Without the Hub, `datasets` takes the newest rows of its cache, of whatever revision; refuse another one."""
    asked = data.dataset_revision or "main"
    folder = repo_folder_name(repo_id=data.dataset_name, repo_type="dataset")
    reference = Path(HF_HUB_CACHE, folder, "refs", asked)
    expected = reference.read_text() if reference.is_file() else asked
    got = commit(cache_file(dataset))
    if got and commit(f"/{expected}/") not in (got, None):
        raise InputError(
            f"dataset_name {data.dataset_name}: without the Hub the cache gives commit {got[:7]}, "
            f"but revision {asked} is {expected[:7]}; connect, or ask for dataset_revision: {got}"
        )


def cache_file(dataset: Dataset) -> str:
    """The file with the rows in the cache of `datasets`."""
    return dataset.cache_files[0]["filename"] if dataset.cache_files else ""


def commit(file: str) -> str | None:
    """The commit of a file from the Hub: the caches keep it in a folder of that name."""
    found = re.search(r"/([0-9a-f]{40})/", file)
    return found and found[1]


def fingerprint(*datasets: Dataset) -> str:
    """The first 16 hex digits of the SHA-256 of all rows."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for row in dataset:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def shared_rows(train: Dataset, test: Dataset) -> int:
    """How many of the test's rows stand in the training rows too."""
    columns = list(row_format(test))
    if not set(columns) <= set(train.column_names):
        return 0
    seen = {json.dumps(row, sort_keys=True) for row in train.select_columns(columns)}
    return sum(json.dumps(row, sort_keys=True) in seen for row in test.select_columns(columns))


def answered(tokenised: Dataset, split: str, max_length: int | None) -> Dataset:
    """The rows with a token that the loss counts, which the first never is; InputError if there are none.

    A batch of others would have no loss but 0/0, which looks like divergence; TRL leaves them out only where it cuts.
    """
    labels = tokenised.select_columns("labels").with_format("arrow")[:]["labels"].combine_chunks()
    later = compute.list_slice(labels, 1)
    counted = compute.not_equal(compute.list_flatten(later), -100)
    rows = compute.unique(compute.list_parent_indices(later).filter(counted))
    if not len(rows):
        raise InputError(f"{split}: no row has an answer{within(max_length)}")
    return tokenised if len(rows) == len(tokenised) else tokenised.select(rows.to_pylist())


def what_was_read(data: DataConfig, splits: tuple[Dataset, Dataset], trainer, shared: int) -> str:
    """The first lines of a run: rows, tokens and steps, a row, and a warning if rows are shared by both splits.

    The trainer has tokenised the rows, and left out those without an answer (within max_length).
    """
    train, test = splits
    settings = trainer.args
    lines = [
        counts(f"train ({data.dataset_train_split})", train, trainer.train_dataset, settings.max_length),
        counts(f"test ({data.dataset_test_split})", test, trainer.eval_dataset, settings.max_length),
    ]
    rows = len(trainer.train_dataset)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    epochs = settings.num_train_epochs
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(epochs * math.ceil(rows / batch))
    lines.append(f"{steps} steps of {batch} rows, {steps * batch / rows:.2g} epochs")
    if shared:
        lines.append(f"warning: {shared} of {len(test)} test rows are training rows too: the eval loss flatters")
    lines += ["the first row; ⟦⟧ is what the loss counts:", marked(trainer.train_dataset[0], trainer.processing_class)]
    return "\n".join(lines)


def counts(name: str, rows: Dataset, tokenised: Dataset, max_length: int | None) -> str:
    """A split in numbers."""
    table = tokenised.with_format("arrow")[:]
    longest = lengths(tokenised).max()
    labels = compute.list_flatten(table["labels"])
    answers = compute.sum(compute.not_equal(labels, -100)).as_py() / len(labels)
    line = f"{name}: {len(rows):,} rows, {len(labels):,} tokens, longest {longest}, {answers:.0%} of them answers"
    left_out = len(rows) - len(tokenised)
    return line + (f"; {left_out} left out, without an answer{within(max_length)}" if left_out else "")


def within(max_length: int | None) -> str:
    return f" within max_length: {max_length}" if max_length else ""


def lengths(tokenised: Dataset) -> numpy.ndarray:
    """How many tokens each row has."""
    return compute.list_value_length(tokenised.with_format("arrow")["input_ids"][:]).to_numpy()


def highest_token(tokenised: Dataset) -> int:
    return compute.max(compute.list_flatten(tokenised.with_format("arrow")["input_ids"][:])).as_py()


def marked(row: dict, tokenizer) -> str:
    """A tokenised row as text, with what the loss counts in ⟦⟧."""
    parts = []
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for counted, group in itertools.groupby(pairs, lambda pair: pair[1] != -100):
        text = tokenizer.decode([token for token, _ in group])
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[: SHOWN_CHARACTERS // 2]} … {text[-SHOWN_CHARACTERS // 2 :]}"
        parts.append(f"⟦{text}⟧" if counted else text)
    return "".join(parts)
