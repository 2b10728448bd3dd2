"""Artifacts both ways with the real client."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import wandb
from wandb.errors import CommError

from local_wandb.artifacts import remove_outlived
from local_wandb.store import Store


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
    files = {"a/one.txt": "1", "two.txt": "2", "copy of two.txt": "2", f"{'long ' * 40}.txt": "3"}
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
    assert (found.description, found.metadata, found.version, found.size) == ("numbers", {"n": 3}, "v0", 4)
    assert [f.name for f in found.files()] == sorted(files)
    assert all(f.storage_path == f"wandb_artifacts/{f.storage_path.split('/')[1]}/{f.name}" for f in found.files())
    assert (found.logged_by().id, [run.id for run in found.used_by()]) == ("maker", ["user"])
    assert [a.name for a in api.run("local/artifacts/maker").logged_artifacts()] == ["data:v0", "data:v1"]
    assert [a.name for a in api.run("local/artifacts/user").used_artifacts()] == ["data:v0"]
    assert [a.version for a in api.artifacts("dataset", "local/artifacts/data")] == ["v2", "v1", "v0"]
    assert api.artifact("local/artifacts/data:latest").version == "v2"
    with pytest.raises(CommError, match="must be specified as 'collection:alias'"):
        api.artifact("local/artifacts/data")

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


def test_the_same_content_again_is_an_output_of_that_run_too(api):
    for run_id in ("first", "second"):
        with wandb.init(project="artifacts", id=run_id) as run:
            assert log(run, "twice", {"a.txt": "a"}).version == "v0"
    for run_id in ("first", "second"):
        assert [a.name for a in api.run(f"local/artifacts/{run_id}").logged_artifacts()] == ["twice:v0"]


def test_increments_add_to_the_version_before(api):
    with wandb.init(project="artifacts", id="increments") as run:
        log(run, "growing", {"a.txt": "a"})
        log(run, "growing", {"b.txt": "b"}, incremental=True)
        assert log(run, "growing", {"a.txt": "A", "c.txt": "c"}, incremental=True).version == "v2"
        assert log(run, "growing", {"b.txt": "b"}, incremental=True).version == "v3"  # its digest is that of the second
        table = wandb.Table(columns=["x"], log_mode="INCREMENTAL")
        for x in range(3):
            table.add_data(x)
            run.log({"rows": table})
    assert read(api.artifact("local/artifacts/growing:v1").download("v1")) == {"a.txt": "a", "b.txt": "b"}
    assert read(api.artifact("local/artifacts/growing:latest").download("all")) == {
        "a.txt": "A", "b.txt": "b", "c.txt": "c"
    }  # fmt: skip
    api.artifact("local/artifacts/growing:v0").delete(delete_aliases=True)
    assert read(api.artifact("local/artifacts/growing:v1").download("again")) == {"a.txt": "a", "b.txt": "b"}
    increments = api.artifact("local/artifacts/run-increments-incr-rows:latest")
    (last,) = [file.name for file in increments.files() if file.name.startswith("2-")]  # the first is called "None-"
    assert increments.get(last).data == [[0], [1], [2]]


def test_several_writers_of_one_artifact(api, tmp_path):
    def part(text: str) -> wandb.Artifact:
        artifact = wandb.Artifact("together", "dataset")
        with artifact.new_file(f"{text}.txt") as file:
            file.write(text)
        return artifact

    for text in "ab":
        with wandb.init(project="artifacts", id=f"writer-{text}", group="writers") as run:
            run.upsert_artifact(part(text), distributed_id="writers")
    with wandb.init(project="artifacts", id="writer-c", group="writers") as run:
        made = run.finish_artifact(part("c"), distributed_id="writers").wait()
    assert read(made.download("together")) == {"a.txt": "a", "b.txt": "b", "c.txt": "c"}


def test_tags_of_versions_and_collections(api):
    with wandb.init(project="artifacts", id="tagger") as run:
        artifact = wandb.Artifact("tagged", "dataset")
        with artifact.new_file("a") as file:
            file.write("a")
        run.log_artifact(artifact, tags=["raw", "small"]).wait()
    artifact = api.artifact("local/artifacts/tagged:v0")
    assert artifact.tags == ["raw", "small"]
    artifact.tags = ["small", "checked"]
    artifact.save()
    assert api.artifact("local/artifacts/tagged:v0").tags == ["small", "checked"]
    assert [a.version for a in api.artifacts("dataset", "local/artifacts/tagged", tags=["checked"])] == ["v0"]
    assert not list(api.artifacts("dataset", "local/artifacts/tagged", tags="raw"))
    collection = api.artifact_collection("dataset", "local/artifacts/tagged")
    collection.tags, collection.description = ["all"], "text"
    collection.save()
    collection.change_type("corpus")
    found = api.artifact_collection("corpus", "local/artifacts/tagged")
    assert (found.tags, found.description) == (["all"], "text")
    assert api.artifact("local/artifacts/tagged:v0").type == "corpus"


def test_link_to_a_portfolio_and_back(api, tmp_path):
    (tmp_path / "weights").write_text("1 2 3")
    with wandb.init(project="artifacts", id="linker") as run:
        first, second = (log(run, "source", {"a": text}) for text in "12")
        linked = run.link_artifact(first, "artifacts/chosen", aliases=["best"])
        assert (linked.name, linked.is_link, linked.source_name) == ("chosen:v0", True, "source:v0")
        run.link_model(path=str(tmp_path / "weights"), registered_model_name="model", name="trained")
    assert second.link("artifacts/chosen").version == "v1"
    chosen = api.artifact("local/artifacts/chosen:best")
    assert read(chosen.download("chosen")) == {"a": "1"} and set(chosen.aliases) == {"best"}
    assert [a.version for a in api.artifacts("dataset", "local/artifacts/chosen")] == ["v1", "v0"]
    assert [a.name for a in api.artifact("local/artifacts/source:v0").linked_artifacts] == ["chosen:v0"]
    api.artifact("local/artifacts/chosen:latest").unlink()
    assert api.artifact("local/artifacts/chosen:latest").source_version == "v0"
    assert api.artifact("local/artifacts/source:v1").version == "v1"
    with wandb.init(project="artifacts", id="linker2") as run, pytest.raises(ValueError, match="linked to, not logged"):
        log(run, "chosen", {"a": "b"})


def test_a_time_to_live_is_kept(server, api):
    with wandb.init(project="artifacts", id="mortal") as run:
        artifact = wandb.Artifact("mortal", "dataset")
        with artifact.new_file("a") as file:
            file.write("a")
        artifact.ttl = timedelta(seconds=1)
        run.log_artifact(artifact).wait()
        log(run, "mortal", {"a": "b"})
    assert [a.ttl for a in api.artifacts("dataset", "local/artifacts/mortal")] == [None, timedelta(seconds=1)]
    hashes = [a.commit_hash for a in api.artifacts("dataset", "local/artifacts/mortal")]
    assert all(hashes) and len(set(hashes)) == 2
    time.sleep(1.1)
    remove_outlived(Store(server.data))
    assert [a.version for a in wandb.Api().artifacts("dataset", "local/artifacts/mortal")] == ["v1"]
