"""gang/agent.py between W&B's server and the loop: who gets a seat, what is tried again, what stays claimed."""

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from wandb.sdk.sweeps import SweepNotFoundError

from gang import agent
from gang.agent import Agent, Agents, Sweep, arguments
from inputs import InputError
from memory import OutOfMemory

ROOT = Path(__file__).resolve().parents[2]


class Loop:
    """A gang.loop.Loop that trains nothing: each member ends with the error that is told."""

    def __init__(self, **errors):
        self.errors, self.shared, self.members, self.trained = errors, None, [], []

    def train(self, members, recruit):
        self.members = list(members)
        self.shared = self.shared or SimpleNamespace(checkpointing=False, point=members[0].point)
        if recruit:
            self.members += recruit(members[0])
        for member in self.members:
            member.error = self.errors.get(member.run_id)
        self.trained.append([member.run_id for member in self.members])


def claimed(name: str, **point) -> Agent:
    return Agent(f"agent-{name}", name, {key: {"value": value} for key, value in point.items()})


def process(loop: Loop, *agents: Agent, size: int | None = None) -> Agents:
    """The agents of a process as they are once their sweep has been checked."""
    found = object.__new__(Agents)
    found.sweep, found.size = object.__new__(Sweep), size
    found.sweep.id, found.sweep.config, found.sweep.lock = "s", {"command": ["train.py", "${args}"]}, threading.Lock()
    found.agents, found.loop = list(agents), loop
    found.sweep.heartbeat = lambda agent: []
    found.apart = lambda first, other: None
    return found


def test_a_claim_is_asked_for_once():
    sweep, asked = object.__new__(Sweep), []
    commands = {
        "a": [{"type": "stop", "run_id": "x"}, {"type": "run", "run_id": "r", "args": {"seed": {"value": 1}}}],
        "b": [{"type": "resume", "run_id": "q", "args": {}}],
        "c": [{"type": "exit"}],
        "d": [],
    }
    sweep.heartbeat = lambda agent: asked.append(agent.id) or commands[agent.id]
    agents = [Agent(name) for name in commands]
    for one in agents * 2:
        sweep.claim(one)
    assert [one.run_id for one in agents] == ["r", "q", None, None] and agents[0].point == {"seed": {"value": 1}}
    assert [one.retired for one in agents] == [False, False, True, False]
    assert asked == ["a", "b", "c", "d", "d"]


def test_gangs_follow_one_another_until_the_sweep_has_no_more(monkeypatch):
    monkeypatch.setattr(agent, "HEARTBEAT_SECONDS", 0.001)
    runs = {name: [{"type": "run", "run_id": name, "args": {"seed": {"value": 1}}}] for name in "abc"}
    answers = iter([runs["a"], runs["b"], [], [], runs["c"], [{"type": "exit"}], [{"type": "exit"}]])
    found = process(Loop(), Agent("one"), Agent("two"), size=2)
    found.sweep.heartbeat = lambda one: [] if one.run_id else next(answers)
    found.work()
    assert found.loop.trained == [["a", "b"], ["c"]] and next(answers, None) is None


def test_those_that_fit_the_first_have_a_seat_and_the_others_wait(capsys):
    rates = [
        claimed(name, learning_rate=rate, max_steps=9) for name, rate in zip("abc", (1e-3, 2e-3, 3e-3), strict=True)
    ]
    other = claimed("other", learning_rate=1e-3, max_steps=7)
    found = process(Loop(), rates[0], other, Agent("idle"), *rates[1:], size=2)
    found.train()
    assert found.loop.trained == [["a", "b"]]
    assert [one.run_id for one in found.agents] == [None, "other", None, None, "c"]
    said = capsys.readouterr().out
    assert "gang: other trains in a later gang (max_steps: 7, not 9)" in said
    assert "gang: b is learning_rate=0.002" in said and "c is" not in said
    found.train()
    assert found.loop.trained[1:] == [["other"]]


def test_another_base_is_read_anew_and_the_same_one_is_not():
    found = process(Loop(), claimed("a", learning_rate=1e-3, lora_dropout=0.0), size=1)
    read = []
    for name, dropout in (("a", 0.0), ("b", 0.0), ("c", 0.1)):
        found.agents = [claimed(name, learning_rate=1e-3, lora_dropout=dropout)]
        before = found.loop.shared
        found.train()
        read.append(found.loop.shared is not before)
    assert read == [True, False, True]


def test_what_goes_on_after_another_step_trains_in_a_later_gang():
    found = process(Loop())
    first, other, same, unfit = (
        SimpleNamespace(start=int(start), configure=lambda sweep: None) for start in ("1000", "2000", "1000", "1000")
    )

    def refuse(sweep):
        raise InputError(sweep)

    unfit.configure = refuse
    assert Agents.apart(found, first, other) == "from step 2000, not 1000"
    assert Agents.apart(found, first, same) is None is Agents.apart(found, unfit, same)


def test_where_memory_ran_out_fewer_train_at_once_then_with_activations_recomputed(capsys):
    lost = {name: OutOfMemory(f"Tried to allocate {name} GiB") for name in "abc"}
    agents = [claimed(name, learning_rate=1e-3) for name in "abc"]
    found = process(Loop(**lost), *agents, size=3)
    found.train()
    assert found.size == 2 and [one.run_id for one in agents] == ["a", "b", "c"]
    found.train()
    assert found.size == 1 and not found.loop.shared.checkpointing
    found.train()
    assert found.loop.shared.checkpointing and agents[0].run_id == "a"
    found.train()
    assert found.loop.trained == [["a", "b", "c"], ["a", "b"], ["a"], ["a"]]
    assert [one.run_id for one in agents] == [None, "b", "c"]
    said = capsys.readouterr()
    assert "out of memory (Tried to allocate a GiB); another try with 2 at once" in said.out
    assert "another try with 1 at once" in said.out and "another try with activations recomputed" in said.out
    assert said.err == "OutOfMemoryError: a: Tried to allocate a GiB\n"


def test_a_base_that_does_not_fit_is_not_tried_again():
    found = process(Loop(a=OutOfMemory("no")), claimed("a", learning_rate=1e-3), size=1)
    train = found.loop.train

    def read(members, recruit):
        train(members, recruit)
        found.loop.shared = None

    found.loop.train = read
    found.train()
    assert found.agents[0].run_id is None


FLAGS = ["--learning_rate=0.001", "--seed=1"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [(None, FLAGS), (["/usr/bin/env", "python3.11", "train.py", "--x", "${args}"], ["--x", *FLAGS]),
     (["accelerate", "launch", "${program}", "${args}"], "starts with accelerate; for that, use wandb agent"),
     (["python", "other.py", "${args}"], "does not run train.py; use wandb agent")],
)  # fmt: skip
def test_a_command_gives_the_flags_of_train_py_or_is_refused(command, expected):
    sweep, point = {"program": "train.py", "command": command}, {"learning_rate": {"value": 1e-3}, "seed": {"value": 1}}
    if isinstance(expected, list):
        assert arguments(sweep, point) == expected
    else:
        with pytest.raises(InputError, match=expected):
            arguments(sweep, point)


def test_the_server_gives_each_point_once(api, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["${env}", "python", "${program}", "--config", "recipes/starter.yaml", "${args}"]
    rates = {"learning_rate": {"values": [1.0e-3, 2.0e-3]}}
    config = {"method": "grid", "program": "train.py", "command": command, "parameters": rates}
    path = f"local/gang-agents/{wandb.sweep(config, project='gang-agents', entity='local')}"
    sweep = Sweep(path)
    assert sweep.left() == 2 + 1  # before this process has one of them
    assert [len(Agents(sweep, size).agents) for size in (None, 3)] == [1, 3]
    agents = sweep.agents(3)
    for one in agents:
        sweep.claim(one)
    assert sorted(one.point["learning_rate"]["value"] for one in agents[:2]) == [1e-3, 2e-3]
    assert agents[2].run_id is None and Sweep(path).left() == 0 + 1
    assert sweep.heartbeat(agents[0]) == []
    endless = config | {"method": "random", "parameters": {"learning_rate": {"min": 1.0e-5, "max": 1.0e-3}}}
    assert Sweep(f"local/gang-agents/{wandb.sweep(endless, project='gang-agents', entity='local')}").left() == math.inf
    with pytest.raises(InputError, match=r"^local/gang-agents/none: "):
        Sweep("local/gang-agents/none")


def test_a_deleted_sweep_has_no_more(monkeypatch):
    def deleted(*_):
        raise SweepNotFoundError("gone")

    monkeypatch.setattr(agent.sweeps, "_agent_heartbeat", deleted)
    sweep = object.__new__(Sweep)
    sweep.api, sweep.lock = None, threading.Lock()
    assert sweep.heartbeat(claimed("a")) == [{"type": "exit"}]


def test_of_two_that_end_badly_the_well_one_is_not_tried_again(capsys):
    agents = [claimed("a", learning_rate=1e-3), claimed("b", learning_rate=2e-3)]
    found = process(Loop(a=OutOfMemory("no")), *agents, size=2)
    found.train()
    assert [one.run_id for one in agents] == ["a", None]
    agents = [claimed("a", learning_rate=1e-3), claimed("b", learning_rate=2e-3)]
    process(Loop(a=ValueError("of its disk")), *agents, size=2).train()
    said = capsys.readouterr().err
    assert "gang: a failed:" in said and "ValueError: of its disk" in said and "every run failed" not in said


def test_where_every_run_fails_the_process_does(capsys):
    with pytest.raises(SystemExit) as exit:
        process(Loop(a=ValueError("no")), claimed("a", learning_rate=1e-3), size=1).train()
    assert exit.value.code == 1 and "gang: every run failed" in capsys.readouterr().err
    with pytest.raises(InputError, match="a flag"):
        process(Loop(a=InputError("a flag")), claimed("a", learning_rate=1e-3), size=1).train()


def test_the_first_member_tells_how_many_are_claimed(monkeypatch):
    asked = []
    monkeypatch.setattr(agent, "choose", lambda *arguments: asked.append(arguments) or (3, True))
    found = process(Loop(), claimed("a", learning_rate=1e-3))
    found.loop.shared = None
    shared = SimpleNamespace(model="model", packed="packed", checkpointing=None)
    train = found.loop.train

    def read(members, recruit):
        found.loop.shared = shared
        train(members, recruit)

    found.loop.train = read
    found.sweep.left = lambda: 4
    found.sweep.agents = lambda count: [Agent(f"more-{index}") for index in range(count)]
    point = {"learning_rate": {"value": 2e-3}}
    found.sweep.heartbeat = lambda one: [] if one.run_id else [{"type": "run", "run_id": one.id, "args": point}]
    found.train()
    assert found.loop.trained == [["a", "more-0", "more-1"]] and found.size == 3 and shared.checkpointing
    ((left, model, first, packed),) = asked
    assert (left, model, first.run_id, packed) == (4, "model", "a", "packed")
    assert len(found.agents) == 3


def test_a_run_that_the_server_stops_is_the_one_that_ends(monkeypatch):
    monkeypatch.setattr(agent, "HEARTBEAT_SECONDS", 0.001)
    found, done, beats = process(Loop(), claimed("a"), claimed("b"), Agent("idle")), threading.Event(), []
    found.loop.members = [SimpleNamespace(run_id=name, stopped=False) for name in "ab"]

    def beat(one):
        beats.append(one.run_id)
        if len(beats) == 4:
            done.set()
        return json.loads('[{"type": "stop", "run_id": "b"}, {"type": "resume", "run_id": "a"}]')

    found.sweep.heartbeat = beat
    found.keep_alive(done)
    assert beats == ["a", "b"] * 2 and [member.stopped for member in found.loop.members] == [False, True]
