"""The README's way from a model folder and rows of one's own to a report and its adapter, followed to the letter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml

import train
from settings import parse

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("## Your own model and data\n")[1].split("\n## ")[0]
CHECK = (ROOT / "docs/adapter.md").read_text().split("## Check it\n")[1]


def block(language: str, text: str = SECTION) -> str:
    return text.split(f"```{language}\n")[1].split("```")[0]


KINDS = [json.loads(line) for line in block("json").splitlines()]
COMMANDS = [line.split("  #")[0].strip() for line in block("bash").splitlines()]


@pytest.fixture
def own(checkout, monkeypatch):
    """Lays the README's recipe, a model and rows of one kind into a checkout; the steps are fewer."""

    def lay(kind: dict) -> Path:
        shutil.copytree(ROOT / "starter/model", checkout / "my-model")
        (checkout / "my-data").mkdir()
        for split, numbers in (("train", range(2, 40)), ("test", range(40, 52))):
            rows = (json.dumps(kind).replace("2 +", f"{n} +").replace("5", str(n + 3)) for n in numbers)
            (checkout / f"my-data/{split}.jsonl").write_text("".join(row + "\n" for row in rows))
        recipe = block("yaml").replace("max_steps: 100", "max_steps: 3").replace("batch_size: 16", "batch_size: 4")
        recipe = recipe if "messages" in kind else recipe.replace("only_loss: true", "only_loss: false")
        (checkout / "my-recipe.yaml").write_text(recipe)
        monkeypatch.chdir(checkout)
        return checkout

    return lay


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " + ".join(kind))
def test_each_kind_of_row_is_read(own, kind):
    own(kind)
    splits = train.read_data(*parse(["--config", "my-recipe.yaml"]))
    assert [len(split) for split in splits] == [38, 12]
    if "messages" not in kind:
        for file in Path("my-data").glob("*.jsonl"):
            pandas.read_json(file, lines=True, dtype=False).to_csv(file.with_suffix(".csv"), index=False)
            file.unlink()
        again = train.read_data(*parse(["--config", "my-recipe.yaml"]))
        assert [split.to_list() for split in again] == [split.to_list() for split in splits]


def test_the_commands_lead_to_a_report(own):
    checkout = own(KINDS[0])
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    plain["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{plain['PATH']}"
    outputs = []
    for command in COMMANDS:
        result = subprocess.run(["bash", "-c", command], cwd=checkout, env=plain, capture_output=True, text=True)
        assert result.returncode == 0, command + "\n" + result.stdout + result.stderr
        outputs.append(result.stdout)
    assert "train (train): 38 rows" in outputs[1] and "⟦5</s>⟧" in outputs[1]
    report = (checkout / "outputs/latest/README.md").read_text()
    assert "my-model" in report and "my-data" in report
    rates = yaml.safe_load((ROOT / "sweep.yaml").read_text())["parameters"]["learning_rate"]["values"]
    assert len(list((checkout / "outputs/latest").glob("lr_*/run_data.json"))) == len(rates)
    (checkout / "check.py").write_text(block("python", report) + block("python", CHECK))
    checked = subprocess.run([sys.executable, "check.py"], cwd=checkout, env=plain, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    loss = json.loads((checkout / "outputs/latest/all_results.json").read_text())["adapter"]["loss"]
    assert float(checked.stdout.split()[-1]) == pytest.approx(loss, abs=1e-4)
