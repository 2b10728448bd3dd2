"""The search for the best rate: what to run next, given the runs so far, or where the best rate is and why it stops.

It aims at regret, not at the rate's digits: a rate is good enough when what it costs above the best one is below ε.
First one seed at half-decade points on both sides of the best feasible rate, then closer; then seeds, for the two or
three rates that are left, until the basin test of the report says that the best of them is inside. Losses are in nats
per answer token, rates are compared in log10 η. The interval of the best rate is what the report prints, too.
docs/search.md says how often it is right.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis import statistics
from analysis.runs import Checkpoint
from analysis.words import decimals, labels, rate_label

HALF_DECADE = 10**0.5
NEAR = 2.0  # factor between the best rate and its neighbours from which on closer rates are not worth a run
ROUNDED = 1.02  # two digits move a rate by so much
LEFT = 3  # most rates that get more seeds
FEWEST = 2  # seeds that tell a spread
MORE = 2  # seeds that one round adds: with two in all, 95 % are 12.7 standard errors
GUESSED = 0.25  # share of ε taken as the seeds' standard deviation while one seed says nothing of it
TIED = 0.25  # share of ε within which the lower of two rates is taken: the higher one may diverge with another seed
# What `place` takes for possible; benchmarks/search.py holds that its interval covers the best rate in 95 %.
POWERS = (1.0, 2.0, 4.0)  # of the distance to the lowest point, on either side: a kink, a parabola, a flat floor
SKEWS = np.linspace(-1.2, 1.2, 9)  # log10 of the right side's height over the left side's, a decade away
SKEW = 0.5  # its prior standard deviation
NOISES = (0.1, 0.2, 0.4, 0.8, 1.6)  # standard deviation over seeds where it is not known, as shares of ε
MISFIT = 0.2  # standard deviation of a loss from such a shape, as a share of its height above the lowest
FLAT = 0.35  # ... and this share of ε
CELL = 0.02  # decades between the places at which the best rate is looked for
BEYOND = 1.0  # decades outside the tested rates within which it is looked for


Losses = dict[float, dict[int, float]]  # rate -> seed -> loss, rates ascending


class Point(NamedTuple):
    """A run at its end: loss is infinite where it diverged or ended worse than untrained."""

    rate: float
    seed: int
    loss: float


class Round(NamedTuple):
    """Runs to make, each rate with each seed, and the sentence of what they are to tell."""

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    asked: str


class Decision(NamedTuple):
    """The rate to use, the 95 % interval of the best rate, and why the search stops.

    low is 0 where the best rate may lie below all that were run, high infinite where above; rate is NaN if none ended.
    """

    rate: float
    low: float
    high: float
    why: str


class Place(NamedTuple):
    """Where the best rate lies: its most probable place, the 95 % interval, and what the best rate run costs above it.

    low 0 and high infinite are open sides.
    """

    rate: float
    low: float
    high: float
    regret: float


def two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def next_round(points: Sequence[Point], budget: int, epsilon: float, noise: float | None = None) -> Round | Decision:
    """The next runs, at most `budget` of them, or the decision.

    epsilon: ε, the smallest difference that matters. noise: standard deviation over seeds; None to take it from the
    points.
    """
    losses = by_rate(points)
    feasible = feasible_of(losses)
    found = place(points, epsilon, noise)
    if found is None:
        return downwards(losses, budget)
    best = choice(feasible, epsilon)
    if rates := closer(losses, feasible, found, epsilon):
        if budget < 1:
            return decide(best, found, "The budget ends before the rates beside it were run.")
        rates = sorted(rates[:budget])
        return Round(tuple(rates), (first_seed(losses),), f"Is {labels(rates, 'or')} better than {rate_label(best)}?")
    left = still_left(best, feasible, epsilon, noise or deviation(losses, epsilon))
    if len(left) == 1:
        return decide(best, found, f"Every other rate is worse by clearly more than {decimals(epsilon)}.")
    if basin(left, losses, epsilon, noise) == "in":
        above = f"less than {decimals(epsilon)} above {labels(left[1:], 'or')}"
        return decide(best, found, f"Over seeds {rate_label(best)} costs {above}, with 95 %.")
    return more_seeds(left, losses, budget) or decide(best, found, "The budget ends before seeds decide.")


def by_rate(points: Sequence[Point]) -> Losses:
    found: Losses = {}
    for point in sorted(points):
        found.setdefault(point.rate, {})[point.seed] = point.loss
    return found


def feasible_of(losses: Losses) -> dict[float, float]:
    """The mean loss of each rate at which all runs ended, as if each had every seed."""
    ended = {rate: ends for rate, ends in losses.items() if all(map(math.isfinite, ends.values()))}
    return dict(zip(ended, statistics.rates_and_seeds(list(ended.values()))[0].tolist(), strict=True))


def deviation(losses: Losses, epsilon: float) -> float:
    """The standard deviation over seeds of a rate's loss, what seeds share left out; guessed from ε with one seed."""
    ended = [ends for ends in losses.values() if all(map(math.isfinite, ends.values()))]
    _, residuals, freedom = statistics.rates_and_seeds(ended)
    guess = GUESSED * epsilon
    # A guess worth one degree of freedom: two seeds at two rates alone can be equal by chance.
    return math.sqrt((guess**2 + float((residuals**2).sum())) / (1 + freedom))


def first_seed(losses: Losses) -> int:
    """The seed that most rates have, so that new ones can be compared with them."""
    seeds = [seed for ends in losses.values() for seed in ends]
    return min(seeds, key=lambda seed: (-seeds.count(seed), seed))


def downwards(losses: Losses, budget: int) -> Round | Decision:
    """Where no rate ended: half a decade and a decade below the lowest."""
    lowest = min(losses)
    if budget < 1:
        return Decision(math.nan, 0.0, lowest, "The budget is spent and no rate ended without diverging.")
    rates = [two_digits(lowest / HALF_DECADE**k) for k in (1, 2)][:budget]
    return Round(tuple(sorted(rates)), (first_seed(losses),), f"Does a rate below {rate_label(lowest)} end?")


def closer(losses: Losses, feasible: dict[float, float], found: Place, epsilon: float) -> list[float]:
    """Rates to run beside the best one while a neighbour is too far; then the place of the lowest point, if it pays.

    Half a decade away where nothing nearer was run, else half-way; the side that promises more comes first.
    """
    best, wanted = choice(feasible, epsilon), {}
    for side in (-1, 1):
        beyond = [rate for rate in losses if (rate - best) * side > 0]
        neighbour = min(beyond, key=lambda rate: abs(rate - best), default=None)
        gap = math.inf if neighbour is None else max(neighbour / best, best / neighbour)
        if gap > NEAR * ROUNDED:
            step = HALF_DECADE if gap > NEAR * HALF_DECADE else NEAR if gap > NEAR**2 else math.sqrt(gap)
            wanted[two_digits(best * step**side)] = feasible.get(neighbour, math.inf)
    lowest = two_digits(found.rate)
    if not wanted and found.regret > epsilon / 2 and all(max(lowest / r, r / lowest) > ROUNDED for r in losses):
        return [lowest]
    return sorted(wanted, key=wanted.get)


def choice(feasible: dict[float, float], epsilon: float) -> float:
    """The lowest rate that is within TIED · ε of the best."""
    return min(rate for rate, loss in feasible.items() if loss - min(feasible.values()) <= TIED * epsilon)


def still_left(chosen: float, feasible: dict[float, float], epsilon: float, noise: float) -> list[float]:
    """The chosen rate and those, at most LEFT in all, that may be as good: best first."""
    margin = epsilon + 2 * math.sqrt(2) * noise
    others = [rate for rate in sorted(feasible, key=feasible.get) if rate != chosen]
    return [chosen, *(rate for rate in others[: LEFT - 1] if feasible[rate] - feasible[chosen] < margin)]


def basin(left: list[float], losses: Losses, epsilon: float, noise: float | None) -> str:
    """The report's basin test of the first of these rates among them, over seeds.

    The eval examples, which are in the report's, are left out: more seeds do not make more examples.
    """
    first, *others = [{seed: Checkpoint(0, loss, None) for seed, loss in losses[rate].items()} for rate in left]
    if noise is None and min(map(len, (first, *others))) < FEWEST:
        return "undecided"
    pairs = {}
    for place, other in enumerate(others, 1):
        difference = statistics.difference(first, other, None, None)
        if noise is not None:
            variance = noise**2 * (1 / len(first) + 1 / len(other))
            difference = statistics.with_interval(difference.mean, [(variance, 1e9)], seeds=1, examples=0, clusters=0)
        pairs[0, place] = difference
    return statistics.basin_verdict(statistics.excess(0, pairs, len(left)), epsilon)


def more_seeds(left: list[float], losses: Losses, budget: int) -> Round | None:
    """Seeds for these rates: those that some lack, else new ones; fewer where the budget ends, None if it has."""
    known = {seed for rate in left for seed in losses[rate]}
    lacking = {rate: sorted(known - losses[rate].keys()) for rate in left}
    seeds = max(lacking.values(), key=len)
    rates = [rate for rate in left if lacking[rate] == seeds]
    if not seeds:
        seeds = list(itertools.islice((seed for seed in itertools.count() if seed not in known), MORE))
    for some in (rates, rates[:2]):
        if fit := seeds[: budget // len(some)]:
            return Round(tuple(sorted(some)), tuple(fit), f"Over more seeds, is {labels(left, 'or')} best?")
    return None


def decide(best: float, found: Place, why: str) -> Decision:
    return Decision(best, min(found.low, best), max(found.high, best), why)


def place(points: Sequence[Point], epsilon: float, noise: float | None = None) -> Place | None:
    """Where the best rate lies: the posterior of the lowest point of a two-sided curve; None if no rate ended.

    Above its lowest point the curve rises as a power of the distance in log10 η, on each side one of POWERS, in the
    proportion of one of SKEWS. Height and level are by weighted least squares for each place, shape and noise; the
    posterior is exp(−χ²/2), summed over shapes and noises. No loss is such a curve: its variance is that over seeds
    plus (MISFIT times its height + FLAT · ε)². The best rate lies below the lowest one above the best that diverged.
    """
    losses = by_rate(points)
    feasible = feasible_of(losses)
    if not feasible:
        return None
    rates, loss = np.array(list(feasible)), np.array(list(feasible.values()))
    best = int(loss.argmin())
    walls = [rate for rate in losses if rate not in feasible and rate > rates[best]]
    x, seeds = np.log10(rates), np.array([len(losses[rate]) for rate in feasible])
    at = np.arange(x[0] - BEYOND, (math.log10(min(walls)) if walls else x[-1] + BEYOND) + CELL / 2, CELL)
    rise = shapes(x - at[:, None])
    _, residuals, freedom = statistics.rates_and_seeds([losses[rate] for rate in feasible])
    logs, costs = [], []
    for spread in [noise] if noise else [share * epsilon for share in NOISES]:
        variance = spread**2 / seeds + (MISFIT * (loss - loss.min()) + FLAT * epsilon) ** 2
        total = (1 / variance).sum()
        weight = 1 / variance / total
        centred = loss - weight @ loss
        product = rise @ (weight * centred)
        square = rise**2 @ weight - (rise @ weight) ** 2
        height = np.maximum(product, 0) / np.maximum(square, 1e-12)
        logs.append(
            -0.5 * (total * (weight @ centred**2 - height * product) + (SKEWS / SKEW) ** 2)
            - 0.5 * (np.log(variance).sum() + math.log(total))
            - freedom * math.log(spread) - 0.5 * float((residuals**2).sum()) / spread**2
        )  # fmt: skip
        costs.append(height * rise[..., best])
    probability = np.exp(np.array(logs) - np.max(logs))
    probability /= probability.sum()
    cumulative = probability.sum((0, 2, 3)).cumsum()
    low, middle, high = (
        at[min(int(np.searchsorted(cumulative, share)), len(at) - 1)]
        for share in ((1 - statistics.LEVEL) / 2, 0.5, (1 + statistics.LEVEL) / 2)
    )
    return Place(
        rate=10 ** float(middle),
        low=10 ** float(low) if low >= x[0] else 0.0,
        high=10 ** float(high) if walls or high <= x[-1] else math.inf,
        regret=float((probability * np.array(costs)).sum()),
    )


def shapes(apart: np.ndarray) -> np.ndarray:
    """The rise (places, pairs of POWERS, SKEWS, rates) of each rate at log10 η `apart` (places, rates) from a place."""
    left = np.stack([np.maximum(0, -apart) ** power for power in POWERS], axis=1)
    right = np.stack([np.maximum(0, apart) ** power for power in POWERS], axis=1)
    rise = left[:, :, None, None] + right[:, None, :, None] * 10 ** SKEWS[:, None]
    return rise.reshape(len(apart), len(POWERS) ** 2, len(SKEWS), -1)
