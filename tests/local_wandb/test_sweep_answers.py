"""What the server decides about sweeps and agents, case by case, without a client: test_sweeps.py has the real one."""

import json
import math
from types import SimpleNamespace

import pytest
import yaml
from graphql import GraphQLError

from local_wandb import runs, schema, sweeps
from local_wandb.nodes import Context, node_id
from local_wandb.store import Store

GRID = {"method": "grid", "program": "script.py", "parameters": {"lr": {"values": [1, 2]}}}
SCHEDULER = GRID | {"method": "custom", "scheduler": {"engine": "optuna"}}
EXIT = [("exit", None, None)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def info(store):
    return SimpleNamespace(context=Context(store, lambda file, method: ""))


@pytest.fixture
def upsert(info):
    """A new sweep of project p, or with its id another state of it."""

    def upsert(config: dict | None = None, **input) -> dict:
        text = {} if config is None else {"config": yaml.safe_dump(config)}
        return sweeps.upsert_sweep(None, info, {"projectName": "p"} | text | input)["sweep"]

    return upsert


class Agent:
    def __init__(self, info, sweep: dict):
        self.info = info
        input = {"projectName": "p", "sweep": sweep["name"], "host": "h"}
        self.row = sweeps.create_agent(None, info, input)["agent"]
        self.id = node_id("Agent", self.row["id"])

    def beat(self, *alive: str) -> list[tuple]:
        """Kind, run and rate of each command."""
        input = {"id": self.id, "runState": json.dumps(dict.fromkeys(alive, True) | {"other": False})}
        found = json.loads(sweeps.agent_heartbeat(None, self.info, input)["commands"])
        assert all(command["program"] == "script.py" for command in found if "args" in command)
        return [(c["type"], c.get("run_id"), c.get("args", {}).get("lr", {}).get("value")) for c in found]

    def take(self) -> tuple[str, float]:
        """The run and the rate that it is given."""
        ((kind, run, rate),) = self.beat()
        assert kind == "run"
        return run, rate


def end(info, run: str, state: str = "finished") -> None:
    info.context.store.update("runs", info.context.store.get("runs", name=run)["id"], state=state)


def test_a_grid_is_given_point_by_point_and_ends_when_none_may_be_lost(info, store, upsert):
    sweep = upsert(GRID)
    assert sweep["state"] == "PENDING" and sweep["controllerRunName"] is None
    one, two = Agent(info, sweep), Agent(info, sweep)
    (first, a), (second, b) = one.take(), two.take()
    assert (a, b) == (1, 2) and store.row("sweeps", 1)["state"] == "RUNNING"
    row = store.get("runs", name=first)
    assert (row["state"], row["seen"], row["sweepName"]) == ("pending", 0, sweep["name"])
    assert json.loads(row["args"]) == json.loads(row["config"]) == {"lr": {"value": 1}}
    assert one.beat(first) == []
    assert store.get("runs", name=first)["seen"] == runs.STARTED
    end(info, first)
    assert one.beat() == [] and store.row("sweeps", 1)["state"] == "RUNNING"  # the other point may yet come here
    end(info, second)
    assert one.beat() == EXIT == two.beat() and store.row("sweeps", 1)["state"] == "FINISHED"
    assert store.row("sweeps", 1)["heartbeatAt"] >= store.get("agents", id=1)["createdAt"]


def test_what_a_heartbeat_says_of_the_runs(info, store, upsert):
    agent = Agent(info, upsert(GRID))
    name, _ = agent.take()
    agent.beat(name)
    store.update("runs", 1, seen=runs.HEARD)
    agent.beat(name)
    assert store.row("runs", 1)["seen"] == runs.HEARD
    store.update("runs", 1, seen=runs.STARTED)
    assert agent.take()[1] == 2  # it logs offline: its point is used, and nobody waits for it
    assert (store.row("runs", 1)["state"], store.row("runs", 1)["agent"]) == ("pending", None)
    store.update("runs", 2, seen=runs.HEARD)
    again, rate = agent.take()
    assert rate == 2 and store.row("runs", 2)["state"] == "crashed"  # it ended without a last word
    end(info, again)
    assert agent.beat() == EXIT
    with pytest.raises(sweeps.SweepGone, match="has no sweep any more"):
        sweeps.agent_heartbeat(None, info, {"id": node_id("Agent", 9)})


def test_a_point_is_offered_until_it_was_lost_three_times(info, store, upsert):
    agent = Agent(info, upsert(GRID | {"parameters": {"lr": {"values": [1]}}}))
    for _ in range(3):
        assert agent.take()[1] == 1  # the agent knows nothing of the one before: it crashed
    assert agent.beat() == EXIT and {run["state"] for run in store.find("runs")} == {"crashed"}


@pytest.mark.parametrize("state", ["failed", "killed", "finished"])
def test_a_point_whose_run_ended_itself_is_used(info, upsert, state):
    agent = Agent(info, upsert(GRID))
    end(info, agent.take()[0], state)
    assert agent.take()[1] == 2


def test_a_preempted_run_is_given_to_who_asks_next(info, store, upsert):
    sweep = upsert(GRID)
    name, _ = Agent(info, sweep).take()
    end(info, name, "preempted")
    store.update("runs", 1, seen=runs.HEARD, heartbeatAt=0.0)
    other = Agent(info, sweep)
    assert other.beat() == [("resume", name, 1)]
    row = store.row("runs", 1)
    assert (row["state"], row["seen"], row["agent"]) == ("pending", 0, other.row["id"]) and row["heartbeatAt"] > 0
    assert other.take()[0] != name


@pytest.mark.parametrize(
    ("state", "busy", "idle"),
    [
        ("paused", [], []),
        ("finished", [], EXIT),
        ("canceled", [("stop", "RUN", None), *EXIT], EXIT),
        ("running", [], [("run", "NEW", 2)]),
    ],
)
def test_what_an_agent_does_in_each_state_of_its_sweep(info, store, upsert, state, busy, idle):
    sweep = upsert(GRID)
    agent = Agent(info, sweep)
    name, _ = agent.take()
    assert upsert(id=sweep["name"], state=state)["state"] == state.upper()
    row = store.row("runs", 1)
    assert (row["state"], row["shouldStop"]) == (("killed", 1) if state == "canceled" else ("pending", 0))
    assert [(kind, run and "RUN", rate) for kind, run, rate in agent.beat(name)] == busy
    end(info, name)
    assert [(kind, run and "NEW", rate) for kind, run, rate in agent.beat()] == idle
    assert sweeps.upsert_sweep(None, info, {"id": node_id("Sweep", 1), "state": "PAUSED"})["sweep"]["id"] == 1


def test_a_run_that_is_to_stop_is_stopped_by_its_agent_alone(info, store, upsert):
    sweep = upsert(GRID)
    one, two = Agent(info, sweep), Agent(info, sweep)
    (first, _), (second, _) = one.take(), two.take()
    store.update("runs", 1, shouldStop=1)
    assert two.beat(second) == [] and one.beat(first) == [("stop", first, None)]


def test_a_cancelled_sweep_leaves_the_runs_that_are_over(info, store, upsert):
    sweep = upsert(GRID)
    agent = Agent(info, sweep)
    end(info, agent.take()[0], "failed")
    agent.take()
    upsert(id=sweep["name"], state="CANCELED")
    assert [(run["state"], run["shouldStop"]) for run in store.find("runs")] == [("failed", 0), ("killed", 1)]


def test_the_cap_ends_a_sweep_and_enqueued_runs_count(info, store, upsert):
    sweep = upsert(GRID | {"method": "random", "run_cap": 2})
    for value in ({"lr": {"value": 7}}, {"lr": 8}, {"lr": 9}):
        sweeps.enqueue(None, info, {"id": node_id("Sweep", 1), "config": json.dumps(value)})
    made = [json.loads(run["args"]) for run in store.find("runs")]
    assert made == [{"lr": {"value": rate}} for rate in (7, 8, 9)]
    agent = Agent(info, sweep)
    for rate in (7, 8):
        name, found = agent.take()
        assert found == rate and store.row("sweeps", 1)["state"] == "RUNNING"
        end(info, name)
    assert agent.beat() == EXIT
    for state in ("FINISHED", "CANCELED"):
        store.update("sweeps", 1, state=state)
        with pytest.raises(GraphQLError, match=f"sweep {sweep['name']} is {state.lower()}: it takes no more runs"):
            sweeps.enqueue(None, info, {"id": node_id("Sweep", 1), "config": "{}"})


def test_an_enqueued_run_has_its_names(info, store, upsert):
    upsert(GRID)
    input = {"id": node_id("Sweep", 1), "config": '{"deep": {"er": 1}}'}
    plain, named = (sweeps.enqueue(None, info, input | more) for more in ({}, {"displayName": "A name"}))
    assert (plain["runQueueItemId"], named["runQueueItemId"]) == (
        node_id("RunQueueItem", 1),
        node_id("RunQueueItem", 2),
    )
    assert [run["displayName"] for run in store.find("runs")] == [plain["id"], "A name"]
    assert json.loads(store.row("runs", 1)["args"]) == {"deep": {"value": {"er": 1}}}
    with pytest.raises(ValueError, match="config is not a JSON object"):
        sweeps.enqueue(None, info, {"id": node_id("Sweep", 1), "config": "[]"})


def test_what_a_scheduler_enqueues_is_run_up_to_the_cap(info, store, upsert):
    sweep = upsert(SCHEDULER | {"run_cap": 1})
    assert len(sweep["controllerRunName"]) == 8
    again = upsert(SCHEDULER | {"run_cap": 1, "program": "script.py"}, id=sweep["name"])
    assert again["controllerRunName"] == sweep["controllerRunName"]
    agent, other = Agent(info, sweep), Agent(info, sweep)
    assert agent.beat() == []  # nobody has drawn a point yet
    for rate in (1, 2):
        sweeps.enqueue(None, info, {"id": node_id("Sweep", 1), "config": json.dumps({"lr": rate})})
    name, rate = agent.take()
    assert rate == 1 and other.beat() == agent.beat(name) == []
    end(info, name)
    assert other.beat() == EXIT and store.row("runs", 2)["state"] == "killed"
    assert store.row("sweeps", 1)["state"] == "FINISHED"


@pytest.mark.parametrize(
    ("input", "words"),
    [
        ({"config": "x" * (2**20 + 1)}, "longer than 1,048,576 characters"),
        ({"config": "{a: &x 1, b: *x}"}, "YAML aliases"),
        ({"config": "{a: ["}, "Invalid sweep config: not YAML: while parsing"),
        ({"config": "method: gird"}, "'gird' is not one of"),
        ({"config": json.dumps(GRID), "state": "ended"}, "sweep state 'ended' is not one of PENDING, RUNNING, PAUSED"),
        ({"displayName": "n"}, "a new sweep needs a config"),
        ({"id": "nobody", "state": "PAUSED"}, "'nobody' is not the id of a Sweep"),
        ({"config": json.dumps(GRID), "priorRunsFilters": "{}"}, "none of the prior runs exists"),
    ],
)
def test_what_is_no_sweep_is_refused_by_name(store, info, input, words):
    with pytest.raises((GraphQLError, ValueError), match=words):
        sweeps.upsert_sweep(None, info, {"projectName": "p"} | input)
    assert store.find("sweeps") == []


def test_a_sweep_keeps_what_it_is_told(info, upsert, monkeypatch):
    said = {"description": "d", "controller": '{"a": 1}', "scheduler": "{}", "displayName": "n", "state": "paused"}
    sweep = upsert(GRID, **said)
    assert {key: sweep[key] for key in said} == said | {"state": "PAUSED"}
    assert yaml.safe_load(sweep["config"]) == GRID
    sweep = upsert(GRID | {"name": "other"}, id=sweep["name"])
    assert yaml.safe_load(sweep["config"])["name"] == "other" and sweep["displayName"] == "n"
    text = yaml.safe_dump(GRID)
    monkeypatch.setattr(sweeps, "CONFIG", len(text))
    assert sweeps.upsert_sweep(None, info, {"projectName": "p", "config": text})["sweep"]["state"] == "PENDING"


def test_agents_and_sweeps_answer(info, store, upsert):
    sweep = upsert(GRID | {"metric": {"name": "loss"}})
    upsert(GRID | {"method": "random"}, displayName="second")
    for i, config in enumerate(({"lr": {"value": 1}}, {"lr": {"value": 2}})):  # of before: it takes them in
        call = {"modelName": "p", "name": f"before{i}", "config": json.dumps(config)}
        runs.upsert_bucket(None, info, call)
        store.update("runs", i + 1, createdAt=float(i))
    upsert(id=sweep["name"], priorRunsFilters=json.dumps({"name": "before0"}))
    agent = Agent(info, sweep)
    name, rate = agent.take()
    assert rate == 2 and store.get("runs", name="before1")["sweep"] is None

    def ask(fields: str) -> dict:
        text = f'{{ project(name: "p") {{ totalSweeps sweep(sweepName: "{sweep["name"]}") {{ {fields} }} }} }}'
        found = schema.answer(info.context, {"query": text})
        assert not found.errors and found.data["project"]["totalSweeps"] == 2
        return found.data["project"]["sweep"]

    edges = "{ edges { node { name } } }"
    found = ask(f"method runCount runCountExpected bestLoss runs {edges} priorRuns {edges} project {{ name }}")
    assert [edge["node"]["name"] for edge in found.pop("runs")["edges"]] == ["before0", name]
    assert [edge["node"]["name"] for edge in found.pop("priorRuns")["edges"]] == ["before0"]
    assert found == {
        "method": "grid", "runCount": 2, "runCountExpected": 2, "bestLoss": None, "project": {"name": "p"},
    }  # fmt: skip
    for called in (agent.id, agent.row["name"]):
        one = ask(f'agent(agentName: "{called}") {{ state totalRuns runs {edges} }}')["agent"]
        assert (one["state"], one["totalRuns"], one["runs"]["edges"]) == ("RUNNING", 1, [{"node": {"name": name}}])
    assert ask('agent(agentName: "nobody") { state }')["agent"] is None
    store.update("agents", 1, heartbeatAt=0.0)
    assert ask("agents { edges { node { state } } }")["agents"]["edges"] == [{"node": {"state": "FINISHED"}}]
    filters = json.dumps(json.dumps({"display_name": "second"}))
    query = f'{{ project(name: "p") {{ sweeps(filters: {filters}) {{ edges {{ node {{ method }} }} }} }} }}'
    listed = schema.answer(info.context, {"query": query})
    assert listed.data["project"]["sweeps"]["edges"] == [{"node": {"method": "random"}}]
    with pytest.raises(GraphQLError, match="sweep 'nobody' does not exist in project 'p'"):
        Agent(info, {"name": "nobody"})


def test_a_sweeps_runs_are_listed_whole_or_as_many_as_asked_for(info, store, upsert):
    sweep = upsert(GRID)
    for i in range(51):  # more than a page
        sweeps._new_run(store, sweep, f"r{i}", {}, "", 0.0)
    for arguments, count in (("", 51), ("(first: 2)", 2), ("(first: 0)", 0), ('(after: "50")', 1)):
        field = f'sweep(sweepName: "{sweep["name"]}") {{ runs{arguments} {{ edges {{ cursor }} }} }}'
        found = schema.answer(info.context, {"query": f'{{ project(name: "p") {{ {field} }} }}'}).data["project"][
            "sweep"
        ]["runs"]["edges"]
        assert len(found) == count


def test_the_best_loss_is_the_least_or_the_most_of_the_finite_ones(info, store, upsert):
    sweep = upsert(GRID | {"metric": {"name": "loss"}})
    for i, loss in enumerate((2.0, 1.0, 3, math.nan, math.inf, "text", None)):
        call = {"modelName": "p", "name": f"r{i}", "sweep": sweep["name"], "summaryMetrics": json.dumps({"loss": loss})}
        runs.upsert_bucket(None, info, call)
    runs.upsert_bucket(None, info, {"modelName": "p", "name": "empty", "sweep": sweep["name"]})
    assert sweeps._best_loss(sweep, info) == 1
    for goal, best in (("maximize", 3), ("minimize", 1)):
        sweep = upsert(GRID | {"metric": {"name": "loss", "goal": goal}}, id=sweep["name"])
        assert sweeps._best_loss(sweep, info) == best
    assert sweeps._best_loss(upsert(GRID), info) is None


def test_a_run_that_the_search_gives_up_is_stopped(info, store, upsert, monkeypatch):
    """Which one, hyperband of W&B's package says: test_sweeps.py."""
    early = {"metric": {"name": "loss"}, "early_terminate": {"type": "hyperband", "min_iter": 2}}
    monkeypatch.setattr(sweeps.search, "check", lambda config: None)  # the package may be absent
    sweep = upsert(GRID | early)
    one, two = Agent(info, sweep), Agent(info, sweep)
    (first, _), (second, _) = one.take(), two.take()
    seen = []
    monkeypatch.setattr(sweeps.search, "to_stop", lambda config, runs: seen.append(runs) or {first})
    assert one.beat(first) == [] == seen  # none is running
    for run in (1, 2):
        store.update("runs", run, state="running", summaryMetrics='{"loss": 2}')
        store.append_history(store.row("runs", run), 0, ['{"loss": 3}', '{"x": 1}'])
    assert two.beat(second) == [] and one.beat(first) == [("stop", first, None)]
    assert [store.row("runs", run)["shouldStop"] for run in (1, 2)] == [1, 0]
    assert seen[0][0] == {
        "name": first, "state": "running", "config": {"lr": {"value": 1}}, "summaryMetrics": {"loss": 2},
        "history": [{"loss": 3}],
    }  # fmt: skip
