"""What CONTRIBUTING.md and the pages of docs/ name exists, and the programs of docs/upstream.md still show a fault."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "docs/how-it-works.md", "docs/upstream.md", "docs/search.md")]
CONTRIBUTING, TOUR, UPSTREAM, _ = PAGES
FILE = re.compile(r"`([\w./-]+\.(?:py|md|yaml|txt|jinja|toml|sh|graphql|js|svg)|Makefile|\.ci/run)`")
FUNCTION = re.compile(r"`([\w.]+)` (?:in|of) `([\w/]+(?:\.py|/))`")  # `name` in `file.py` means a place in the code
MADE = ("run_data.json", "all_results.json", "report.html", "recipe.yaml")  # what runs and reports write


def names(path: Path) -> set[str]:
    """The functions, classes (with their methods) and constants of a module, or of all in a folder."""
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    found = set()
    for node in (node for file in files for node in ast.parse(file.read_text()).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{part.name}" for part in inner if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_every_file_that_it_names_exists(document):
    named = {name for name in FILE.findall(document.read_text()) if Path(name).name not in MADE}
    linked = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", document.read_text()) if "://" not in link}
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [link for link in linked if link and not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_every_function_that_it_names_stands_in_its_file(document):
    places = FUNCTION.findall(document.read_text())
    assert places
    assert [f"{name} in {file}" for name, file in places if name not in names(ROOT / file)] == []


def privates() -> list[tuple[str, str, str]]:
    """The first, second and last column of CONTRIBUTING.md's table: a private, who uses it, the test that sees it."""
    section = CONTRIBUTING.read_text().split("## Upstream privates\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", row[0])[0], row[1], row[-1]) for row in rows]


@pytest.mark.parametrize(("name", "users", "test"), privates(), ids=lambda value: value if "." in value else None)
def test_every_private_exists_and_is_used_where_the_table_says(name, users, test):
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):  # the longest part that is a module
        try:
            found = importlib.import_module(".".join(words[:end]))
        except ModuleNotFoundError:
            continue
        break
    for word in words[end:-1]:
        found = getattr(found, word)
    source = Path(importlib.import_module(found.__module__).__file__) if isinstance(found, type) else None
    assert hasattr(found, words[-1]) or f"self.{words[-1]} = " in source.read_text(), f"{name} is no more"
    for user in FILE.findall(users):
        assert words[-1] in (ROOT / user).read_text()
    assert FILE.findall(test)


def test_the_drawing_is_that_of_its_program_and_names_what_exists():
    drawn = runpy.run_path(str(ROOT / "docs/how_it_works.py"))
    assert drawn["drawing"]() == (ROOT / "docs/how-it-works.svg").read_text(encoding="utf-8")
    places = {(what, where) for _, _, _, what, where in drawn["STOPS"] if where.endswith(".py")}
    assert [f"{what} in {where}" for what, where in places if what not in names(ROOT / where)] == []
    assert places <= set(FUNCTION.findall(TOUR.read_text()))


PROGRAMS = re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", UPSTREAM.read_text(), re.MULTILINE | re.DOTALL)
MISSING = {  # the first line of a program -> whether this machine lacks it
    "# needs a GPU": not torch.cuda.is_available(),
    "# needs a CPU with AVX512-BF16": not bitsandbytes.functional.has_avx512bf16(),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", [code for _, code in PROGRAMS], ids=[name for name, _ in PROGRAMS])
def test_what_we_patch_upstream_is_still_needed(program):
    needs = program.splitlines()[0]
    if MISSING.get(needs):
        pytest.skip(needs.removeprefix("# "))
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"mended upstream? then the patch can go: {done.stderr[-2000:]}"
