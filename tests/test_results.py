"""The committed results: every sentence and figure can be made again from the files beside them, without a network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMITTED = subprocess.check_output(["git", "ls-files", "outputs/*/all_results.json"], cwd=ROOT, text=True).split()


@pytest.mark.parametrize("folder", [Path(path).parent for path in COMMITTED], ids=str)
def test_the_report_and_the_numbers_come_out_again(folder, checkout):
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
