"""The seed's hypotheses as numbers, fixed before the runs, with verdicts: confirmed, refuted, inconclusive."""

import math

import numpy as np

from analysis.behaviour import FAST_START, GAIN
from analysis.statistics import basin_verdict, excess, first_crossing, interval, paired_difference, wilson
from analysis.study import Study

VERY_LOW, STANDARD, HIGH, VERY_HIGH = 1e-5, 2e-4, 1e-3, 5e-3  # the seed's rates
SLOWER = 2.0  # times the steps of the standard rate to reach 80 % of the gain
HALF = 0.5  # share of the seeds


def hypothesis(name: str, claim: str, verdict: str, evidence: str, **numbers: object) -> dict:
    return {"name": name, "claim": claim, "verdict": verdict, "evidence": evidence, **numbers}


def untested(name: str, claim: str, rate: float) -> dict:
    return hypothesis(name, claim, "not tested", f"no run at {rate:g} counts", n=0, interval=None)


def gain_interval(study: Study, place: int) -> tuple[float, float] | None:
    """The 95 % interval of G of one rate, l0 and the best rate's loss resampled along."""
    c = study.comparison
    if c is None or c.replicates is None or c.base_replicates is None:
        return None
    reach = c.base_replicates - c.replicates.min(axis=1)
    if (reach <= 0).any():
        return None
    return interval((c.base_replicates - c.replicates[:, place]) / reach)


def median_steps(study: Study, rate: float, q: float) -> float | None:
    """Median over seeds of the steps to l0 − q(l0 − l*); a miss is infinite and stays in; None if not defined."""
    runs = study.at(rate)
    if not runs or None in (study.base_loss, study.best_loss) or study.base_loss <= study.best_loss:
        return None
    target = study.base_loss - q * (study.base_loss - study.best_loss)
    steps = sorted(first_crossing(run["eval/loss"], target) for run in runs)
    low, high = steps[(len(steps) - 1) // 2], steps[len(steps) // 2]
    return math.inf if math.isinf(high) else (low + high) / 2


def share_of_runs(study: Study, rate: float, classes: tuple[str, ...]) -> dict | None:
    """How many of the rate's ended runs are in these classes, with Wilson's interval."""
    ended = [study.verdicts[run.id].behaviour for run in study.at(rate)]
    ended = [behaviour for behaviour in ended if behaviour != "incomplete"]
    if not ended:
        return None
    count = sum(behaviour in classes for behaviour in ended)
    return {"count": count, "n": len(ended), "interval": list(wilson(count, len(ended)))}


def bounds(pair: tuple[float, float] | list | None, form: str = ".3f") -> str:
    return "no interval" if pair is None else f"95 % [{pair[0]:{form}}, {pair[1]:{form}}]"


def steps_text(steps: float | None, planned: int | None) -> str:
    return "unknown" if steps is None else f"> {planned}" if math.isinf(steps) else f"{steps:.0f}"


def very_low_is_slow(study: Study) -> dict:
    claim = f"{VERY_LOW:g} is slow: G below {GAIN:.0%}, and more than {SLOWER:g} × the steps of {STANDARD:g} to 80 %"
    place = study.index(VERY_LOW)
    steps, standard = median_steps(study, VERY_LOW, 0.8), median_steps(study, STANDARD, 0.8)
    if place is None or steps is None:
        return untested("H1", claim, VERY_LOW)
    gain = (study.base_loss - study.comparison.loss[place]) / (study.base_loss - study.best_loss)
    limits = gain_interval(study, place)
    slower = math.isinf(steps) or (standard is not None and steps > SLOWER * standard)
    low, high = limits or (gain, gain)
    if high < GAIN and slower:
        verdict = "confirmed" if limits else "inconclusive"
    elif low >= GAIN or (not slower and standard is not None):
        verdict = "refuted"
    else:
        verdict = "inconclusive"
    planned = study.planned_steps
    evidence = (
        f"G = {gain:.2f}, {bounds(limits, '.2f')}; {steps_text(steps, planned)} steps to 80 % of the gain, "
        f"{steps_text(standard, planned)} at {STANDARD:g}"
    )
    return hypothesis(
        "H1",
        claim,
        verdict,
        evidence,
        value=gain,
        interval=limits,
        n=len(study.feasible[study.comparison.rates[place]]),
    )


def standard_is_good(study: Study) -> dict:
    claim = f"{STANDARD:g} is good: stable in every seed, and inside the basin of the best rate"
    stable = share_of_runs(study, STANDARD, ("stable, suboptimal", "stable, good"))
    if stable is None:
        return untested("H2", claim, STANDARD)
    place, verdict, words, limits = study.index(STANDARD), "out", "it is not feasible", None
    if place is not None:
        over = excess(study.comparison)
        limits = None if over is None else interval(over[:, place])
        verdict = basin_verdict(limits, study.basin_width)
        loss = study.comparison.loss
        words = (
            f"{loss[place] - loss.min():.3f} nats above the best rate, {bounds(limits)}, "
            f"against ε = {study.basin_width:.3f} (basin test: {verdict})"
        )
    all_stable = stable["count"] == stable["n"]
    outcome = "refuted" if verdict == "out" or not all_stable else "confirmed" if verdict == "in" else "inconclusive"
    evidence = f"stable in {stable['count']} of {stable['n']} seeds; {words}"
    return hypothesis("H2", claim, outcome, evidence, interval=limits, n=stable["n"])


def high_starts_fast(study: Study) -> dict:
    claim = f"{HIGH:g} drops faster at first: lower train loss than {STANDARD:g} over steps 5–10 %"
    pairs = [(a["train/loss"], b["train/loss"]) for a in study.at(HIGH) for b in study.at(STANDARD) if a.seed == b.seed]
    planned = study.planned_steps or 0
    found = paired_difference(pairs, FAST_START[0] * planned, FAST_START[1] * planned)
    if found is None:
        return untested("H3a", claim, HIGH)
    low, high = found["interval"]
    verdict = "confirmed" if high < 0 else "refuted" if low > 0 else "inconclusive"
    evidence = (
        f"{found['mean']:+.3f} nats per token, {bounds(found['interval'])}, "
        f"{found['seeds']} seeds × {found['steps']} paired steps"
    )
    return hypothesis(
        "H3a", claim, verdict, evidence, value=found["mean"], interval=found["interval"], n=found["seeds"]
    )


def majority(study: Study, name: str, claim: str, rate: float, classes: tuple[str, ...]) -> dict:
    found = share_of_runs(study, rate, classes)
    if found is None:
        return untested(name, claim, rate)
    verdict = "confirmed" if found["count"] >= HALF * found["n"] else "refuted"
    words = " or ".join(classes)
    evidence = f"{words} in {found['count']} of {found['n']} seeds, {bounds(found['interval'], '.0%')} of runs"
    return hypothesis(
        name, claim, verdict, evidence, value=found["count"] / found["n"], interval=found["interval"], n=found["n"]
    )


def high_is_unstable(study: Study) -> dict:
    claim = f"{HIGH:g} is unstable later: unstable or diverged in at least half of the seeds"
    return majority(study, "H3b", claim, HIGH, ("diverged", "unstable"))


def very_high_diverges(study: Study) -> dict:
    claim = f"{VERY_HIGH:g} diverges in at least half of the seeds"
    return majority(study, "H4", claim, VERY_HIGH, ("diverged",))


HYPOTHESES = (very_low_is_slow, standard_is_good, high_starts_fast, high_is_unstable, very_high_diverges)


def hypotheses(study: Study) -> list[dict]:
    return [test(study) for test in HYPOTHESES]


def finite(values: list[float | None]) -> np.ndarray:
    """The finite ones of some values, as an array."""
    return np.array([v for v in values if v is not None and math.isfinite(v)])
