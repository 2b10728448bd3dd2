"""The search on response surfaces of known optimum, with seeds that all rates share and noise of each run's own."""

import math
from collections.abc import Callable

import numpy as np
import pytest

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
