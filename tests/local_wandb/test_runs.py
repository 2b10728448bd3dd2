"""Runs with the real client: what is logged, resumed, edited, filtered and deleted."""

import json
import math
import time

import pytest
import wandb
from wandb.apis.public import Run
from wandb.errors import CommError, UsageError
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from local_wandb.filters import duration

PROJECT = "logged"


def start(run: str, **options):
    return wandb.init(project=PROJECT, entity="local", id=run, reinit="create_new", **options)


def rows(run: str) -> list[dict]:
    return list(wandb.Api().run(f"local/{PROJECT}/{run}").scan_history())


def test_resume_allow_must_never(api):
    with start("resumed", resume="allow") as run:
        run.log({"x": 0})
    with start("resumed", resume="must") as run:
        assert run.starting_step == 1
        run.log({"x": 1})
    assert [row["x"] for row in rows("resumed")] == [0, 1]
    with pytest.raises(UsageError):
        start("resumed", resume="never")
    with pytest.raises(UsageError):
        start("unheard-of", resume="must")


def test_rewind_forgets_what_came_after(api):
    with start("rewound") as run:
        for x in range(10):
            run.log({"x": x})
    with wandb.init(project=PROJECT, entity="local", resume_from="rewound?_step=4") as run:
        run.log({"x": -1})
    assert [row["x"] for row in rows("rewound")] == [0, 1, 2, 3, 4, -1]


def test_several_runs_in_one_process_do_not_mix(api):
    runs = [start(f"gang{i}") for i in range(3)]
    for step in range(20):
        for i, run in enumerate(runs):
            run.log({"who": i, "step": step})
    runs[0].finish(exit_code=3)
    for run in runs[1:]:
        run.finish()
    for i in range(3):
        assert [(row["who"], row["step"]) for row in rows(f"gang{i}")] == [(i, step) for step in range(20)]
    assert [wandb.Api().run(f"local/{PROJECT}/gang{i}").state for i in range(3)] == ["failed", "finished", "finished"]


def test_what_is_logged_comes_back(api, tmp_path):
    values = {
        "nan": math.nan,
        "inf": math.inf,
        "minus": -math.inf,
        "big": 2**60,
        "text": "é\u2028<b>",
        "nested": {"a": 1},
    }
    (tmp_path / "folder").mkdir()
    for i in range(60):  # more than a page of files
        (tmp_path / "folder" / f"{i}.txt").write_text(str(i))
    (tmp_path / "folder" / "a b%.txt").write_text("text")
    with start(
        "whole", name="A name", tags=["t1", "t2"], notes="notes", group="g", job_type="train",
        config={"lr": 1e-5, "nested": {"a": [1, None]}},
    ) as run:  # fmt: skip
        run.log(values)
        run.summary["best"] = 3
        run.save("folder/*", policy="now")
        run.alert("Look", "at this", level="WARN")
    run = wandb.Api().run(f"local/{PROJECT}/whole")
    (row,) = run.scan_history()
    assert math.isnan(row["nan"]) and (row["inf"], row["minus"]) == (math.inf, -math.inf)
    assert {key: row[key] for key in ("big", "text", "nested")} == {k: values[k] for k in ("big", "text", "nested")}
    assert run.history(keys=["nan"], pandas=False)[0]["nan"] == "NaN"  # strict JSON has no NaN
    assert (run.name, run.tags, run.notes, run.group, run.job_type) == ("A name", ["t1", "t2"], "notes", "g", "train")
    assert run.config == {"lr": 1e-5, "nested": {"a": [1, None]}}
    assert run.summary["best"] == 3 and dict(run.summary["nested"]) == {"a": 1}
    assert len([f for f in run.files() if f.name.startswith("folder/")]) == 61 and len(run.files()) >= 61
    with run.file("folder/a b%.txt").download(root=str(tmp_path / "got")) as file:
        assert file.read() == "text"
    assert run.lastHistoryStep == 0


def test_the_machines_measurements_come_back(api):
    with start("measured", settings=wandb.Settings(x_stats_sampling_interval=0.1)):
        run, end = wandb.Api().run(f"local/{PROJECT}/measured"), time.monotonic() + 300
        while "system.memory_percent" not in (found := run.history(stream="system")):
            assert time.monotonic() < end, found
            time.sleep(0.1)


def test_a_long_history_is_read_back_whole(api):
    with start("long") as run:
        for step in range(100_000):
            run.log({"x": step})
    found = [row["x"] for row in rows("long")]
    assert found == list(range(100_000))
    assert len(wandb.Api().run(f"local/{PROJECT}/long").history(samples=500)) == 500


def test_a_sample_of_a_column_is_spread_over_all_its_rows(api):
    with start("sampled") as run:
        for x in range(10):
            run.log({"x": x})
    for keys in (["x"], None):
        found = wandb.Api().run(f"local/{PROJECT}/sampled").history(keys=keys, samples=4, pandas=False)
        assert [row["x"] for row in found] == [0, 3, 6, 9]


@pytest.fixture(scope="module")
def sixty(server):
    """Sixty runs without a process each: created by name as Run.create does, then given values."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            if name.startswith("WANDB_"):
                patch.setenv(name, value)
        wandb.teardown()
        api = wandb.Api()
        for i in range(60):
            Run.create(api, run_id=f"n{i:02}", project="sixty", entity="local", state="pending")
            run = api.run(f"local/sixty/n{i:02}")
            run.config["lr"], run.config["deep"] = i / 10, {"er": i % 2}
            run.tags = ["even"] if i % 2 == 0 else ["odd"]
            run.update()
            run.summary["loss"] = (i - 30) ** 2
            run.summary.update()
        wandb.teardown()


FILTERS = [
    ({"config.lr": 0.5}, [5]),
    ({"config.lr.value": {"$lt": 0.3}}, [0, 1, 2]),
    ({"config.deep.er": 1, "config.lr": {"$gte": 5.7}}, [57, 59]),
    ({"$or": [{"name": "n03"}, {"display_name": {"$regex": "7$"}}]}, [3, 7, 17, 27, 37, 47, 57]),
    ({"summary_metrics.loss": {"$in": [0, 1]}}, [29, 30, 31]),
    ({"$and": [{"tags": "odd"}, {"summary_metrics.loss": {"$lte": 9}}]}, [27, 29, 31, 33]),
    ({"tags": {"$nin": ["odd"]}, "config.lr": {"$not": {"$gt": 0.4}}}, [0, 2, 4]),
    ({"state": {"$ne": "pending"}}, []),
    ({"summary_metrics.nothing": {"$exists": True}}, []),
    ({"created_at": {"$gt": "2020-01-01"}, "$nor": [{"config.lr": {"$gt": 0.05}}]}, [0]),
]


@pytest.mark.parametrize(("filters", "expected"), FILTERS, ids=[json.dumps(f) for f, _ in FILTERS])
def test_filters(sixty, api, filters, expected):
    runs = api.runs("local/sixty", filters=filters)
    assert [int(run.id[1:]) for run in runs] == expected
    assert len(runs) == len(expected)


def test_order_and_pages(sixty, api):
    by_loss = [int(run.id[1:]) for run in api.runs("local/sixty", order="+summary_metrics.loss", per_page=7)]
    assert by_loss[:3] == [30, 29, 31] and len(set(by_loss)) == 60
    down = [run.id for run in api.runs("local/sixty", order="-created_at", per_page=25)]
    assert down == [f"n{i:02}" for i in range(59, -1, -1)]
    assert api.runs("local/sixty", order="-config.lr", lazy=False)[0].config["lr"] == 5.9


def test_an_unknown_filter_is_named(sixty, api):
    with pytest.raises(WandbApiFailedError, match=r"\$near"):
        len(api.runs("local/sixty", filters={"config.lr": {"$near": 1}}))
    with pytest.raises(WandbApiFailedError, match="colour"):
        len(api.runs("local/sixty", filters={"colour": 1}))


def test_edit_upload_and_delete(api, tmp_path):
    start("edited").finish()
    run = api.run(f"local/{PROJECT}/edited")
    run.config["added"], run.tags, run.notes, run.name = 1, ["new"], "n", "Renamed"
    run.update()
    (tmp_path / "late.txt").write_text("late")
    run.upload_file("late.txt")
    again = wandb.Api().run(f"local/{PROJECT}/edited")
    assert (again.config["added"], again.tags, again.notes, again.name) == (1, ["new"], "n", "Renamed")
    assert again.state == "finished"
    again.file("late.txt").delete()
    assert "late.txt" not in [file.name for file in wandb.Api().run(f"local/{PROJECT}/edited").files()]
    again.delete()
    with pytest.raises((CommError, ValueError)):
        wandb.Api().run(f"local/{PROJECT}/edited")


def test_projects_are_listed(sixty, api):
    assert {"logged", "sixty"} <= {project.name for project in api.projects()}
    assert api.create_project("made", "local") is None and api.project("made").name == "made"


def test_an_id_used_again_without_resume_starts_the_run_anew(api):
    for rows_logged, config in ((5, {"lr": 1, "old": True}), (2, {"lr": 2})):
        with start("again", config=config) as run:
            for x in range(rows_logged):
                run.log({f"x{rows_logged}": x})
    again = wandb.Api().run(f"local/{PROJECT}/again")
    assert [row["x2"] for row in again.scan_history(use_cache=False)] == [0, 1]
    assert again.config == {"lr": 2} and "x5" not in again.summary and again.lastHistoryStep == 1


def test_writers_of_a_shared_run_keep_each_others_rows(api):
    shared = wandb.Settings(mode="shared", x_primary=True, x_label="one", console="off")
    with wandb.init(project=PROJECT, entity="local", id="shared", settings=shared, reinit="create_new") as run:
        run.log({"x": 1})
    other = wandb.Settings(mode="shared", x_primary=False, x_label="two", console="off")
    with wandb.init(project=PROJECT, entity="local", id="shared", settings=other, reinit="create_new") as run:
        run.log({"y": 1})
    assert {key for row in rows("shared") for key in row} >= {"x", "y"}


def test_a_fork_has_the_rows_of_its_ancestors(api):
    with start("parent") as run:
        for x in range(6):
            run.log({"x": x})
    with wandb.init(project=PROJECT, entity="local", id="child", fork_from="parent?_step=3") as run:
        run.log({"x": -1})
    with wandb.init(project=PROJECT, entity="local", id="grandchild", fork_from="child?_step=4") as run:
        run.log({"x": -2})
    assert [row["x"] for row in rows("grandchild")] == [0, 1, 2, 3, -1, -2]
    assert [row["x"] for row in rows("parent")] == [0, 1, 2, 3, 4, 5]


def test_runs_by_duration_user_entity_and_time(api):
    start("timed").finish()
    run = wandb.Api().run(f"local/{PROJECT}/timed")
    for filters in (
        {"username": "local"},
        {"entity": "local"},
        {"updated_at": {"$gt": "2020"}},
        {"duration": {"$lt": 99}},
    ):
        assert run.id in [found.id for found in api.runs(f"local/{PROJECT}", filters=filters, per_page=200)], filters
    assert not list(api.runs(f"local/{PROJECT}", filters={"username": "somebody"}))
    assert wandb.Api().runs(f"local/{PROJECT}", order="-updated_at")[0].id == "timed"
    assert len(wandb.Api().runs(f"local/{PROJECT}", order="+duration")) > 0


def test_a_runs_own_count_of_its_seconds_comes_first():
    times = {"createdAt": 2.0, "heartbeatAt": 5.0}
    assert duration(times | {"summaryMetrics": '{"_wandb": {"runtime": 70}}'}) == 70
    for summary in (None, "{}", '{"_wandb": "text"}', '{"_wandb": {}}'):
        assert duration(times | {"summaryMetrics": summary}) == 3


def test_delete_with_artifacts_and_twice(api):
    with start("maker") as run:
        artifact = wandb.Artifact("made", "dataset")
        with artifact.new_file("a") as file:
            file.write("a")
        run.log_artifact(artifact).wait()
    run = api.run(f"local/{PROJECT}/maker")
    run.delete(delete_artifacts=True)
    assert not wandb.Api().artifact_exists(f"local/{PROJECT}/made:v0")
    run.delete()  # as W&B: it is gone, which is what was asked for
    assert "maker" not in [found.id for found in wandb.Api().runs(f"local/{PROJECT}", per_page=200)]


def test_a_file_that_is_not_there_is_said_to_be_so(api, tmp_path):
    """W&B lists a name that was asked for and has no file: its MD5 is "0"."""
    with start("files"):
        pass
    run = api.run(f"local/{PROJECT}/files")
    with pytest.raises(ValueError, match=r"late\.txt not found"):
        wandb.restore("late.txt", run_path=f"local/{PROJECT}/files")
    with pytest.raises(CommError, match="404"):
        run.file("late.txt").download(root=str(tmp_path))
    (tmp_path / "root").mkdir()
    (tmp_path / "late.txt").write_text("here")
    run.upload_file(str(tmp_path / "late.txt"), root=str(tmp_path / "root"))  # from outside: W&B names the file __/...
    assert run.file("__/late.txt").size == 4


def test_states_are_changed_only_as_in_wandb(api):
    start("requeued").finish(exit_code=1)
    run = api.run(f"local/{PROJECT}/requeued")
    assert run.update_state("pending") and wandb.Api().run(f"local/{PROJECT}/requeued").state == "pending"
    assert run.update_state("failed")
    with pytest.raises(CommError, match="invalid state transition"):
        run.update_state("finished")
