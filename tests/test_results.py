"""The committed results: every sentence and figure can be made again from the files beside them, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image

from analysis import report, tables
from analysis.files import to_json
from analysis.results import results
from analysis.runs import load
from analysis.study import build
from analysis.words import rate_label

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
    for name in ("README.md", "all_results.json", "report.html"):
        made, kept = (re.sub(r"[\w+/=]{10000,}", "", (top / folder / name).read_text()) for top in (checkout, ROOT))
        assert made == kept, name  # but for what is packed into the page: Plotly, and the figure that follows
    made, kept = ({path.name: path for path in (top / folder).glob("*.png")} for top in (checkout, ROOT))
    assert made.keys() == kept.keys() != set()
    for name in made:
        one, other = (np.asarray(Image.open(path[name]).convert("RGB"), int) for path in (made, kept))
        # A glyph's edge may differ between machines; another number moves a line, a thousandth of the picture or more.
        assert (np.abs(one - other).max(2) > 64).mean() < 2e-4, name


def test_the_reference_experiment_is_small_enough_to_keep():
    assert sum(path.stat().st_size for path in (ROOT / "outputs/flagship").rglob("*") if path.is_file()) < 15e6


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


def test_the_questions_show_the_reference_experiments():
    """All but one are not committed whole: docs/flagship_again.json has parts of their all_results.json."""
    first, third, weak = json.loads((ROOT / "docs/flagship_again.json").read_text())
    second = json.loads((ROOT / "outputs/flagship/all_results.json").read_text())
    three = [first, second, third]
    again, weaker = (section(title) for title in ("Does it come out again?", "Does a weaker base want another rate?"))
    for shown, experiments in ((again, three), (weaker, [second, weak])):
        rows, lines = side_by_side(experiments), [line for line in shown.splitlines() if line.startswith("|")]
        assert lines[2:10] + lines[12:] == [f"| {' | '.join(row)} |" for row in rows]
    high = [run["behaviour"] for one in three for run in one["runs"] if run["learning_rate"] == 5e-3]
    assert f"{high.count('diverged')} of {len(high)} runs" in again
    solo = [run for run in weak["repeats"] if run["solo"] and not run["differs"]]
    low = [run["difference"] for run in solo if run["learning_rate"] < 5e-3]
    assert (len(solo), len(low)) == (12, 9)
    assert f"{max(map(abs, low)):.4f} apart (mean of nine\n  {mean(low):.5f})".replace("-", "−") in weaker


def section(title: str) -> str:
    return (ROOT / "docs/QUESTIONS.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def side_by_side(experiments: list[dict]) -> list[list[str]]:
    """Rows of both tables: what each rate costs, what each control changes (in the report's order), the hypotheses."""
    rows = []
    for same in zip(*(one["rates"] for one in experiments), strict=True):
        words = [", ".join(f"{word} {count}/3" for word, count in x["behaviours"].items()) for x in same]
        behaviours = words if len(set(words)) > 1 else words[:1]
        rows.append([rate_label(same[0]["learning_rate"]), *map(cost, same), " · ".join(behaviours)])
    reported = next(one for one in experiments if "recipe" in one)
    for differs in (control["differs"] for control in reported["controls"]):
        name = ", ".join(f"{key} = {value}" for key, value in differs.items())
        points = [next(c["points"] for c in one["controls"] if c["differs"] == differs) for one in experiments]
        for same in zip(*points, strict=True):
            found = [tables.with_interval(x["difference"]["mean"], x["difference"]["interval"], "+.3f") for x in same]
            rows.append([f"{name}, {rate_label(same[0]['learning_rate'])}", *found])
    for same in zip(*(one["hypotheses"] for one in experiments), strict=True):
        rows.append([same[0]["name"], *(x["verdict"] for x in same)])
    return rows


def cost(rate: dict) -> str:
    """At the end with its interval, and at the best checkpoints."""
    end, best = rate["difference"]["end"], rate["difference"]["best"]
    return f"{tables.with_interval(end['mean'], end['interval'], '+.3f')}; {best['mean']:+.3f}" if end else "best"
