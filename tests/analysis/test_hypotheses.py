"""Where a hypothesis turns from confirmed to inconclusive to refuted."""

import math
from types import SimpleNamespace

import pytest

from analysis import hypotheses
from analysis.statistics import Spread


def row(rate: float, *classes: str, gain=None, steps=None, basin="in", excess=0.0, ends=(3.0, 3.0)) -> SimpleNamespace:
    """What a hypothesis reads of a rate: `gain` and its interval, `ends` the final and the best eval loss."""
    value, interval = gain or (None, None)
    verdicts = [SimpleNamespace(behaviour=name) for name in classes]
    runs = [SimpleNamespace(end=None) for _ in classes]
    final, best = (Spread(end, None, 2) for end in ends)
    return SimpleNamespace(
        learning_rate=rate, gain=value, gain_interval=interval, steps={0.8: steps}, verdicts=verdicts, basin=basin,
        excess=excess, excess_interval=None, final_eval=final, best_eval=best, runs=runs,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "steps", "verdict"),
    [
        ((0.5, (0.4, 0.89)), 101, "confirmed"),
        ((0.5, (0.4, 0.89)), math.inf, "confirmed"),
        ((0.5, (0.4, 0.89)), 100, "refuted"),  # twice the standard rate's steps: no slower than that
        ((0.5, (0.4, 0.90)), 101, "inconclusive"),
        ((0.95, (0.90, 0.99)), 101, "refuted"),
        ((0.95, (0.89, 0.99)), 101, "inconclusive"),
        ((0.5, None), 101, "inconclusive"),
        ((0.95, None), 101, "refuted"),
    ],
)
def test_a_very_low_rate_is_slow(gain, steps, verdict):
    found = hypotheses.very_low_is_slow([row(1e-5, gain=gain, steps=steps), row(2e-4, steps=50)], 200, 0.03)
    assert (found["verdict"], found["value"], found["interval"], found["n"]) == (verdict, *gain, 2)
    shown = "> 200" if steps == math.inf else steps
    assert found["evidence"].endswith(f"; {shown} steps to 80 %, 50 at 2e-4")
    assert found["claim"] == (
        "1e-5 is slow: below 0.9 of the best gain, and more than 2 × the steps of 2e-4 to 80 %, or never there"
    )
    low, standard = row(1e-5, gain=gain, steps=steps), row(2e-4, steps=50)
    for unknown in ([low], [standard], [row(1e-5, steps=9), standard], [low, row(2e-4)]):
        assert hypotheses.very_low_is_slow(unknown, 200, 0.03) is None


@pytest.mark.parametrize(
    ("standard", "verdict", "words"),
    [
        ({}, "confirmed", "diverged or unstable in 0 of 2 seeds; the lowest mean"),
        ({"excess": 0.01}, "confirmed", "0.010 nats above the best rate, no interval against a margin of 0.030"),
        ({"excess": 0.01, "basin": "undecided"}, "inconclusive", "0.010 nats above the best rate"),
        ({"excess": 0.1, "basin": "out"}, "refuted", "0.100 nats above the best rate"),
        ({"excess": None}, "refuted", "diverged or unstable in 0 of 2 seeds"),
        ({"ends": (3.0, 2.9949)}, "confirmed", "the lowest mean; its end lies 0.005 above its best checkpoints"),
        ({"ends": (3.0, 2.996)}, "confirmed", "the lowest mean"),
        ({"ends": (None, 2.9)}, "confirmed", "the lowest mean"),
    ],
)
def test_the_standard_rate_is_good(standard, verdict, words):
    found = hypotheses.standard_is_good([row(2e-4, "stable, good", "slow", **standard), row(1e-3)], 200, 0.03)
    assert found["verdict"] == verdict and words in found["evidence"] and found["n"] == 2
    assert ("checkpoints" in found["evidence"]) == ("checkpoints" in words)
    alone = hypotheses.standard_is_good([row(2e-4, "slow"), row(1e-3, excess=None)], 200, 0.03)
    assert alone["verdict"] == "inconclusive" and alone["evidence"].endswith("1 seed; the only rate that ended")
    for shaky in ("diverged", "unstable"):
        found = hypotheses.standard_is_good([row(2e-4, shaky, "slow"), row(1e-3)], 200, 0.03)
        assert found["verdict"] == "refuted" and found["evidence"].startswith("diverged or unstable in 1 of 2 seeds")
    assert hypotheses.standard_is_good([row(2e-4, "incomplete")], 200, 0.03) is None


@pytest.mark.parametrize(
    ("classes", "third", "fourth"),
    [
        (("diverged", "diverged"), "confirmed", "confirmed"),
        (("diverged", "slow"), "confirmed", "confirmed"),  # half is at least half
        (("unstable", "slow"), "confirmed", "refuted"),
        (("slow", "slow", "diverged"), "refuted", "refuted"),
        (("diverged", "incomplete"), "confirmed", "confirmed"),
    ],
)
def test_high_rates_are_unstable_or_diverge_in_half_of_the_seeds(classes, third, fourth):
    rates = [row(1e-3, *classes), row(5e-3, *classes)]
    found = [test(rates, 200, 0.03) for test in (hypotheses.high_is_unstable, hypotheses.very_high_diverges)]
    assert [one["verdict"] for one in found] == [third, fourth]
    assert {one["n"] for one in found} == {len(classes) - classes.count("incomplete")}
    told = hypotheses.very_high_diverges([row(5e-3, *["slow"] * 9, "diverged")], 200, 0.03)
    assert told["evidence"] == (
        "diverged in 1 of these 10 seeds; over other seeds the share may be 0.02 to 0.40, so half is excluded"
    )
    assert hypotheses.very_high_diverges([row(5e-3, "incomplete")], 200, 0.03) is None


@pytest.mark.parametrize(
    ("mean", "interval", "seeds", "verdict", "evidence"),
    [
        (-0.5, (-0.9, -0.1), 3, "confirmed", "-0.500 nats per token, 95 % [-0.900, -0.100], 3 seeds × 6 paired steps"),
        (-0.5, (-1.1, 0.1), 3, "inconclusive", "-0.500 nats per token, 95 % [-1.100, 0.100], 3 seeds × 6 paired steps"),
        (0.5, (0.1, 0.9), 3, "refuted", "+0.500 nats per token, 95 % [0.100, 0.900], 3 seeds × 6 paired steps"),
        (-0.031, None, 1, "confirmed", "-0.031 nats per token, against a margin of 0.030, 1 seed × 6 paired steps"),
        (-0.029, None, 1, "inconclusive", "-0.029 nats per token, against a margin of 0.030, 1 seed × 6 paired steps"),
        (0.031, None, 1, "refuted", "+0.031 nats per token, against a margin of 0.030, 1 seed × 6 paired steps"),
    ],
)
def test_a_high_rate_starts_fast(mean, interval, seeds, verdict, evidence, monkeypatch):
    found = SimpleNamespace(mean=mean, interval=interval, seeds=seeds, examples=6)
    asked = []
    monkeypatch.setattr(hypotheses, "paired_difference", lambda *arguments: asked.append(arguments) or found)
    told = hypotheses.high_starts_fast([row(2e-4), row(1e-3)], 100, 0.03)
    assert (told["verdict"], told["evidence"]) == (verdict, evidence)
    assert asked == [([], 5, 10)] and told["n"] == seeds
