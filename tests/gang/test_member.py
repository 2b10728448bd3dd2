"""gang/member.py: the batches that a member's trainer would take, and how its run ends."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gang import member
from gang.member import Member
from inputs import InputError
from memory import OutOfMemory

ROOT = Path(__file__).parent.parent.parent


def test_batches_are_those_of_a_trainer_epoch_after_epoch():
    """Two epochs of three batches, two a step: the second step of each has what is left."""
    rows = [{"labels": torch.tensor([[-100, 1, 1], [1, -100, 1]])}, {"labels": torch.tensor([[1, -100, 1]])}]
    subject, epochs, counted = Member("r", {}, []), [], iter([8, 2, None, None])
    subject.training = SimpleNamespace(gradient_accumulation_steps=2)
    subject.updates_per_epoch, subject.batches_per_epoch = 2, 3
    subject.trainer = SimpleNamespace(
        get_batch_samples=lambda batches, count, device: ([next(batches) for _ in range(count)], next(counted))
    )

    class Loader(list):
        set_epoch = epochs.append

    subject.loader = Loader([*rows, rows[0]])
    stream = subject.batches()
    found = [next(stream) for _ in range(4)]
    assert [epoch for epoch, _, _ in found] == pytest.approx([2 / 3, 1, 1 + 2 / 3, 2])
    assert [batches for _, batches, _ in found] == [rows, rows[:1], rows, rows[:1]] and epochs == [0, 1]
    # Where the trainer counts no tokens, the mean of the micro-batches' means.
    assert [items for _, _, items in found] == [[8.0, 8.0], [2.0], [6.0, 2.0], [3.0]]


def test_flags_are_read_once_unless_they_are_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    subject = Member("r", {"seed": {"value": 1}}, ["--config", "recipes/starter.yaml", "--seed", "1"])
    subject.configure(None)
    training = subject.training
    subject.configure(None)
    assert subject.training is training and training.seed == 1
    refused = Member("r", {}, ["--lerning_rate", "1e-3"])
    for _ in range(2):
        with pytest.raises(InputError, match="learning_rate"):
            refused.configure(None)


def ended(error: BaseException | None, stopped: bool = False) -> tuple[Member, list]:
    """A member whose training is over, and what is done with its run when it is closed."""
    subject, done = Member("r", {}, []), []
    subject.error, subject.stopped = error, stopped
    finish = {"mark_preempting": lambda: done.append("preempted"), "finish": lambda exit_code: done.append(exit_code)}
    subject.run = SimpleNamespace(summary={}, **finish)
    subject.keeper = SimpleNamespace(remove=lambda: done.append("removed"))
    return subject, done


@pytest.mark.parametrize(
    ("error", "stopped", "expected"),
    [(ValueError("its disk"), False, [1]), (OutOfMemory("no"), False, [1]), (SystemExit(143), True, [1]),
     (SystemExit(143), False, ["preempted", 1]), (KeyboardInterrupt(), False, ["preempted", 1])],
)  # fmt: skip
def test_a_run_that_ends_before_its_time_says_how(error, stopped, expected):
    subject, done = ended(error, stopped)
    subject.close()
    assert done == expected
    assert subject.run.summary == ({"out_of_memory": "no"} if isinstance(error, OutOfMemory) else {})
    subject.run = None
    subject.close()
    assert done == expected


@pytest.mark.parametrize(("diverged_at", "fails"), [(None, False), (3, False), (None, True)])
def test_a_run_that_comes_to_its_end_leaves_what_it_has(diverged_at, fails, monkeypatch):
    subject, done = ended(None)
    left, logged, state = [], [], SimpleNamespace(global_step=4, max_steps=8, total_flos=7.0)
    handler = SimpleNamespace(on_train_end=lambda *_: None)
    subject.trainer = SimpleNamespace(state=state, control=None, log=logged.append, callback_handler=handler)
    subject.samples, subject.begun, subject.training = 16, member.time.time() - 10, None
    subject.resumed = SimpleNamespace(step=2)
    subject.watch = SimpleNamespace(diverged_at_step=diverged_at)

    def leave(trainer, watch, answers):
        if fails:
            raise OSError("its disk")
        left.append(answers)

    monkeypatch.setattr(member.train, "leave", leave)
    subject.close([{"prompt": "a"}])
    assert left == ([] if fails else [None if diverged_at else [{"prompt": "a"}]])
    assert done == ([1] if fails else [0, "removed"]) and isinstance(subject.error, OSError) == fails
    (row,) = logged
    assert row["total_flos"] == 7.0 and row["train_loss"] is None
    seconds = row["train_runtime"]  # of two steps, and a quarter of the samples
    assert row["train_steps_per_second"] == pytest.approx(2 / seconds, abs=2e-3)
    assert row["train_samples_per_second"] == pytest.approx(4 / seconds, abs=2e-3)
