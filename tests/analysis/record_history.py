"""Keep one run of each behaviour class as a test: python -m tests.analysis.record_history OUTPUT_DIRECTORY.

Writes tests/analysis/recorded/CLASS.json for classes that have none yet. Look at the curve before committing the file:
its "behaviour" is what a person says, and the test holds the code to it.
"""

import json
import sys
from pathlib import Path

from analysis.files import to_json
from analysis.runs import COLUMNS, RECIPE_KEYS, STEP, load
from analysis.study import build

RECORDED = Path(__file__).parent / "recorded"
CONFIG = ("learning_rate", "seed", "vocab_size", *RECIPE_KEYS)


def main(directory: Path) -> None:
    study = build(*load(directory))
    raw = [run for path in directory.glob("lr_*/run_data.json") for run in json.loads(path.read_text())["runs"]]
    for record in raw:
        evidence, verdict = study.evidence[record["id"]], study.verdicts[record["id"]]
        path = RECORDED / f"{verdict.behaviour.replace(', ', '-')}.json"
        if path.exists():
            continue
        kept = {
            "id": record["id"],
            "state": record["state"],
            "config": {key: record["config"][key] for key in CONFIG if key in record["config"]},
            "summary": {k: v for k, v in record["summary"].items() if k == "diverged_at_step"},
            "history": [{k: v for k, v in row.items() if k in (*COLUMNS, STEP)} for row in record["history"]],
        }
        judged = {
            "behaviour": verdict.behaviour,
            "base_loss": evidence.base_loss,
            "best_loss": evidence.best_loss,
            "near_best": evidence.near_best,
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(to_json(judged | {"run": kept}, lines=3), encoding="utf-8")
        print(f"{path}: {verdict.reason}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
