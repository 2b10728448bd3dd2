"""Sweeps and agents: the CLI where it is the claim, else the functions that `wandb agent` itself calls every 5 s."""

import contextlib
import signal
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import wandb
from wandb.apis.public.sweeps import _agent_heartbeat, _register_agent
from wandb.sdk.sweeps import SweepNotFoundError

from local_wandb.runs import mark_lost
from local_wandb.store import Store
from local_wandb.sweeps import _experience, _new_run

PROJECT = "agents"
GRID = {"method": "grid", "program": "script.py", "parameters": {"lr": {"values": [0.1, 0.2, 0.3]}}}


class Agent:
    """`wandb agent` without the children and the pauses."""

    def __init__(self, api: wandb.Api, sweep: str, host: str = "test"):
        self.api = api
        self.id = _register_agent(api, host, sweep_id=sweep, project=PROJECT, entity="local")["id"]

    def beat(self, *alive: str) -> list[dict]:
        return _agent_heartbeat(self.api, self.id, {}, dict.fromkeys(alive, True))

    def take(self) -> tuple[str, float]:
        """The run and the rate that it is given."""
        (command,) = self.beat()
        assert command["type"] == "run"
        return command["run_id"], command["args"]["lr"]["value"]


@pytest.fixture
def sweep(api):
    """Creates a sweep from a configuration; answers its id."""
    return lambda config: wandb.sweep(config, project=PROJECT, entity="local")


def start(run: str, sweep: str, **options):
    return wandb.init(
        project=PROJECT, entity="local", id=run, settings=wandb.Settings(sweep_id=sweep), reinit="create_new", **options
    )


@contextlib.contextmanager
def database(server):
    """The server's database, to turn back its clocks."""
    with contextlib.closing(sqlite3.connect(server.data / "local_wandb.sqlite", timeout=60)) as db, db:
        yield db


def states(sweep: str) -> dict[str, str]:
    return {run.id: run.state for run in wandb.Api().sweep(f"local/{PROJECT}/{sweep}").runs}  # a new Api: it caches


def test_two_agents_never_get_the_same_point_and_end_together(api, sweep):
    sid = sweep(GRID)
    one, two = Agent(api, sid), Agent(api, sid)
    first, second, third = one.take(), two.take(), None
    assert (first[1], second[1]) == (0.1, 0.2)
    assert one.beat(first[0]) == []  # busy
    start(first[0], sid).finish()
    third = one.take()
    assert third[1] == 0.3
    start(second[0], sid).finish()
    assert two.beat() == []  # the third point may yet be lost: it would come here
    start(third[0], sid).finish()
    assert one.beat() == two.beat() == [{"type": "exit"}]
    assert api.sweep(f"local/{PROJECT}/{sid}").state == "FINISHED"
    agents = api.sweep(f"local/{PROJECT}/{sid}").agents()
    assert [len(list(agent.runs())) for agent in agents] == [2, 1]


def test_agents_that_ask_at_the_same_moment_get_different_points(api, sweep):
    values = [i / 10 for i in range(8)]
    sid = sweep(GRID | {"parameters": {"lr": {"values": values}}})
    agents = [Agent(api, sid) for _ in values]
    with ThreadPoolExecutor(len(agents)) as pool:
        taken = list(pool.map(Agent.take, agents))
    assert sorted(rate for _, rate in taken) == values and len({run for run, _ in taken}) == 8


def test_pause_resume_stop_cancel(server, api, sweep):
    def command(option: str, sid: str) -> None:
        done = server.run("wandb", "sweep", option, f"local/{PROJECT}/{sid}", env={"WANDB_PROJECT": PROJECT})
        assert done.returncode == 0, done.stderr

    sid = sweep(GRID)
    agent = Agent(api, sid)
    run, _ = agent.take()
    command("--pause", sid)
    assert agent.beat(run) == []
    start(run, sid).finish()
    assert agent.beat() == []
    command("--resume", sid)
    run, rate = agent.take()
    assert rate == 0.2
    command("--stop", sid)
    assert agent.beat(run) == []  # the run under way may finish
    start(run, sid).finish()
    assert agent.beat() == [{"type": "exit"}]

    sid = sweep(GRID)
    agent = Agent(api, sid)
    run, _ = agent.take()
    command("--cancel", sid)
    assert agent.beat(run) == [{"type": "stop", "run_id": run}, {"type": "exit"}]


def test_update_changes_what_comes_next(server, api, sweep, tmp_path):
    sid = sweep(GRID)
    agent = Agent(api, sid)
    run, _ = agent.take()
    start(run, sid).finish()
    (tmp_path / "new.yaml").write_text("{program: script.py, method: grid, parameters: {lr: {values: [0.1, 0.7]}}}")
    done = server.run("wandb", "sweep", "--update", f"local/{PROJECT}/{sid}", str(tmp_path / "new.yaml"))
    assert done.returncode == 0, done.stderr
    assert agent.take()[1] == 0.7


def test_a_refused_configuration_is_named_in_the_client(server, tmp_path):
    (tmp_path / "bad.yaml").write_text("{program: x.py, method: grid, parameters: {lr: {distribution: unifrom}}}")
    done = server.run("wandb", "sweep", str(tmp_path / "bad.yaml"))
    assert done.returncode != 0
    assert "parameter lr has an unknown distribution 'unifrom'" in done.stderr + done.stdout


def test_the_point_of_a_killed_agent_is_offered_again(server, api, sweep):
    sid = sweep(GRID)
    dead, alive = Agent(api, sid), Agent(api, sid)
    lost, rate = dead.take()
    for _ in range(2):
        start(alive.take()[0], sid).finish()
    assert alive.beat() == []
    with database(server) as db:  # neither the agent nor its run has been heard of for ten minutes
        db.execute(
            "UPDATE agents SET heartbeatAt = heartbeatAt - 600 WHERE id = (SELECT agent FROM runs WHERE name = ?)",
            [lost],
        )
        db.execute("UPDATE runs SET heartbeatAt = heartbeatAt - 600 WHERE name = ?", [lost])
    store = Store(server.data)
    mark_lost(store)
    assert states(sid)[lost] == "pending"  # a server that has only just started knows nothing about those ten minutes
    store.started -= 600
    mark_lost(store)
    assert states(sid)[lost] == "crashed"
    again, same = alive.take()
    assert (again != lost, same) == (True, rate)


def test_a_command_that_got_lost_on_its_way_is_given_again(api, sweep):
    agent = Agent(api, sweep(GRID))
    (first, rate), (second, same) = agent.take(), agent.take()  # it asks again and knows nothing of the first
    assert first != second and rate == same


def test_a_point_is_lost_three_times_at_most(api, sweep):
    sid = sweep(GRID | {"parameters": {"lr": {"values": [0.5]}}})
    agent = Agent(api, sid)
    for _ in range(3):
        run, rate = agent.take()
        assert rate == 0.5
        start(run, sid)  # its process ends without a last word: the agent no longer lists it as alive
    assert agent.beat() == [{"type": "exit"}]
    assert len(states(sid)) == 3  # crashed, unless a process of this test has spoken since: then running again


def test_a_failed_point_is_not_offered_again(api, sweep):
    sid = sweep(GRID | {"parameters": {"lr": {"values": [0.5]}}})
    agent = Agent(api, sid)
    run, _ = agent.take()
    start(run, sid).finish(exit_code=1)
    assert agent.beat() == [{"type": "exit"}]
    assert states(sid) == {run: "failed"}


def test_a_run_that_logs_offline_keeps_its_point(api, sweep):
    sid = sweep(GRID)
    agent = Agent(api, sid)
    run, _ = agent.take()
    assert agent.beat(run) == []
    assert agent.take()[1] == 0.2  # the first never reported, and is not tried again: it is synced later


def test_a_preempted_run_is_resumed_where_it_was(api, sweep):
    sid = sweep(GRID)
    agent = Agent(api, sid)
    name, rate = agent.take()
    run = start(name, sid)
    for step in range(3):
        run.log({"step": step})
    run.mark_preempting()
    run.finish(exit_code=1)
    (command,) = agent.beat()
    assert (command["type"], command["run_id"], command["args"]["lr"]["value"]) == ("resume", name, rate)
    run = start(name, sid, resume="allow")
    assert run.starting_step == 3
    run.log({"step": 3})
    run.finish()
    done = api.run(f"local/{PROJECT}/{name}")
    assert (done.state, [row["step"] for row in done.scan_history()]) == ("finished", [0, 1, 2, 3])


def test_run_stop_reaches_the_agent(api, sweep):
    sid = sweep(GRID)
    agent = Agent(api, sid)
    name, _ = agent.take()
    run = start(name, sid)
    api.run(f"local/{PROJECT}/{name}").stop()
    assert agent.beat(name) == [{"type": "stop", "run_id": name}]
    run.mark_preempting()  # as a program that takes every SIGTERM for a preemption
    run.finish(exit_code=143)
    assert states(sid)[name] == "killed"


def test_a_deleted_sweep_ends_its_agent(server, api, sweep):
    sid = sweep(GRID)
    agent = Agent(api, sid)
    with database(server) as db:
        db.execute("DELETE FROM agents WHERE sweep = (SELECT id FROM sweeps WHERE name = ?)", [sid])
    with pytest.raises(SweepNotFoundError):
        agent.beat()


def test_hyperband_stops_the_worse_run(api, sweep):
    pytest.importorskip("sweeps")
    early = {"type": "hyperband", "min_iter": 2, "eta": 3}
    sid = sweep(GRID | {"metric": {"name": "loss", "goal": "minimize"}, "early_terminate": early})
    good, bad = Agent(api, sid), Agent(api, sid)
    first, second = good.take()[0], bad.take()[0]
    runs = [(start(first, sid), 1.0), (start(second, sid), 5.0)]
    for run, loss in runs:
        for step in range(5):
            run.log({"loss": loss / (step + 1)})
        run.finish() if loss == 1.0 else None
    deadline = time.time() + 20
    while not (commands := bad.beat(second)) and time.time() < deadline:
        time.sleep(0.5)
    assert commands == [{"type": "stop", "run_id": second}]
    runs[1][0].finish()


def test_bayes_learns_from_the_runs(api, sweep):
    pytest.importorskip("sweeps")
    config = {"method": "bayes", "run_cap": 3, "program": "x.py", "metric": {"name": "loss", "goal": "minimize"}}
    sid = sweep(config | {"parameters": {"lr": {"min": 0.0, "max": 1.0}}})
    agent = Agent(api, sid)
    for _ in range(3):
        run, rate = agent.take()
        assert 0 <= rate <= 1
        with start(run, sid) as logged:
            logged.log({"loss": rate**2})
    assert agent.beat() == [{"type": "exit"}]


def test_the_search_sees_the_metric_over_time_where_it_asks_for_it(tmp_path):
    store = Store(tmp_path)
    project = store.insert("projects", entityName="local", name="p", createdAt=0.0)
    times = {"createdAt": 0.0, "heartbeatAt": 0.0}
    run = store.insert("runs", project=project["id"], name="r", state="running", **times)
    store.append_history(run, 0, ['{"loss": 2}', '{"other": 1}', '{"loss": 1}'])
    metric, early = {"metric": {"name": "loss"}}, {"early_terminate": {"type": "hyperband"}}
    for config in (metric | {"method": "bayes"}, metric | early | {"method": "grid"}):
        assert _experience(store, run, config)["history"] == [{"loss": 2}, {"loss": 1}]
    for config in (metric | {"method": "grid"}, {"method": "bayes"}):
        assert _experience(store, run, config)["history"] == []


SCRIPT = """
import argparse, signal, sys, time, wandb
arguments = argparse.ArgumentParser()
arguments.add_argument("--lr", type=float)
lr = arguments.parse_args().lr
if lr == 0.2:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
run = wandb.init(config={"lr": lr}, resume="allow")
run.log({"loss": lr})
if lr == 0.2:
    print("waiting", flush=True)
    time.sleep(60)
"""


def test_the_agent_of_the_command_line(server, api, sweep, tmp_path):
    """--count, and --forward-signals: the child hears SIGTERM, ends with 143, and its rows are there."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = server.env | {"WANDB_PROJECT": PROJECT, "WANDB_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    sid = sweep(GRID)
    once = server.run("wandb", "agent", "--count", "1", f"local/{PROJECT}/{sid}", cwd=tmp_path, env=env)
    assert once.returncode == 0, once.stderr
    assert list(states(sid).values()) == ["finished"]
    with subprocess.Popen(
        ["wandb", "agent", "--forward-signals", f"local/{PROJECT}/{sid}"],
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as agent:  # fmt: skip
        for line in agent.stdout:
            if "waiting" in line:
                break
        agent.send_signal(signal.SIGTERM)
        rest = agent.stdout.read()
    assert "SIGTERM received" in rest
    (killed,) = [run for run in wandb.Api().sweep(f"local/{PROJECT}/{sid}").runs if run.config["lr"] == 0.2]
    assert (killed.state, [row["loss"] for row in killed.scan_history()]) == ("failed", [0.2])


def test_the_agent_of_a_python_function(api, sweep):
    sid, rates = sweep(GRID), []

    def train():
        with wandb.init() as run:
            rates.append(run.config["lr"])
            run.log({"loss": run.config["lr"]})

    wandb.agent(sid, function=train, project=PROJECT, entity="local", count=3)
    assert rates == [0.1, 0.2, 0.3]
    assert set(states(sid).values()) == {"finished"}


def test_prior_runs_belong_to_the_sweep(api):
    with wandb.init(project=PROJECT, entity="local", id="before", config={"lr": 0.1}, reinit="create_new") as run:
        run.log({"loss": 1})
    sid = wandb.sweep(GRID, project=PROJECT, entity="local", prior_runs=["before"])
    assert list(states(sid)) == ["before"]
    query = """query Sweep($project: String, $entity: String, $name: String!) {
      project(name: $project, entityName: $entity) { sweep(sweepName: $name) {
        id state config priorRuns { edges { node { name } } } } } }"""
    found = wandb.apis.public.Sweep.get(api, "local", PROJECT, sid, query=query)
    assert [edge["node"]["name"] for edge in found._attrs["priorRuns"]["edges"]] == ["before"]
    assert Agent(api, sid).take()[1] == 0.2  # 0.1 has been tried
    with pytest.raises(Exception, match="none of the prior runs exists"):
        wandb.sweep(GRID, project=PROJECT, entity="local", prior_runs=["nobody"])


def test_a_cancelled_sweep_kills_its_runs_at_once(server, api, sweep):
    sid = sweep(GRID)
    agent = Agent(api, sid)
    name, _ = agent.take()
    run = start(name, sid)
    run.log({"loss": 1})
    waiting, _ = Agent(api, sid).take()
    assert server.run("wandb", "sweep", "--cancel", f"local/{PROJECT}/{sid}").returncode == 0
    assert states(sid) == {name: "killed", waiting: "killed"}
    run.log({"loss": 2})
    run.config["late"] = True
    time.sleep(2.5)  # the client streams every 2 s: what it sends does not bring the run back to life
    assert states(sid)[name] == "killed"
    run.finish(exit_code=1)
    assert states(sid)[name] == "killed"
    assert [row["loss"] for row in wandb.Api().run(f"local/{PROJECT}/{name}").scan_history()] == [1, 2]


def test_an_enqueued_run_comes_before_the_grid(api, sweep):
    sid = sweep(GRID)
    name = api.sweep(f"local/{PROJECT}/{sid}").enqueue_run({"lr": {"value": 0.7}})
    agent = Agent(api, sid)
    assert agent.take() == (name, 0.7)
    start(name, sid).finish()
    assert agent.take()[1] == 0.1


def test_a_scheduler_draws_the_points(server, api, sweep, tmp_path):
    """`wandb sweep-scheduler` with W&B's own engine, which optuna's and ax's share their protocol with."""
    pytest.importorskip("sweeps")
    sid = sweep(GRID | {"scheduler": {"engine": "wandb"}, "metric": {"name": "loss", "goal": "minimize"}})
    agent = Agent(api, sid)
    assert agent.beat() == []  # nobody has drawn a point yet
    command = ["wandb", "sweep-scheduler", "--batch-size", "2", "--poll-interval", "1", f"local/{PROJECT}/{sid}"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=server.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as scheduler:
        rates, deadline = [], time.time() + 300
        while (commands := agent.beat()) != [{"type": "exit"}] and time.time() < deadline:
            for command in commands:
                rates.append(command["args"]["lr"]["value"])
                with start(command["run_id"], sid) as run:
                    run.log({"loss": rates[-1]})
            time.sleep(0.2)
        assert scheduler.wait(120) == 0, scheduler.stdout.read()
    assert sorted(rates) == [0.1, 0.2, 0.3]
    assert api.sweep(f"local/{PROJECT}/{sid}").state == "FINISHED" and set(states(sid).values()) == {"finished"}


def test_of_what_a_scheduler_drew_no_more_than_the_cap_is_run(server, api, sweep):
    sid = sweep(GRID | {"scheduler": {"engine": "wandb"}, "run_cap": 1})
    agent, other, store = Agent(api, sid), Agent(api, sid), Store(server.data)
    assert agent.beat() == []  # nobody has drawn a point yet
    row = store.get("sweeps", name=sid)
    for run, rate in ((f"{sid}-1", 0.1), (f"{sid}-2", 0.2)):
        _new_run(store, row, run, {"lr": {"value": rate}}, run, time.time())
    assert agent.take() == (f"{sid}-1", 0.1)
    assert agent.beat(f"{sid}-1") == other.beat() == []
    start(f"{sid}-1", sid).finish()
    assert agent.beat() == [{"type": "exit"}]
    assert states(sid) == {f"{sid}-1": "finished", f"{sid}-2": "killed"}
