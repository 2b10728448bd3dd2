"""Statistics against slow or known answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import statistics
from analysis.runs import Series, read_run
from tests.analysis import simulate

shares = st.lists(st.floats(0.0001, 1), min_size=1, max_size=8)


def runs_of(rates, seeds=3, **options):
    return {
        rate: [read_run(simulate.record(kind, rate, seed, **options)) for seed in range(seeds)]
        for rate, kind in rates.items()
    }


def comparison(loss, replicates=None, rates=(1e-5, 1e-4, 1e-3, 1e-2)):
    return statistics.Comparison(list(rates), [0], 1, 0, np.array(loss), 4.2, replicates, None, "", 0)


def test_bootstrap_of_examples_has_the_standard_error_of_a_mean():
    rng = np.random.default_rng(1)
    rows = rng.normal(3, 1, (1, 400))
    out = statistics.bootstrap(rows, np.ones(400), np.array([0]), np.array([0]))
    assert out.mean() == pytest.approx(rows.mean(), abs=0.01)
    assert out.std() == pytest.approx(rows.std() / 20, rel=0.05)


def test_bootstrap_equals_a_slow_one():
    """The same draws, one replicate at a time, straight from the definition."""
    rng = np.random.default_rng(2)
    rows, tokens = rng.uniform(1, 9, (4, 30)), rng.integers(1, 9, 30).astype(float)
    group, draw = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    fast = statistics.bootstrap(rows, tokens, group, draw, 5)
    rng = np.random.default_rng(0)
    seeds, examples = statistics.draws(rng, 5, 2), statistics.draws(rng, 5, 30)
    for b in range(5):
        for g in range(2):
            losses = [(rows[r] * examples[b]).sum() / (tokens * examples[b]).sum() for r in np.flatnonzero(group == g)]
            assert fast[b, g] == pytest.approx(np.average(losses, weights=seeds[b]))


def test_pairing_cancels_what_the_rates_share():
    rng = np.random.default_rng(3)
    shared = rng.normal(3, 1, (2, 300))
    rows = np.concatenate([shared, shared + 0.05])
    out = statistics.bootstrap(rows, np.ones(300), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert out[:, 1] - out[:, 0] == pytest.approx(0.05)
    apart = statistics.bootstrap(rows, np.ones(300), np.array([0, 0, 1, 1]), np.arange(4))
    assert (apart[:, 1] - apart[:, 0]).std() > 0.01


def test_bootstrap_is_deterministic_and_does_not_depend_on_the_chunks(monkeypatch):
    rows = np.random.default_rng(4).uniform(1, 2, (2, 50))
    arguments = (rows, np.ones(50), np.array([0, 1]), np.array([0, 0]), 200)
    assert (statistics.bootstrap(*arguments) == statistics.bootstrap(*arguments)).all()


def test_the_interval_covers_the_truth():
    """Coverage of the 95 % interval of a paired difference over examples, 200 simulated studies."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(200):
        first = rng.normal(3, 1, 200)
        rows = np.array([first, first + rng.normal(0.02, 0.3, 200)])
        out = statistics.bootstrap(rows, np.ones(200), np.array([0, 1]), np.array([0, 0]), 400)
        low, high = statistics.interval(out[:, 1] - out[:, 0])
        hits += low <= 0.02 <= high
    assert 0.90 <= hits / 200 <= 0.99


@given(shares)
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p):
    adjusted = statistics.holm(p)
    assert all(a >= b - 1e-12 and a <= 1 for a, b in zip(adjusted, p, strict=True))
    assert [adjusted[i] for i in np.argsort(p, kind="stable")] == sorted(adjusted)


def test_holm_of_a_textbook_case():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_wilson_of_a_known_case():
    assert statistics.wilson(1, 1) == pytest.approx((0.2065, 1.0), abs=1e-3)
    assert statistics.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)


@given(st.integers(0, 20), st.integers(1, 20))
def test_wilson_contains_the_share(count, n):
    low, high = statistics.wilson(min(count, n), n)
    assert 0 <= low <= min(count, n) / n + 1e-12 and min(count, n) / n <= high + 1e-12 and high <= 1


@given(st.floats(-4.5, -2.5), st.floats(0.01, 1))
def test_a_parabola_has_its_vertex(at, curvature):
    rates = [1e-5, 1e-4, 1e-3, 1e-2]
    found = statistics.optimum(comparison(3 + curvature * (np.log10(rates) - at) ** 2), [])
    if found["identified"]:
        assert math.log10(found["learning_rate"]) == pytest.approx(at)
    else:
        assert "edge" in found["reason"]


@pytest.mark.parametrize(
    ("loss", "infeasible", "reason"),
    [
        ([3, 2, 3, 4], [], None),
        ([2, 3, 4, 5], [], "edge of the feasible range"),
        ([5, 4, 3, 2], [], "edge of the feasible range"),
        ([5, 4, 3, 2], [3e-2], "right neighbour, 3e-2, diverged"),
        ([4, 2, 3, 5], [5e-4], "right neighbour, 5e-4, diverged"),
    ],
)
def test_the_quadratic_refuses(loss, infeasible, reason):
    found = statistics.optimum(comparison(loss), infeasible)
    assert found["identified"] is (reason is None)
    assert reason is None or reason in found["reason"]


def test_the_quadratic_refuses_two_points_and_a_noisy_valley():
    assert "three are needed" in statistics.optimum(comparison([2, 3], rates=(1e-4, 1e-3)), [])["reason"]
    noisy = np.random.default_rng(0).normal([3, 2.99, 3, 3.1], 0.2, (1000, 4))
    assert "replicates" in statistics.optimum(comparison([3, 2.99, 3, 3.1], noisy), [])["reason"]


def test_basin_verdicts():
    assert [statistics.basin_verdict(pair, 0.02) for pair in ((0, 0.01), (0.03, 0.05), (0.01, 0.03), None)] == [
        "in",
        "out",
        "undecided",
        "undecided",
    ]
    assert statistics.basin_width(2.0, 0.03) == 0.06 and statistics.basin_width(0.5, None) == 0.01


def test_sensitivity_counts_a_diverged_run_as_untrained():
    assert statistics.sensitivity([2.0, 3.0, math.nan, 9.0], 4.0, 2.0) == pytest.approx((2 + 3 + 4 + 4) / 4 - 2)


def test_comparison_pairs_the_seeds_that_all_rates_have():
    found = runs_of({1e-4: "good", 1e-3: "suboptimal"}, 3, planned=100, examples=40)
    found[1e-3].pop()
    c = statistics.compare(found)
    assert (c.seeds, c.n, c.left_out) == ([0, 1], 2, 1) and "2 seeds and 40 eval examples" in c.covers
    assert c.replicates.shape == (statistics.REPLICATES, 2)
    assert c.replicates.mean(0) == pytest.approx(c.loss, rel=0.02)


def test_one_seed_resamples_examples_only():
    c = statistics.compare(runs_of({1e-4: "good", 1e-3: "suboptimal"}, 1, planned=100, examples=40))
    assert c.covers == "40 eval examples, not seeds"


def test_without_examples_seeds_are_resampled_and_without_both_nothing():
    for seeds, covers in ((3, "3 seeds, not eval examples"), (1, "nothing")):
        found = runs_of({1e-4: "good", 1e-3: "suboptimal"}, seeds, planned=100, examples=5)
        for runs in found.values():
            for run in runs:
                run.eval_nll = None
        c = statistics.compare(found)
        assert c.covers.startswith(covers) and (c.replicates is None) == (seeds == 1)


def test_paired_difference_finds_a_shared_shift():
    step, noise = np.arange(1, 101), np.random.default_rng(0).normal(0, 0.5, (2, 100))
    pairs = [(Series(step, 3 + row - 0.1), Series(step, 3 + row)) for row in noise]
    found = statistics.paired_difference(pairs, 5, 10)
    assert found["mean"] == pytest.approx(-0.1) and found["interval"] == pytest.approx((-0.1, -0.1))
    assert (found["seeds"], found["steps"]) == (2, 6)
    assert statistics.paired_difference(pairs, 200, 300) is None


def test_infinite_steps_stay_in_quantiles():
    assert statistics.interval(np.array([1.0, 2.0, np.inf, np.inf])) == (1.0, np.inf)
