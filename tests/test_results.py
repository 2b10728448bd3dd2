"""The committed results: every sentence and figure can be made again from the files beside them, without a network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import report
from analysis.files import to_json
from analysis.results import results
from analysis.runs import load
from analysis.study import build

ROOT = Path(__file__).parent.parent
COMMITTED = re.findall(r"^!(outputs/\w+)/$", (ROOT / ".gitignore").read_text(), re.MULTILINE)


@pytest.mark.parametrize("folder", COMMITTED)
def test_every_number_and_sentence_comes_out_again(folder):
    found = results(build(*load(ROOT / folder)))
    assert to_json(found, lines=3) == (ROOT / folder / "all_results.json").read_text()
    pictures = [path.name for path in (ROOT / folder).glob("*.png")]
    assert report.render(found, ROOT / folder, pictures) == (ROOT / folder / "README.md").read_text()


@pytest.mark.parametrize("folder", COMMITTED)
def test_the_command_makes_them_without_a_network(folder, checkout):
    for path in (ROOT / folder).glob("lr_*/**/run_data.json"):
        target = checkout / path.relative_to(ROOT)
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    environment = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-m", "analysis", folder], cwd=checkout, env=environment, check=True)
    for name in ("README.md", "all_results.json"):
        assert (checkout / folder / name).read_text() == (ROOT / folder / name).read_text()
    pictures = [{path.name for path in (top / folder).glob("*.png")} for top in (checkout, ROOT)]
    assert pictures[0] == pictures[1] != set()


def test_the_questions_quote_the_reference_experiment():
    found = (ROOT / "outputs/flagship/README.md").read_text().splitlines()
    quotes = re.findall(r"^> (.+(?:\n> .+)*)", (ROOT / "docs/QUESTIONS.md").read_text(), re.MULTILINE)
    quotes = [" ".join(quote.replace("\n> ", " ").split()) for quote in quotes]
    assert len(quotes) > 5
    assert [quote for quote in quotes if not any(quote in line for line in found)] == []


def test_the_readme_quotes_the_committed_report():
    readme = (ROOT / "README.md").read_text()
    folder = re.search(r"\]\(outputs/(\w+)/lr_comparison\.png\)", readme)[1]
    answer = (ROOT / "outputs" / folder / "README.md").read_text().splitlines()[2]
    assert answer in " ".join(readme.replace("\n> ", " ").split())
