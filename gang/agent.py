"""W&B's side of a gang: the agents of one process, the configurations they claim, their heartbeats."""

import math
import re
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import wandb
from wandb.apis.public import sweeps
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.sdk.sweeps import SweepNotFoundError

from gang.fit import unfit
from gang.loop import Loop, Shared
from gang.member import Member
from gang.size import choose
from inputs import InputError, first_line
from memory import OutOfMemory
from settings import parse
from train import patiently

INTERPRETER = re.compile(r"env|python[\d.]*|\$\{(env|interpreter)\}")  # words that may stand before train.py
ALONE = "use wandb agent (experiment.py --one-by-one)"
HEARTBEAT_SECONDS = 5  # as wandb agent
DIFFER = {"learning_rate", "seed", "lora_r", "lora_alpha", "guide"}


@dataclass
class Agent:
    """One agent of the sweep, as the server sees it, and the configuration that it has claimed."""

    id: str
    run_id: str | None = None
    point: dict | None = None
    retired: bool = False  # the server has told it that the sweep has no more


class Sweep:
    """The server's side: the sweep's command, its agents, their claims and heartbeats."""

    def __init__(self, path: str):
        entity, project, self.id = path.split("/")
        try:
            self.api = wandb.Api()
            self.place = {"entity": entity, "project": project, "sweep_id": self.id}
            self.path, self.config = path, patiently(lambda: self.api.sweep(path)).config
        except (wandb.Error, ValueError) as error:
            raise InputError(f"{path}: {first_line(error)}") from error
        self.lock = threading.Lock()

    def agents(self, count: int) -> list[Agent]:
        def registered() -> str:
            return sweeps._register_agent(self.api, socket.gethostname(), **self.place)["id"]

        return [Agent(patiently(registered)) for _ in range(count)]

    def heartbeat(self, agent: Agent) -> list[dict]:
        alive = {agent.run_id: True} if agent.run_id else {}
        with self.lock:
            try:
                return sweeps._agent_heartbeat(self.api, agent.id, {}, alive)
            except SweepNotFoundError:  # deleted: what runs may finish
                return [{"type": "exit"}]

    def left(self) -> float:
        """The points that nobody has claimed, or are offered again, and this process's one; may be infinite."""
        sweep = patiently(lambda: self.api.sweep(self.path))
        expected = sweep.expected_run_count
        taken = sum(run.state not in ("crashed", "preempted") for run in patiently(lambda: list(sweep.runs)))
        return math.inf if expected is None else expected - taken + 1

    def claim(self, agent: Agent) -> None:
        """Ask for a configuration, unless it has one; the server may have none now, or none ever again."""
        if agent.run_id or agent.retired:
            return
        for command in self.heartbeat(agent):
            if command["type"] in ("run", "resume"):
                agent.run_id, agent.point = command["run_id"], command["args"]
            elif command["type"] == "exit":
                agent.retired = True


def arguments(sweep: dict, point: dict) -> list[str]:
    """The flags with which `wandb agent` would call train.py."""
    words = create_sweep_command(list(sweep.get("command") or ["${program}", "${args}"]))
    macros = create_sweep_command_args({"args": point}) | {"program": [sweep.get("program", "")]}
    words = [part for word in words for part in macros.get(str(word)[2:-1], [str(word)])]
    for index, word in enumerate(words):
        if Path(word).name == "train.py":
            launcher = [word for word in words[:index] if not INTERPRETER.fullmatch(Path(word).name)]
            if launcher:
                raise InputError(f"the sweep's command starts with {launcher[0]}; for that, {ALONE}")
            return words[index + 1 :]
    raise InputError(f"the sweep's command does not run train.py; {ALONE}")


def first(sweep: dict) -> Member:
    """The first point of a sweep, given as its configuration, which has no run; InputError if no gang can train it."""
    point = {
        key: {"value": (spec.get("values") or [spec["value"]])[0]}
        for key, spec in sweep["parameters"].items()
        if "values" in spec or "value" in spec  # a distribution's end, such as 0, need not be a point of the sweep
    }
    member = Member("first", point, arguments(sweep, point))
    if reason := unfit(parse(member.flags)):
        raise InputError(f"{reason}; {ALONE}")
    return member


def difference(first: dict, other: dict) -> str | None:
    """What keeps a point of the sweep out of the first one's gang, as "key: value, not value"."""
    for key, entry in other.items():
        expected = first.get(key, {}).get("value")
        if key not in DIFFER and entry["value"] != expected:
            return f"{key}: {entry['value']}, not {expected}"
    return None


class Agents:
    """The agents of one process, and the gangs that they make up."""

    def __init__(self, sweep: Sweep, size: int | None, shared: Shared | None = None):
        if shared is None:
            first(sweep.config)  # refused before anything is claimed
        self.sweep, self.size = sweep, size
        self.agents = sweep.agents(size or 1)
        self.loop = Loop(sweep.id, shared)

    def work(self) -> None:
        """Gangs until the sweep has no more configurations."""
        while True:
            for agent in self.agents:
                self.sweep.claim(agent)
            if any(agent.run_id for agent in self.agents):
                self.train()
            elif all(agent.retired for agent in self.agents):
                return
            else:
                time.sleep(HEARTBEAT_SECONDS)

    def train(self) -> None:
        """Train those of the claimed configurations that fit together; what does not stays claimed."""
        seats: dict[str, tuple[Agent, Member]] = {}
        done = threading.Event()
        members = self.seat(self.agents, seats)
        # What differs may say which base; else the next gang goes on with the one that is loaded.
        if self.loop.shared and difference(self.loop.shared.point, members[0].point):
            self.loop.shared = None
        heart = threading.Thread(target=self.keep_alive, args=(done,))
        heart.start()
        try:
            self.loop.train(members, None if self.size else lambda first: self.recruit(first, seats))
        finally:
            done.set()
            heart.join()
        again = self.smaller(seats)
        for agent, member in seats.values():
            if again and isinstance(member.error, OutOfMemory):
                continue  # it keeps what it has claimed
            agent.run_id = agent.point = None
            if isinstance(member.error, InputError):
                raise member.error
            if isinstance(member.error, OutOfMemory):
                print(f"OutOfMemoryError: {member.run_id}: {member.error}", file=sys.stderr)
            elif isinstance(member.error, Exception):
                print(f"gang: {member.run_id} failed:", file=sys.stderr)
                traceback.print_exception(member.error)
        errors = [member.error for _, member in seats.values()]
        if all(isinstance(error, Exception) and not isinstance(error, OutOfMemory) for error in errors):
            print("gang: every run failed; the errors are above", file=sys.stderr)
            sys.exit(1)

    def smaller(self, seats: dict[str, tuple[Agent, Member]]) -> bool:
        """After memory ran out, choose fewer at once, then activations recomputed; False when that was tried before."""
        lost = [member.error for _, member in seats.values() if isinstance(member.error, OutOfMemory)]
        if not lost:
            return False
        if len(seats) > 1:
            self.size = math.ceil(len(seats) / 2)
        elif self.loop.shared is not None and not self.loop.shared.checkpointing:
            self.loop.shared.checkpointing = True
        else:
            return False
        how = f"{self.size} at once" if len(seats) > 1 else "activations recomputed"
        print(f"gang: out of memory ({lost[0]}); another try with {how}", flush=True)
        return True

    def seat(self, agents: list[Agent], seats: dict) -> list[Member]:
        """Members for the claims of these agents that fit the first; a line says why another does not."""
        members = []
        for agent in (agent for agent in agents if agent.run_id):
            if self.size and len(seats) == self.size:
                break
            member = Member(agent.run_id, agent.point, arguments(self.sweep.config, agent.point))
            first = next((member for _, member in seats.values()), member)
            if reason := difference(first.point, agent.point) or self.apart(first, member):
                print(f"gang: {agent.run_id} trains in a later gang ({reason})", flush=True)
                continue
            members.append(member)
            seats[agent.run_id] = agent, member
        for member in members:
            values = (f"{key}={entry['value']}" for key, entry in member.point.items())
            print(f"gang: {member.run_id} is {' '.join(values)}", flush=True)
        return members

    def apart(self, first: Member, other: Member) -> str | None:
        """Whether two go on after different steps. What is wrong with their flags shows when they are set up."""
        for member in (first, other):
            with suppress(InputError):
                member.configure(self.sweep.id)
        return f"from step {other.start}, not {first.start}" if other.start != first.start else None

    def recruit(self, first: Member, seats: dict) -> list[Member]:
        """Choose how many to train at once, and claim as many configurations more."""
        shared = self.loop.shared
        self.size, shared.checkpointing = choose(self.sweep.left(), shared.model, first, shared.packed)
        more = self.sweep.agents(self.size - 1)
        for agent in more:
            self.sweep.claim(agent)
        self.agents += more
        return self.seat(more, seats)

    def keep_alive(self, done: threading.Event) -> None:
        """Heartbeats while the gang trains; a run that the server wants stopped ends as with SIGTERM."""
        while not done.wait(HEARTBEAT_SECONDS):
            for agent in [agent for agent in self.agents if agent.run_id]:
                for command in self.sweep.heartbeat(agent):
                    for member in self.loop.members:
                        if command["type"] == "stop" and command["run_id"] == member.run_id:
                            member.stopped = True
