"""The statistics of a sweep: resampling, comparisons with the best rate, basin, optimum, convergence.

Losses are in nats per token. Everything is vectorised numpy and deterministic for a given input.
"""

import math
from dataclasses import dataclass

import numpy as np

from analysis.runs import Run, Series
from analysis.wording import plural, rate_label

REPLICATES = 10_000
LEVEL = 0.95  # of every interval: percentile, two-sided
BASIN_NATS = 0.01  # smallest difference in eval loss that matters, nats per token
BASIN_SHARE = 0.01  # ... or this share of the best loss
BASIN_SD = 2.0  # ... or so many seed standard deviations
FIT_DECADES = 1.0  # distance from the best rate within which points enter the quadratic
IDENTIFIED = 0.95  # share of the replicates that must have a minimum inside the range for a vertex to be reported
COARSE = 10**0.5  # a gap to a neighbouring rate above half a decade cannot place an optimum
TARGETS = (0.5, 0.8, 0.95)  # shares q of the gain l0 − l*, for convergence


@dataclass(frozen=True)
class Comparison:
    """Mean final eval losses of the compared rates, and their joint bootstrap replicates."""

    rates: list[float]  # (m,) feasible, ascending
    seeds: list  # the seeds that every compared rate has; [] if unpaired
    n: int  # seeds of each rate, the fewest if unpaired
    left_out: int  # runs whose seed some rate lacks
    loss: np.ndarray  # (m,) nats per token
    base: float | None  # l0 on the same examples
    replicates: np.ndarray | None  # (B, m); None if nothing can be resampled
    base_replicates: np.ndarray | None  # (B,)
    covers: str  # what the intervals cover, in words
    examples: int  # N, 0 if no per-example losses were recorded


def bootstrap(
    rows: np.ndarray, tokens: np.ndarray | None, group: np.ndarray, draw: np.ndarray, replicates: int = REPLICATES
) -> np.ndarray:
    """Replicated mean losses (B, m) of m groups of runs, resampling seeds and, jointly, examples.

    rows: (R, N) summed NLL of each example in each run, or (R, 1) losses with tokens=None (seeds only).
    group: (R,) in 0..m-1, the rate of each run. draw: (R,) which seed draw a run shares; runs of one seed at several
    rates share it (paired), or each (rate, seed) has its own. Seeds and examples are crossed factors: every run sees
    the same examples, so both are resampled independently and products of counts weigh the cells
    (Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1, §2).
    """
    rng = np.random.default_rng(0)
    count = int(group.max()) + 1
    member = (group[:, None] == np.arange(count)).astype(float)
    runs, examples = rows.shape
    # Seeds are drawn within each set of runs that share their draws: one set if paired, one for each rate if not.
    weights = np.zeros((replicates, runs))
    for block in {tuple(sorted(set(draw[group == g]))) for g in range(count)}:
        labels = np.array(block)
        drawn = draws(rng, replicates, len(labels))
        for column, label in enumerate(labels):
            weights[:, draw == label] = drawn[:, [column]]
    out = np.empty((replicates, count))
    chunk = max(1, 4_000_000 // examples)  # 32 MB of counts at a time
    for start in range(0, replicates, chunk):
        part = slice(start, min(start + chunk, replicates))
        if tokens is None:
            losses = np.broadcast_to(rows[:, 0], (part.stop - part.start, runs))
        else:
            counts = draws(rng, part.stop - part.start, examples)
            losses = (counts @ rows.T) / (counts @ tokens)[:, None]
        out[part] = (losses * weights[part]) @ member / (weights[part] @ member)
    return out


def draws(rng: np.random.Generator, replicates: int, n: int) -> np.ndarray:
    """How often each of n items is drawn in n draws with replacement: (replicates, n) counts, as floats."""
    picked = rng.integers(0, n, (replicates, n)) + n * np.arange(replicates)[:, None]
    return np.bincount(picked.ravel(), minlength=replicates * n).reshape(replicates, n).astype(float)


def compare(by_rate: dict[float, list[Run]]) -> Comparison | None:
    """The joint comparison of feasible rates, each with its complete runs (one for each seed); None without any.

    Seeds that every rate has are paired; with none in common each rate's seeds are drawn on their own.
    """
    rates = sorted(by_rate)
    if not rates:
        return None
    common = sorted(set.intersection(*({r.seed for r in by_rate[rate]} for rate in rates)) - {None})
    runs = [r for rate in rates for r in by_rate[rate] if not common or r.seed in common]
    group = np.array([rates.index(r.learning_rate) for r in runs])
    draw = np.array([common.index(r.seed) for r in runs]) if common else np.arange(len(runs))
    seeds = int(min(np.bincount(group)))
    left_out = sum(map(len, by_rate.values())) - len(runs)
    rows, tokens = [r.end_nll() for r in runs], [r.eval_nll.tokens for r in runs if r.eval_nll]
    final = np.array([r.final_eval_loss for r in runs])
    loss = np.array([final[group == g].mean() for g in range(len(rates))])
    bases = [r.base_loss for r in runs if r.base_loss is not None]
    base = float(np.mean(bases)) if bases else None
    if all(row is not None for row in rows) and all(np.array_equal(t, tokens[0]) for t in tokens):
        start = next(
            (r.eval_nll.nll[0] for r in runs if r.eval_nll.steps[0] == 0 and np.isfinite(r.eval_nll.nll[0]).all()), None
        )
        # l0 rides along as one more group: seedless, on the same examples.
        extra = [] if start is None else [start]
        replicates = bootstrap(
            np.array(rows + extra),
            tokens[0],
            np.concatenate([group, [len(rates)] * len(extra)]).astype(int),
            np.concatenate([draw, [draw.max() + 1] * len(extra)]).astype(int),
        )
        covers = (
            f"{seeds} seeds and {len(tokens[0])} eval examples"
            if seeds > 1
            else f"{len(tokens[0])} eval examples, not seeds"
        )
        base_replicates = replicates[:, -1] if extra else None
        return Comparison(
            rates,
            common,
            seeds,
            left_out,
            loss,
            base,
            replicates[:, : len(rates)],
            base_replicates,
            covers,
            len(tokens[0]),
        )
    if seeds > 1:
        replicates = bootstrap(final[:, None], None, group, draw)
        return Comparison(
            rates, common, seeds, left_out, loss, base, replicates, None, f"{seeds} seeds, not eval examples", 0
        )
    return Comparison(
        rates, common, seeds, left_out, loss, base, None, None, "nothing: one seed and no per-example losses", 0
    )


def interval(samples: np.ndarray | None) -> tuple[float, float] | None:
    """The two-sided percentile interval at LEVEL of (B,) samples; infinite samples count as such."""
    if samples is None or not len(samples):
        return None
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(samples, tails, method="inverted_cdf")
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided bootstrap p-value of (B,) differences against 0: 2·min(share ≤ 0, share ≥ 0), never 0."""
    n = len(differences)
    return min(1.0, 2 * (1 + min((differences <= 0).sum(), (differences >= 0).sum())) / (n + 1))


def holm(p: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979, Scandinavian Journal of Statistics 6), in the given order."""
    order, adjusted, worst = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = worst
    return adjusted


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927, JASA 22)."""
    z, share = 1.959964, count / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def seed_sd(by_rate: dict[float, list[Run]]) -> float | None:
    """Median over rates of the standard deviation of final eval losses over seeds; None with one seed.

    The median, so that one unsteady rate does not widen the basin.
    """
    spreads = [np.std([r.final_eval_loss for r in runs], ddof=1) for runs in by_rate.values() if len(runs) > 1]
    return float(np.median(spreads)) if spreads else None


def basin_width(best_loss: float, sd: float | None) -> float:
    """ε = max(0.01 nats, 1 % of l*, 2 × seed sd): differences below it do not matter."""
    return max(BASIN_NATS, BASIN_SHARE * best_loss, BASIN_SD * (sd or 0.0))


def excess(comparison: Comparison) -> np.ndarray | None:
    """Loss above the best rate's (B, m), the best re-selected in each replicate."""
    if comparison.replicates is None:
        return None
    return comparison.replicates - comparison.replicates.min(axis=1, keepdims=True)


def basin_verdict(bounds: tuple[float, float] | None, width: float) -> str:
    """Inside the basin if the interval of the excess loss ends below ε, outside if it begins above, else undecided."""
    if bounds is None:
        return "undecided"
    return "in" if bounds[1] < width else "out" if bounds[0] > width else "undecided"


def fit_points(rates: list[float], best: int) -> list[int]:
    """Indices of the rates that enter the quadratic: the best, its neighbours, and others within FIT_DECADES."""
    near = [i for i, rate in enumerate(rates) if abs(math.log10(rate / rates[best])) <= FIT_DECADES + 1e-9]
    return sorted({best, *near, *(i for i in (best - 1, best + 1) if 0 <= i < len(rates))})


def vertex(x: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertex (B,) and curvature (B,) of the least-squares quadratic through x (k,) and losses (B, k)."""
    centre = x.mean()
    coefficients = np.linalg.pinv(np.vander(x - centre, 3)) @ losses.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return centre - coefficients[1] / (2 * coefficients[0]), coefficients[0]


def optimum(comparison: Comparison, infeasible: list[float]) -> dict:
    """Learning rate at the vertex of a quadratic in log10 η, with interval, or the reason why there is none."""
    rates, best = comparison.rates, int(comparison.loss.argmin())
    right = [rate for rate in infeasible if rate > rates[best]]
    chosen = fit_points(rates, best)
    x = np.log10([rates[i] for i in chosen])
    refusal, name = None, rate_label(rates[best])
    if right and (best == len(rates) - 1 or min(right) < rates[best + 1]):
        refusal = f"the best rate's right neighbour, {rate_label(min(right))}, diverged"
    elif len(rates) < 3:
        refusal = f"{plural(len(rates), 'feasible rate')}, three are needed"
    elif best in (0, len(rates) - 1):
        refusal = f"the best rate, {name}, is at the edge of the feasible range"
    if refusal:
        return {"identified": False, "reason": refusal}
    at, curvature = vertex(x, comparison.loss[None, chosen])
    if curvature[0] <= 0 or not x[0] <= at[0] <= x[-1]:
        return {"identified": False, "reason": "the quadratic has no minimum inside the range"}
    result = {"identified": True, "learning_rate": float(10 ** at[0]), "n": len(chosen), "interval": None}
    if comparison.replicates is not None:
        ats, curvatures = vertex(x, comparison.replicates[:, chosen])
        good = (curvatures > 0) & (ats >= x[0]) & (ats <= x[-1])
        if good.mean() < IDENTIFIED:
            share = f"{good.mean():.0%} of the replicates have a minimum inside the range"
            return {"identified": False, "reason": f"only {share}"}
        result["interval"] = [10**bound for bound in interval(ats[good])]
    return result


def sensitivity(losses: list[float], base_loss: float, best_loss: float) -> float:
    """S = mean over the grid of min(E, l0) − l* (Wortsman et al. 2023, arXiv:2309.14322, §2.2); NaN counts as l0."""
    return float(np.mean([base_loss if not loss <= base_loss else loss for loss in losses]) - best_loss)


def paired_difference(pairs: list[tuple[Series, Series]], first: float, last: float) -> dict | None:
    """Mean of l_t(a) − l_t(b) over steps first..last, one pair a seed; bootstrap of seeds, then of steps.

    Returns {"mean", "interval", "seeds", "steps"}, None without a common step. Steps are resampled as if independent.
    """
    rows = []
    for a, b in pairs:
        a, b = a.between(first, last), b.between(first, last)
        _, at_a, at_b = np.intersect1d(a.step, b.step, return_indices=True)
        difference = a.value[at_a] - b.value[at_b]
        if len(difference) and np.isfinite(difference).all():
            rows.append(difference)
    if not rows:
        return None
    steps = min(map(len, rows))
    table = np.array([row[:steps] for row in rows])
    n = len(table)
    replicates = bootstrap(table, np.ones(steps), np.zeros(n, int), np.arange(n))[:, 0]
    return {"mean": float(table.mean()), "interval": interval(replicates), "seeds": n, "steps": steps}
