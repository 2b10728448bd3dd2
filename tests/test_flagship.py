"""From nothing to a report and what it proposes by recipes/flagship.sh; here with the starter's base and one sweep."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PARTS = ("analysis", "gang", "local_wandb", "recipes", "starter")


def test_the_script_goes_from_the_data_to_the_report(tmp_path):
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "data*"))
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.jinja")):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "starter/model", tmp_path / "outputs/flagship_base")
    recipe = tmp_path / "recipes/flagship.yaml"
    tiny = {"max_steps": 3, "max_length": 256, "per_device_train_batch_size": 2, "dataset_test_split": "test[:8]"}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | tiny))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(
        [tmp_path / "recipes/flagship.sh", "repeats"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    logs = "".join(path.read_text() for path in (tmp_path / "outputs/flagship_logs").glob("*"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + logs[-3000:]
    results = json.loads((tmp_path / "outputs/flagship/all_results.json").read_text())
    assert [sweep["name"] for sweep in results["sweeps"]] == ["flagship, repeats", "round-1"]
    given, proposed = ([r for r in results["runs"] if r["sweep"] == sweep["id"]] for sweep in results["sweeps"])
    assert [run["learning_rate"] for run in given] == [2e-4, 1e-3, 5e-3] and proposed
    assert {run["state"] for run in results["runs"]} == {"finished"}
    assert (tmp_path / "outputs/flagship/README.md").exists()


def test_every_sweep_of_the_script_is_there_and_runs_the_recipe():
    script = (ROOT / "recipes/flagship.sh").read_text()
    (names,) = [line.split("set -- ")[1].split() for line in script.splitlines() if line.startswith("[ $#")]
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "recipes/flagship").glob("*.yaml")}
    assert sorted(names) == sorted(files)
    assert {sweep["command"][4] for sweep in files.values()} == {"recipes/flagship.yaml"}
    rates = [rate for sweep in files.values() for rate in sweep["parameters"]["learning_rate"]["values"]]
    assert {type(rate) for rate in rates} == {float}
