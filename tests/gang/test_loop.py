"""gang/loop.py: what is written of the steps, in which order, and what is said where memory ran out."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy
import pytest
import torch

from gang import loop
from gang.loop import AHEAD, Gang, Loop, Result, ahead
from gang.member import Member

ERROR = "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB free. More"


@pytest.mark.parametrize(
    ("members", "step", "mode", "said"),
    [(1, None, True, "; two fit"), (1, True, True, "; two fit"), (1, False, False, "; two fit"), (2, True, None, "")],
)
def test_a_member_alone_is_told_what_would_fit(members, step, mode, said, monkeypatch):
    modes = []
    monkeypatch.setattr(loop, "fitting", lambda trainer: "two fit")
    trainer = SimpleNamespace(model=SimpleNamespace(train=modes.append))
    gang = SimpleNamespace(step=None if step is None else SimpleNamespace(model=SimpleNamespace(training=step)))
    subject = Loop()
    subject.members = [SimpleNamespace(trainer=trainer)] * members
    for each in (gang, *([None] if step is None else [])):  # none at all where the base did not fit
        error = subject.too_large(each, torch.OutOfMemoryError(ERROR))
        assert str(error) == f"Tried to allocate 2 GiB. GPU 0 has 1 GiB free{said}"
    assert gang.step is None and set(modes) == ({mode} if said else set())
    subject.members = [SimpleNamespace(trainer=None)]
    assert str(subject.too_large(None, torch.OutOfMemoryError(ERROR))).endswith("1 GiB free")


def test_a_rows_first_token_is_not_scored():
    assert [loop.scored_tokens(labels) for labels in ([5], [5, 6], [5, -100, 6], [-100, 5, 6])] == [0, 1, 1, 2]


class Recorder(Member):
    """A member that keeps what it is to log."""

    def __init__(self, name: str, diverged_at: int | None = None, error: Exception | None = None):
        super().__init__(name, {}, [])
        self.watch, self.error, self.logged = SimpleNamespace(diverged_at_step=diverged_at), error, []
        self.trainer = SimpleNamespace(state=SimpleNamespace(global_step=diverged_at))

    def log_step(self, plan, index, losses, seconds):
        self.logged.append((plan.number, index, losses.tolist(), seconds))

    def log_evaluation(self, scores, tokens, sizes, seconds):
        self.logged.append((scores.tolist(), sizes["update_ratio"], seconds))


def gang(*members: Member) -> Gang:
    found = object.__new__(Gang)
    found.members, found.seconds, found.evaluated = list(members), {"steps": 1.0, "writing": 0.0, "evaluations": 1.0}, 0
    found.pending = deque()
    return found


def result(*arrays) -> SimpleNamespace:
    return SimpleNamespace(arrays=lambda: [numpy.array(array) for array in arrays], seconds_since=lambda before: 6.0)


def test_each_member_logs_its_own_losses_until_it_ends():
    """Of a gang whose second member has left; two steps, of two micro-batches and of one."""
    well, ill, broken = Recorder("a"), Recorder("c", diverged_at=1), Recorder("d", error=ValueError("no"))
    subject = gang(well, Recorder("b"), ill, broken)
    done = [SimpleNamespace(number=1, batches=[0, 0]), SimpleNamespace(number=2, batches=[0])]
    losses = [[[10 * part + place] for place in range(3)] for part in range(3)]
    subject.write_steps(done, [0, 2, 3], result(losses), None)
    assert well.logged == [(1, 0, [[0], [10]], 3.0), (2, 0, [[20]], 3.0)]
    assert ill.logged == broken.logged == [] and subject.seconds["steps"] == 7.0

    ill, late = Recorder("b", diverged_at=1), Recorder("c", diverged_at=2)
    subject = gang(well, ill, late, broken)
    subject.last_step, subject.shared = 4, SimpleNamespace(tokens=numpy.array([3, 5]))
    subject.first = SimpleNamespace(trainer=SimpleNamespace(weight_squares={"x": 3.0, "y": 1.0}))
    scores = [[[place, 1.0], [8.0, 2.0]] for place in range(4)]
    squares = [[[4.0 * (place + 1), 1.0]] for place in range(4)]
    well.logged.clear()
    subject.write_evaluation(2, [0, 1, 2, 3], result(scores, squares), None)
    assert well.logged == [(scores[0], 1.0, 6.0)] and late.logged == [(scores[2], 3.0**0.5, 6.0)]
    assert ill.logged == broken.logged == [] and (subject.seconds["evaluations"], subject.evaluated) == (7.0, 1)


def test_what_goes_wrong_with_a_record_ends_its_member_alone():
    broken, well = Recorder("a"), Recorder("b")
    broken.log_step = None
    gang(broken, well).write_steps([SimpleNamespace(number=1, batches=[0])], [0, 1], result([[[0], [1]]]), None)
    assert isinstance(broken.error, TypeError) and well.error is None and len(well.logged) == 1


def test_the_writer_has_two_tasks_at_most_and_keeps_their_order():
    subject, done = gang(), []
    with ThreadPoolExecutor(1) as subject.writer:
        for number in range(5):
            subject.submit(done.append, number)
            assert len(subject.pending) == min(2, number + 1)
        subject.settle()
    assert done == [0, 1, 2, 3, 4] and not subject.pending


@pytest.mark.parametrize(("error", "flushed"), [(SystemExit(143), 1), (ValueError("no"), 0)])
def test_a_device_that_has_failed_is_not_asked_for_more(error, flushed):
    subject, asked = gang(), []
    subject.flush = lambda: asked.append(1)
    subject.stop(error)
    assert len(asked) == flushed


@pytest.mark.parametrize("gpu", [False, True])
def test_results_are_as_far_apart_as_their_times(gpu, monkeypatch):
    """By the host's clock in seconds, or a GPU's in milliseconds."""
    times = iter([1.0, 3.5])

    class Event:
        def __init__(self, enable_timing, blocking):
            assert enable_timing and blocking

        def record(self):
            self.time = 1000 * next(times)

        def elapsed_time(self, other):
            return other.time - self.time

        def synchronize(self):
            self.done = True

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(loop.time, "monotonic", lambda: None if gpu else next(times))
    first, second = Result(torch.ones(2)), Result(torch.zeros(1), torch.ones(1))
    assert second.seconds_since(first) == 2.5 and [array.tolist() for array in second.arrays()] == [[0], [1]]
    assert not gpu or second.event.done


def test_plans_are_made_ahead_in_their_order():
    made = []
    stream = ahead(made.append(number) or number for number in range(1, 9))
    assert next(stream) == 1
    rest = list(stream)
    assert rest == list(range(2, 9)) and made == [1, *rest] and AHEAD > 1
