"""Artifacts both ways with the real client."""

from pathlib import Path

import pytest
import wandb
from wandb.errors import CommError


def log(run, name: str, files: dict[str, str], aliases=(), **options) -> wandb.Artifact:
    artifact = wandb.Artifact(name, "dataset", **options)
    for path, text in files.items():
        with artifact.new_file(path) as file:
            file.write(text)
    run.log_artifact(artifact, aliases=list(aliases))
    return artifact.wait()


def read(folder: str) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in Path(folder).rglob("*") if p.is_file()}


def test_an_artifact_comes_back_through_every_door(api, tmp_path):
    (tmp_path / "beside.txt").write_text("beside")
    files = {"a/one.txt": "1", "two.txt": "2", "copy of two.txt": "2"}
    with wandb.init(project="artifacts", id="maker") as run:
        made = log(run, "data", files, ["best"], description="numbers", metadata={"n": 3})
        made_again = log(run, "data", files)
        assert (made.version, made_again.version) == ("v0", "v0")  # the same content is the same version
        changed = log(run, "data", files | {"two.txt": "changed"})
        assert changed.version == "v1"
    with wandb.init(project="artifacts", id="user") as run:
        used = run.use_artifact("data:best")
        assert read(used.download("all")) == files
        assert Path(used.get_entry("two.txt").download("one")).read_text() == "2"  # the address the client makes up
        used.verify("all")
        draft = used.new_draft()
        draft.add_reference((tmp_path / "beside.txt").as_uri())
        with draft.new_file("three.txt") as file:
            file.write("3")
        run.log_artifact(draft)
        assert read(draft.wait().download("draft")) == files | {"three.txt": "3", "beside.txt": "beside"}

    found = api.artifact("local/artifacts/data:best")
    assert (found.description, found.metadata, found.version, found.size) == ("numbers", {"n": 3}, "v0", 3)
    assert [f.name for f in found.files()] == sorted(files)
    assert (found.logged_by().id, [run.id for run in found.used_by()]) == ("maker", ["user"])
    assert [a.name for a in api.run("local/artifacts/maker").logged_artifacts()] == ["data:v0", "data:v1"]
    assert [a.name for a in api.run("local/artifacts/user").used_artifacts()] == ["data:v0"]
    assert [a.version for a in api.artifacts("dataset", "local/artifacts/data")] == ["v2", "v1", "v0"]
    assert api.artifact("local/artifacts/data:latest").version == "v2"

    found.aliases.append("prod")
    found.save()
    assert api.artifact("local/artifacts/data:prod").version == "v0"
    with pytest.raises(CommError, match="aliases"):
        found.delete()
    found.delete(delete_aliases=True)
    assert not api.artifact_exists("local/artifacts/data:prod")
    # v2 was drafted from v0 and shares its files: they stay
    assert read(api.artifact("local/artifacts/data:v2").download("after")) == files | {
        "three.txt": "3",
        "beside.txt": "beside",
    }


def test_tables_and_images_come_back(api):
    pixels = [[[255, 0, 0]] * 4] * 4
    numpy = pytest.importorskip("numpy")
    with wandb.init(project="artifacts", id="media") as run:
        run.log({"table": wandb.Table(columns=["x"], data=[[1], [2]]), "image": wandb.Image(numpy.uint8(pixels))})
    run = api.run("local/artifacts/media")
    table = api.artifact("local/artifacts/run-media-table:latest").get("table")
    assert table.data == [[1], [2]]
    assert any(f.name.startswith("media/images/image_0") and f.size > 0 for f in run.files())
    assert next(run.scan_history())["image"]["width"] == 4
