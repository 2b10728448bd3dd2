"""The table of operations: one resolver for each field of schema.graphql that is not a column of its row."""

import base64
import binascii
import json
import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import yaml
from graphql import ExecutionResult, GraphQLError, build_schema, execute_sync, parse, validate

from local_wandb import sweeps
from local_wandb.filters import like, matches, select
from local_wandb.store import Store

ENTITY = "local"  # where a request names none
AGENT_LOST = 60.0  # s without a heartbeat (one every 5 s) until an agent counts as gone
RUN_LOST = 300.0  # s without a file stream (one every 30 s at least) until a run counts as crashed; W&B's own limit
ATTEMPTS = 3  # runs that may be lost at one grid point before the point counts as tried
LIVE = ("pending", "running", "preempting")
LOST = ("crashed", "preempted")  # the machine's fault, so the point is offered again; `failed` is the script's
PAGE = 50


@dataclass(frozen=True)
class Context:
    """What a resolver may use: the data, and how to sign a file's address."""

    store: Store
    file_url: Callable[[dict, str], str]  # (file row, "GET" or "PUT") -> absolute URL


class SweepGone(GraphQLError):
    """The agent's sweep no longer exists; the client wants HTTP 404 for that."""


def answer(context: Context, body: dict) -> ExecutionResult:
    """Runs one request body {query, variables, operationName}. Never raises for what a client sends."""
    try:
        document = _document(body["query"])
    except (GraphQLError, KeyError, TypeError) as error:
        return ExecutionResult(None, [error if isinstance(error, GraphQLError) else GraphQLError(f"no query: {error}")])
    if isinstance(document, list):
        return ExecutionResult(None, document)
    return execute_sync(
        SCHEMA,
        document,
        context_value=context,
        variable_values=body.get("variables"),
        operation_name=body.get("operationName") or None,  # the client sends "" for none
    )


@lru_cache(maxsize=512)
def _document(query: str):
    """The parsed query, or the list of its errors. The client sends the same few dozen again and again."""
    document = parse(query)
    return validate(SCHEMA, document) or document


# Names and numbers


def node_id(kind: str, row: int) -> str:
    """The opaque id of a row, as W&B shapes them."""
    return base64.b64encode(f"{kind}:{row}".encode()).decode()


def row_id(kind: str, node: str) -> int:
    """The row of an opaque id. An id of another kind is an error."""
    try:
        found, _, number = base64.b64decode(node, validate=True).decode().partition(":")
        if found == kind:
            return int(number)
    except (binascii.Error, UnicodeDecodeError, ValueError):
        pass
    raise GraphQLError(f"{node!r} is not the id of a {kind}")


def _node(info, table: str, kind: str, node: str) -> dict:
    row = info.context.store.get(table, id=row_id(kind, node))
    if row is None:
        raise GraphQLError(f"{kind} {node!r} does not exist")
    return row


def _connection(items: list, first: int | None = None, after: str | None = None, node=lambda item: item) -> dict:
    start = int(after) if after else 0
    page = items[start : start + (PAGE if first is None else first)]
    return {
        "totalCount": len(items),
        "edges": [{"node": node(item), "cursor": str(start + i)} for i, item in enumerate(page, 1)],
        "pageInfo": {"endCursor": str(start + len(page)), "hasNextPage": start + len(page) < len(items)},
    }


def _name(text: str, what: str) -> str:
    """A name that can stand in a URL: the client builds paths from them."""
    if not text or len(text) > 128 or any(c in "/\\#?%:" or ord(c) < 32 for c in text) or text in (".", ".."):
        raise GraphQLError(f"{what} {text!r} is not a name: 1 to 128 characters, none of / \\ # ? % :")
    return text


# Who


def _user(info) -> dict:
    return {
        "id": node_id("User", 1), "name": ENTITY, "username": ENTITY, "email": "", "admin": True, "flags": "{}",
        "entity": ENTITY, "apiKeys": {"edges": []}, "teams": {"edges": []},
    }  # fmt: skip


def _entity(name: str) -> dict:
    return {"id": node_id("Entity", 1), "name": name, "available": False, "readOnly": False, "isTeam": False}


FEATURES = ("MARK_RUN_FILES_UPLOADED", "TOTAL_COUNT_IN_FILE_CONNECTION", "SWEEPS_QUERY_FILTERING")


# Projects


def _project(source, info, name=None, entityName=None) -> dict | None:
    return info.context.store.get("projects", entityName=entityName or ENTITY, name=name or "uncategorized")


def _make_project(info, name: str | None, entity: str | None) -> dict:
    store = info.context.store
    with store.write():
        return _project(None, info, name, entity) or store.insert(
            "projects",
            entityName=_name(entity or ENTITY, "entity"),
            name=_name(name or "uncategorized", "project"),
            createdAt=time.time(),
        )


def _upsert_model(source, info, input) -> dict:
    store = info.context.store
    known = _project(None, info, input.get("name"), input.get("entityName"))
    project = _make_project(info, input.get("name"), input.get("entityName"))
    if "description" in input:
        project = store.update("projects", project["id"], description=input["description"])
    return {"project": project, "model": project, "inserted": known is None}


# Runs


def _runs(project, info, filters=None, order=None, after=None, first=None) -> dict:
    return _connection(_matching(project, info, filters, order), first, after)


def _matching(project: dict, info, condition: str | None, order: str | None) -> list[dict]:
    runs = info.context.store.find("runs", project=project["id"])
    return select(runs, json.loads(condition or "{}"), order or "+created_at")


def _run(project, info, name, desc=None, missingOk=None) -> dict | None:
    return info.context.store.get("runs", project=project["id"], name=name)


BUCKET = {  # input field -> column, where a null means "leave it"
    "displayName": "displayName", "description": "description", "notes": "notes", "groupName": "group",
    "jobType": "jobType", "config": "config", "commit": "commit", "host": "host", "jobProgram": "program",
    "jobRepo": "repo", "summaryMetrics": "summaryMetrics",
}  # fmt: skip


def _upsert_bucket(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    changes = {column: input[field] for field, column in BUCKET.items() if input.get(field) is not None}
    if input.get("tags") is not None:
        changes["tags"] = json.dumps(input["tags"])
    if not input.get("name"):  # by id: an edit from outside, the run's state is its own affair
        run = _node(info, "runs", "Run", input.get("id") or "")
        return {"bucket": store.update("runs", run["id"], **changes) if changes else run, "inserted": False}
    with store.write():
        project = _make_project(info, input.get("modelName"), input.get("entityName"))
        run = store.get("runs", project=project["id"], name=input["name"])
        inserted = run is None
        if inserted:
            run = store.insert(
                "runs", project=project["id"], name=_name(input["name"], "run"), displayName=input["name"],
                state="running", createdAt=now, heartbeatAt=now,
            )  # fmt: skip
        if input.get("sweep"):  # said once, in the first of a run's calls
            sweep = store.get("sweeps", project=project["id"], name=input["sweep"])
            if sweep is None:
                raise GraphQLError(f"sweep {input['sweep']!r} does not exist in project {project['name']!r}")
            changes |= {"sweep": sweep["id"], "sweepName": sweep["name"]}
        if input.get("state"):
            changes["state"] = input["state"]
        elif run["state"] not in ("finished", "failed", "killed"):
            changes["state"] = "running"
        run = store.update("runs", run["id"], heartbeatAt=now, seen=1, **changes)
    return {"bucket": run, "inserted": inserted}


def stream(context: Context, run: dict, body: dict) -> dict:
    """Stores one file-stream request of a run and answers what the client reads."""
    store, changes = context.store, {"heartbeatAt": time.time(), "seen": 1}
    with store.write():
        for name, chunk in (body.get("files") or {}).items():
            offset, lines = chunk.get("offset", 0), chunk.get("content") or []
            if name == "wandb-history.jsonl":
                store.append_history(run, offset, lines)
            elif name == "wandb-summary.json":
                changes["summaryMetrics"] = lines[-1]
            else:
                store.append_lines(run, name, offset, lines)
                if name == "wandb-events.jsonl" and lines:
                    changes["systemMetrics"] = lines[-1]
        if body.get("complete"):
            code = changes["exitcode"] = int(body.get("exitcode") or 0)
            changes["state"] = _final_state(run, code)
        elif body.get("preempting"):
            changes["state"] = "preempting"
        elif run["state"] != "preempting":
            changes["state"] = "running"
        store.update("runs", run["id"], **changes)
    return {"stopped": bool(run["shouldStop"])}


def _final_state(run: dict, code: int) -> str:
    if code == 0:
        return "finished"
    return "preempted" if run["state"] == "preempting" else "killed" if run["shouldStop"] else "failed"


def mark_lost(store: Store) -> None:
    """Ends the runs that nobody hears of any more. Time while this server was down does not count."""
    now = time.time()

    def silent(row: dict, limit: float) -> bool:
        return now - max(row["heartbeatAt"], store.started) > limit

    for state in LIVE:
        for run in store.find("runs", state=state):
            agent = store.get("agents", id=run["agent"]) if run["agent"] else None
            orphan = agent is not None and silent(agent, AGENT_LOST)
            # A pending run without an agent waits for whoever made it.
            if (run["seen"] or orphan) and silent(run, AGENT_LOST if orphan else RUN_LOST):
                _lose(store, run)


def _lose(store: Store, run: dict) -> None:
    state = "preempted" if run["state"] == "preempting" else "killed" if run["shouldStop"] else "crashed"
    store.update("runs", run["id"], state=state)


def _edit_state(source, info, input) -> dict:
    run, state = _node(info, "runs", "Run", input["id"]), input["state"]
    allowed = {"pending": ("running", "failed", "crashed", "preempted"), "failed": ("pending", "running")}
    if run["state"] not in allowed.get(state, ()) or run["sweep"]:
        raise GraphQLError(f"run {run['name']} cannot go from {run['state']} to {state}")
    info.context.store.update("runs", run["id"], state=state)
    return {"success": True}


def _stop_run(source, info, input) -> dict:
    info.context.store.update("runs", _node(info, "runs", "Run", input["id"])["id"], shouldStop=1)
    return {"success": True}


def _delete_run(source, info, input) -> dict:
    info.context.store.delete("runs", _node(info, "runs", "Run", input["id"])["id"])
    return {}


def _wandb_config(run, info, keys=None) -> str:
    own = json.loads(run["config"] or "{}").get("_wandb", {}).get("value", {})
    return json.dumps({key: own[key] for key in keys or own if key in own})


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


def _sampled_history(run, info, specs) -> list[list[dict]]:
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
    page = _connection(lines[-last:] if last else lines, last or first or 10_000, after)
    for edge in page["edges"]:
        edge["node"] = _log_line(*edge["node"])
    return page


def _log_line(number: int, text: str) -> dict:
    """The client's form is "[ERROR ]TIMESTAMP TEXT"."""
    level, _, rest = text.partition(" ") if text.startswith("ERROR ") else ("", "", text)
    stamp, _, line = rest.partition(" ")
    if not stamp[:4].isdigit():
        stamp, line = None, rest
    return {"number": number, "timestamp": stamp, "level": level.lower() or "info", "label": None, "line": line}


# Files


def _files(run, info, names=None, pattern=None, after=None, first=None) -> dict:
    files = [f for f in info.context.store.find("files", order="name", run=run["id"]) if f["blob"]]
    if names:
        files = [f for f in files if f["name"] in names]
    if pattern:
        files = [f for f in files if like(f["name"], pattern)]
    return _connection(files, first, after)


def _create_run_files(source, info, input) -> dict:
    store = info.context.store
    run = _named_run(info, input)
    with store.write():
        files = [
            store.get("files", run=run["id"], name=name)
            or store.insert("files", run=run["id"], name=name, updatedAt=time.time())
            for name in input["files"]
        ]
    return {"runID": node_id("Run", run["id"]), "uploadHeaders": [], "files": files}


def _named_run(info, input: dict) -> dict:
    project = _project(None, info, input["projectName"], input["entityName"])
    run = project and _run(project, info, input["runName"])
    if not run:
        raise GraphQLError(f"run {input['entityName']}/{input['projectName']}/{input['runName']} does not exist")
    return run


def _delete_files(source, info, input) -> dict:
    for file in input["files"]:
        info.context.store.delete("files", _node(info, "files", "File", file)["id"])
    return {"success": True}


# Sweeps


def _sweep_config(sweep: dict) -> dict:
    return yaml.safe_load(sweep["config"])


def _upsert_sweep(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    changes = {k: input[k] for k in ("description", "controller", "scheduler", "displayName") if input.get(k)}
    if input.get("state"):
        changes["state"] = input["state"].upper()
    if input.get("config"):
        config = yaml.safe_load(input["config"])
        try:
            sweeps.check(config)
        except ValueError as error:
            raise GraphQLError(f"sweep configuration: {error}") from error
        changes["config"] = input["config"]
    with store.write():
        if input.get("id"):
            sweep = _sweep_by_id(info, input)
            sweep = store.update("sweeps", sweep["id"], updatedAt=now, **changes)
        else:
            if "config" not in changes:
                raise GraphQLError("a new sweep needs a config")
            project = _make_project(info, input.get("projectName"), input.get("entityName"))
            sweep = store.insert(
                "sweeps", project=project["id"], name=secrets.token_hex(4), createdAt=now, updatedAt=now,
                **{"state": "PENDING"} | changes,
            )  # fmt: skip
    return {"sweep": sweep, "configValidationWarnings": []}


def _sweep_by_id(info, input: dict) -> dict:
    """By opaque id, or by name: `wandb sweep --update` sends the name as the id."""
    project = _project(None, info, input.get("projectName"), input.get("entityName"))
    named = project and info.context.store.get("sweeps", project=project["id"], name=input["id"])
    return named or _node(info, "sweeps", "Sweep", input["id"])


def _sweep(project, info, sweepName) -> dict | None:
    return info.context.store.get("sweeps", project=project["id"], name=sweepName)


def _create_agent(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    project = _project(None, info, input.get("projectName"), input.get("entityName"))
    sweep = project and _sweep(project, info, input["sweep"])
    if not sweep:
        raise GraphQLError(f"sweep {input['sweep']!r} does not exist in project {input.get('projectName')!r}")
    name = secrets.token_hex(4)
    return {
        "agent": store.insert(
            "agents", sweep=sweep["id"], name=name, host=input["host"], createdAt=now, heartbeatAt=now
        )
    }


_picking = threading.Lock()  # two agents must not be given the same point


def _agent_heartbeat(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    agent = store.get("agents", id=row_id("Agent", input["id"]))
    if agent is None:
        raise SweepGone(f"agent {input['id']!r} has no sweep any more")
    alive = {name for name, is_alive in json.loads(input.get("runState") or "{}").items() if is_alive}
    with _picking:
        agent = store.update("agents", agent["id"], heartbeatAt=now)
        sweep = store.update("sweeps", agent["sweep"], heartbeatAt=now)
        for run in store.find("runs", agent=agent["id"]):
            if run["state"] in LIVE and run["name"] not in alive and run["seen"]:
                _lose(store, store.get("runs", id=run["id"]))  # its process has ended without a last word
            elif run["state"] == "pending" and run["name"] not in alive:
                # It never reported: the script stopped before wandb.init, or logs offline and is synced later. The
                # agent has let go of it, so it is not lost with the agent.
                store.update("runs", run["id"], agent=None)
        mark_lost(store)
        commands = _commands(store, agent, sweep, alive)
    return {"agent": agent, "commands": json.dumps(commands)}


def _commands(store: Store, agent: dict, sweep: dict, alive: set[str]) -> list[dict]:
    config, runs = _sweep_config(sweep), store.find("runs", sweep=sweep["id"])
    if config.get("early_terminate") and any(run["state"] == "running" for run in runs):
        doomed = sweeps.to_stop(config, [_experience(store, run, config) for run in runs])
        for run in runs:
            if run["name"] in doomed:
                run |= store.update("runs", run["id"], shouldStop=1)
    cancelled = sweep["state"] == "CANCELED"
    stops = [
        {"type": "stop", "run_id": run["name"]}
        for run in runs
        if run["name"] in alive and (run["shouldStop"] or cancelled)
    ]
    if cancelled:
        return [*stops, {"type": "exit"}]
    if alive or sweep["state"] == "PAUSED":
        return stops
    if sweep["state"] == "FINISHED":
        return [{"type": "exit"}]
    for run in runs:
        if run["state"] == "preempted":
            store.update("runs", run["id"], state="pending", agent=agent["id"], heartbeatAt=time.time())
            return [_command("resume", run["name"], config, json.loads(run["args"] or run["config"] or "{}"))]
    point = sweeps.next_point(config, _used(runs), [_experience(store, run, config) for run in runs])
    if point is None:
        if any(run["state"] in LIVE and run["agent"] for run in runs):
            return []  # another agent's run may yet be lost: its point would come here
        store.update("sweeps", sweep["id"], state="FINISHED")
        return [{"type": "exit"}]
    now, name = time.time(), secrets.token_hex(4)
    with store.write():
        store.update("sweeps", sweep["id"], state="RUNNING")
        store.insert(
            "runs", project=sweep["project"], name=name, displayName=name, state="pending", sweep=sweep["id"],
            sweepName=sweep["name"], agent=agent["id"], args=json.dumps(point), config=json.dumps(point),
            createdAt=now, heartbeatAt=now,
        )  # fmt: skip
    return [_command("run", name, config, point)]


def _command(kind: str, run: str, config: dict, point: dict) -> dict:
    return {"type": kind, "run_id": run, "program": config.get("program"), "args": point}


def _used(runs: list[dict]) -> list[dict]:
    """The points that are not to be offered: those of every run but the lost ones, and those lost ATTEMPTS times."""
    points = [(json.loads(run["args"] or run["config"] or "{}"), run["state"] in LOST) for run in runs]
    lost = [point for point, was_lost in points if was_lost]
    return [point for point, was_lost in points if not was_lost or lost.count(point) >= ATTEMPTS]


def _experience(store: Store, run: dict, config: dict) -> dict:
    """A run as the search sees it: its point, its state, and its metric over time."""
    metric = config.get("metric", {}).get("name")
    needed = metric and (config["method"] == "bayes" or config.get("early_terminate"))
    rows = map(json.loads, store.history(run["id"])) if needed else ()
    return {
        "name": run["name"],
        "state": run["state"],
        "config": json.loads(run["args"] or run["config"] or "{}"),
        "summaryMetrics": json.loads(run["summaryMetrics"] or "{}"),
        "history": [{metric: row[metric]} for row in rows if metric in row],
    }


def _best_loss(sweep, info) -> float | None:
    metric = _sweep_config(sweep).get("metric", {})
    runs = info.context.store.find("runs", sweep=sweep["id"])
    values = [json.loads(run["summaryMetrics"] or "{}").get(metric.get("name")) for run in runs]
    values = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return (max if metric.get("goal") == "maximize" else min)(values, default=None)


def _sweeps(project, info, filters=None, after=None, first=None) -> dict:
    rows = info.context.store.find("sweeps", project=project["id"])
    wanted = json.loads(filters or "{}")
    return _connection([row for row in rows if matches(row, wanted)], first, after)


def _children(table: str, column: str):
    def children(source, info, after=None, before=None, first=None, last=None, order=None) -> dict:
        rows = info.context.store.find(table, **{column: source["id"]})
        return _connection(rows, len(rows) if first is None else first, after)

    return children


def _agent(sweep, info, agentName) -> dict | None:
    agents = info.context.store.find("agents", sweep=sweep["id"])
    return next((a for a in agents if agentName in (a["name"], node_id("Agent", a["id"]))), None)


def _owner(table: str, column: str):
    return lambda source, info: info.context.store.get(table, id=source[column])


def _state_is(*states: str):
    return lambda run, info: run["state"] in states


RESOLVERS: dict[str, dict[str, Callable]] = {
    "Query": {
        "viewer": lambda source, info: _user(info),
        "serverInfo": lambda source, info: {"features": [{"name": name, "isEnabled": True} for name in FEATURES]},
        "entity": lambda source, info, name=None: _entity(name or ENTITY),
        "models": lambda source, info, entityName=None, after=None, first=None: _connection(
            info.context.store.find("projects", entityName=entityName or ENTITY), first, after
        ),
        "model": _project,
        "project": _project,
    },
    "Mutation": {
        "upsertModel": _upsert_model,
        "upsertBucket": _upsert_bucket,
        "deleteRun": _delete_run,
        "updateRunState": _edit_state,
        "stopRun": _stop_run,
        "createRunFiles": _create_run_files,
        "markRunFilesUploaded": lambda source, info, input: {"success": True},
        "deleteFiles": _delete_files,
        "upsertSweep": _upsert_sweep,
        "createAgent": _create_agent,
        "agentHeartbeat": _agent_heartbeat,
    },
    "Project": {
        "internalId": lambda project, info: project["id"],
        "entity": lambda project, info: _entity(project["entityName"]),
        "access": lambda project, info: "PRIVATE",
        "isBenchmark": lambda project, info: False,
        "readOnly": lambda project, info: False,
        "user": lambda project, info: _user(info),
        "runCount": lambda project, info, filters=None: len(_matching(project, info, filters, None)),
        "runs": _runs,
        "run": _run,
        "bucket": _run,
        "totalSweeps": lambda project, info: info.context.store.count("sweeps", project=project["id"]),
        "sweeps": _sweeps,
        "sweep": _sweep,
    },
    "Run": {
        "projectId": lambda run, info: run["project"],
        "project": _owner("projects", "project"),
        "user": lambda run, info: _user(info),
        "tags": lambda run, info: json.loads(run["tags"] or "[]"),
        "readOnly": lambda run, info: False,
        "historyKeys": lambda run, info: strict(json.loads(run["historyKeys"])) if run["historyKeys"] else None,
        "stopped": lambda run, info: bool(run["shouldStop"]),
        "failed": _state_is("failed", "crashed"),
        "running": _state_is(*LIVE),
        "eventsLineCount": lambda run, info: info.context.store.line_count(run["id"], "wandb-events.jsonl"),
        "logLineCount": lambda run, info: info.context.store.line_count(run["id"], "output.log"),
        "historyTail": lambda run, info: _tail(info.context.store.history(run["id"])),
        "eventsTail": lambda run, info: _tail(_events(run, info)),
        "wandbConfig": _wandb_config,
        "history": _history,
        "events": _events,
        "sampledHistory": _sampled_history,
        "parquetHistory": lambda run, info, liveKeys: {"parquetUrls": [], "liveData": []},  # everything is live
        "logLines": _log_lines,
        "fileCount": lambda run, info: len(_files(run, info)["edges"]),
        "files": _files,
    },
    "File": {
        "displayName": lambda file, info: file["name"],
        "url": lambda file, info, upload=None: info.context.file_url(file, "PUT" if upload else "GET"),
        "directUrl": lambda file, info: info.context.file_url(file, "GET"),
        "uploadUrl": lambda file, info: info.context.file_url(file, "PUT"),
        "uploadHeaders": lambda file, info: [],
        "digest": lambda file, info: file["md5"],
    },
    "Sweep": {
        "project": _owner("projects", "project"),
        "method": lambda sweep, info: _sweep_config(sweep)["method"],
        "bestLoss": _best_loss,
        "runCount": lambda sweep, info: info.context.store.count("runs", sweep=sweep["id"]),
        "runCountExpected": lambda sweep, info: sweeps.expected(_sweep_config(sweep)),
        "runs": _children("runs", "sweep"),
        "agent": _agent,
        "agents": _children("agents", "sweep"),
    },
    "Agent": {
        "state": lambda agent, info: "RUNNING" if time.time() - agent["heartbeatAt"] < AGENT_LOST else "FINISHED",
        "totalRuns": lambda agent, info: info.context.store.count("runs", agent=agent["id"]),
        "runs": _children("runs", "agent"),
    },
}


def _schema():
    schema = build_schema((Path(__file__).parent / "schema.graphql").read_text())
    for type_name, fields in RESOLVERS.items():
        for field, resolver in fields.items():
            schema.type_map[type_name].fields[field].resolve = resolver
    for type_name in ("Project", "Run", "File", "Sweep", "Agent"):
        schema.type_map[type_name].fields["id"].resolve = lambda row, info, kind=type_name: node_id(kind, row["id"])
    schema.type_map["DateTime"].coerce_output_value = lambda at: datetime.fromtimestamp(at, UTC).strftime(
        "%Y-%m-%dT%H:%M:%SZ"
    )
    return schema


SCHEMA = _schema()
