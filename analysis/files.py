"""Strict JSON and whole files.

Non-finite numbers are the strings "NaN", "Infinity" and "-Infinity", as W&B's API has them.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and what would be right."""


def number(value: Any) -> float | None:
    """The float that a JSON value stands for, non-finite strings included; None where it stands for none."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def strict(value: Any) -> Any:
    """`value` as strict JSON can hold it: string keys, plain types, non-finite floats as strings."""
    if isinstance(value, float | np.floating):
        value = float(value)
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [strict(item) for item in value]
    if isinstance(value, np.integer):
        return int(value)
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def to_json(value: object, lines: int = 2) -> str:
    """Strict JSON text with `lines` levels of nesting spread over lines and everything deeper on one line each."""

    def write(value: object, depth: int) -> str:
        if not isinstance(value, dict | list) or not value or depth == lines:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        indent = "\n" + " " * (depth + 1)
        if isinstance(value, dict):
            inner = [json.dumps(k, ensure_ascii=False) + ": " + write(v, depth + 1) for k, v in value.items()]
            return "{" + indent + ("," + indent).join(inner) + indent[:-1] + "}"
        return "[" + indent + ("," + indent).join(write(v, depth + 1) for v in value) + indent[:-1] + "]"

    return write(strict(value), 0) + "\n"


def save(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises InputError naming a place that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give a writable directory with --output") from None
