"""The built-in instruction data: `python -m starter.docstrings` writes starter/data/{train,test}.jsonl.

With --characters 800 --per_module 20 --output FOLDER it makes those of the flagship: longer functions, and so more.

Question: a function of the running interpreter's standard library, its docstring removed.
Answer: the first line of that docstring.

Train and test are split by module, so no test function comes from a module that was trained on. The texts
depend on the interpreter's version; train.py logs a fingerprint of them. Nothing is downloaded, nothing is
copied into the repository.
"""

import argparse
import ast
import json
import os
import random
import sys
import sysconfig
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = "Summarize this function in one line.\n\n{source}"
SHORTEST_SOURCE, LONGEST_SOURCE = 40, 200  # characters, 10 to 80 tokens: a step must stay cheap on two CPU cores
SUMMARY_CHARACTERS = range(12, 81)
TEST_EXAMPLES = 320
TEST_EXAMPLES_PER_MODULE = 40  # no module decides the evaluation alone
# Tests, demos and installed packages: not the library's own functions.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "turtledemo"}


def summaries(path: Path, longest: int = LONGEST_SOURCE) -> Iterator[tuple[str, str]]:
    """Yield (source without docstring, first line of the docstring) for each documented function of a file, up to
    `longest` characters of source."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # the library ships files for its own tests of the parser
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        summary = docstring.strip().split("\n")[0].strip() if docstring else ""
        letters = sum(character.isalpha() for character in summary)
        if len(summary) not in SUMMARY_CHARACTERS or len(summary.split()) < 3 or letters < 0.6 * len(summary):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        body = lines[first - 1 : node.body[0].lineno - 1] + lines[node.body[0].end_lineno : node.end_lineno]
        source = textwrap.dedent("\n".join(body)).strip()
        if SHORTEST_SOURCE <= len(source) <= longest:
            yield source, summary


def module(path: Path, library: Path) -> str:
    """The top-level module that a file belongs to; a C accelerator's Python twin counts as the same module."""
    name = path.relative_to(library).parts[0].removesuffix(".py")
    return name.removeprefix("_").removeprefix("py") if name.startswith("_") else name


def build(
    library: Path, longest: int = LONGEST_SOURCE, per_module: int = TEST_EXAMPLES_PER_MODULE
) -> dict[str, list[dict]]:
    """Both splits as TRL's conversational `messages` rows with the function's module; deterministic per interpreter."""
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(library).parts):
            continue
        name = module(path, library)
        split = "test" if zlib.crc32(name.encode()) % 4 == 0 else "train"
        for source, summary in summaries(path, longest):
            if source in seen:  # copies between modules would leak from one split into the other
                continue
            seen.add(source)
            messages = [
                {"role": "user", "content": INSTRUCTION.format(source=source)},
                {"role": "assistant", "content": summary},
            ]
            splits[split].append({"messages": messages, "module": name})
    answers = {row["messages"][1]["content"] for row in splits["train"]}
    for rows in splits.values():
        random.Random(0).shuffle(rows)
    taken: Counter[str] = Counter()
    test = []
    for row in splits["test"]:
        if row["messages"][1]["content"] not in answers and taken[row["module"]] < per_module:
            taken[row["module"]] += 1
            test.append(row)
    return {"train": splits["train"], "test": test[:TEST_EXAMPLES]}


def main() -> None:
    """Write the two files and print how many examples they hold."""
    parser = argparse.ArgumentParser(prog="python -m starter.docstrings")
    parser.add_argument("--characters", type=int, default=LONGEST_SOURCE, help="of the longest function")
    parser.add_argument("--per_module", type=int, default=TEST_EXAMPLES_PER_MODULE, help="test functions, at most")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    options = parser.parse_args()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    splits = build(Path(sysconfig.get_paths()["stdlib"]), options.characters, options.per_module)
    for split, rows in splits.items():
        new = folder / f".{split}.{os.getpid()}"  # whoever reads meanwhile, or writes, sees whole files alone
        new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        new.replace(folder / f"{split}.jsonl")
        modules = len({row["module"] for row in rows})
        print(f"{folder / split}.jsonl: {len(rows)} functions of {modules} modules of Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
