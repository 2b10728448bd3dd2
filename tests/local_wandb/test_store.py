"""What the store remembers of a run: rows by step, lines by number, files by their blobs."""

import contextlib
import gc
import json
import re
import shutil
import sqlite3

import pytest

from local_wandb.store import SCHEMA, Store, locked


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def project(store: Store, name: str = "p") -> dict:
    return store.insert("projects", entityName="local", name=name, createdAt=1.0)


def run(store: Store, name: str = "r") -> dict:
    parent = store.get("projects") or project(store)
    return store.insert("runs", project=parent["id"], name=name, state="running", createdAt=1.0, heartbeatAt=1.0)


def rows(*found: dict) -> list[str]:
    return [json.dumps(row) for row in found]


def history(store: Store, run: dict, *bounds: int) -> list[dict]:
    return [json.loads(line) for line in store.history(run["id"], *bounds)]


def test_a_row_takes_the_place_of_its_steps_and_counts_once(store):
    one, other = run(store), run(store, "other")
    store.append_history(other, 0, rows({"x": 7}))
    first = [{"_step": 3, "x": 1}, {"_step": 5, "x": 2}]
    for _ in range(2):  # a chunk that is sent again changes nothing
        store.append_history(one, 0, rows(*first))
    store.append_history(one, 6, rows({"x": 3}))  # without a step: its place in the stream
    store.append_history(one, 0, [])
    assert history(store, one) == [*first, {"x": 3}]
    assert history(store, one, 4, 6) == [first[1]] and history(store, one, 3, 5) == [first[0]]
    store.append_history(one, 1, rows({"_step": 5, "y": 4}))
    assert history(store, one, 5, 6) == [{"_step": 5, "y": 4}]
    store.append_history(one, 1, rows({"_step": 4, "y": 1}, {"_step": 5, "z": 5}), merge=True)
    assert history(store, one, 4, 6) == [{"_step": 4, "y": 1}, {"_step": 5, "y": 4, "z": 5}]
    assert store.row("runs", one["id"])["historyLineCount"] == 4
    assert store.row("runs", other["id"])["historyLineCount"] == 1


def test_the_keys_of_a_history_are_known_by_kind_and_last_value(store):
    one = run(store)
    values = {
        "number": 1.5,
        "text": "a",
        "truth": True,
        "none": None,
        "in": {"ner": 2},
        "table": {"_type": "t", "n": 1},
    }
    store.append_history(one, 0, rows({"_step": 8} | values))
    store.append_history(one, 1, rows({"_step": 2, "number": 2}))
    found = json.loads(store.row("runs", one["id"])["historyKeys"])
    assert found["lastStep"] == 8 and found["keys"]["number"]["previousValue"] == 2
    kinds = {key: entry["typeCounts"][0]["type"] for key, entry in found["keys"].items()}
    assert {entry["typeCounts"][0]["count"] for entry in found["keys"].values()} == {1}  # not counted: there are some
    assert kinds == {
        "_step": "number", "number": "number", "text": "string", "truth": "boolean", "none": "nil",
        "in.ner": "number", "table": "number",
    }  # fmt: skip


def test_the_first_step_may_be_the_last(store):
    one = run(store)
    store.append_history(one, 0, rows({"x": 1}))
    found = json.loads(store.row("runs", one["id"])["historyKeys"])
    assert (found["lastStep"], found["sets"], list(found["keys"])) == (0, [], ["x"])


def test_a_rewound_run_has_the_rows_up_to_the_step_and_a_restarted_one_none(store):
    one = run(store)
    store.append_history(one, 0, rows(*({"x": step} for step in range(5))))
    store.append_lines(one, "output.log", 0, ["line"])
    after = store.rewind(one, 2)
    assert history(store, one) == [{"x": 0}, {"x": 1}, {"x": 2}] and after["historyLineCount"] == 3
    assert json.loads(after["historyKeys"])["lastStep"] == 2
    store.update("runs", one["id"], summaryMetrics="{}", exitcode=1, shouldStop=1, state="failed", notes="n")
    after = store.restart(one)
    assert history(store, one) == [] == store.lines(one["id"], "output.log")
    assert (after["state"], after["shouldStop"], after["historyLineCount"]) == ("running", 0, 0)
    assert {after[key] for key in ("historyKeys", "summaryMetrics", "exitcode", "notes")} == {None}
    assert after["createdAt"] > one["createdAt"]


def test_lines_are_counted_by_the_last_ones_number(store):
    one = run(store)
    assert store.line_count(one["id"], "output.log") == 0
    store.append_lines(one, "output.log", 2, ["c", "d"])
    store.append_lines(one, "output.log", 0, ["a", "b", "C"])
    store.append_lines(one, "other.log", 9, ["z"])
    assert store.lines(one["id"], "output.log") == [(0, "a"), (1, "b"), (2, "C"), (3, "d")]
    assert store.lines(one["id"], "output.log", 1, 3) == [(1, "b"), (2, "C")]
    assert store.line_count(one["id"], "output.log") == 4


def test_a_blob_goes_with_its_file_and_what_owns_it(store):
    one, left = run(store), store.new_blob()
    file = store.insert("files", run=one["id"], name="a", updatedAt=0.0)
    store.write_file(file["id"], b"old")
    store.write_file(file["id"], b"new!")
    found = store.get("files", name="a")
    assert store.read(found) == b"new!" and found["sizeBytes"] == 4 and found["updatedAt"] > 0
    assert found["md5"] == "55F27mUrnNqeyi/4JgbPeA==" and len(list(store.blobs.iterdir())) == 1
    left.write_bytes(b"of an upload that a kill cut off")
    store.tidy()
    assert not left.exists() and store.read(found) == b"new!"
    store.delete("runs", one["id"])
    assert store.find("files") == [] and list(store.blobs.iterdir()) == []


def test_an_error_undoes_the_whole_write(store):
    with pytest.raises(KeyError), store.write():
        project(store, "never")
        with store.write():  # joins the outer one
            project(store, "neither")
        raise KeyError
    assert store.count("projects") == 0 and store.get("projects", name="never") is None
    project(store, "a")
    project(store, "b")
    assert store.count("projects") == 2 and store.count("projects", name="b", entityName="local") == 1
    assert [row["name"] for row in store.find_where("projects", "name > ?", "a")] == ["b"]


def test_a_folder_is_served_by_one_process_and_named_by_its_id(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match=r"already served by process \d+$"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def directory(path):
    path.mkdir()


def empty_with_files(path):
    (path.parent / "blobs").mkdir()
    (path.parent / "blobs" / "one").write_text("kept")


def foreign(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE notes (text)")


def newer(path):
    Store(path.parent).checkpoint()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def truncated(path):
    Store(path.parent).checkpoint()
    path.write_bytes(path.read_bytes()[:20_000])


def saying(place: int, content: bytes):
    """A whole file whose first page says otherwise."""

    def damage(path):
        Store(path.parent).checkpoint()
        whole = path.read_bytes()
        path.write_bytes(whole[:place] + content + whole[place + len(content) :])

    return damage


DAMAGED = {
    "a directory": (directory, "unable to open"),
    "nothing, but files": (empty_with_files, "is missing or empty"),
    "text": (lambda path: path.write_text("some text, and more of it than a header"), "is not a database"),
    "another program's": (foreign, "is not a database of local_wandb"),
    "a newer version's": (newer, "written by a newer version (99;"),
    "half": (truncated, "is truncated: 20,000 of"),
    "of more pages": (saying(28, b"\1\0\0\1"), "of 68,719,480,832 bytes"),
    "of larger pages": (saying(16, b"\0\1"), "is truncated"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_database_that_is_none_is_refused_and_left_alone(tmp_path, damage, message):
    path = tmp_path / "local_wandb.sqlite"
    damage(path)
    gc.collect()  # closes what has written it; later, that would move the log into the file
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".sqlite", "")}
    with pytest.raises(ValueError, match=re.escape(message)):
        Store(tmp_path)
    assert {p: p.read_bytes() for p in before} == before


def test_a_checkpoint_that_was_cut_off_is_no_damage(tmp_path):
    """Killed in it, the file's first page is new and tells of pages that only the log has."""
    store = Store(tmp_path / "killed")
    store.checkpoint()
    with store.write() as db:
        db.execute("CREATE TABLE large (text)")
        db.executemany("INSERT INTO large VALUES (?)", [("x" * 5000,)] * 100)
    for path in (store.path, store.path.with_name(f"{store.path.name}-wal")):
        shutil.copy(path, tmp_path)
    file = tmp_path / store.path.name
    with open(file, "r+b") as cut, contextlib.closing(sqlite3.connect(store.path)) as db:
        cut.seek(28)
        cut.write(db.execute("PRAGMA page_count").fetchone()[0].to_bytes(4, "big"))
    assert Store(tmp_path)._db.execute("SELECT count(*) AS n FROM large").fetchone() == {"n": 100}


def test_a_database_of_the_first_version_is_brought_up_to_date(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "local_wandb.sqlite")) as db, db:
        db.executescript(SCHEMA + "PRAGMA user_version = 1;")
        db.execute("INSERT INTO projects (entityName, name, createdAt) VALUES ('local', 'old', 0)")
        db.execute(
            "INSERT INTO runs (project, name, state, createdAt, heartbeatAt) VALUES (1, 'run', 'finished', 0, 5)"
        )
    (run_row,) = Store(tmp_path).find("runs")
    assert (run_row["name"], run_row["updatedAt"]) == ("run", 5)
