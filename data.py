"""The rows that a run reads: two splits of a Hub data set, of a local folder, or files of one's own.

dataset_name: my/folder                  # with train.jsonl and test.jsonl
dataset_name: my/train.jsonl             # and dataset_test_split: my/test.jsonl
dataset_name: my/rows.jsonl              # and slices: train[:-400] and train[-400:] as the two splits
dataset_name: someone/data-set           # of the Hub, with dataset_revision
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from trl import ScriptArguments

from inputs import InputError, first_line

ROW_FORMATS = ({"messages"}, {"prompt", "completion"}, {"text"})


@dataclass
class DataConfig(ScriptArguments):
    """TRL's ScriptArguments; a split may be a slice, such as train[-400:], and dataset_name a JSONL file."""

    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})


def load_splits(data: DataConfig) -> tuple[Dataset, Dataset]:
    """The rows for training and for the evaluations; of a Hub data set both at one commit, noted in the revision."""
    train = load_split(data, data.dataset_train_split)
    data.dataset_revision = commit(data_file(train)) or data.dataset_revision
    return train, load_split(data, data.dataset_test_split)


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
        if "gated" in str(error):
            hint = f"ask for access at https://huggingface.co/datasets/{data.dataset_name} and log in: hf auth login"
        elif Path(data.dataset_name) == Path("starter/data"):
            hint = "make it: python -m starter.docstrings"
        raise InputError(f"dataset_name {data.dataset_name!r}: {first_line(error)}; {hint}") from error
    if not any(columns <= set(dataset.column_names) for columns in ROW_FORMATS):
        found = ", ".join(dataset.column_names)
        raise InputError(
            f"dataset_name {data.dataset_name!r} has columns {found}; TRL needs messages, prompt + completion, or text"
        )
    if not Path(data.dataset_name).exists():
        check_commit(data, dataset)
    return dataset


def check_commit(data: DataConfig, dataset: Dataset) -> None:
    """Without the Hub, `datasets` takes the newest rows of its cache, of whatever revision; refuse another one."""
    asked = data.dataset_revision or "main"
    folder = repo_folder_name(repo_id=data.dataset_name, repo_type="dataset")
    reference = Path(HF_HUB_CACHE, folder, "refs", asked)
    expected = reference.read_text() if reference.is_file() else asked
    got = commit(data_file(dataset))
    if got and commit(f"/{expected}/") not in (got, None):
        raise InputError(
            f"dataset_name {data.dataset_name!r}: without the Hub the cache gives commit {got[:7]}, "
            f"but revision {asked} is {expected[:7]}; connect, or ask for dataset_revision: {got}"
        )


def data_file(dataset: Dataset) -> str:
    """The cache's file with the rows."""
    return dataset.cache_files[0]["filename"] if dataset.cache_files else ""


def commit(file: str) -> str | None:
    """The commit of a file from the Hub: the cache keeps it in a folder of that name."""
    found = re.search(r"/([0-9a-f]{40})/", file)
    return found and found[1]


def fingerprint(*datasets: Dataset) -> str:
    """The first 16 hex digits of the SHA-256 of all rows."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for row in dataset:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
