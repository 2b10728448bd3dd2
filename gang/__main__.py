"""A sweep agent that trains several configurations at once on one frozen base:

    python -m gang ENTITY/PROJECT/SWEEP

Each of its N members claims a configuration through W&B's own protocol, as N `wandb agent` processes would, and logs
to its own run. Configurations may differ in what `DIFFER` names; any other goes into a later gang.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, fields
from pathlib import Path

import wandb
from wandb.apis.public import sweeps
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from gang.members import Conductor, Member
from train import InputError, first_line, parse

HEARTBEAT_SECONDS = 5  # as wandb agent
DIFFER = {"learning_rate", "seed", "lora_r", "lora_alpha"}


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
        self.api = wandb.Api()
        entity, project, self.id = path.split("/")
        try:
            self.place = {"entity": entity, "project": project, "sweep_id": self.id}
            self.command = self.api.sweep(path).config.get("command")
        except (wandb.Error, ValueError) as error:
            raise InputError(f"{path}: {first_line(error)}") from error
        self.lock = threading.Lock()

    def agents(self, count: int) -> list[Agent]:
        return [Agent(sweeps._register_agent(self.api, socket.gethostname(), **self.place)["id"]) for _ in range(count)]

    def heartbeat(self, agent: Agent) -> list[dict]:
        alive = {agent.run_id: True} if agent.run_id else {}
        with self.lock:
            return sweeps._agent_heartbeat(self.api, agent.id, {}, alive)

    def claim(self, agent: Agent) -> None:
        """Ask for a configuration; the server may have none now, or none ever again."""
        for command in self.heartbeat(agent):
            if command["type"] in ("run", "resume"):
                agent.run_id, agent.point = command["run_id"], command["args"]
            elif command["type"] == "exit":
                agent.retired = True

    def arguments(self, point: dict) -> list[str]:
        """The flags with which `wandb agent` would call train.py."""
        words = create_sweep_command(list(self.command or ["${program}", "${args}"]))
        forms = create_sweep_command_args({"args": point})
        words = [part for word in words for part in forms.get(str(word)[2:-1], [str(word)])]
        start = next((i for i, word in enumerate(words) if word == "${program}" or Path(word).name == "train.py"), None)
        if start is None:
            raise InputError(f"sweep {self.id}: its command does not run train.py; use wandb agent")
        return words[start + 1 :]


def difference(first: tuple, other: tuple) -> str | None:
    """What keeps a configuration out of the first one's gang, as "key: value, not value"."""
    for left, right in zip(first, other, strict=True):
        for key in (field.name for field in fields(left)):
            if key not in DIFFER and getattr(left, key) != getattr(right, key):
                return f"{key}: {getattr(right, key)}, not {getattr(left, key)}"
    return None


def keep_alive(sweep: Sweep, agents: list[Agent], conductor: Conductor, done: threading.Event) -> None:
    """Heartbeats while the gang trains; a run that the server wants stopped ends as with SIGTERM."""
    while not done.wait(HEARTBEAT_SECONDS):
        for agent in agents:
            for command in sweep.heartbeat(agent):
                for member in conductor.members:
                    if command["type"] == "stop" and command["run_id"] == member.run_id:
                        member.stopped = True


def train_gang(sweep: Sweep, agents: list[Agent], claimed: list[Agent]) -> None:
    """Train those of the claimed configurations that fit together; what does not stays claimed."""
    configurations = {agent.run_id: tuple(parse(sweep.arguments(agent.point))) for agent in claimed}
    first = configurations[claimed[0].run_id]
    chosen = []
    for agent in claimed:
        reason = difference(first, configurations[agent.run_id])
        if reason:
            print(f"gang: {agent.run_id} trains in a later gang ({reason})", flush=True)
        else:
            chosen.append(agent)
    conductor = Conductor(sweep.id)
    members = [Member(conductor, a.run_id, a.point, configurations[a.run_id], len(chosen)) for a in chosen]
    print(f"gang of {len(members)}: {', '.join(member.run_id for member in members)}", flush=True)
    done = threading.Event()
    heart = threading.Thread(target=keep_alive, args=(sweep, [a for a in agents if a.run_id], conductor, done))
    heart.start()
    try:
        conductor.conduct(members)
    finally:
        done.set()
        heart.join()
    for agent, member in zip(chosen, members, strict=True):
        agent.run_id = agent.point = None
        if isinstance(member.error, InputError):
            raise member.error
        if member.error:
            print(f"gang: {member.run_id} failed:", file=sys.stderr)
            traceback.print_exception(member.error)


def work(path: str, size: int) -> None:
    """Gangs until the sweep has no more configurations."""
    sweep = Sweep(path)
    agents = sweep.agents(size)
    while not all(agent.retired for agent in agents):
        for agent in agents:
            if not agent.run_id and not agent.retired:
                sweep.claim(agent)
        if claimed := [agent for agent in agents if agent.run_id]:
            train_gang(sweep, agents, claimed)
        else:
            time.sleep(HEARTBEAT_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gang", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="ENTITY/PROJECT/SWEEP")
    parser.add_argument("--size", default=4, type=int, help="configurations at once; default: %(default)s")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Under these W&B's client would give every run of this process the same id.
    for variable in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        os.environ.pop(variable, None)
    try:
        if options.sweep.count("/") != 2:
            raise InputError(f"{options.sweep!r}: give ENTITY/PROJECT/SWEEP, as `wandb sweep` prints it")
        entity, project, _ = options.sweep.split("/")
        os.environ.update(WANDB_ENTITY=entity, WANDB_PROJECT=project)
        work(options.sweep, options.size)
    except InputError as error:
        print(f"gang: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
