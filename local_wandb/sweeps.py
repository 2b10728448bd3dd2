"""Sweeps and their agents: who runs which point, what is stopped, what is offered again."""

import json
import math
import secrets
import threading
import time

import yaml
from graphql import GraphQLError

from local_wandb import search
from local_wandb.filters import matches, select
from local_wandb.nodes import children, connection, existing, node_id, owner, row_id
from local_wandb.projects import make_project
from local_wandb.projects import project as find_project
from local_wandb.runs import AGENT_LOST, LIVE, STARTED, json_object, lose, mark_lost
from local_wandb.store import Store

STATES = ("PENDING", "RUNNING", "PAUSED", "FINISHED", "CANCELED")
ATTEMPTS = 3  # runs that may be lost at one grid point before the point counts as tried
LOST = ("crashed", "preempted")  # the machine's fault, so the point is offered again; `failed` is the script's


class SweepGone(GraphQLError):
    """The agent's sweep no longer exists; the client wants HTTP 404 for that."""


# Sweeps


CONFIG = 2**20  # characters of a sweep's configuration


def _parsed(text: str):
    """The YAML of a new configuration. Raises ValueError where it is none, or could grow without bounds (aliases)."""
    if len(text) > CONFIG:
        raise ValueError(f"Invalid sweep config: longer than {CONFIG:,} characters")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("Invalid sweep config: YAML aliases (*name) are not taken")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid sweep config: not YAML: {' '.join(str(error).split())}") from error


def _sweep_config(sweep: dict) -> dict:
    return yaml.safe_load(sweep["config"])


def upsert_sweep(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    changes = {k: input[k] for k in ("description", "controller", "scheduler", "displayName") if input.get(k)}
    if input.get("state"):
        changes["state"] = input["state"].upper()
        if changes["state"] not in STATES:
            raise GraphQLError(f"sweep state {input['state']!r} is not one of {', '.join(STATES)}")
    if input.get("config"):
        config = _parsed(input["config"])
        search.check(config)
        if "scheduler" in config:  # the run that `wandb sweep-scheduler` logs to
            changes["controllerRunName"] = secrets.token_hex(4)
        changes["config"] = input["config"]
    with store.write():
        if input.get("id"):
            sweep = _sweep_by_id(info, input)
            if sweep["controllerRunName"]:
                changes.pop("controllerRunName", None)
            sweep = store.update("sweeps", sweep["id"], updatedAt=now, **changes)
            if changes.get("state") == "CANCELED":
                for run in store.find("runs", sweep=sweep["id"]):
                    if run["state"] in LIVE:
                        store.update("runs", run["id"], shouldStop=1, state="killed")
        else:
            if "config" not in changes:
                raise GraphQLError("a new sweep needs a config")
            project = make_project(info, input.get("projectName"), input.get("entityName"))
            sweep = store.insert(
                "sweeps", project=project["id"], name=secrets.token_hex(4), createdAt=now, updatedAt=now,
                **{"state": "PENDING"} | changes,
            )  # fmt: skip
        if input.get("priorRunsFilters"):
            _take_in(store, sweep, json.loads(input["priorRunsFilters"]))
    return {"sweep": sweep, "configValidationWarnings": []}


def _take_in(store: Store, sweep: dict, condition: dict) -> None:
    """Makes runs that were there before part of the sweep: their points are taken, and bayes learns from them."""
    runs = select(store.find("runs", project=sweep["project"]), condition, "+created_at")
    if not runs:
        raise GraphQLError("none of the prior runs exists in this project")
    for run in runs:
        store.update("runs", run["id"], sweep=sweep["id"], sweepName=sweep["name"])


def enqueue(source, info, input) -> dict:
    """A run that the next free agent takes before any point that the server would draw."""
    store, now, name = info.context.store, time.time(), secrets.token_hex(4)
    point = {
        key: value if isinstance(value, dict) and "value" in value else {"value": value}
        for key, value in json_object(input["config"], "config").items()
    }
    with store.write():
        sweep = existing(info, "sweeps", "Sweep", input["id"])
        if sweep["state"] in ("FINISHED", "CANCELED"):
            raise GraphQLError(f"sweep {sweep['name']} is {sweep['state'].lower()}: it takes no more runs")
        run = _new_run(store, sweep, name, point, input.get("displayName") or name, now)
    return {"id": run["name"], "runQueueItemId": node_id("RunQueueItem", run["id"])}


def _new_run(store: Store, sweep: dict, name: str, point: dict, display: str, now: float, agent: int | None = None):
    return store.insert(
        "runs", project=sweep["project"], name=name, displayName=display, state="pending", sweep=sweep["id"],
        sweepName=sweep["name"], agent=agent, args=json.dumps(point), config=json.dumps(point), createdAt=now,
        heartbeatAt=now, updatedAt=now,
    )  # fmt: skip


def _sweep_by_id(info, input: dict) -> dict:
    """By opaque id, or by name: `wandb sweep --update` sends the name as the id."""
    project = find_project(None, info, input.get("projectName"), input.get("entityName"))
    named = project and info.context.store.get("sweeps", project=project["id"], name=input["id"])
    return named or existing(info, "sweeps", "Sweep", input["id"])


def _sweep(project, info, sweepName) -> dict | None:
    return info.context.store.get("sweeps", project=project["id"], name=sweepName)


def create_agent(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    project = find_project(None, info, input.get("projectName"), input.get("entityName"))
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


def agent_heartbeat(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    agent = store.get("agents", id=row_id("Agent", input["id"]))
    if agent is None:
        raise SweepGone(f"agent {input['id']!r} has no sweep any more")
    alive = {name for name, is_alive in json.loads(input.get("runState") or "{}").items() if is_alive}
    with _picking:
        with store.write():
            agent = store.update("agents", agent["id"], heartbeatAt=now)
            sweep = store.update("sweeps", agent["sweep"], heartbeatAt=now)
            for run in store.find("runs", agent=agent["id"]):
                if run["state"] in LIVE:
                    _attend(store, run, run["name"] in alive)
            mark_lost(store)
        commands = _commands(store, agent, sweep, alive)
    return {"agent": agent, "commands": json.dumps(commands)}


def _attend(store: Store, run: dict, alive: bool) -> None:
    """What a heartbeat says about one run that the agent was given."""
    if alive:
        store.update("runs", run["id"], seen=max(run["seen"], STARTED))
    elif run["seen"] == STARTED:
        # It ran and never spoke to us: it logs offline and is synced later, or its script failed before wandb.init.
        # Nobody waits for it any more, and its point is used.
        store.update("runs", run["id"], agent=None)
    else:  # its process ended without a last word, or the command that should have started it was lost on the way
        lose(store, run)


def _commands(store: Store, agent: dict, sweep: dict, alive: set[str]) -> list[dict]:
    config, runs = _sweep_config(sweep), store.find("runs", sweep=sweep["id"])
    if config.get("early_terminate") and any(run["state"] == "running" for run in runs):
        doomed = search.to_stop(config, [_experience(store, run, config) for run in runs])
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
    cap, begun = config.get("run_cap") or math.inf, [run for run in runs if not _waits(run)]
    for run in runs:
        if run["state"] == "preempted":
            store.update("runs", run["id"], state="pending", seen=0, agent=agent["id"], heartbeatAt=time.time())
            return [_command("resume", run["name"], config, json.loads(run["args"] or run["config"] or "{}"))]
        if _waits(run) and len(begun) < cap:
            store.update("runs", run["id"], agent=agent["id"], heartbeatAt=time.time())
            store.update("sweeps", sweep["id"], state="RUNNING")
            return [_command("run", run["name"], config, json.loads(run["args"]))]
    if "scheduler" in config:  # `wandb sweep-scheduler` enqueues the points and says when there are no more
        if len(begun) < cap or any(run["state"] in LIVE for run in begun):
            return []
        for run in runs:  # enqueued beyond the run_cap
            if _waits(run):
                store.update("runs", run["id"], state="killed")
        store.update("sweeps", sweep["id"], state="FINISHED")
        return [{"type": "exit"}]
    point = search.next_point(config, _used(runs), [_experience(store, run, config) for run in runs])
    if point is None:
        if any(run["state"] in LIVE and run["agent"] for run in runs):
            return []  # another agent's run may yet be lost: its point would come here
        store.update("sweeps", sweep["id"], state="FINISHED")
        return [{"type": "exit"}]
    now, name = time.time(), secrets.token_hex(4)
    with store.write():
        store.update("sweeps", sweep["id"], state="RUNNING")
        _new_run(store, sweep, name, point, name, now, agent["id"])
    return [_command("run", name, config, point)]


def _waits(run: dict) -> bool:
    """Whether a run was enqueued and no agent has taken it."""
    return run["state"] == "pending" and run["agent"] is None and run["args"] is not None and run["seen"] == 0


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
    return connection([row for row in rows if matches(row, wanted)], first, after)


def _prior_runs(sweep, info, after=None, first=None) -> dict:
    """The runs that it took in: they are older than the sweep."""
    runs = info.context.store.find("runs", sweep=sweep["id"])
    return connection([run for run in runs if run["createdAt"] < sweep["createdAt"]], first, after)


def _agent(sweep, info, agentName) -> dict | None:
    agents = info.context.store.find("agents", sweep=sweep["id"])
    return next((a for a in agents if agentName in (a["name"], node_id("Agent", a["id"]))), None)


FIELDS = {
    "Project": {
        "totalSweeps": lambda project, info: info.context.store.count("sweeps", project=project["id"]),
        "sweeps": _sweeps,
        "sweep": _sweep,
    },
    "Sweep": {
        "project": owner("projects", "project"),
        "method": lambda sweep, info: _sweep_config(sweep).get("method"),
        "bestLoss": _best_loss,
        "runCount": lambda sweep, info: info.context.store.count("runs", sweep=sweep["id"]),
        "runCountExpected": lambda sweep, info: search.expected(_sweep_config(sweep)),
        "runs": children("runs", "sweep"),
        "priorRuns": _prior_runs,
        "agent": _agent,
        "agents": children("agents", "sweep"),
    },
    "Agent": {
        "state": lambda agent, info: "RUNNING" if time.time() - agent["heartbeatAt"] < AGENT_LOST else "FINISHED",
        "totalRuns": lambda agent, info: info.context.store.count("runs", agent=agent["id"]),
        "runs": children("runs", "agent"),
    },
}
