"""The rows that a run reads: a split of a Hub data set, of a local folder or of a file."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from trl import ScriptArguments

from inputs import InputError, first_line

ROW_FORMATS = ({"messages"}, {"prompt", "completion"}, {"text"})


@dataclass
class DataConfig(ScriptArguments):
    """TRL's ScriptArguments; a split may be a slice, such as train[-400:], and dataset_name a JSONL file."""

    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})


def load_split(data: DataConfig, split: str) -> Dataset:
    """One split of a Hub data set, a local directory or a JSONL file; InputError if it is missing or unfit."""
    local_file = Path(data.dataset_name).is_file()
    try:
        if local_file:
            dataset = load_dataset("json", data_files=data.dataset_name, split=split)
        else:
            revision = data.dataset_revision
            dataset = load_dataset(data.dataset_name, data.dataset_config, split=split, revision=revision)
    except Exception as error:  # datasets raises a dozen types; each says in its first line what it missed
        hint = "give a local directory, a JSONL file or the name of a Hub data set"
        if Path(data.dataset_name) == Path("starter/data"):
            hint = "make it: python -m starter.docstrings"
        raise InputError(f"dataset_name {data.dataset_name!r}: {first_line(error)}; {hint}") from error
    if not any(columns <= set(dataset.column_names) for columns in ROW_FORMATS):
        found = ", ".join(dataset.column_names)
        raise InputError(
            f"dataset_name {data.dataset_name!r} has columns {found}; TRL needs messages, prompt + completion, or text"
        )
    return dataset


def fingerprint(*datasets: Dataset) -> str:
    """The first 16 hex digits of the SHA-256 of all rows."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for row in dataset:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
