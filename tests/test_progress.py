"""progress.py: what is shown of runs in each state."""

import time

import pytest

from progress import Progress, ended, label, phase, varied

KEYS = ["learning_rate"]


def run(rate: float, state: str = "running", step: float | None = None, steps: float | None = 100, **more) -> dict:
    config = {"learning_rate": rate, "seed": 0}
    rest = {"id": str(rate), "name": "x", "config": config, "loss": step and 1 / step, "diverged": None}
    return rest | {"state": state, "step": step, "steps": steps} | more


def test_what_varies_names_a_run():
    values = {"learning_rate": {"values": [1, 2]}, "seed": {"value": 0}, "lora_r": {"min": 1}}
    assert varied({"parameters": values}) == ["learning_rate", "lora_r"]
    assert label(run(0.1), KEYS) == "learning_rate=0.1"
    assert label(run(0.1), []) == "x"


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (run(1, "pending"), "starting"),
        (run(1, steps=None), "starting"),
        (run(1, step=3, steps=None), "training"),
        (run(1, step=99), "training"),
        (run(1, step=100), "uploading"),
        (run(1, "finished", step=100), "finished"),
        (run(1, "failed", step=7), "failed"),
        (run(1, "finished", step=7, diverged=7.0), "diverged at step 7"),
    ],
)
def test_the_phases_of_a_run(of, expected):
    assert phase(of) == expected


def test_how_a_run_ended():
    assert ended(run(1, "crashed", step=4)) == "crashed, step 4 of 100, loss 0.250"
    assert ended(run(1, "failed")) == "failed"
    assert ended(run(1, "running", step=4)) == "lost, step 4 of 100, loss 0.250"


def test_the_line_of_each_run_and_the_time_left(monkeypatch):
    now = iter([0.0, 100.0])
    monkeypatch.setattr("progress.time.monotonic", lambda: next(now))
    progress = Progress(4, KEYS)
    four = [run(rate, step=10) for rate in (1e-5, 2e-4, 1e-3, 5e-3)]
    assert progress.table(four)[1] == "learning_rate=0.0002  step 10 of 100     loss  0.100  training"
    assert progress.summary(four) == "0 of 4 runs done"  # one look tells no pace
    later = [run(5e-3, "finished", step=2, diverged=2.0), *(run(rate, step=60) for rate in (1e-5, 2e-4, 1e-3))]
    # Of 4 runs, 0.4 were done at first and 2.8 after 100 s.
    assert progress.summary(later) == "1 of 4 runs done · about 50 s left"


def test_what_is_waited_for_at_both_ends():
    progress = Progress(2, KEYS)
    assert progress.summary([]) == "0 of 2 runs done · starting"
    assert progress.summary([run(1, "pending")]) == "0 of 2 runs done · starting"
    assert progress.summary([run(1, "finished", step=100)]) == "1 of 2 runs done · starting"
    assert progress.summary([run(1, "finished"), run(2, step=100)]) == "1 of 2 runs done · uploading the last results"
    assert progress.summary([run(1, step=100), run(2, step=100)]) == "0 of 2 runs done · uploading the last results"
    assert progress.summary([run(1, "finished"), run(2, "crashed")]) == "1 of 2 runs done · starting"
    assert progress.summary([run(1, "finished"), run(2, "failed")]) == "2 of 2 runs done · the agents are ending"
    assert progress.summary(None) == "the server does not answer just now; the runs go on"


def test_a_log_is_told_each_end_once(capsys, monkeypatch):
    progress = Progress(2, KEYS)
    monkeypatch.setattr("progress.LINE_SECONDS", 1e9)
    progress.printed = time.monotonic()
    for _ in range(2):
        progress.show([run(0.1, "finished", step=100), run(0.2, step=3)])
    progress.close([run(0.1, "finished", step=100), run(0.2, step=3)])
    assert capsys.readouterr().out == "learning_rate=0.1: finished, step 100 of 100, loss 0.010\n"


def test_a_terminal_is_drawn_over_and_never_overflows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "4")
    progress = Progress(9, KEYS)
    progress.terminal = True
    progress.show([run(rate, step=3) for rate in range(9)])
    progress.show([run(0, step=4)])
    first, second = capsys.readouterr().out.split("\033[3A\r\033[J")
    assert len(first.splitlines()) == 3 and max(map(len, first.splitlines())) < 30
    assert second.splitlines()[-1].startswith("0 of 9 runs done")
