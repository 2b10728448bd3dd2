"""recipes/slurm.sh on a cluster of one node: a task that is told to end is queued again, and its run goes on."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import yaml

from tests.test_faults import processes_in, wait

ROOT = Path(__file__).parent.parent
CLUSTER = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
NodeName=localhost CPUs=2
PartitionName=all Nodes=localhost Default=YES State=UP
"""

pytestmark = pytest.mark.skipif(not shutil.which("slurmctld"), reason="needs Slurm: apt-get install slurm-wlm")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


@pytest.fixture
def cluster(tmp_path):
    """The environment in which Slurm's commands find a cluster of one node."""
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    ports = free_port(), free_port()
    (folder / "slurm.conf").write_text(CLUSTER.format(ports=ports, user=user, folder=folder))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons = []
    for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
        with open(folder / f"{command[0]}.log", "w") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(120)


def test_a_task_that_reaches_its_time_limit_goes_on(cluster, server, checkout, api):
    """SIGTERM to the batch script, which --signal=B:TERM@120 has Slurm send 120 s before the limit."""
    (checkout / ".venv").symlink_to(sys.prefix)
    recipe = yaml.safe_load((ROOT / "recipes/starter.yaml").read_text())
    recipe |= {"max_steps": 12, "per_device_train_batch_size": 2}
    recipe |= {"dataset_train_split": "train[:64]", "dataset_test_split": "test[:8]"}
    (checkout / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["${env}", "python", "train.py", "--config", "recipe.yaml", "${args}"]
    sweep = {"program": "train.py", "method": "grid", "command": command}
    sweep["parameters"] = {"learning_rate": {"values": [1.0e-3]}}
    path = f"local/slurm/{wandb.sweep(sweep, project='slurm')}"

    def run(*words: str) -> str:
        result = server.run(*words, cwd=checkout, env={"WANDB_DIR": str(checkout)} | cluster)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    def state() -> str:
        return run("squeue", "--noheader", "--format=%T").strip()

    wait(lambda: "idle" in run("sinfo", "--noheader", "--format=%T"))
    job = re.search(r"job (\d+)", run("sbatch", "--gres=none", "--array=0", "recipes/slurm.sh", path))[1]
    log = checkout / f"slurm-{job}_0.log"
    wait(lambda: log.exists() and "eval_loss" in log.read_text())
    run("scancel", "--batch", f"--signal={signal.SIGTERM.name[3:]}", job)
    wait(lambda: state() == "PENDING")
    # What is queued again waits two minutes, so that no node takes it for the job that has just ended there: that is
    # told apart by the second.
    run("scontrol", "update", f"job={job}", "StartTime=now+2")
    wait(lambda: not state(), 300)
    (only,) = wandb.Api().sweep(path).runs
    assert only.state == "finished" and "goes on after step" in log.read_text(), log.read_text()
    steps = [row["train/global_step"] for row in only.scan_history() if "train/loss" in row]
    assert steps == list(range(1, 13))
    assert "Restarts=1" in run("scontrol", "show", "job", job)
    assert not processes_in(checkout)
