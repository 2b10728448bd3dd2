"""Keep whole sweeps of real runs as a test: python -m tests.analysis.record_history NAME=OUTPUT_DIRECTORY [...].

Writes tests/analysis/recorded/runs.json.gz: {NAME: {"sweeps": [...], "runs": [...]}}, with the columns that the
analysis reads to five digits and without the per-example losses. The class that a person gives each run, by its curves
and not by the code's verdict, stands in recorded/classes.json: {NAME: {run: [class, reason]}}.
"""

import gzip
import json
import sys
from pathlib import Path

from analysis.runs import COLUMNS, STEP

RECORDED = Path(__file__).parent / "recorded"
CONFIG = (
    "learning_rate",
    "seed",
    "max_steps",
    "warmup_steps",
    "vocab_size",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "adapter_dtype",
    "model_name_or_path",
    "dataset_name",
    "data_fingerprint",
    "gang_size",
    "hardware",
    "adapted_modules",
    "trainable_parameters",
)
SUMMARY = ("diverged_at_step", "first_batch_hash", "train_runtime", "tokens_per_second", "peak_memory_gib")


def brief(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def kept(record: dict) -> dict:
    """What of one run the analysis reads, but for the per-example losses."""
    return {
        **{key: record[key] for key in ("id", "sweep", "name", "state", "created_at")},
        "config": {key: record["config"][key] for key in CONFIG if key in record["config"]},
        "summary": {key: brief(value) for key, value in record["summary"].items() if key in SUMMARY},
        "history": [{k: brief(v) for k, v in row.items() if k in (*COLUMNS, STEP)} for row in record["history"]],
    }


def read() -> dict[str, dict]:
    """The recorded sweeps by name."""
    return json.loads(gzip.decompress((RECORDED / "runs.json.gz").read_bytes()))


def classes() -> dict[str, dict[str, list[str]]]:
    """The class that a person gives each recorded run, and why."""
    return json.loads((RECORDED / "classes.json").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> None:
    found = {}
    for name, directory in (argument.split("=", 1) for argument in arguments):
        data = [json.loads(path.read_text()) for path in sorted(Path(directory).glob("lr_*/run_data.json"))]
        found[name] = {"sweeps": data[0]["sweeps"], "runs": [kept(run) for part in data for run in part["runs"]]}
    text = json.dumps(found, allow_nan=False).encode()
    (RECORDED / "runs.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])
