"""A gang that was interrupted goes on, as a gang or with train.py, equal to one that nobody interrupted."""

import json
import os
import re
import shutil
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import train
from gang.checkpoint import Checkpoints
from gang.loop import Gang, Loop
from gang.member import Member
from settings import parse
from tests.gang.test_gang import flags, rows
from tests.test_checkpoint import signals  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("offline")]

POINTS = [{"learning_rate": 2e-3, "seed": 0}, {"learning_rate": 1e-3, "seed": 1, "lora_r": 8, "lora_alpha": 24}]
NINE = ["--dataset_train_split", "train[:9]"]  # of two a step: the checkpoint lies within the second epoch


def gang(folder, *names: str) -> list[Member]:
    members = []
    for name, point in zip(names, POINTS, strict=True):
        words = flags(folder, *NINE, *(f"--{key}={value}" for key, value in point.items()), steps=8)
        members.append(Member(name, {key: {"value": value} for key, value in point.items()}, words))
    return members


def test_a_gang_goes_on_from_its_checkpoint(tmp_path, monkeypatch, signals, capsys):  # noqa: F811
    whole = gang(tmp_path / "whole", "whole0", "whole1")
    Loop("sweep").train(whole)
    said = re.findall(
        r"^gang: step (\S+) of 8: eval/loss \d+\.\d{3} \d+\.\d{3}$", capsys.readouterr().out, re.MULTILINE
    )
    assert said == [str(step) for step in sorted(train.evaluation_steps(8))]
    assert whole[0].trainer.first_batch_hash != whole[1].trainer.first_batch_hash
    for member in whole:
        member.trainer.generation_examples = whole[0].trainer.generation_examples
        answers = json.loads(Path(member.run.dir, "generations.json").read_text())
        assert answers == member.trainer.generate_answers()
    issue = Gang.issue

    def interrupted(gang, plan):
        if plan.number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        issue(gang, plan)

    monkeypatch.setattr(Gang, "issue", interrupted)
    with pytest.raises(SystemExit) as exit:
        Loop("sweep").train(gang(tmp_path / "parts", "lost0", "lost1"))
    assert exit.value.code == 143
    monkeypatch.setattr(Gang, "issue", issue)
    saved = sorted(path.parts[-2:] for path in (tmp_path / "parts").glob("adapters/*/*"))
    assert [(name.rpartition("-")[2], folder) for name, folder in saved] == [
        ("lost1", "checkpoint-6"), ("lost0", "checkpoint-6")
    ]  # fmt: skip
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    parts = gang(tmp_path / "parts", "new0", "new1")  # the same points, given to new runs of the sweep
    Loop("sweep").train(parts)
    for mine, other in zip(parts, whole, strict=True):
        assert mine.error is None and mine.start == 6
        assert [sorted(row) for row in rows(mine)] == [sorted(row) for row in rows(other)]
        for row, expected in zip(rows(mine), rows(other), strict=True):
            assert row == pytest.approx(expected, rel=1e-6), row["step"]
        assert mine.trainer.example_losses == other.trainer.example_losses
        assert mine.trainer.first_batch_hash == other.trainer.first_batch_hash
    assert not list((tmp_path / "parts").glob("adapters/*/checkpoint-*"))
    assert not list((tmp_path / "parts").glob("adapters/*lost*"))

    left = []
    leave = train.leave
    monkeypatch.setattr(train, "leave", lambda trainer, *more: (left.append(trainer), leave(trainer, *more)))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    words = gang(tmp_path / "alone", "lost0", "lost1")[1].flags
    train.train(*parse(words), POINTS[1])
    same = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "total_flos")
    mine, other = left[0].state, whole[1].trainer.state
    assert [getattr(mine, name) for name in same] == [getattr(other, name) for name in same]
    for row, expected in zip(rows(SimpleNamespace(trainer=left[0])), rows(whole[1]), strict=True):
        assert row == pytest.approx(expected, rel=1e-5), row["step"]


def test_checkpoints_are_written_one_at_a_time_and_not_of_those_that_ended(monkeypatch):
    saved, tasks, calls = [], [], []
    monkeypatch.setattr("gang.checkpoint.save", lambda member, number, stack, place, _: saved.append((number, place)))
    monkeypatch.setattr(checkpoint, "SECONDS", -1.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    stack = SimpleNamespace(values=torch.ones(2), first=torch.ones(2), second=torch.ones(2))
    gang = SimpleNamespace(
        step=SimpleNamespace(stack=stack), rows=[0, 2], last_step=5, mind=lambda member: nullcontext(),
        members=[SimpleNamespace(ended=False), None, SimpleNamespace(ended=True)],
        flush=lambda: calls.append("flush"), settle=lambda: calls.append("settle"),
        submit=lambda task, *arguments: tasks.append(partial(task, *arguments)),
    )  # fmt: skip
    subject = Checkpoints(gang)
    for number in (1, 2, 3, 4, 5):
        subject.after(number)
        if number in (2, 4):
            tasks.pop()()
    assert saved == [(1, 0), (3, 0)] and tasks == []  # while one is written none is begun, nor one at the end
    monkeypatch.setattr(checkpoint.interruption, "code", 143)
    subject.after(5)  # in the last step it comes to its end
    with pytest.raises(SystemExit, match="143"):
        subject.after(4)
    tasks.pop()()
    assert saved[2:] == [(4, 0)] and calls == ["flush"] * 3 + ["settle"]
