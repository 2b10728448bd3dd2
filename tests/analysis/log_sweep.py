"""Log simulated runs as a sweep with the real client; prints its path: python -m tests.analysis.log_sweep."""

import json
import os
import sys
from pathlib import Path

import wandb

from tests.analysis.simulate import SEED_RATES, record, sweep_of


def main() -> None:
    rates = {float(rate): kind for rate, kind in json.loads(sys.argv[1]).items()} if len(sys.argv) > 1 else SEED_RATES
    entity, project = os.environ["WANDB_ENTITY"], os.environ["WANDB_PROJECT"]
    config = {"name": "simulated", **sweep_of(list(rates), [0])["config"]}
    sweep = wandb.sweep(config, entity=entity, project=project)
    for rate, kind in rates.items():
        one = record(kind, rate, planned=100, examples=20)
        settings = wandb.Settings(sweep_id=sweep, console="off", x_disable_stats=True)
        run = wandb.init(
            entity=entity,
            project=project,
            name=one["name"],
            config=one["config"],
            settings=settings,
            reinit="create_new",
        )
        for row in one["history"]:
            run.log({key: value for key, value in row.items() if not key.startswith("_")})
        run.summary.update(one["summary"])
        for name, content in one["files"].items():
            path = Path(run.dir) / name
            path.write_text(json.dumps(content))
            run.save(str(path), base_path=run.dir, policy="now")
        run.summary["load_adapter"] = "model = load()"
        adapter = wandb.Artifact(f"model-{run.id}", type="model")
        with adapter.new_file("adapter") as file:
            file.write(run.id)
        run.log_artifact(adapter, aliases=["final_model"])
        run.finish(exit_code=1 if kind == "cut" else 0)
    print(f"{entity}/{project}/{sweep}")


if __name__ == "__main__":
    main()
