"""The statistics of a sweep: intervals over seeds and clustered examples, the basin, budgets.

Losses are in nats per token. Everything is closed form: no resampling, no random numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from analysis.runs import Checkpoint, Series

LEVEL = 0.95  # of every interval, two-sided
BASIN_NATS = 0.01  # smallest difference in eval loss that matters, nats per token
BASIN_SHARE = 0.01  # ... or this share of the best loss
BASIN_SD = 2.0  # ... or so many seed standard deviations
COARSE = 10**0.5 * 1.1  # a gap to a neighbouring rate above half a decade cannot place an optimum
TARGETS = (0.5, 0.8, 0.95)  # shares q of the gain l0 − l*, for convergence


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of the finite values, with their number; sd None for fewer than two."""

    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval at LEVEL (None if nothing tells its error) and what that interval covers."""

    mean: float
    interval: tuple[float, float] | None
    seeds: int
    examples: int  # 0: no per-example losses were recorded
    clusters: int  # modules that the examples come in; as many as examples where the data name none
    paired: bool = True

    def about(self, mean: float) -> "Estimate":
        """Another mean with the same error."""
        shift = mean - self.mean
        moved = None if self.interval is None else (self.interval[0] + shift, self.interval[1] + shift)
        return replace(self, mean=mean, interval=moved)

    @property
    def covers(self) -> str:
        seeds = f"{self.seeds} seeds" if self.seeds > 1 else ""
        names = f"{self.clusters} modules" if 0 < self.clusters < self.examples else f"{self.examples} examples"
        return " and ".join(part for part in (seeds, names if self.examples else "") if part) or "nothing"


def spread(values: Sequence[float | None]) -> Spread:
    kept = np.array([v for v in values if v is not None and abs(v) < 1e100])  # squares of more are no floats
    sd = float(kept.std(ddof=1)) if len(kept) > 1 else None
    return Spread(float(kept.mean()) if len(kept) else None, sd, len(kept))


def clustered(nll: np.ndarray, tokens: np.ndarray, module: np.ndarray | None) -> tuple[float, float]:
    """Variance, in nats² per token², of Σ nll/Σ tokens over examples drawn in clusters; and its degrees of freedom.

    Linearised ratio estimator: sums over each cluster of nll − ratio·tokens, with the G/(G − 1) correction (Cochran
    1977, Sampling Techniques, §6.3 and 9A). The degrees of freedom are those of G_eff = (Σ T_c)²/Σ T_c² clusters:
    with a few modules holding most tokens, 34 clusters are worth 12.
    """
    total = tokens.sum()
    residual = nll - nll.sum() / total * tokens
    if module is not None:
        residual, tokens = np.bincount(module, residual), np.bincount(module, tokens)
    count, effective = len(residual), total**2 / (tokens**2).sum()
    if count < 2 or effective <= 1:
        return math.nan, 1.0
    return float(count / (count - 1) * (residual**2).sum() / total**2), float(effective - 1)


def with_interval(mean: float, variances: list[tuple[float, float]], **covered: Any) -> Estimate:
    """mean ± t·sqrt(Σ v), with Welch and Satterthwaite's degrees of freedom (Welch 1947, Biometrika 34).

    variances: (v, degrees of freedom) of each independent part of the error; none gives no interval.
    """
    total = sum(v for v, _ in variances)
    if not variances or not math.isfinite(total):
        return Estimate(mean, None, **covered)
    freedom = total**2 / sum(v**2 / df for v, df in variances) if total > 0 else 1.0
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(total)
    return Estimate(mean, (mean - half, mean + half), **covered)


def over_seeds(values: np.ndarray) -> list[tuple[float, float]]:
    """The variance of a mean over n seeds with n − 1 degrees of freedom; nothing to tell it by with one."""
    n = len(values)
    return [(float(values.var(ddof=1)) / n, n - 1.0)] if n > 1 else []


def over_examples(rows: list, tokens: np.ndarray | None, module: np.ndarray | None) -> list[tuple[float, float]]:
    """The clustered variance of the mean row; nothing if an example is missing in some row."""
    if tokens is None or not rows or any(row is None or len(row) != len(tokens) for row in rows):
        return []
    found = clustered(np.mean(rows, axis=0), tokens, module)
    return [found] if math.isfinite(found[0]) else []


def rates_and_seeds(losses: Sequence[dict]) -> tuple[np.ndarray, np.ndarray, int]:
    """Least squares of a loss as its rate's plus its seed's: means (m,), residuals, their degrees of freedom.

    losses: one seed -> loss for each rate. A mean is the rate's as if it had every seed; where all have the same seeds,
    or share none, that is the plain mean.
    """
    seeds = list(dict.fromkeys(seed for ends in losses for seed in ends))
    cells = [(place, seeds.index(seed)) for place, ends in enumerate(losses) for seed in ends]
    effects = np.zeros((len(cells), len(losses) + len(seeds)))
    for row, (place, seed) in enumerate(cells):
        effects[row, [place, len(losses) + seed]] = 1
    values = np.array([loss for ends in losses for loss in ends.values()])
    # Seeds' effects are pulled to 0 by next to nothing: what rates and seeds could share counts as the rates'.
    pull = 1e-4 * np.eye(len(seeds), effects.shape[1], len(losses))
    found = np.linalg.lstsq(np.vstack([effects, pull]), np.append(values, np.zeros(len(seeds))), rcond=None)[0]
    freedom = len(cells) - int(np.linalg.matrix_rank(effects)) if cells else 0
    return found[: len(losses)], values - effects @ found, freedom


def level(ends: dict[object, Checkpoint], tokens: np.ndarray | None, module: np.ndarray | None) -> Estimate | None:
    """The mean loss of one rate over its seeds; `ends` by seed."""
    if not ends:
        return None
    losses = np.array([end.loss for end in ends.values()])
    examples = over_examples([end.nll for end in ends.values()], tokens, module)
    return with_interval(
        float(losses.mean()), over_seeds(losses) + examples, **covered(len(losses), examples, tokens, module)
    )


def difference(
    a: Mapping[Any, Checkpoint], b: Mapping[Any, Checkpoint], tokens: np.ndarray | None, module: np.ndarray | None
) -> Estimate | None:
    """The mean of a's loss − b's, by seed where they share any, else between their means.

    interval: mean ± t·sqrt(s²/n + SE²), s the standard deviation over seeds of the difference (of each alone if
    unpaired), SE that of the mean difference over examples in their clusters.
    """
    if not a or not b:
        return None
    seeds = [seed for seed in a if seed in b and seed is not None]
    ends_a, ends_b = [a[seed] for seed in seeds or a], [b[seed] for seed in seeds or b]
    losses_a, losses_b = (np.array([end.loss for end in ends]) for ends in (ends_a, ends_b))
    mean = float(losses_a.mean() - losses_b.mean())
    variances = over_seeds(losses_a - losses_b) if seeds else over_seeds(losses_a) + over_seeds(losses_b)
    rows = [end.nll for end in (*ends_a, *ends_b)]
    examples = []
    if all(row is not None for row in rows):
        gap = np.mean([end.nll for end in ends_a], axis=0) - np.mean([end.nll for end in ends_b], axis=0)
        examples = over_examples([gap], tokens, module)
    n = min(len(ends_a), len(ends_b))
    return with_interval(mean, variances + examples, **covered(n, examples, tokens, module), paired=bool(seeds))


def covered(seeds: int, examples: list, tokens: np.ndarray | None, module: np.ndarray | None) -> dict:
    count = len(tokens) if examples else 0
    clusters = count if module is None else len(np.unique(module)) if examples else 0
    return {"seeds": seeds, "examples": count, "clusters": clusters}


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927, JASA 22)."""
    z, share = 1.959964, count / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def basin_width(best_loss: float, sd: float | None) -> float:
    """ε = max(0.01 nats, 1 % of l*, 2 × seed sd): differences below it do not matter."""
    return max(BASIN_NATS, BASIN_SHARE * best_loss, BASIN_SD * (sd or 0.0))


def excess(place: int, pairs: dict[tuple[int, int], Estimate], count: int) -> tuple[float, float] | None:
    """The interval of a rate's loss above the best rate's, whichever that is: comparisons with all others (Hsu 1981).

    pairs[i, j] is the difference of rate i from rate j. None if some pair has no interval.
    """
    others = [pairs[place, other].interval for other in range(count) if other != place]
    if any(interval is None for interval in others):
        return None
    return max([0.0, *(low for low, _ in others)]), max([0.0, *(high for _, high in others)])


def basin_verdict(bounds: tuple[float, float] | None, width: float) -> str:
    """Inside the basin if the interval of the excess loss ends below ε, outside if it begins above, else undecided."""
    if bounds is None:
        return "undecided"
    return "in" if bounds[1] < width else "out" if bounds[0] > width else "undecided"


def parabola(x: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """Vertex, curvature and root-mean-square residual of the least-squares quadratic through x (k,) and losses (k,)."""
    centre = x.mean()
    coefficients = np.polyfit(x - centre, losses, 2)
    residual = float(np.sqrt(np.mean((np.polyval(coefficients, x - centre) - losses) ** 2)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(centre - np.float64(coefficients[1]) / (2 * coefficients[0])), float(coefficients[0]), residual


def best_by_budget(curves: dict[float, Series], width: float) -> list[dict]:
    """For each evaluation step that all rates share, or that the best of them have: which rate is best so far.

    curves: mean eval loss by rate. Every prefix of a run at a constant rate is a run of that length, so each step is a
    budget. "between": the vertex of the parabola in log10 η through the best rate and its two neighbours, an
    indication only; "band": where that parabola is less than ε above its vertex, between the neighbours; "gap": the
    larger ratio to a neighbour; "within": the rates that ε does not tell from the best.
    """
    found = []
    for step in sorted({int(step) for curve in curves.values() for step in curve.step if step > 0}):
        here = {r: float(c.value[c.step == step][0]) for r, c in sorted(curves.items()) if (c.step == step).any()}
        here = {rate: loss for rate, loss in here.items() if math.isfinite(loss)}
        if not here or (len(here) > 1 and max(here.values()) == min(here.values())):
            continue  # after a first step at rate 0 nobody leads
        rates, losses = list(here), np.array(list(here.values()))
        best = int(losses.argmin())
        between = band = gap = None
        if 0 < best < len(rates) - 1:
            part = slice(best - 1, best + 2)
            at, curvature, _ = parabola(np.log10(rates[part]), losses[part])
            if curvature > 0:
                left, middle, right = rates[part]
                between, reach, gap = 10**at, math.sqrt(width / curvature), max(middle / left, right / middle)
                band = [max(left, 10 ** (at - reach)), min(right, 10 ** (at + reach))]
        within = [rate for rate, loss in here.items() if loss - losses[best] < width]
        found.append(
            {"step": step, "best_rate": rates[best], "loss": float(losses[best]), "within": within}
            | {"between": between, "band": band, "gap": gap}
        )
    return found


def paired_difference(pairs: list[tuple[Series, Series]], first: float, last: float) -> Estimate | None:
    """Mean of l_t(a) − l_t(b) over steps first..last, one pair a seed; the interval is over seeds alone.

    Neighbouring steps of a run share its weights, and most of what they learned: they tell no error.
    """
    rows = []
    for a, b in pairs:
        a, b = a.between(first, last), b.between(first, last)
        _, at_a, at_b = np.intersect1d(a.step, b.step, return_indices=True)
        gap = a.value[at_a] - b.value[at_b]
        if len(gap) and np.isfinite(gap).all():
            rows.append(gap)
    if not rows:
        return None
    steps, gaps = min(map(len, rows)), np.array([row.mean() for row in rows])
    return with_interval(float(gaps.mean()), over_seeds(gaps), seeds=len(gaps), examples=steps, clusters=steps)
