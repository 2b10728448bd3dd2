"""The search on response surfaces of known optimum, with seeds that all rates share and noise of each run's own."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from analysis import refinement
from analysis.refinement import Decision, Place, Point, Round, next_round, place

EPSILON = 0.03
GRID = (1e-5, 2e-4, 1e-3, 5e-3)


def valley(lowest: float, left: float = 0.3, right: float = 0.6, wall: float = math.inf) -> Callable[[float], float]:
    """3 nats at `lowest`, so many more a decade away on either side (squared), and divergence from `wall` on."""

    def loss(rate: float) -> float:
        x = math.log10(rate / lowest)
        return math.inf if rate >= wall else 3 + (left if x < 0 else right) * x * x

    return loss


class Runs:
    """Runs on a surface: what was asked, and the points."""

    def __init__(self, surface: Callable[[float], float], sd: float = 0.0, draw: int = 0):
        self.surface, self.sd, self.random = surface, sd, np.random.default_rng(draw)
        self.shared = self.random.normal(0, 5 * sd, 50)
        self.points: list[Point] = []
        self.asked: list[Round] = []

    def run(self, rates, seeds=(0,)) -> None:
        for rate in rates:
            for seed in seeds:
                own = self.sd * self.random.normal()
                self.points.append(Point(rate, seed, self.surface(rate) + self.shared[seed] + own))

    def search(self, budget: int) -> Decision:
        while isinstance(found := next_round(self.points, budget, EPSILON), Round):
            budget -= len(found.rates) * len(found.seeds)
            self.asked.append(found)
            self.run(found.rates, found.seeds)
        assert budget >= 0
        assert len({point[:2] for point in self.points}) == len(self.points)  # nothing twice
        return found


def searched(surface: Callable[[float], float], budget: int = 12, grid=GRID, **noise) -> tuple[Runs, Decision]:
    runs = Runs(surface, **noise)
    runs.run(grid)
    return runs, runs.search(budget)


def test_rates_beside_the_best_come_first_then_seeds_for_what_is_left():
    runs, found = searched(valley(6e-4), sd=0.003)
    first, *others = runs.asked
    assert (first.rates, first.seeds) == ((5e-4, 2e-3), (0,))
    assert first.asked == "Is 5e-4 or 2e-3 better than 1e-3?"
    assert any(len(one.seeds) > 1 and len(one.rates) in (2, 3) for one in others)
    assert found.why == "Over seeds 5e-4 costs less than 0.030 above 3.2e-4 or 1e-3, with 95 %."
    assert (found.rate, found.low < 6e-4 < found.high) == (5e-4, True)


@pytest.mark.parametrize("lowest", [2e-6, 3e-5, 1.3e-3, 2e-2])
def test_the_best_rate_is_found_wherever_the_grid_lies(lowest):
    _, found = searched(valley(lowest), sd=0.003)
    assert valley(lowest)(found.rate) - 3 <= EPSILON
    assert found.low <= lowest <= found.high


def test_a_wall_beside_the_best_rate_is_kept_away_from():
    runs, found = searched(valley(2e-3, right=0.0, wall=2.2e-3))
    assert max(max(rate for one in runs.asked for rate in one.rates), found.rate) < 5e-3
    assert valley(2e-3)(found.rate) - 3 <= EPSILON
    assert found.low <= 2e-3 <= found.high < min(p.rate for p in runs.points if math.isinf(p.loss))


def test_where_no_rate_ended_it_goes_down():
    runs, found = searched(valley(1e-6, wall=4e-6))
    assert runs.asked[0].rates == (1e-6, 3.2e-6)
    assert valley(1e-6)(found.rate) - 3 <= EPSILON
    lost = next_round([Point(rate, 0, math.inf) for rate in GRID], 0, EPSILON)
    assert math.isnan(lost.rate) and (lost.low, lost.high) == (0.0, 1e-5)


def test_a_steep_valley_is_followed_to_its_floor():
    """Twice the rate costs 1.8 nats here, so neighbours so far apart leave more than ε between them."""
    _, found = searched(valley(7e-4, 20, 20))
    assert valley(7e-4)(found.rate) - 3 <= EPSILON
    assert found.why == "Every other rate is worse by clearly more than 0.030."


def test_the_budget_is_kept_and_said():
    for budget in range(5):
        _, found = searched(valley(6e-4), budget, sd=0.003)
        assert found.why.startswith("The budget ends before")


def test_what_a_seed_shares_moves_no_rate():
    """Seeds differ by far more than rates: a rate's mean is compared as if it had every seed."""
    points = [Point(rate, 0, valley(6e-4)(rate)) for rate in (*GRID, 5e-4, 2e-3)]
    more = [Point(rate, seed, valley(6e-4)(rate) + 9 * seed) for rate in (5e-4, 1e-3) for seed in (1, 2)]
    assert place(points + more, EPSILON, 0.003).rate == place(points, EPSILON, 0.003).rate
    assert isinstance(found := next_round(points + more, 0, EPSILON), Decision) and found.rate == 5e-4


def test_known_noise_saves_seeds():
    points = [Point(rate, 0, valley(6e-4)(rate)) for rate in (*GRID, 3.2e-4, 5e-4, 2e-3)]
    assert isinstance(next_round(points, 9, EPSILON), Round)
    assert isinstance(next_round(points, 9, EPSILON, noise=0.002), Decision)


def test_open_sides():
    falling = [Point(rate, 0, -math.log10(rate)) for rate in GRID]
    assert place(falling, EPSILON).high == math.inf and place(falling, EPSILON).low > 2e-4
    rising = [Point(rate, 0, math.log10(rate)) for rate in GRID]
    assert place(rising, EPSILON).low == 0.0
    assert place([Point(1e-3, 0, 3.0)], EPSILON) == Place(pytest.approx(1e-3, rel=0.1), 0.0, math.inf, 0.0)
    assert place([Point(1e-3, 0, math.inf)], EPSILON) is None


def test_the_interval_covers():
    """Over 100 surfaces with sides of their own, each after a search of eight runs: at least 92 % of the time."""
    covered = []
    for draw in range(100):
        random = np.random.default_rng([draw, 1])
        lowest, left = 10 ** random.uniform(-4, -3), 10 ** random.uniform(-1, 0)
        _, found = searched(valley(lowest, left, left * 10 ** random.uniform(-0.3, 0.8)), 8, sd=0.005, draw=draw)
        covered.append(found.low <= lowest <= found.high)
    assert np.mean(covered) >= 0.92


@pytest.mark.parametrize(
    ("gap", "asked"),
    [  # to the neighbour on either side
        (math.inf, [3.2e-4, 3.2e-3]),
        (6.4, [3.2e-4, 3.2e-3]),
        (6.3, [5e-4, 2e-3]),
        (4.1, [5e-4, 2e-3]),
        (3.0, [5.8e-4, 1.7e-3]),
        (2.1, [6.9e-4, 1.4e-3]),
        (2.04, []),
    ],
)
def test_how_far_from_the_best_rate_the_next_ones_lie(gap, asked):
    there = Place(1.5e-3, 0.0, math.inf, 0.4)  # costs too little to be run
    for lower, higher in ((1.0, 2.0), (2.0, 1.0)):
        losses = {1e-3 / gap: lower, 1e-3: 0.0, 1e-3 * gap: higher} if gap < math.inf else {1e-3: 0.0}
        found = refinement.closer({rate: {0: loss} for rate, loss in losses.items()}, losses, there, 1.0)
        assert found == (asked if lower < higher or gap == math.inf else asked[::-1])  # what promises more comes first
    diverged = {1e-3: {0: 0.0}, 2e-3: {0: math.inf}}
    assert refinement.closer(diverged, {1e-3: 0.0}, there, 1.0) == [3.2e-4]


@pytest.mark.parametrize(
    ("rate", "regret", "asked"),
    [(1.5e-3, 0.51, [1.5e-3]), (1.5e-3, 0.5, []), (9.8e-4, 0.51, [9.8e-4]), (9.9e-4, 0.51, []), (2.02e-3, 0.51, [])],
)
def test_the_lowest_place_is_run_where_it_pays_and_nothing_like_it_was(rate, regret, asked):
    losses = {5e-4: 1.0, 1e-3: 0.0, 2e-3: 1.0}
    known = {each: {0: loss} for each, loss in losses.items()}
    assert refinement.closer(known, losses, Place(rate, 0.0, 1.0, regret), 1.0) == asked


def test_the_choice_and_what_is_left_beside_it():
    assert refinement.choice({1e-4: 0.25, 2e-4: 0.0}, 1.0) == 1e-4
    assert refinement.choice({1e-4: 0.26, 2e-4: 0.0}, 1.0) == 2e-4
    feasible, noise = {1e-4: 1.9, 2e-4: 0.0, 4e-4: 1.0, 8e-4: 1.8, 2e-3: 9.0}, 1 / 8**0.5  # the margin is 2
    assert refinement.still_left(2e-4, feasible, 1.0, noise) == [2e-4, 4e-4, 8e-4]
    assert refinement.still_left(2e-4, feasible | {4e-4: 2.1}, 1.0, noise) == [2e-4, 8e-4, 1e-4]
    assert refinement.still_left(2e-4, feasible | {8e-4: 2.1, 1e-4: 2.1}, 1.0, noise) == [2e-4, 4e-4]


def test_the_noise_of_a_run_is_guessed_with_one_seed_and_then_measured():
    one = {1e-4: {0: 3.0}, 2e-4: {0: 2.0}, 1e-3: {0: math.inf}}
    assert refinement.deviation(one, 0.04) == pytest.approx(0.01)
    two = {1e-4: {0: 3.0, 1: 4.0}, 2e-4: {0: 2.0, 1: 3.4}, 1e-3: {0: 1.0, 1: math.inf}}  # seeds differ by 1.2 ± 0.2
    assert refinement.deviation(two, 0.04) == pytest.approx(math.sqrt((0.01**2 + 4 * 0.1**2) / 2))


def test_the_seed_of_new_rates_is_the_one_that_most_have():
    assert refinement.first_seed({1e-4: {3: 1.0}, 2e-4: {3: 1.0, 1: 1.0}}) == 3
    assert refinement.first_seed({1e-4: {3: 1.0}, 2e-4: {2: 1.0}}) == 2


def test_the_basin_needs_two_seeds_or_a_known_noise():
    def verdict(cost: float, noise: float | None, seeds: int) -> str:
        losses = {rate: {seed: mean + 1e-3 * seed for seed in range(seeds)} for rate, mean in ((1e-4, cost), (2e-4, 0))}
        return refinement.basin([1e-4, 2e-4], losses, 1.0, noise)

    assert verdict(0.5, None, 1) == "undecided" and verdict(0.5, None, 2) == "in" and verdict(1.5, None, 2) == "out"
    reach = 1.96 * 0.1 * math.sqrt(2)  # of the difference of two runs
    for cost, seeds, said in (
        (1 - reach - 0.01, 1, "in"),
        (1 - reach + 0.01, 1, "undecided"),
        (1 + reach - 0.01, 1, "undecided"),
        (1 + reach + 0.01, 1, "out"),
        (1 - reach / 2**0.5 - 0.01, 2, "in"),
        (1 - reach / 2**0.5 + 0.01, 2, "undecided"),
    ):
        assert verdict(cost, 0.1, seeds) == said


@pytest.mark.parametrize(
    ("seeds", "budget", "rates", "asked"),
    [  # those that each of the rates 1, 2 and 3 has
        (([0], [0]), 9, (1, 2), (1, 2)),
        (([0], [0]), 4, (1, 2), (1, 2)),
        (([0], [0]), 3, (1, 2), (1,)),
        (([0, 2], [0, 2]), 9, (1, 2), (1, 3)),
        (([0], [0], [0]), 6, (1, 2, 3), (1, 2)),
        (([0], [0], [0]), 5, (1, 2, 3), (1,)),
        (([0], [0], [0]), 2, (1, 2), (1,)),  # of the two best alone
        (([0, 1], [0]), 9, (2,), (1,)),
        (([0, 1, 2], [0], [0]), 9, (2, 3), (1, 2)),
        (([0, 1, 2], [0, 1], [0]), 9, (3,), (1, 2)),  # who lacks most comes first
    ],
)
def test_which_seeds_are_added_to_which_rates(seeds, budget, rates, asked):
    losses = {float(rate): dict.fromkeys(known, 0.0) for rate, known in enumerate(seeds, 1)}
    found = refinement.more_seeds(list(losses), losses, budget)
    assert found[:2] == (rates, asked) and found.asked == f"Over more seeds, is {refinement.labels(losses, 'or')} best?"
    assert refinement.more_seeds(list(losses), losses, len(rates) - 1) is None or len(rates) == 3


def test_a_small_budget_takes_what_promises_most():
    lost = [Point(rate, 0, math.inf) for rate in GRID]
    assert next_round(lost, 1, EPSILON).rates == (3.2e-6,) and next_round(lost, 9, EPSILON).rates == (1e-6, 3.2e-6)
    points = [Point(rate, 7, valley(6e-4)(rate)) for rate in GRID]
    found = next_round(points, 1, EPSILON)
    assert (found.rates, found.seeds, found.asked) == ((5e-4,), (7,), "Is 5e-4 better than 1e-3?")
    assert next_round(points, 0, EPSILON).why == "The budget ends before the rates beside it were run."


def test_the_interval_has_the_rate_that_is_decided_on():
    for low, high, best in ((2.0, 3.0, 1.0), (1.0, 2.0, 3.0), (1.0, 3.0, 2.0)):
        found = refinement.decide(best, Place(2.0, low, high, 0.0), "")
        assert (found.low, found.high) == (min(low, best), max(high, best))
