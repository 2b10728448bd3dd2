"""Records response surfaces of the starter for benchmarks.search: each is one gang, with another rank, batch or data.

    OMP_NUM_THREADS=1 nice python -m benchmarks.record    # adds to surfaces.json what it lacks; a minute or two each

RATES × SEEDS, evaluated after a ninth, a third and all of the steps: a prefix of a constant-rate run is a run.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.grid import ROOT, call, serve
from benchmarks.surfaces import FILE, circumstances

COMMAND = "OMP_NUM_THREADS=1 nice python -m benchmarks.record"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
RATES = [float(f"{10 ** (k / 3):.1e}") for k in range(-13, -4)]  # 4.6e-5 to 2.2e-2
SEEDS = [0, 1, 2]
TEST = 64  # examples: the same for all runs, so fewer make another surface, not a noisier one
# What differs from recipes/starter.yaml; of these every second one is held out.
COMMON = {"per_device_train_batch_size": 4, "max_steps": 36}
VARIATIONS = {
    "rank 4": {"lora_r": 4, "lora_alpha": 8},
    "rank 64, alpha 32": {"lora_r": 64, "lora_alpha": 32},
    "batch 2": {"per_device_train_batch_size": 2, "max_steps": 54},
    "64 rows": {"dataset_train_split": "train[:64]", "max_steps": 54},
    "9 steps": {"max_steps": 9},
    "rank 1": {"lora_r": 1, "lora_alpha": 16},
    "batch 8, 27 steps": {"per_device_train_batch_size": 8, "max_steps": 27},
    "alpha 256": {"lora_alpha": 256},
    "rank 128, alpha 16": {"lora_r": 128, "lora_alpha": 16},
    "batch 1": {"per_device_train_batch_size": 1, "max_steps": 54},
    "32 rows, rank 8": {"dataset_train_split": "train[:32]", "max_steps": 54, "lora_r": 8, "lora_alpha": 16},
    "cosine": {"max_steps": 45, "lr_scheduler_type": "cosine"},
}
# A gang that evaluates four times in all.
GANG = """
import sys, train
train.evaluation_steps = lambda last: {0, -(-last // 9), -(-last // 3), last}
from gang.__main__ import main
sys.exit(main())
"""
READ = """
import json, sys, wandb
for run in wandb.Api().runs(sys.argv[1]):
    rows = [row for row in run.scan_history(keys=["train/global_step", "eval/loss"])]
    print("row", json.dumps([run.config["learning_rate"], run.config["seed"],
                             {int(row["train/global_step"]): row["eval/loss"] for row in rows}]))
"""


def record(name: str, changes: dict, folder: Path, environment: dict[str, str]) -> dict:
    """The final and earlier eval losses of one surface's runs, in nats per token; None where not finite."""
    recipe = yaml.safe_load((ROOT / "recipes/starter.yaml").read_text()) | COMMON | changes
    recipe |= {"dataset_test_split": f"test[:{TEST}]", "output_dir": str(folder / "adapters")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    parameters = {"learning_rate": {"values": RATES}, "seed": {"values": SEEDS}}
    command = ["${env}", "${interpreter}", "${program}", "--config", str(folder / "recipe.yaml"), "${args}"]
    sweep = {"program": "train.py", "method": "grid", "parameters": parameters, "command": command}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    project = re.sub(r"\W+", "-", name)
    create = [sys.executable, "-m", "wandb", "sweep", "--project", project, str(folder / "sweep.yaml")]
    path = re.search(r"wandb agent (\S+)", call(create, environment))[1]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", GANG, path], cwd=ROOT, env=environment | {"WANDB_SILENT": "true"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    read = call([sys.executable, "-c", READ, f"local/{project}"], environment)
    runs = [json.loads(line.removeprefix("row ")) for line in read.splitlines() if line.startswith("row ")]
    steps = sorted({int(step) for *_, losses in runs for step in losses})
    rows = [
        {"learning_rate": rate, "seed": seed, "loss": [finite(losses.get(str(step))) for step in steps]}
        for rate, seed, losses in sorted(runs, key=lambda run: run[:2])
    ]
    seconds = round(time.monotonic() - start)
    return {"name": name, "changes": COMMON | changes, "seconds": seconds, "steps": steps, "runs": rows}


def finite(value: object) -> float | None:
    return round(value, 5) if isinstance(value, float) and math.isfinite(value) else None


def save(found: dict) -> None:
    """One line for each run."""
    lines = [json.dumps(found["about"])]
    for surface in found["surfaces"]:
        *_, (_, runs) = surface.items()
        head = json.dumps({key: value for key, value in surface.items() if key != "runs"})
        rows = ",\n  ".join(map(json.dumps, runs))
        lines.append(f'{head[:-1]}, "runs": [\n  {rows}]}}')
    about, *surfaces = lines
    text = ",\n ".join(surfaces)
    FILE.write_text(f'{{"about": {about},\n "surfaces": [\n {text}]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIATIONS), default=list(VARIATIONS))
    options = parser.parse_args()
    found = (
        json.loads(FILE.read_text()) if FILE.exists() else {"about": circumstances(COMMAND, *PACKAGES), "surfaces": []}
    )
    have = {surface["name"] for surface in found["surfaces"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server, environment = serve(folder)
        try:
            for name in [name for name in options.only if name not in have]:
                found["surfaces"].append(record(name, VARIATIONS[name], folder, environment))
                save(found)
                print(f"{name}: {found['surfaces'][-1]['seconds']} s", flush=True)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
