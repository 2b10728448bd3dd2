"""`wandb sync`: torn files, twice, and a sweep that moves from one server to another."""

import shutil
from pathlib import Path

import pytest
from conftest import start

SCRIPT = """
import sys, wandb
with wandb.init(id=sys.argv[1], settings=wandb.Settings(sweep_id=sys.argv[2] if sys.argv[2:] else None)) as run:
    for step in range(3000):
        run.log({"x": step, "loss": step / 7})
"""
READ = """
import json, sys, wandb
run = wandb.Api().run(sys.argv[1])
print(json.dumps([run.state, run.sweep and run.sweep.id, [row["x"] for row in run.scan_history(use_cache=False)]]))
"""


def read(server, path: str) -> list:
    done = server.run("python", "-c", READ, path)
    assert done.returncode == 0, done.stderr
    return __import__("json").loads(done.stdout)


@pytest.fixture
def offline(server, tmp_path):
    """The folder of a finished offline run `whole` of 3,000 rows."""
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "sync"}
    done = server.run("python", "-c", SCRIPT, "whole", env=env)
    assert done.returncode == 0, done.stderr
    return next((tmp_path / "wandb").glob("offline-run-*"))


def test_a_torn_file_then_the_whole_one_twice(server, offline, tmp_path):
    def sync(folder: Path) -> str:
        done = server.run("wandb", "sync", str(folder), env={"WANDB_PROJECT": "sync"})
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    torn = tmp_path / "torn" / offline.name
    shutil.copytree(offline, torn)
    file = next(torn.glob("*.wandb"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 6 // 10])
    assert "ERROR" in sync(torn)
    state, _, rows = read(server, "local/sync/whole")
    assert state == "failed" and 1000 < len(rows) < 2500 and rows == list(range(len(rows)))
    for _ in range(2):
        sync(offline)
        for mark in offline.glob("*.synced"):
            mark.unlink()
        assert read(server, "local/sync/whole") == ["finished", None, list(range(3000))]


def test_a_sweep_run_here_is_sent_to_another_server(server, tmp_path):
    env = {"WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "moving"}
    done = server.run("python", "-c", SCRIPT, "traveller", "abcd1234", env=env)
    assert done.returncode == 0, done.stderr
    other = start(tmp_path / "other")
    try:
        done = other.run("wandb", "sync", "--yes", "--include-online", cwd=tmp_path, env=env)
        assert done.returncode == 0 and "ERROR" not in done.stderr + done.stdout, done.stderr
        expected = ["finished", "abcd1234", list(range(3000))]
        assert read(other, "local/moving/traveller") == read(server, "local/moving/traveller") == expected
    finally:
        other.stop()
