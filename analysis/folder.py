"""The folder of one experiment: where it lies, how a report names it, and the link to the newest."""

import os
import re
from pathlib import Path

from analysis.files import InputError

PROJECT = Path(__file__).resolve().parent.parent
OUTPUTS, LATEST = Path("outputs"), Path("outputs/latest")
RECIPE = "recipe.yaml"  # the recipe as used, which experiment.py keeps beside the report
LONGEST = 160  # bytes of a sweep's name in its folder's; file systems take 255, ids included


def of_sweeps(name: str, *sweeps: str) -> Path:
    """Where the report of these sweeps goes: outputs/NAME-ID, the name being the first one's."""
    words = "" if name in sweeps else re.sub(r"[^\w.-]+", "-", name).encode()[:LONGEST].decode(errors="ignore")
    return OUTPUTS / "-".join(filter(None, [words.strip("-."), *sweeps]))


def check_latest() -> None:
    """Raise InputError where the link to the newest experiment cannot be made."""
    if LATEST.is_dir() and not LATEST.is_symlink():
        raise InputError(f"{LATEST} is a folder; move it: it is to be the link to the newest experiment")


def link_latest(directory: Path) -> None:
    """Let outputs/latest point to this folder."""
    LATEST.parent.mkdir(exist_ok=True)
    LATEST.unlink(missing_ok=True)
    LATEST.symlink_to(os.path.relpath(directory, LATEST.parent))


def shown(directory: Path) -> str:
    """The folder as a user of the project writes it; outside the project only its name."""
    full = directory.resolve()
    return full.relative_to(PROJECT).as_posix() if full.is_relative_to(PROJECT) else full.name


def docs(directory: Path) -> str:
    """The relative path from the report to the project's docs."""
    full = directory.resolve()
    return Path(os.path.relpath(PROJECT / "docs", full)).as_posix() if full.is_relative_to(PROJECT) else "../../docs"
