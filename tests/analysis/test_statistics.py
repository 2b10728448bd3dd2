"""Statistics against slow, known or simulated answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import rates, statistics
from analysis.runs import Checkpoint, Series, read_run
from tests.analysis import calibrate, simulate


def runs_of(kinds, seeds=3, **options):
    return {
        rate: [read_run(simulate.record(kind, rate, seed, **options)) for seed in range(seeds)]
        for rate, kind in kinds.items()
    }


def ends(losses, rows=None):
    return {seed: Checkpoint(100, loss, None if rows is None else rows[seed]) for seed, loss in enumerate(losses)}


def test_the_clustered_variance_of_alone_standing_examples_is_that_of_a_mean():
    rng = np.random.default_rng(1)
    nll = rng.normal(3, 1, 400)
    variance, freedom = statistics.clustered(nll, np.ones(400), None)
    assert variance == pytest.approx(nll.var(ddof=1) / 400) and freedom == pytest.approx(399)


def test_the_clustered_variance_is_that_of_the_clusters():
    """Each example five times over is worth one example, not five."""
    rng = np.random.default_rng(2)
    nll, tokens = rng.normal(30, 9, 60), rng.integers(5, 20, 60).astype(float)
    alone = statistics.clustered(nll, tokens, None)
    fivefold = statistics.clustered(np.repeat(nll, 5), np.repeat(tokens, 5), np.repeat(np.arange(60), 5))
    assert fivefold == pytest.approx(alone)
    assert statistics.clustered(np.repeat(nll, 5), np.repeat(tokens, 5), None)[0] == pytest.approx(
        alone[0] / 5, rel=0.03
    )


def test_a_few_large_clusters_leave_few_degrees_of_freedom():
    tokens = np.array([100.0, 100.0, *[1.0] * 50])
    assert statistics.clustered(tokens * 2, tokens, np.arange(52))[1] < 2.5


def test_one_cluster_tells_no_error():
    assert math.isnan(statistics.clustered(np.ones(5), np.ones(5), np.zeros(5, int))[0])


def test_a_spread_is_of_what_is_there():
    assert statistics.spread([None, 1.0, 3.0, math.nan, math.inf, 1e100]) == statistics.Spread(2.0, math.sqrt(2), 2)
    assert statistics.spread([1.0]) == statistics.Spread(1.0, None, 1)
    assert statistics.spread([None]) == statistics.Spread(None, None, 0)


def test_an_interval_adds_up_its_errors_by_welch():
    about = {"seeds": 3, "examples": 9, "clusters": 4}
    assert statistics.with_interval(1.0, [], **about).interval is None
    assert statistics.with_interval(1.0, [(math.nan, 2.0)], **about).interval is None
    assert statistics.with_interval(1.0, [(0.0, 2.0)], **about).interval == (1.0, 1.0)
    found = statistics.with_interval(1.0, [(0.03, 2.0), (0.01, 8.0)], **about)
    half = 2.959 * 0.2  # t of 97.5 % at 0.04²/(0.03²/2 + 0.01²/8) = 3.459 degrees of freedom
    assert found.interval == pytest.approx((1 - half, 1 + half), rel=2e-3) and found.covers == "3 seeds and 4 modules"
    assert statistics.over_seeds(np.array([1.0, 2.0, 3.0])) == [(pytest.approx(1 / 3), 2.0)]
    assert statistics.over_seeds(np.array([1.0])) == []


def test_what_an_estimate_covers():
    def covers(*about):
        return statistics.Estimate(1.0, None, *about).covers

    assert [covers(1, 0, 0), covers(2, 0, 0), covers(1, 9, 9)] == ["nothing", "2 seeds", "9 examples"]
    assert [covers(1, 9, 8), covers(2, 9, 0)] == ["8 modules", "2 seeds and 9 examples"]
    tokens, rows = np.array([1.0, 2.0, 3.0]), [np.array([1.0, 2.0, 4.0])]
    assert len(statistics.over_examples(rows, tokens, None)) == 1
    for unknown in ([rows, None], [[], tokens], [[None], tokens], [[rows[0][:2]], tokens]):
        assert statistics.over_examples(*unknown, None) == []
    assert statistics.over_examples(rows, tokens, np.zeros(3, int)) == []  # one module tells no error
    assert statistics.covered(2, [1], tokens, np.array([0, 0, 1])) == {"seeds": 2, "examples": 3, "clusters": 2}
    assert statistics.covered(2, [], tokens, np.array([0, 0, 1])) == {"seeds": 2, "examples": 0, "clusters": 0}


def test_no_runs_have_no_level():
    assert statistics.level({}, None, None) is None and statistics.difference({}, ends([1.0]), None, None) is None


def test_seeds_alone_give_students_interval():
    found = statistics.level(ends([1.0, 2.0, 3.0]), None, None)
    half = 4.302653 / math.sqrt(3)  # t of 97.5 % at 2 degrees of freedom, sd 1
    assert found.mean == 2 and found.interval == pytest.approx((2 - half, 2 + half)) and found.covers == "3 seeds"


def test_three_tiny_differences_of_one_sign_are_no_certainty_once_examples_count():
    rng = np.random.default_rng(3)
    tokens = np.full(300, 12.0)
    base = rng.normal(36, 9, (3, 300))
    other = base + rng.normal(0, 3, 300) + 0.0001 * 12
    a, b = (ends([row.sum() / tokens.sum() for row in rows], rows) for rows in (other, base))
    low, high = statistics.difference(a, b, tokens, None).interval
    assert low < 0 < high


def test_pairing_cancels_what_the_seeds_share():
    paired = statistics.difference(ends([3.1, 3.3, 3.6]), ends([3.0, 3.2, 3.5]), None, None)
    assert paired.mean == pytest.approx(0.1) and paired.interval[1] - paired.interval[0] < 1e-6
    apart = {seed + 10: end for seed, end in ends([3.1, 3.3, 3.6]).items()}
    unpaired = statistics.difference(apart, ends([3.0, 3.2, 3.5]), None, None)
    assert not unpaired.paired and unpaired.interval[0] < 0


def test_rates_are_compared_by_the_seeds_that_both_have():
    found = statistics.difference(ends([3.1, 3.3, 9.0]), ends([3.0, 3.2]), None, None)
    assert (found.seeds, found.mean) == (2, pytest.approx(0.1))


def test_one_seed_covers_the_examples_only_and_without_them_nothing():
    tokens = np.full(50, 10.0)
    rows = np.random.default_rng(4).normal(30, 5, (1, 50))
    assert statistics.level(ends([3.0], rows), tokens, None).covers == "50 examples"
    assert statistics.level(ends([3.0]), None, None).interval is None


@pytest.mark.parametrize("case", calibrate.COVERAGE, ids=str)
def test_the_interval_covers_the_truth(case):
    """Coverage of the 95 % interval, the truth being that of all seeds and all modules: at least 0.93."""
    assert calibrate.coverage(*case, calibrate.STUDIES) >= 0.93


def test_clusters_that_are_taken_as_independent_cover_too_little():
    """What the modules are recorded for."""
    assert calibrate.coverage(3, calibrate.MODULES, 0.0, 0.08, 500, told=False) < 0.85


def test_wilson_of_a_known_case():
    assert statistics.wilson(1, 1) == pytest.approx((0.2065, 1.0), abs=1e-3)
    assert statistics.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)


@given(st.integers(0, 20), st.integers(1, 20))
def test_wilson_contains_the_share(count, n):
    low, high = statistics.wilson(min(count, n), n)
    assert 0 <= low <= min(count, n) / n + 1e-12 and min(count, n) / n <= high + 1e-12 and high <= 1


def test_rates_and_seeds_are_told_apart():
    """Where every rate has every seed the plain means; else a rate that lacks a hard seed is not the better for it."""
    whole = [{0: 3.0, 1: 3.4}, {0: 3.1, 1: 3.7}]
    means, residuals, freedom = statistics.rates_and_seeds(whole)
    assert means == pytest.approx([3.2, 3.4]) and freedom == 1
    assert residuals == pytest.approx([0.05, -0.05, -0.05, 0.05])
    means, residuals, freedom = statistics.rates_and_seeds([{0: 3.0, 1: 3.4}, {0: 2.9}])
    assert means == pytest.approx([3.2, 3.1], abs=1e-6) and residuals == pytest.approx([0] * 3, abs=1e-6)
    assert freedom == 0
    means, _, _ = statistics.rates_and_seeds([{0: 3.0, 1: 3.4}, {2: 2.9, 3: 3.0, 4: 3.1}])  # no seed in common
    assert means == pytest.approx([3.2, 3.0], abs=1e-6)


def test_the_best_rate_by_budget_falls_with_it():
    step = np.array([0, 10, 100])
    curves = {
        1e-4: Series(step, [4.0, 3.9, 3.0]),
        1e-3: Series(step, [4.0, 3.2, 3.1]),
        1e-2: Series(step, [4.0, 3.5, 5]),
    }
    curves = {rate: Series(series.step, np.array(series.value)) for rate, series in curves.items()}
    first, last = statistics.best_by_budget(curves, 0.2)
    assert (first["step"], first["best_rate"], first["within"]) == (10, 1e-3, [1e-3])
    assert 1e-3 < first["between"] < 1e-2
    assert (last["best_rate"], last["within"], last["between"]) == (1e-4, [1e-4, 1e-3], None)


def test_the_band_of_a_budget_is_where_its_parabola_is_less_than_the_width_above_its_vertex():
    def band(reach):
        losses = {rate: 3 + math.log10(rate / 1e-3) ** 2 for rate in (1e-4, 1e-3, 1e-2)}
        (found,) = statistics.best_by_budget(
            {r: Series(np.array([9]), np.array([x])) for r, x in losses.items()}, reach
        )
        return found["band"]

    assert band(0.25) == pytest.approx([10**-3.5, 10**-2.5])
    assert band(4.0) == [1e-4, 1e-2]  # no further than the neighbours


def test_basin_verdicts():
    assert [statistics.basin_verdict(pair, 0.02) for pair in ((0, 0.01), (0.03, 0.05), (0.01, 0.03), None)] == [
        "in",
        "out",
        "undecided",
        "undecided",
    ]
    assert statistics.basin_width(2.0, 0.03) == 0.06 and statistics.basin_width(0.5, None) == 0.01


def test_the_excess_is_over_whichever_rate_is_best():
    pairs = {
        (i, j): statistics.Estimate(gap, (gap - 0.1, gap + 0.1), 3, 0, 0)
        for i, j, gap in ((0, 1, 0.05), (1, 0, -0.05), (0, 2, -1.0), (2, 0, 1.0), (1, 2, -1.05), (2, 1, 1.05))
    }
    assert statistics.excess(0, pairs, 3) == pytest.approx((0, 0.15))
    assert statistics.excess(1, pairs, 3) == pytest.approx((0, 0.05))
    assert statistics.excess(2, pairs, 3) == pytest.approx((0.95, 1.15))


def test_the_median_steps_to_a_target_keep_a_miss():
    def steps(*falls):
        """Runs that fall from 4 by so much in 100 steps."""
        step = np.array([0, 100])
        return [{"eval/loss": Series(step, np.array([4.0, 4.0 - fall]))} for fall in falls]

    assert (
        rates.median_steps(steps(2.0), 4.0, 3.0, 0.5) == 25
        and rates.median_steps(steps(1.0, 2.0), 4.0, 3.0, 0.5) == 37.5
    )
    assert rates.median_steps(steps(1.0, 2.0, 0.1), 4.0, 3.0, 0.5) == 50
    assert rates.median_steps(steps(1.0, 0.1), 4.0, 3.0, 0.5) == math.inf
    for base, best in ((None, 3.0), (4.0, None), (3.0, 3.0)):
        assert rates.median_steps(steps(1.0), base, best, 0.5) is None
    assert rates.median_steps([], 4.0, 3.0, 0.5) is None


def test_a_mean_curve_has_the_steps_that_all_have():
    a, b = Series(np.array([0, 5, 10]), np.array([4.0, 3.0, 2.0])), Series(np.array([0, 10]), np.array([2.0, 1.0]))
    found = rates.mean_series([a, b])
    assert found.step.tolist() == [0, 10] and found.value.tolist() == [3.0, 1.5]
    assert len(rates.mean_curve([])) == 0 and len(rates.mean_series([a, Series(np.array([7]), np.array([1.0]))])) == 0


def test_early_steps_are_compared_by_seed():
    step = np.arange(1, 21)
    pairs = [(Series(step, 3.0 - 0.1 * (step < 11) + 0.001 * seed), Series(step, 3.0 + 0 * step)) for seed in range(3)]
    found = statistics.paired_difference(pairs, 5, 10)
    assert found.mean == pytest.approx(-0.099) and found.seeds == 3 and found.interval[1] < 0
    half = 4.302653 * 0.001 / math.sqrt(3)  # t of 97.5 % at 2 degrees of freedom
    assert found.interval == pytest.approx((found.mean - half, found.mean + half))
    noisy = [(Series(step, a.value + 0.1 * np.sin(step)), b) for a, b in pairs]  # steps that vary tell no error
    again = statistics.paired_difference(noisy, 5, 10)
    assert again.interval[1] - again.interval[0] == pytest.approx(2 * half)
    assert statistics.paired_difference(noisy[:1], 5, 10).interval is None
    assert statistics.paired_difference(pairs, 50, 60) is None


def test_a_difference_is_that_of_the_means_where_seeds_are_missing():
    """The third rate lacks two seeds; by its one seed alone it would be 0.10 above the first, not 0.15."""
    shifts = {1e-4: (0.0, 0.0, 0.0), 2e-4: (-0.1, 0.05, 0.05), 4e-4: (0.1,)}
    found = {
        rate: [read_run(simulate.record("good", rate, 0, shift=x) | {"id": f"{rate}{x}"}) for x in of]
        for rate, of in shifts.items()
    }
    for runs in found.values():
        for seed, run in enumerate(runs):
            run.config["seed"] = seed
    c = rates.compare(found)
    assert c.loss - c.loss[0] == pytest.approx([0, 0, 0.15], abs=1e-6)
    assert c.pairs[2, 0].mean == pytest.approx(0.15, abs=1e-6)
    low, high = c.pairs[2, 0].interval
    assert low + high == pytest.approx(0.3, abs=1e-6)


def test_a_comparison_has_all_pairs_and_says_what_it_covers():
    found = runs_of({1e-4: "good", 1e-3: "suboptimal"}, 3, planned=100, examples=40)
    found[1e-3].pop()
    c = rates.compare(found)
    assert c.seeds == 3  # of what may be the best
    assert c.pairs[0, 1].mean == -c.pairs[1, 0].mean and c.pairs[0, 1].covers == "2 seeds and 40 examples"
    assert c.verdict(0) == "in" and c.verdict(1) != "in"
