"""The hypotheses of the seed document as numbers, fixed before the runs: confirmed, refuted, inconclusive.

One that no run can judge is left out.
"""

import math

from analysis.behaviour import FAST_START, GAIN, tells
from analysis.rates import Rate
from analysis.statistics import paired_difference, wilson
from analysis.words import bounds, plural, rate_label
from analysis.words import steps as steps_text

VERY_LOW, STANDARD, HIGH, VERY_HIGH = 1e-5, 2e-4, 1e-3, 5e-3  # the document's rates
SLOWER = 2.0  # times the steps of the standard rate to reach 80 % of the gain
HALF = 0.5  # share of the seeds


def hypothesis(name: str, claim: str, verdict: str, evidence: str, **numbers: object) -> dict:
    return {"name": name, "claim": claim, "verdict": verdict, "evidence": evidence, **numbers}


def at(rates: list[Rate], wanted: float) -> Rate | None:
    """The row of a rate, up to rounding."""
    return next((row for row in rates if math.isclose(row.learning_rate, wanted, rel_tol=1e-6)), None)


def share_of_runs(row: Rate, classes: tuple[str, ...]) -> tuple[int, int]:
    """How many of the rate's ended runs are in these classes, and how many ended."""
    both = zip(row.runs, row.verdicts, strict=True)
    ended = [verdict.behaviour for run, verdict in both if tells(run, verdict)]
    return sum(behaviour in classes for behaviour in ended), len(ended)


def very_low_is_slow(rates: list[Rate], planned: int, width: float) -> dict | None:
    row, standard = at(rates, VERY_LOW), at(rates, STANDARD)
    if row is None or standard is None or row.gain is None or standard.steps[0.8] is None:
        return None
    low, name = rate_label(VERY_LOW), rate_label(STANDARD)
    steps, others = row.steps[0.8], standard.steps[0.8]
    goal = f"more than {SLOWER:g} × the steps of {name} to 80 %, or never there"
    claim = f"{low} is slow: below {GAIN:g} of the best gain, and {goal}"
    slower = math.isinf(steps) or steps > SLOWER * others
    lower, upper = row.gain_interval or (row.gain, row.gain)
    if upper < GAIN and slower:
        verdict = "confirmed" if row.gain_interval else "inconclusive"
    else:
        verdict = "refuted" if lower >= GAIN or not slower else "inconclusive"
    evidence = (
        f"{row.gain:.2f} of the best gain, {bounds(row.gain_interval, '.2f')}; "
        f"{steps_text(steps, planned)} steps to 80 %, {steps_text(others, planned)} at {name}"
    )
    return hypothesis("H1", claim, verdict, evidence, value=row.gain, interval=row.gain_interval, n=row.final_eval.n)


def standard_is_good(rates: list[Rate], planned: int, width: float) -> dict | None:
    row = at(rates, STANDARD)
    shaky, n = share_of_runs(row, ("diverged", "unstable")) if row else (0, 0)
    if not n:
        return None
    claim = f"{rate_label(STANDARD)} is good: no seed diverges or is unstable, and it ends as low as the best rate"
    parts = [f"diverged or unstable in {shaky} of {plural(n, 'seed')}"]
    basin = row.basin if row.excess is not None else "out"
    alone = row.excess is not None and sum(other.excess is not None for other in rates) == 1
    if row.excess is not None:
        above = (
            f"{row.excess:.3f} nats above the best rate, {bounds(row.excess_interval)} against a margin of {width:.3f}"
        )
        parts.append("the only rate that ended" if alone else above if row.excess else "the lowest mean")
    price = row.final_eval.mean - row.best_eval.mean if None not in (row.final_eval.mean, row.best_eval.mean) else 0.0
    if price >= 0.005:
        parts.append(f"its end lies {price:.3f} above its best checkpoints")
    verdict = "refuted" if basin == "out" or shaky else "confirmed" if basin == "in" and not alone else "inconclusive"
    return hypothesis("H2", claim, verdict, "; ".join(parts), value=row.excess, interval=row.excess_interval, n=n)


def high_starts_fast(rates: list[Rate], planned: int, width: float) -> dict | None:
    high, standard = at(rates, HIGH), at(rates, STANDARD)
    if high is None or standard is None:
        return None
    pairs = [(a["train/loss"], b["train/loss"]) for a in high.runs for b in standard.runs if a.seed == b.seed]
    found = paired_difference(pairs, FAST_START[0] * planned, FAST_START[1] * planned)
    if found is None:
        return None
    claim = f"{rate_label(HIGH)} drops faster at first: lower train loss than {rate_label(STANDARD)} over steps 5–10 %"
    # The steps of one run are not independent, so that one seed has no interval: then the margin decides.
    low, above = found.interval or (found.mean - width, found.mean + width)
    limits = bounds(found.interval) if found.interval else f"against a margin of {width:.3f}"
    verdict = "confirmed" if above < 0 else "refuted" if low > 0 else "inconclusive"
    steps = f"{plural(found.seeds, 'seed')} × {found.examples} paired steps"
    evidence = f"{found.mean:+.3f} nats per token, {limits}, {steps}"
    return hypothesis("H3a", claim, verdict, evidence, value=found.mean, interval=found.interval, n=found.seeds)


def majority(rates: list[Rate], name: str, claim: str, wanted: float, classes: tuple[str, ...]) -> dict | None:
    row = at(rates, wanted)
    found, n = share_of_runs(row, classes) if row else (0, 0)
    if not n:
        return None
    share, limits = found / n, wilson(found, n)
    verdict = "confirmed" if share >= HALF else "refuted"
    other = "less than half" if share >= HALF else "half"
    told = "not excluded" if limits[0] <= HALF <= limits[1] else "excluded"
    seeds = "1 seed" if n == 1 else f"these {n} seeds"
    evidence = (
        f"{' or '.join(classes)} in {found} of {seeds}; over other seeds "
        f"the share may be {limits[0]:.2f} to {limits[1]:.2f}, so {other} is {told}"
    )
    return hypothesis(name, claim, verdict, evidence, value=share, interval=limits, n=n, scope=f"in {seeds}")


def high_is_unstable(rates: list[Rate], planned: int, width: float) -> dict | None:
    claim = f"{rate_label(HIGH)} is unstable later: unstable or diverged in at least half of the seeds"
    return majority(rates, "H3b", claim, HIGH, ("diverged", "unstable"))


def very_high_diverges(rates: list[Rate], planned: int, width: float) -> dict | None:
    claim = f"{rate_label(VERY_HIGH)} diverges in at least half of the seeds"
    return majority(rates, "H4", claim, VERY_HIGH, ("diverged",))


HYPOTHESES = (very_low_is_slow, standard_is_good, high_starts_fast, high_is_unstable, very_high_diverges)


def hypotheses(rates: list[Rate], planned: int | None, width: float | None) -> list[dict]:
    """Those that these rates can judge. width: ε, the margin of the basin."""
    found = [test(rates, planned or 0, width or 0.0) for test in HYPOTHESES]
    return [one for one in found if one is not None]
