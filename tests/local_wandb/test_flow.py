"""The thin path with the real client: sweep, agent, run, offline sync, and everything read back."""

import math
import re
from pathlib import Path

import pytest

SCRIPT = """
import argparse, sys, wandb
arguments = argparse.ArgumentParser()
arguments.add_argument("--lr", type=float, default=0.5)
lr = arguments.parse_args().lr
run = wandb.init(config={"lr": lr, "max_steps": 20})
for step in range(20):
    run.log({"train/global_step": step, "train/loss": float("nan") if step == 7 else lr / (step + 1)})
print("trained at", lr)
with open("notes.txt", "w") as file:
    file.write("kept")
run.save("notes.txt", policy="now")
if lr == 0.3:
    sys.exit(3)
"""
SWEEP = """
program: script.py
method: grid
metric: {name: train/loss, goal: minimize}
parameters: {lr: {values: [0.1, 0.3, 0.2]}}
"""


@pytest.fixture(scope="module")
def flow(server, tmp_path_factory):
    """A grid of three run by an agent, and two offline runs synced, one of them into the sweep."""
    folder = tmp_path_factory.mktemp("flow")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "sweep.yaml").write_text(SWEEP)
    env = {"WANDB_PROJECT": "flow", "WANDB_DIR": str(folder)}
    created = server.run("wandb", "sweep", "sweep.yaml", cwd=folder, env=env)
    path = re.search(r"wandb agent (\S+)", created.stderr + created.stdout).group(1)
    agent = server.run("wandb", "agent", path, cwd=folder, env=env)
    assert agent.returncode == 0, agent.stderr
    for extra in ({}, {"WANDB_SWEEP_ID": path.rpartition("/")[2]}):
        offline = server.run(
            "python",
            "script.py",
            cwd=folder,
            env=env | extra | {"WANDB_MODE": "offline", "WANDB_RUN_ID": f"off{len(extra)}"},
        )
        assert offline.returncode == 0, offline.stderr
    offline = sorted((folder / "wandb").glob("offline-run-*"))
    synced = server.run("wandb", "sync", *map(str, offline), cwd=folder, env=env)
    assert "ERROR" not in synced.stderr + synced.stdout
    return path


def test_grid_runs_once_each_in_the_order_of_the_file(flow, api):
    runs = api.sweep(flow).runs
    assert [run.config["lr"] for run in runs] == [0.1, 0.3, 0.2, 0.5]
    assert [run.state for run in runs] == ["finished", "failed", "finished", "finished"]
    assert api.sweep(flow).state == "FINISHED"


def test_history_comes_back_whole_with_nan(flow, api):
    for run in api.runs("local/flow"):
        rows = list(run.scan_history())
        assert [row["train/global_step"] for row in rows] == list(range(20))
        assert math.isnan(rows[7]["train/loss"])
        assert rows[19]["train/loss"] == run.config["lr"] / 20


def test_files_console_and_metadata_come_back(flow, api, tmp_path):
    run = api.run("local/flow/off0")
    with run.file("notes.txt").download(root=str(tmp_path)) as file:
        assert file.read() == "kept"
    assert Path(run.metadata["program"]).name == "script.py"
    if hasattr(run, "console_logs"):  # since 0.29
        assert "trained at 0.5" in [line.content for line in run.console_logs()]
    assert run.sweep is None and api.run("local/flow/off1").sweep.id == flow.rpartition("/")[2]
