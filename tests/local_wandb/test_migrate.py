"""A project moves: from a server into a data directory, and by offline runs and `wandb sync` to another server."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, start

from local_wandb import migrate
from local_wandb.__main__ import _move
from local_wandb.store import Store

pytestmark = pytest.mark.slow

PROJECT = "travelling"
READ = """
import json, sys, wandb
api, found = wandb.Api(), {}
for run in api.runs(sys.argv[1], order="+created_at"):
    found[run.id] = {
        "state": run.state, "name": run.name, "tags": run.tags, "notes": run.notes, "group": run.group,
        "config": dict(run.config), "sweep": run.sweep_name, "summary": run.summary.get("x"),
        "rows": [[row["_step"], row["x"], row["_timestamp"]] for row in run.scan_history(use_cache=False)],
        "console": [line.content for line in run.console_logs() if line.content],
        "notes.txt": run.file("notes.txt").download(root=sys.argv[2], replace=True).read(),
        "made": [],
    }
    for a in run.logged_artifacts():
        if a.type == "wandb-history":
            continue
        found[run.id]["made"].append([a.name, a.tags, a.metadata, a.description])
        content = {name: open(a.get_entry(name).download(sys.argv[2])).read() for name in a.manifest.entries}
        found[a.name] = [sorted(a.aliases), content]
found["used"] = {run.id: [a.name for a in run.used_artifacts()] for run in api.runs(sys.argv[1])}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A server with a sweep of two runs, one of them failed, and an artifact of two versions."""
    folder = tmp_path_factory.mktemp("source")
    server = start(folder)
    script = f"""
import wandb
from wandb.sdk.artifacts._internal_artifact import InternalArtifact
grid = {{"method": "grid", "parameters": {{"lr": {{"values": [1, 2]}}}}}}
sid = wandb.sweep(grid, project="{PROJECT}", entity="local")
for lr in (1, 2):
    run = wandb.init(project="{PROJECT}", entity="local", id=f"run{{lr}}", name=f"lr {{lr}}", tags=["t"], notes="n",
        group="g", config={{"lr": lr}}, settings=wandb.Settings(sweep_id=sid, console="off"))
    for step in range(3):
        run.log({{"x": lr * step}}, step=step * 2)
    run.write_logs("one line")
    open("notes.txt", "w").write(f"notes {{lr}}")
    run.save("notes.txt", policy="now")
    artifact = wandb.Artifact("data", "dataset", description="d", metadata={{"lr": lr}})
    with artifact.new_file("inner/a.txt") as file:
        file.write(f"content {{lr}}")
    run.log_artifact(artifact, aliases=[f"of{{lr}}"], tags=["kept"]).wait()
    run.use_artifact("data:v0") if lr == 2 else None
    run.log_artifact(InternalArtifact(f"run-{{run.id}}-history", "wandb-history")).wait()  # as the cloud does
    run.finish(exit_code=lr - 1)
"""
    done = server.run(sys.executable, "-c", script, cwd=folder)
    assert done.returncode == 0, done.stderr
    yield server
    server.stop()


def read(server, folder) -> dict:
    done = server.run(sys.executable, "-c", READ, f"local/{PROJECT}", str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def move(*arguments: str, env: dict) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "local_wandb", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_import_takes_everything_over_once(source, tmp_path):
    for _ in range(2):  # the second time finds everything there
        done = move("import", f"local/{PROJECT}", "--data", str(tmp_path / "data"), env=source.env)
        assert done.returncode == 0, done.stderr
    other = start(tmp_path / "data")
    try:
        assert read(other, tmp_path / "got") == read(source, tmp_path / "was")
        kinds = {kind["type"] for kind in Store(other.data).find("collections")}
        assert kinds == {"dataset"}  # the rows of wandb-history have come as rows
    finally:
        other.stop()


def test_export_and_sync_bring_a_project_to_another_server(source, tmp_path):
    done = move(
        "export", f"local/{PROJECT}", "--data", str(source.data), "--output", str(tmp_path / "out"), env=source.env
    )
    assert done.returncode == 0, done.stderr
    other = start(tmp_path / "data")
    try:
        synced = other.run("sh", tmp_path / "out" / "sync.sh", cwd=tmp_path)
        assert synced.returncode == 0 and "ERROR" not in synced.stdout + synced.stderr, synced.stderr
        was, got = read(source, tmp_path / "was"), read(other, tmp_path / "got")
        assert was.pop("used") == {"run1": [], "run2": ["data:v0"]} and got.pop("used")  # an offline run cannot say it
        assert got == was
    finally:
        other.stop()


def test_what_cannot_be_moved_is_one_line(tmp_path, source):
    done = move("import", "local/nothing", "--data", str(tmp_path / "new"), env=source.env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"there is no project local/nothing at {source.url}" in done.stderr
    for arguments, message in (
        (["export", "local/nothing", "--data", str(source.data)], "there is no project local/nothing"),
        (
            ["export", f"local/{PROJECT}", "--data", str(source.data), "--output", str(tmp_path)],
            "exists; export writes",
        ),
        (["export", "local/x", "--data", str(tmp_path / "none")], "holds no database"),
        (["export", "x"], "is not ENTITY/PROJECT"),
    ):
        with pytest.raises(ValueError, match=message):
            migrate.main(arguments)


def test_without_the_client_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "local_wandb.migrate")
    monkeypatch.delattr("local_wandb.migrate")
    with pytest.raises(SystemExit) as ended:
        _move(["import", "local/x"])
    assert ended.value.code == 2 and "pip install wandb" in capsys.readouterr().err
