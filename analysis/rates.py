"""One learning rate over its seeds, and the comparison of all rates of a grid. Losses in nats per token."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis import statistics
from analysis.behaviour import Evidence, Verdict, captured_gain, tells
from analysis.curves import first_crossing
from analysis.runs import Checkpoint, Run, Series
from analysis.statistics import Estimate, Spread, spread

# Where rates are compared: the same numbers at the end, at each run's best checkpoint, and after one pass.
MOMENTS: dict[str, Callable[[Run], Checkpoint | None]] = {
    "end": lambda run: run.end,
    "best": lambda run: run.best if run.complete else None,
    "one_pass": lambda run: run.one_pass,
}


@dataclass(frozen=True)
class Comparison:
    """Mean losses of the feasible rates at their end, and their differences."""

    rates: list[float]  # (m,) ascending
    loss: np.ndarray  # (m,), as if each rate had every seed
    levels: list[Estimate]  # (m,)
    pairs: dict[tuple[int, int], Estimate]  # (i, j) -> loss[i] − loss[j], with the error of the seeds that both have
    seeds: int  # seeds of each rate that may be the best, the fewest
    seed_sd: float | None  # median over rates, so that one unsteady rate does not widen the basin
    width: float  # ε

    @property
    def best(self) -> int:
        return int(self.loss.argmin())

    def excess(self, place: int) -> tuple[float, float] | None:
        return statistics.excess(place, self.pairs, len(self.rates))

    def near(self, place: int) -> bool:
        """Whether the mean is within ε of the best, whatever its interval."""
        return bool(self.loss[place] - self.loss.min() < self.width)

    def verdict(self, place: int) -> str:
        return statistics.basin_verdict(self.excess(place), self.width) if len(self.rates) > 1 else "in"


@dataclass(frozen=True)
class Rate:
    """One learning rate over its seeds; what is None was not recorded or does not exist."""

    learning_rate: float
    alpha_rate: float | None  # α·η
    runs: tuple[Run, ...]
    verdicts: tuple[Verdict, ...]
    diverged: int  # runs
    final_train: Spread
    final_eval: Spread
    last_eval: Spread  # the last finite eval loss of every run, diverged ones too
    last_step: int | None  # the earliest step of those
    level: Estimate | None  # of final_eval
    best_eval: Spread
    best_step: float | None  # median over runs
    one_pass: Spread
    gap: Spread  # final eval loss − final train loss
    moments: dict[str, Estimate | None]  # difference from the best rate at each of MOMENTS
    basin: str  # in, out or undecided
    excess: float | None  # mean loss above the best rate's
    excess_interval: tuple[float, float] | None
    gain: float | None  # G
    gain_interval: tuple[float, float] | None
    steps: dict[float, float | None]  # to each target, median over seeds; ∞ is a miss
    clipped: float | None
    update_ratio: Spread
    stable_rank: Spread
    flags: dict[str, int]

    @property
    def ended(self) -> bool:
        """Whether every run has a finite loss at its end."""
        return self.final_eval.n == len(self.runs)

    @property
    def behaviours(self) -> dict[str, int]:
        return count([verdict.behaviour for verdict in self.verdicts])


def count(words: list[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words), key=words.index)}


def example_set(runs: list[Run]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Tokens (N,) and module (N,) of the eval examples, if all runs have the same."""
    found = [run.eval_nll for run in runs if run.eval_nll is not None]
    if not found or any(not np.array_equal(nll.tokens, found[0].tokens) for nll in found):
        return None, None
    return found[0].tokens, found[0].module


def by_seed(runs: list[Run], moment: str) -> dict[object, Checkpoint]:
    """Each run's checkpoint at one of MOMENTS, by seed; runs without one are left out."""
    found = {run.seed if run.seed is not None else run.id: MOMENTS[moment](run) for run in runs}
    return {seed: checkpoint for seed, checkpoint in found.items() if checkpoint is not None}


def means(feasible: dict[float, list[Run]], moment: str) -> dict[float, float]:
    """The mean loss of each rate at one of MOMENTS, as if each had every seed."""
    losses = {
        rate: {seed: checkpoint.loss for seed, checkpoint in found.items()}
        for rate, runs in sorted(feasible.items())
        if (found := by_seed(runs, moment))
    }
    return dict(zip(losses, statistics.rates_and_seeds(list(losses.values()))[0].tolist(), strict=True))


def compare(feasible: dict[float, list[Run]]) -> Comparison | None:
    """The joint comparison of the rates of which no run diverged; None without any."""
    ends = {rate: found for rate, runs in sorted(feasible.items()) if (found := by_seed(runs, "end"))}
    if not ends:
        return None
    examples = example_set([run for runs in feasible.values() for run in runs])
    rates = list(ends)
    levels = [statistics.level(ends[rate], *examples) for rate in rates]
    loss = np.array(list(means(feasible, "end").values()))
    pairs = {
        (i, j): statistics.difference(ends[a], ends[b], *examples).about(float(loss[i] - loss[j]))
        for i, a in enumerate(rates)
        for j, b in enumerate(rates)
        if i != j
    }
    spreads = [spread([end.loss for end in found.values()]).sd for found in ends.values()]
    sds = [sd for sd in spreads if sd is not None]
    seed_sd = float(np.median(sds)) if sds else None
    width = statistics.basin_width(float(loss.min()), seed_sd)
    seeds = min(len(found) for found, mean in zip(ends.values(), loss, strict=True) if mean - loss.min() < width)
    return Comparison(rates, loss, levels, pairs, seeds, seed_sd, width)


def rate(
    learning_rate: float,
    runs: list[Run],
    evidence: dict[str, Evidence],
    verdicts: dict[str, Verdict],
    comparison: Comparison | None,
    feasible: dict[float, list[Run]],
    base_loss: float | None,
    alpha: float | None,
    flags: dict[str, list[str]],
) -> Rate:
    """One rate's row: spreads over its seeds, differences from the best rate's runs, basin, convergence."""
    place = None
    if comparison is not None and learning_rate in comparison.rates:
        place = comparison.rates.index(learning_rate)
    best_loss = None if comparison is None else float(comparison.loss.min())
    reach = None if None in (base_loss, best_loss) or base_loss <= best_loss else base_loss - best_loss
    ends = [run.final_eval_loss for run in runs]
    whole = [run for run in runs if tells(run, verdicts[run.id])]
    lasts = [run.last for run in runs if run.last is not None]
    is_best = place is not None and place == comparison.best
    moments = dict.fromkeys(MOMENTS)
    if not is_best and comparison is not None:
        moments = {moment: above(learning_rate, runs, comparison, feasible, moment) for moment in MOMENTS}
    end = None if place is None or is_best else moments["end"]
    gain = gain_interval = None
    if place is not None and reach:
        gain = captured_gain(float(comparison.loss[place]), base_loss, best_loss)
        if end is not None and end.interval is not None:
            gain_interval = (1 - end.interval[1] / reach, 1 - end.interval[0] / reach)
    ratios = [run["eval/update_ratio"].finite for run in runs]
    ranks = [run["eval/stable_rank"].finite for run in runs]
    gaps = [e - t for e, t in zip(ends, (run.final_train_loss for run in runs), strict=True) if None not in (e, t)]
    bests = [run.best for run in runs if run.best is not None and run.complete]
    return Rate(
        learning_rate=learning_rate,
        alpha_rate=None if alpha is None else alpha * learning_rate,
        runs=tuple(runs),
        verdicts=tuple(verdicts[run.id] for run in runs),
        diverged=sum(verdicts[run.id].behaviour == "diverged" for run in runs),
        final_train=spread([run.final_train_loss for run in runs]),
        final_eval=spread(ends),
        last_eval=spread([last.loss for last in lasts]),
        last_step=min((last.step for last in lasts), default=None),
        level=None if place is None else comparison.levels[place],
        best_eval=spread([best.loss for best in bests]),
        best_step=float(np.median([best.step for best in bests])) if bests else None,
        one_pass=spread([run.one_pass.loss for run in runs if run.one_pass is not None]),
        gap=spread(gaps),
        moments=moments,
        basin="out" if place is None else comparison.verdict(place),
        excess=None if place is None else float(comparison.loss[place] - comparison.loss.min()),
        excess_interval=None if place is None or len(comparison.rates) < 2 else comparison.excess(place),
        gain=gain,
        gain_interval=gain_interval,
        steps={q: median_steps(whole, base_loss, best_loss, q) for q in statistics.TARGETS},
        clipped=spread([evidence[run.id].clipped for run in runs]).mean,
        update_ratio=spread([float(s.value[-1]) for s in ratios if len(s)]),
        stable_rank=spread([float(s.value[-1]) for s in ranks if len(s)]),
        flags=count([flag for run in runs for flag in flags[run.id]]),
    )


def above(
    learning_rate: float, runs: list[Run], comparison: Comparison, feasible: dict[float, list[Run]], moment: str
) -> Estimate | None:
    """A rate's loss − the best rate's at one of MOMENTS: of their means, or by seed if the rate has none."""
    best = comparison.rates[comparison.best]
    examples = example_set([*runs, *feasible[best]])
    found = statistics.difference(by_seed(runs, moment), by_seed(feasible[best], moment), *examples)
    loss = means(feasible, moment)
    return found if found is None or learning_rate not in loss else found.about(loss[learning_rate] - loss[best])


def median_steps(runs: list[Run], base_loss: float | None, best_loss: float | None, q: float) -> float | None:
    """Median over seeds of the steps to l0 − q(l0 − l*); a miss is infinite and stays in; None if not defined."""
    if not runs or None in (base_loss, best_loss) or base_loss <= best_loss:
        return None
    target = base_loss - q * (base_loss - best_loss)
    steps = sorted(first_crossing(run["eval/loss"], target) for run in runs)
    low, high = steps[(len(steps) - 1) // 2], steps[len(steps) // 2]
    return math.inf if math.isinf(high) else (low + high) / 2


def mean_curve(runs: list[Run]) -> Series:
    """Mean eval loss of these runs at the steps where all of them have a finite one."""
    series = [run["eval/loss"].finite for run in runs if len(run["eval/loss"].finite)]
    return mean_series(series) if series else Series(np.zeros(0, np.int64), np.zeros(0))


def mean_series(series: list[Series]) -> Series:
    """Mean of several series at the steps that all of them have."""
    step = series[0].step
    for one in series[1:]:
        step = np.intersect1d(step, one.step)
    values = [one.value[np.isin(one.step, step)] for one in series]
    return Series(step, np.mean(values, axis=0) if len(step) else np.zeros(0))
