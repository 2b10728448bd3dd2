"""The committed results: every sentence and figure can be made again from the files beside them, without a network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = sorted(path.parent for path in ROOT.glob("outputs/*/all_results.json") if "learning_rate" not in str(path))


@pytest.fixture(params=RESULTS, ids=lambda path: path.name)
def rebuilt(request):
    """A committed result, and a copy of its raw data beside it that has been analysed anew."""
    copy = request.param.with_name(f"{request.param.name}-rebuilt")
    shutil.rmtree(copy, ignore_errors=True)
    for path in request.param.glob("lr_*/**/run_data.json"):
        target = copy / path.relative_to(request.param)
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    environment = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-m", "analysis", str(copy)], cwd=ROOT, env=environment, check=True)
    yield request.param, copy
    shutil.rmtree(copy)


def test_the_report_and_the_numbers_come_out_again(rebuilt):
    committed, copy = rebuilt
    for name in ("README.md", "all_results.json"):
        assert (copy / name).read_text().replace(copy.name, committed.name) == (committed / name).read_text()
    assert {path.name for path in copy.glob("*.png")} == {path.name for path in committed.glob("*.png")}


def test_the_readme_quotes_the_committed_report():
    readme = (ROOT / "README.md").read_text()
    folder = re.search(r"\]\(outputs/(\w+)/lr_comparison\.png\)", readme)[1]
    answer = (ROOT / "outputs" / folder / "README.md").read_text().splitlines()[2]
    assert answer in " ".join(readme.replace("\n> ", " ").split())
