"""Runs: their state, history, console and files."""

import json
import logging
import math
import posixpath
import time
from collections.abc import Callable

from graphql import GraphQLError

from local_wandb.artifacts import remove as remove_artifact
from local_wandb.filters import like, select
from local_wandb.nodes import Context, connection, existing, node_id, owner, proper_name, proper_path, row_id
from local_wandb.projects import make_project, named_run, user
from local_wandb.projects import project as find_project
from local_wandb.store import Store

AGENT_LOST = 60.0  # s without a heartbeat (one every 5 s) until an agent counts as gone
RUN_LOST = 300.0  # s without a file stream (one every 30 s at least) until a run counts as crashed; W&B's own limit
STARTED, HEARD = 1, 2  # of a sweep's run: its agent says that it lives; it has spoken itself
LIVE = ("pending", "running", "preempting")
log = logging.getLogger("local_wandb")


def _runs(project, info, filters=None, order=None, after=None, first=None) -> dict:
    return connection(_matching(project, info, filters, order), first, after)


def _matching(project: dict, info, condition: str | None, order: str | None) -> list[dict]:
    runs = [
        run | {"entityName": project["entityName"]} for run in info.context.store.find("runs", project=project["id"])
    ]
    return select(runs, json.loads(condition or "{}"), order or "+created_at")


def _run(project, info, name, desc=None, missingOk=None) -> dict | None:
    return info.context.store.get("runs", project=project["id"], name=name)


BUCKET = {  # input field -> column, where a null means "leave it"
    "displayName": "displayName", "description": "description", "notes": "notes", "groupName": "group",
    "jobType": "jobType", "config": "config", "commit": "commit", "host": "host", "jobProgram": "program",
    "jobRepo": "repo", "summaryMetrics": "summaryMetrics",
}  # fmt: skip


def upsert_bucket(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    changes = {column: input[field] for field, column in BUCKET.items() if input.get(field) is not None}
    for column in ("config", "summaryMetrics"):
        if column in changes:
            json_object(changes[column], column)
    _features(changes.get("config"))
    if input.get("tags") is not None:
        changes["tags"] = json.dumps(input["tags"])
    if not input.get("name"):  # by id: an edit from outside, the run's state is its own affair
        run = existing(info, "runs", "Run", input.get("id") or "")
        return {"bucket": store.update("runs", run["id"], updatedAt=now, **changes), "inserted": False}
    with store.write():
        project = make_project(info, input.get("modelName"), input.get("entityName"))
        run = store.get("runs", project=project["id"], name=input["name"])
        inserted = run is None
        if inserted:
            run = store.insert(
                "runs", project=project["id"], name=proper_name(input["name"], "run"), displayName=input["name"],
                state="running", createdAt=now, heartbeatAt=now,
            )  # fmt: skip
        elif _starts_anew(input):
            run = store.restart(run)
        if inserted or not run["historyLineCount"]:
            run = _with_ancestors(store, project, run, input)
        if input.get("sweep"):  # said once, in the first of a run's calls
            sweep = store.get("sweeps", project=project["id"], name=input["sweep"])
            if sweep is None:  # `wandb sync` of a sweep that ran against another server: the runs stay together
                sweep = store.insert(
                    "sweeps",
                    project=project["id"],
                    name=proper_name(input["sweep"], "sweep"),
                    config="{method: synced, parameters: {}}",
                    state="FINISHED",
                    createdAt=now,
                    updatedAt=now,
                )
            changes |= {"sweep": sweep["id"], "sweepName": sweep["name"]}
        if input.get("state"):
            changes["state"] = input["state"]
        elif run["state"] in ("pending", "preempted", "crashed"):
            changes["state"] = "running"
        elif run["state"] == "killed" and input.get("jobProgram"):  # begun again: the old wish to stop it is past
            changes |= {"state": "running", "shouldStop": 0}
        run = store.update("runs", run["id"], heartbeatAt=now, updatedAt=now, seen=HEARD, **changes)
    return {"bucket": run, "inserted": inserted, "serverSettings": {"serverMessages": []}}


# Of the client's telemetry (wandb_telemetry.proto, Feature): a run's first call says how it was begun.
OFFLINE, SYNC, SHARED, FORK, REWIND, SYNC2 = 4, 42, 67, 71, 72, 76


def _features(config: str | None) -> set[int]:
    try:
        return set(_telemetry(config).get("t", {}).get("3", []))
    except (AttributeError, TypeError) as error:
        raise ValueError("config: _wandb is not what a client writes there") from error


def _telemetry(config: str | None) -> dict:
    return json.loads(config or "{}").get("_wandb", {}).get("value", {})


def _begun(input) -> set[int] | None:
    """The features of a run's first call; None of a later one, which says nothing of the program but its machine."""
    own = _telemetry(input.get("config"))
    return _features(input["config"]) if input.get("jobProgram") and "t" in own and "e" not in own else None


def _starts_anew(input) -> bool:
    """Whether an id is used again without `resume`, which would bring the run's opaque id: W&B starts the run anew."""
    begun = _begun(input)
    return begun is not None and not input.get("id") and not begun & {OFFLINE, SYNC, SHARED, REWIND, SYNC2}


def _with_ancestors(store: Store, project: dict, run: dict, input) -> dict:
    """A forked run begins with the rows of its parent, which has those of its own, up to the step of the fork."""
    if FORK not in (_begun(input) or ()):
        return run
    point = _telemetry(input["config"])["branch_point"]
    parent = store.get("runs", project=project["id"], name=point["run_id"])
    if parent is None:
        raise GraphQLError(f"run {point['run_id']!r} does not exist, so it cannot be forked")
    store.append_history(run, 0, store.history(parent["id"], high=int(point["step"]) + 1))
    return store.row("runs", run["id"])


def json_object(text: str, what: str) -> dict:
    """The object that a JSON text is. Raises ValueError where it is none: it would break whoever reads it."""
    try:
        value = json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    return value


def stream(context: Context, run: dict, body: dict) -> dict:
    """Stores one file-stream request of a run and answers what the client reads."""
    store, now = context.store, time.time()
    changes: dict = {"heartbeatAt": now, "updatedAt": now, "seen": HEARD}
    with store.write():
        run = store.row("runs", run["id"])  # as it is now that nobody else can change it
        for name, chunk in (body.get("files") or {}).items():
            offset, lines = chunk.get("offset", 0), chunk.get("content") or []
            if name == "wandb-history.jsonl":
                store.append_history(run, offset, lines, merge=SHARED in _features(run["config"]))
            elif name == "wandb-summary.json":
                json_object(lines[-1], "the summary")
                changes["summaryMetrics"] = lines[-1]
            else:
                store.append_lines(run, name, offset, lines)
                if name == "wandb-events.jsonl" and lines:
                    json_object(lines[-1], "the last system metric")
                    changes["systemMetrics"] = lines[-1]
        preempting = bool(body.get("preempting")) or run["state"] == "preempting"
        killed = run["state"] == "killed" and run["shouldStop"]  # its sweep was cancelled; the process may not know yet
        if body.get("complete"):
            code = changes["exitcode"] = int(body.get("exitcode") or 0)
            lost = "killed" if run["shouldStop"] else "preempted" if preempting else "failed"
            changes["state"] = lost if code or killed else "finished"
        elif not killed:
            changes["state"] = "preempting" if preempting else "running"
        store.update("runs", run["id"], **changes)
    return {"stopped": bool(run["shouldStop"])}


def mark_lost(store: Store) -> None:
    """Ends the runs that nobody hears of any more. Time while this server was down does not count."""
    now = time.time()

    def silent(row: dict, limit: float) -> bool:
        return now - max(row["heartbeatAt"], store.started) > limit

    with store.write():
        for run in [run for state in LIVE for run in store.find("runs", state=state)]:
            agent = store.get("agents", id=run["agent"]) if run["agent"] else None
            orphan = agent is not None and silent(agent, AGENT_LOST)
            # A pending run without an agent waits for whoever made it.
            if (run["seen"] == HEARD or orphan) and silent(run, AGENT_LOST if orphan else RUN_LOST):
                lose(store, run)


def lose(store: Store, run: dict) -> None:
    """A live run that ended without a last word."""
    state = "killed" if run["shouldStop"] else "preempted" if run["state"] == "preempting" else "crashed"
    if store.get("sweeps", project=run["project"], controllerRunName=run["name"]):
        state = "finished"  # `wandb sweep-scheduler` never says that it is done
    store.update("runs", run["id"], state=state)


def update_state(source, info, input) -> dict:
    run, state = existing(info, "runs", "Run", input["id"]), input["state"]
    allowed = {"pending": ("running", "failed", "crashed", "preempted"), "failed": ("pending", "running")}
    if run["sweep"]:
        raise GraphQLError(f"cannot update the state of run {run['name']}: it is a sweep run")
    if run["state"] not in allowed.get(state, ()):
        raise GraphQLError(f"invalid state transition of run {run['name']}: from {run['state']!r} to {state!r}")
    info.context.store.update("runs", run["id"], state=state)
    return {"success": True}


def alert(source, info, input) -> dict:
    run, severity = named_run(info, input), input.get("severity") or "INFO"
    log.warning("alert of run %s, %s: %s: %s", run["name"], severity, input["title"], input["text"])
    info.context.store.insert(
        "alerts", run=run["id"], title=input["title"], text=input["text"], severity=severity, createdAt=time.time()
    )
    return {"success": True}


def stop_run(source, info, input) -> dict:
    info.context.store.update("runs", existing(info, "runs", "Run", input["id"])["id"], shouldStop=1)
    return {"success": True}


def rewind(source, info, input) -> dict:
    """Forgets the history after a step, so that the run can go on from there."""
    if input["metricName"] != "_step":
        raise GraphQLError(f"a run is rewound to a _step, not to a {input['metricName']!r}")
    project = find_project(None, info, input.get("projectName"), input.get("entityName"))
    run = project and _run(project, info, input["runName"])
    if not run:
        raise GraphQLError(f"run {input['runName']!r} does not exist")
    return {"rewoundRun": info.context.store.rewind(run, int(input["metricValue"]))}


def delete_run(source, info, input) -> dict:
    store = info.context.store
    run = store.get("runs", id=row_id("Run", input["id"]))
    if run is None:  # deleted before: it is as it was asked for
        return {}
    with store.write():
        if input.get("deleteArtifacts"):
            for artifact in store.find("artifacts", run=run["id"]):
                remove_artifact(store, artifact)
        store.delete("runs", run["id"])
    return {}


def _wandb_config(run, info, keys=None) -> str:
    own = _telemetry(run["config"])
    return json.dumps({key: own[key] for key in keys or own if key in own})


def _last_step(run: dict) -> int:
    return json.loads(run["historyKeys"])["lastStep"] if run["historyKeys"] else 0


def _tail(lines: list[str]) -> str:
    return json.dumps(lines[-1:])


def _history(run, info, minStep=0, maxStep=2**62, samples=None) -> list[str]:
    lines = info.context.store.history(run["id"], minStep, maxStep)
    return _sample(lines, samples) if minStep == 0 and maxStep == 2**62 else lines


def _events(run, info, samples=None) -> list[str]:
    return _sample([line for _, line in info.context.store.lines(run["id"], "wandb-events.jsonl")], samples)


def _sample(rows: list, samples: int | None) -> list:
    """At most `samples` rows, evenly spread, the first and the last among them."""
    if not samples or len(rows) <= samples:
        return rows
    return [rows[round(i * (len(rows) - 1) / max(samples - 1, 1))] for i in range(samples)]


SPECS = 20  # each reads the whole history; the client asks for one


def _sampled_history(run, info, specs) -> list[list[dict]]:
    if len(specs) > SPECS:
        raise GraphQLError(f"{len(specs):,} samples of a history in one field; at most {SPECS} are answered")
    answers = []
    for text in specs:
        spec = json.loads(text)
        keys = spec.get("keys")
        last = spec.get("maxStep")
        lines = info.context.store.history(run["id"], spec.get("minStep") or 0, 2**62 if last is None else last + 1)
        rows = [strict(json.loads(line)) for line in lines]
        if keys:
            rows = [{key: row[key] for key in keys} for row in rows if all(key in row for key in keys)]
        answers.append(_sample(rows, spec.get("samples")))
    return answers


def strict(value):
    """The value with NaN and infinities as the strings W&B uses: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, list) else value


def _log_lines(run, info, first=None, last=None, after=None, useImprovedPagination=None) -> dict:
    lines = info.context.store.lines(run["id"], "output.log")
    page = connection(lines[-last:] if last else lines, last or first or 10_000, after)
    for edge in page["edges"]:
        edge["node"] = _log_line(*edge["node"])
    return page


def _log_line(number: int, text: str) -> dict:
    """The client's form is "[ERROR ]TIMESTAMP TEXT"."""
    level, _, rest = text.partition(" ") if text.startswith("ERROR ") else ("", "", text)
    stamp, _, line = rest.partition(" ")
    if not stamp[:4].isdigit():
        stamp, line = "", rest
    return {"number": number, "timestamp": stamp or None, "level": level.lower() or "info", "label": None, "line": line}


# Files

# What W&B answers for a name that the run has no file of. The client looks at the MD5 ("not found in ...").
MISSING = {"id": 0, "blob": None, "sizeBytes": 0, "md5": "0", "updatedAt": None}


def _files(run, info, names=None, pattern=None, after=None, first=None) -> dict:
    files = [f for f in info.context.store.find("files", order="name", run=run["id"]) if f["blob"]]
    if names:
        known = {f["name"]: f for f in files}
        wanted = dict.fromkeys(posixpath.normpath(name) for name in names)  # asked for as it was saved: ./notes.txt
        files = [known.get(name, MISSING | {"name": name}) for name in wanted]
    if pattern:
        files = [f for f in files if like(f["name"], pattern)]
    return connection(files, first, after)


def create_run_files(source, info, input) -> dict:
    store = info.context.store
    run = named_run(info, input)
    with store.write():
        files = [
            store.get("files", run=run["id"], name=name)
            or store.insert("files", run=run["id"], name=proper_path(name), updatedAt=time.time())
            for name in input["files"]
        ]
    return {"runID": node_id("Run", run["id"]), "uploadHeaders": [], "files": files}


def mark_files_uploaded(source, info, input) -> dict:
    return {"success": True}  # an upload is known by its content, not by an announcement


def delete_files(source, info, input) -> dict:
    for file in input["files"]:
        info.context.store.delete("files", existing(info, "files", "File", file)["id"])
    return {"success": True}


FIELDS: dict[str, dict[str, Callable]] = {
    "Project": {
        "runCount": lambda project, info, filters=None: len(_matching(project, info, filters, None)),
        "runs": _runs,
        "run": _run,
        "bucket": _run,
    },
    "Run": {
        "projectId": lambda run, info: run["project"],
        "project": owner("projects", "project"),
        "user": user,
        "tags": lambda run, info: json.loads(run["tags"] or "[]"),
        "readOnly": lambda run, info: False,
        "historyKeys": lambda run, info: strict(json.loads(run["historyKeys"])) if run["historyKeys"] else None,
        "stopped": lambda run, info: bool(run["shouldStop"]),
        "failed": lambda run, info: run["state"] in ("failed", "crashed"),
        "running": lambda run, info: run["state"] in LIVE,
        "eventsLineCount": lambda run, info: info.context.store.line_count(run["id"], "wandb-events.jsonl"),
        "logLineCount": lambda run, info: info.context.store.line_count(run["id"], "output.log"),
        "historyTail": lambda run, info: _tail(info.context.store.history(run["id"], _last_step(run))),
        "eventsTail": lambda run, info: _tail(_events(run, info)),
        "wandbConfig": _wandb_config,
        "history": _history,
        "events": _events,
        "sampledHistory": _sampled_history,
        "parquetHistory": lambda run, info, liveKeys: {"parquetUrls": [], "liveData": []},  # everything is live
        "logLines": _log_lines,
        "fileCount": lambda run, info: _files(run, info)["totalCount"],
        "files": _files,
    },
    "File": {
        "displayName": lambda file, info: file["name"],
        "url": lambda file, info, upload=None: info.context.file_url(file, "PUT" if upload else "GET"),
        "directUrl": lambda file, info: file.get("ref") or info.context.file_url(file, "GET"),
        "uploadUrl": lambda file, info: info.context.file_url(file, "PUT"),
        "uploadHeaders": lambda file, info: [],
        "digest": lambda file, info: file["md5"],
    },
}
