"""What the server decides and answers about runs, case by case, without a client: test_runs.py has the real one."""

import json
import time
from types import SimpleNamespace

import pytest
from graphql import GraphQLError

from local_wandb import runs, schema
from local_wandb.nodes import Context, node_id
from local_wandb.runs import FORK, HEARD, OFFLINE, REWIND, SHARED, STARTED, SYNC, SYNC2
from local_wandb.store import Store

EVENTS, HISTORY, OUTPUT, SUMMARY = "wandb-events.jsonl", "wandb-history.jsonl", "output.log", "wandb-summary.json"


@pytest.fixture
def info(tmp_path):
    return SimpleNamespace(context=Context(Store(tmp_path), lambda file, method: f"{method} {file['name']}"))


@pytest.fixture
def call(info):
    """The client's call for a run of project p."""
    return lambda name="r", **input: runs.upsert_bucket(None, info, {"modelName": "p", "name": name} | input)


@pytest.fixture
def ask(info):
    """What GraphQL answers for these fields of run r."""

    def ask(fields: str) -> dict:
        found = schema.answer(info.context, {"query": f'{{ project(name: "p") {{ run(name: "r") {{ {fields} }} }} }}'})
        assert not found.errors, found.errors
        return found.data["project"]["run"]

    return ask


def log(info, *rows: dict, stream: str = HISTORY, **more) -> dict:
    """One file-stream request with these rows."""
    body = {"files": {stream: {"offset": 0, "content": [json.dumps(row) for row in rows]}}} if rows else {}
    return runs.stream(info.context, info.context.store.get("runs", name="r"), body | more)


def telemetry(*features: int, **more) -> str:
    return json.dumps({"_wandb": {"value": {"t": {"3": features}} | more}})


@pytest.mark.parametrize(
    ("before", "input", "after"),
    [
        ("pending", {}, "running"),
        ("preempted", {}, "running"),
        ("crashed", {}, "running"),
        ("crashed", {"state": "failed"}, "failed"),
        ("running", {"state": "pending"}, "pending"),
        ("finished", {}, "finished"),
        ("failed", {"jobProgram": "train.py"}, "failed"),
        ("killed", {}, "killed"),
        ("killed", {"jobProgram": "train.py"}, "running"),
    ],
)
def test_a_call_wakes_a_run_that_is_not_over(info, call, before, input, after):
    first, store = call(), info.context.store
    assert first["inserted"] is True and first["bucket"]["state"] == "running" and first["bucket"]["seen"] == HEARD
    assert first["bucket"]["displayName"] == "r" and first["bucket"]["createdAt"] > time.time() - 60
    store.update("runs", 1, state=before, shouldStop=1, heartbeatAt=0.0, updatedAt=0.0, seen=0)
    again = call(**input)
    assert again["inserted"] is False and again["bucket"]["state"] == after and again["bucket"]["seen"] == HEARD
    assert again["bucket"]["shouldStop"] == (0 if before == "killed" != after else 1)
    assert min(again["bucket"]["heartbeatAt"], again["bucket"]["updatedAt"]) > time.time() - 60


def test_each_field_has_its_column_and_null_leaves_it(info, call):
    given = {field: "{}" if field in ("config", "summaryMetrics") else field for field in runs.BUCKET}
    for input in (given | {"tags": ["a"]}, dict.fromkeys((*given, "tags"))):
        run = call(**input)["bucket"]
        assert {field: run[column] for field, column in runs.BUCKET.items()} == given and run["tags"] == '["a"]'
    for column in ("config", "summaryMetrics"):
        with pytest.raises(ValueError, match=f"{column} is not a JSON object"):
            call(**{column: "[]"})
        with pytest.raises(ValueError, match=f"{column} is not JSON: "):
            call(**{column: "{"})
    with pytest.raises(ValueError, match="config: _wandb is not what a client writes there"):
        call(config='{"_wandb": {"value": {"t": 3}}}')
    for input in ({"name": None, "id": node_id("Run", 1)}, {"name": "", "id": node_id("Run", 1)}):  # from outside
        info.context.store.update("runs", 1, state="crashed", heartbeatAt=0.0, updatedAt=0.0)
        edited = call(notes="n", **input)
        assert edited["inserted"] is False and edited["bucket"]["updatedAt"] > 0
        assert [edited["bucket"][key] for key in ("notes", "state", "heartbeatAt")] == ["n", "crashed", 0.0]
    with pytest.raises(GraphQLError, match="'' is not the id of a Run"):
        call(name=None)


def test_the_runs_of_a_project_are_chosen_ordered_and_paged(info, call):
    for name, rate in (("a", 3), ("b", 1), ("c", 2)):
        call(name, config=json.dumps({"lr": {"value": rate}}))
    call("elsewhere", modelName="q")

    def listed(arguments: str = "") -> tuple:
        query = f'{{ project(name: "p") {{ runs{arguments} {{ totalCount edges {{ cursor node {{ name }} }} }} }} }}'
        found = schema.answer(info.context, {"query": query}).data["project"]["runs"]
        assert [edge["cursor"] for edge in found["edges"]][:1] in ([], ["1"], ["2"])
        return found["totalCount"], "".join(edge["node"]["name"] for edge in found["edges"])

    assert listed() == (3, "abc") and listed('(order: "-config.lr")') == (3, "acb")
    assert listed("(first: 2)") == (3, "ab") and listed('(first: 2, after: "1")') == (3, "bc")
    text = json.dumps(json.dumps({"config.lr": {"$gt": 1}}))
    assert listed(f"(filters: {text})") == (2, "ac")
    query = f'{{ project(name: "p") {{ all: runCount some: runCount(filters: {text}) run(name: "nobody") {{ id }} }} }}'
    assert schema.answer(info.context, {"query": query}).data["project"] == {"all": 3, "some": 2, "run": None}


def test_a_sweep_that_is_not_here_is_made_so_that_its_runs_stay_together(info, call):
    one, two = call("r", sweep="s")["bucket"], call("other", sweep="s")["bucket"]
    (sweep,) = info.context.store.find("sweeps")
    assert one["sweep"] == two["sweep"] == sweep["id"] and one["sweepName"] == "s" == sweep["name"]
    assert sweep["state"] == "FINISHED" and call("r")["bucket"]["sweepName"] == "s"


@pytest.mark.parametrize(
    ("input", "anew"),
    [
        ({"config": telemetry(), "jobProgram": "x"}, True),
        ({"config": telemetry(5), "jobProgram": "x"}, True),
        ({"config": telemetry()}, False),  # a later call names no program
        ({"config": telemetry(e={}), "jobProgram": "x"}, False),  # nor one that tells the machine
        ({"config": "{}", "jobProgram": "x"}, False),
        ({"config": telemetry(), "jobProgram": "x", "id": node_id("Run", 1)}, False),  # resumed
        *[({"config": telemetry(f, 5), "jobProgram": "x"}, False) for f in (OFFLINE, SYNC, SHARED, REWIND, SYNC2)],
    ],
)
def test_an_id_used_again_starts_anew_unless_it_is_said_otherwise(info, call, input, anew):
    call(notes="old")
    log(info, {"x": 1})
    run = call(**input)["bucket"]
    assert (run["historyLineCount"], run["notes"]) == ((0, None) if anew else (1, "old"))


def test_a_forked_run_begins_with_its_parents_rows_up_to_the_step(info, call):
    call()
    log(info, *({"x": x} for x in range(5)))
    point = {"jobProgram": "x", "config": telemetry(FORK, branch_point={"run_id": "r", "step": 2.0})}
    child = call("child", **point)["bucket"]
    store = info.context.store
    assert [json.loads(line)["x"] for line in store.history(child["id"])] == [0, 1, 2] and child[
        "historyLineCount"
    ] == 3
    assert len(store.history(1)) == 5
    store.append_history(child, 3, ['{"x": 9}'])
    call("child", config=telemetry(FORK, branch_point={"run_id": "r", "step": 2.0}))  # a later call
    assert len(store.history(child["id"])) == 4
    call("plain", config=telemetry(), jobProgram="x")
    assert store.get("runs", name="plain")["historyLineCount"] == 0
    with pytest.raises(GraphQLError, match="run 'nobody' does not exist, so it cannot be forked"):
        call("orphan", jobProgram="x", config=telemetry(FORK, branch_point={"run_id": "nobody", "step": 2}))


ENDED = {"complete": True}


@pytest.mark.parametrize(
    ("state", "stop", "body", "after", "code"),
    [
        ("running", 0, {}, "running", None),
        ("crashed", 1, {}, "running", None),
        ("running", 0, {"preempting": True}, "preempting", None),
        ("preempting", 0, {}, "preempting", None),
        ("running", 0, ENDED, "finished", 0),
        ("running", 1, ENDED, "finished", 0),
        ("preempting", 0, ENDED, "finished", 0),
        ("running", 0, ENDED | {"exitcode": 3}, "failed", 3),
        ("running", 1, ENDED | {"exitcode": 143}, "killed", 143),
        ("preempting", 1, ENDED | {"exitcode": 143}, "killed", 143),
        ("preempting", 0, ENDED | {"exitcode": 1}, "preempted", 1),
        ("running", 0, ENDED | {"exitcode": 1, "preempting": True}, "preempted", 1),
        ("killed", 1, {}, "killed", None),  # its sweep was cancelled, and its process did not know
        ("killed", 1, {"preempting": True}, "killed", None),
        ("killed", 1, ENDED, "killed", 0),
        ("killed", 0, {}, "running", None),
        ("killed", 0, ENDED, "finished", 0),
    ],
)
def test_the_state_after_a_request_of_the_file_stream(info, call, state, stop, body, after, code):
    call()
    info.context.store.update("runs", 1, state=state, shouldStop=stop, heartbeatAt=0.0, updatedAt=0.0, seen=STARTED)
    assert log(info, **body) == {"stopped": bool(stop)}
    run = info.context.store.row("runs", 1)
    assert (run["state"], run["exitcode"], run["seen"]) == (after, code, HEARD)
    assert min(run["heartbeatAt"], run["updatedAt"]) > time.time() - 60


def test_each_file_of_the_stream_has_its_place(info, call, ask):
    call()
    for offset, content in ((0, ["a", "b"]), (2, ["c"])):
        files = {
            name: {"offset": offset, "content": [f'{{"x": "{text}"}}' for text in content]}
            for name in (EVENTS, HISTORY)
        }
        files |= {
            OUTPUT: {"offset": offset, "content": content},
            SUMMARY: {"content": ["no", f'{{"last": "{content[-1]}"}}']},
        }
        runs.stream(info.context, info.context.store.row("runs", 1), {"files": files})
    runs.stream(info.context, info.context.store.row("runs", 1), {"files": {EVENTS: {"content": None}}})
    kinds, lines = ("history", "events"), [f'{{"x": "{text}"}}' for text in "abc"]
    assert ask("history events historyTail eventsTail historyLineCount eventsLineCount logLineCount") == (
        dict.fromkeys(kinds, lines)
        | {f"{kind}Tail": json.dumps(lines[-1:]) for kind in kinds}
        | {f"{kind}LineCount": 3 for kind in (*kinds, "log")}
    )
    assert ask("summaryMetrics systemMetrics") == {"summaryMetrics": '{"last": "c"}', "systemMetrics": '{"x": "c"}'}
    for name, words in ((SUMMARY, "the summary is not JSON"), (EVENTS, "the last system metric is not JSON")):
        with pytest.raises(ValueError, match=words):
            runs.stream(
                info.context,
                info.context.store.row("runs", 1),
                {"files": {HISTORY: {"offset": 3, "content": ['{"x": 1}']}, name: {"content": ["{"]}}},
            )
    assert ask("historyLineCount")["historyLineCount"] == 3  # nothing of a request that is refused
    call(config=telemetry(SHARED))
    log(info, {"_step": 9, "x": 1})
    log(info, {"_step": 9, "y": 2})
    assert json.loads(ask("history")["history"][-1]) == {"_step": 9, "x": 1, "y": 2}


@pytest.mark.parametrize(
    ("state", "seen", "agent", "silent", "lost"),
    [
        ("running", HEARD, None, 300.0, False),
        ("running", HEARD, None, 300.5, True),
        ("pending", HEARD, None, 300.5, True),
        ("finished", HEARD, None, 300.5, False),
        ("pending", 0, None, 9999.0, False),  # it waits for whoever made it
        ("running", STARTED, None, 9999.0, False),
        ("running", HEARD, 60.0, 300.0, False),
        ("running", HEARD, 60.5, 60.0, False),  # the run still speaks
        ("running", HEARD, 60.5, 60.5, True),
        ("pending", 0, 60.5, 60.5, True),
        ("pending", 0, 60.0, 9999.0, False),
    ],
)
def test_a_run_is_lost_when_neither_it_nor_its_agent_is_heard_of(
    info, call, monkeypatch, state, seen, agent, silent, lost
):
    monkeypatch.setattr(runs, "time", SimpleNamespace(time=lambda: 10_000.0))
    call(sweep="s")
    store = info.context.store
    if agent is not None:
        agent = store.insert("agents", sweep=1, name="a", host="h", createdAt=0.0, heartbeatAt=10_000 - agent)["id"]
    store.update("runs", 1, state=state, seen=seen, agent=agent, heartbeatAt=10_000 - silent)
    store.started = 10_000.0
    runs.mark_lost(store)
    assert store.row("runs", 1)["state"] == state  # this server was not there to hear them
    store.started = 0.0
    runs.mark_lost(store)
    assert store.row("runs", 1)["state"] == ("crashed" if lost else state)


def test_how_a_lost_run_ended(info, call):
    call(sweep="s")
    store = info.context.store
    for state, stop, after in (("running", 0, "crashed"), ("preempting", 0, "preempted"), ("preempting", 1, "killed")):
        runs.lose(store, store.update("runs", 1, state=state, shouldStop=stop))
        assert store.row("runs", 1)["state"] == after
    store.update("sweeps", 1, controllerRunName="r")
    runs.lose(store, store.row("runs", 1))
    assert store.row("runs", 1)["state"] == "finished"


STATES = ("pending", "running", "failed", "crashed", "preempted", "finished", "killed")
ALLOWED = {("running", "pending"), ("failed", "pending"), ("crashed", "pending"), ("preempted", "pending")}
ALLOWED |= {("pending", "failed"), ("running", "failed")}


def test_a_state_is_changed_from_outside_only_where_wandb_does(info, call):
    call()
    store = info.context.store
    for before, after in ((before, after) for before in STATES for after in STATES):
        store.update("runs", 1, state=before)
        try:
            assert runs.update_state(None, info, {"id": node_id("Run", 1), "state": after}) == {"success": True}
            assert (before, after) in ALLOWED and store.row("runs", 1)["state"] == after
        except GraphQLError as error:
            assert (before, after) not in ALLOWED and store.row("runs", 1)["state"] == before
            assert f"of run r: from '{before}' to '{after}'" in str(error)
    call(sweep="s")
    store.update("runs", 1, state="running")
    with pytest.raises(GraphQLError, match="cannot update the state of run r: it is a sweep run"):
        runs.update_state(None, info, {"id": node_id("Run", 1), "state": "pending"})


def test_a_run_is_stopped_rewound_told_of_and_deleted(info, call, ask, caplog):
    call()
    log(info, *({"x": x} for x in range(4)))
    named = {"entityName": "local", "projectName": "p", "runName": "r"}
    assert ask("stopped failed running shouldStop") == {
        "stopped": False, "failed": False, "running": True, "shouldStop": False,
    }  # fmt: skip
    assert runs.stop_run(None, info, {"id": node_id("Run", 1)}) == {"success": True} and ask("stopped")["stopped"]
    assert runs.alert(None, info, named | {"title": "T", "text": "words"}) == {"success": True}
    assert "alert of run r, INFO: T: words" in caplog.text
    (row,) = info.context.store.find("alerts")
    assert (row["title"], row["text"], row["severity"]) == ("T", "words", "INFO")
    rewound = runs.rewind(None, info, named | {"metricName": "_step", "metricValue": 1.0})["rewoundRun"]
    assert rewound["historyLineCount"] == 2
    for wrong, words in (
        ({"metricName": "x"}, "rewound to a _step, not to a 'x'"),
        ({"runName": "q"}, "run 'q' does not"),
    ):
        with pytest.raises(GraphQLError, match=words):
            runs.rewind(None, info, named | {"metricName": "_step", "metricValue": 1.0} | wrong)
    with pytest.raises(GraphQLError, match="run local/p/q does not exist"):
        runs.alert(None, info, named | {"runName": "q", "title": "T", "text": "words"})
    for state, failed, running in (("crashed", True, False), ("failed", True, False), ("pending", False, True)):
        info.context.store.update("runs", 1, state=state)
        assert ask("failed running") == {"failed": failed, "running": running}
    assert runs.mark_files_uploaded(None, info, named) == {"success": True}
    for wrong in (node_id("Run", 9), node_id("Sweep", 1)):
        with pytest.raises(GraphQLError):
            runs.stop_run(None, info, {"id": wrong})
    for _ in range(2):  # the second time it is as it was asked for
        assert runs.delete_run(None, info, {"id": node_id("Run", 1)}) == {}
    assert info.context.store.find("runs") == [] == info.context.store.find("history")


def test_a_runs_artifacts_go_with_it_where_that_is_asked_for(info, call):
    call()
    store = info.context.store
    times = {"createdAt": 0.0, "updatedAt": 0.0}
    store.insert("collections", project=1, name="c", type="t", **times)
    for run in (1, 1, None):
        store.insert("artifacts", collection=1, run=run, state="COMMITTED", digest="d", wanted="[]", **times)
    runs.delete_run(None, info, {"id": node_id("Run", 1), "deleteArtifacts": True})
    assert [row["id"] for row in store.find("artifacts") if row["state"] != "DELETED"] == [3]


def test_a_run_of_which_nothing_was_logged_answers_too(call, ask):
    call()
    assert ask("historyKeys historyTail eventsTail wandbConfig tags history fileCount logLineCount") == {
        "historyKeys": None, "historyTail": "[]", "eventsTail": "[]", "wandbConfig": "{}", "tags": [], "history": [],
        "fileCount": 0, "logLineCount": 0,
    }  # fmt: skip


def test_parts_of_a_history(info, call, ask):
    call(config=json.dumps({"_wandb": {"value": {"t": {}, "m": [1]}}}))
    log(info, *({"_step": s, "x": s if s != 3 else float("nan")} | ({"y": -s} if s % 2 else {}) for s in range(6)))

    def steps(fields: str) -> list:
        return [[json.loads(row)["_step"] for row in found] for found in ask(fields).values()]

    assert steps("a: history b: history(minStep: 2, maxStep: 4) c: history(minStep: 4) d: history(maxStep: 1)") == [
        [0, 1, 2, 3, 4, 5], [2, 3], [4, 5], [0],
    ]  # fmt: skip
    assert steps("a: history(samples: 3) b: history(samples: 1) c: history(samples: 6)") == [
        [0, 2, 5],
        [0],
        [*range(6)],
    ]
    assert steps("a: history(minStep: 2, samples: 2)") == [[2, 3, 4, 5]]

    def sampled(**spec) -> list:
        return ask(f"sampledHistory(specs: [{json.dumps(json.dumps(spec))}])")["sampledHistory"][0]

    assert sampled(keys=["y"]) == [{"y": -1}, {"y": -3}, {"y": -5}]
    assert sampled(keys=["x", "y"], minStep=2, maxStep=3) == [{"x": "NaN", "y": -3}]
    assert [row["_step"] for row in sampled(minStep=1, samples=2)] == [1, 5] and len(sampled(maxStep=0)) == 1
    specs = ["{}"] * (runs.SPECS + 1)
    with pytest.raises(GraphQLError, match="21 samples of a history in one field; at most 20"):
        runs._sampled_history(info.context.store.row("runs", 1), info, specs)
    assert len(runs._sampled_history(info.context.store.row("runs", 1), info, specs[1:])) == 20
    assert ask('a: wandbConfig b: wandbConfig(keys: ["m", "none"])') == {"a": '{"t": {}, "m": [1]}', "b": '{"m": [1]}'}
    keys = ask("historyKeys")["historyKeys"]
    assert keys["lastStep"] == 5 and keys["keys"]["x"]["previousValue"] == 5
    inf = float("inf")
    assert runs.strict({"a": [inf, -inf, -float("nan"), 1.5, "t"]}) == {"a": ["Infinity", "-Infinity", "NaN", 1.5, "t"]}


def test_lines_of_the_console_and_their_pages(info, call, ask):
    call()
    texts = ["2026-01-01T00:00:00 one", "ERROR 2026-01-01T00:00:01 two words", "plain words", "ERROR bare"]
    info.context.store.append_lines(info.context.store.row("runs", 1), OUTPUT, 0, texts)

    def lines(arguments: str) -> list:
        found = ask(f"logLines({arguments}) {{ edges {{ node {{ number timestamp level line }} }} }}")["logLines"]
        return [tuple(edge["node"].values()) for edge in found["edges"]]

    assert lines("first: 9") == [
        (0, "2026-01-01T00:00:00", "info", "one"),
        (1, "2026-01-01T00:00:01", "error", "two words"),
        (2, None, "info", "plain words"),
        (3, None, "error", "bare"),
    ]
    assert [line[0] for line in lines("last: 3")] == [1, 2, 3] and [line[0] for line in lines("first: 1")] == [0]
    assert [line[0] for line in lines('first: 2, after: "1"')] == [1, 2]


def test_files_by_name_and_pattern_those_with_content_alone(info, call, ask):
    call()
    named, store = {"entityName": "local", "projectName": "p", "runName": "r"}, info.context.store
    made = runs.create_run_files(None, info, named | {"files": ["b.txt", "a/c.json", "empty"]})
    assert made["runID"] == node_id("Run", 1)
    again = runs.create_run_files(None, info, named | {"files": ["b.txt"]})["files"]
    assert [file["id"] for file in made["files"]] == [1, 2, 3] and again[0]["id"] == 1
    for file in (1, 2):
        store.write_file(file, b"text")

    def files(arguments: str = "", fields: str = "name") -> list:
        found = ask(f"files{arguments} {{ edges {{ node {{ {fields} }} }} }}")["files"]
        return [tuple(edge["node"].values()) for edge in found["edges"]]

    fields = "name displayName url upload: url(upload: true) directUrl uploadUrl sizeBytes digest"
    digest = "HLJR7A1WjeapKbUgxK7Y0Q=="
    assert files('(pattern: "b%")', fields) == [
        ("b.txt", "b.txt", "GET b.txt", "PUT b.txt", "GET b.txt", "PUT b.txt", 4, digest),
    ]
    assert files() == [("a/c.json",), ("b.txt",)] and ask("fileCount")["fileCount"] == 2
    assert files('(names: ["./b.txt", "late", "b.txt"])', "name sizeBytes md5") == [
        ("b.txt", 4, digest),
        ("late", 0, "0"),
    ]
    assert runs.delete_files(None, info, {"files": [node_id("File", 1)]}) == {"success": True}
    assert files() == [("a/c.json",)]
