"""The seed's hypotheses as numbers, fixed before the runs, with verdicts: confirmed, refuted, inconclusive."""

import math

from analysis.behaviour import FAST_START, GAIN
from analysis.statistics import basin_verdict, excess, interval, paired_difference, wilson
from analysis.study import Study, gain_interval, median_steps
from analysis.wording import bounds, plural, rate_label
from analysis.wording import steps as steps_text

VERY_LOW, STANDARD, HIGH, VERY_HIGH = 1e-5, 2e-4, 1e-3, 5e-3  # the seed's rates
SLOWER = 2.0  # times the steps of the standard rate to reach 80 % of the gain
HALF = 0.5  # share of the seeds


def hypothesis(name: str, claim: str, verdict: str, evidence: str, **numbers: object) -> dict:
    return {"name": name, "claim": claim, "verdict": verdict, "evidence": evidence, **numbers}


def untested(name: str, claim: str, rate: float) -> dict:
    return hypothesis(name, claim, "not tested", f"no run at {rate_label(rate)} counts", n=0, interval=None)


def share_of_runs(study: Study, rate: float, classes: tuple[str, ...]) -> dict | None:
    """How many of the rate's ended runs are in these classes, with Wilson's interval."""
    ended = [study.verdicts[run.id].behaviour for run in study.at(rate)]
    ended = [behaviour for behaviour in ended if behaviour != "incomplete"]
    if not ended:
        return None
    count = sum(behaviour in classes for behaviour in ended)
    return {"count": count, "n": len(ended), "interval": list(wilson(count, len(ended)))}


def very_low_is_slow(study: Study) -> dict:
    low, standard = rate_label(VERY_LOW), rate_label(STANDARD)
    claim = f"{low} is slow: G below {GAIN:.2f}, and more than {SLOWER:g} × the steps of {standard} to 80 % of the gain"
    place = study.index(VERY_LOW)
    steps, others = median_steps(study, VERY_LOW, 0.8), median_steps(study, STANDARD, 0.8)
    if place is None or steps is None:
        return untested("H1", claim, VERY_LOW)
    gain = (study.base_loss - study.comparison.loss[place]) / (study.base_loss - study.best_loss)
    limits = gain_interval(study, place)
    slower = math.isinf(steps) or (others is not None and steps > SLOWER * others)
    lower, upper = limits or (gain, gain)
    if upper < GAIN and slower:
        verdict = "confirmed" if limits else "inconclusive"
    elif lower >= GAIN or (not slower and others is not None):
        verdict = "refuted"
    else:
        verdict = "inconclusive"
    planned = study.planned_steps
    evidence = (
        f"G = {gain:.2f}, {bounds(limits, '.2f')}; {steps_text(steps, planned)} steps to 80 % of the gain, "
        f"{steps_text(others, planned) if others is not None else 'no run'} at {standard}"
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
    claim = f"{rate_label(STANDARD)} is good: stable in every seed, and inside the basin of the best rate"
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
    evidence = f"stable in {stable['count']} of {plural(stable['n'], 'seed')}; {words}"
    return hypothesis("H2", claim, outcome, evidence, interval=limits, n=stable["n"])


def high_starts_fast(study: Study) -> dict:
    claim = f"{rate_label(HIGH)} drops faster at first: lower train loss than {rate_label(STANDARD)} over steps 5–10 %"
    pairs = [(a["train/loss"], b["train/loss"]) for a in study.at(HIGH) for b in study.at(STANDARD) if a.seed == b.seed]
    planned = study.planned_steps or 0
    found = paired_difference(pairs, FAST_START[0] * planned, FAST_START[1] * planned)
    if found is None:
        return untested("H3a", claim, HIGH)
    low, high = found["interval"]
    verdict = "confirmed" if high < 0 else "refuted" if low > 0 else "inconclusive"
    evidence = (
        f"{found['mean']:+.3f} nats per token, {bounds(found['interval'])}, "
        f"{plural(found['seeds'], 'seed')} × {found['steps']} paired steps"
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
    n, share = found["n"], found["count"] / found["n"]
    evidence = (
        f"{words} in {found['count']} of {plural(n, 'seed')}; share {share:.2f}, {bounds(found['interval'], '.2f')}"
    )
    return hypothesis(name, claim, verdict, evidence, value=share, interval=found["interval"], n=n)


def high_is_unstable(study: Study) -> dict:
    claim = f"{rate_label(HIGH)} is unstable later: unstable or diverged in at least half of the seeds"
    return majority(study, "H3b", claim, HIGH, ("diverged", "unstable"))


def very_high_diverges(study: Study) -> dict:
    claim = f"{rate_label(VERY_HIGH)} diverges in at least half of the seeds"
    return majority(study, "H4", claim, VERY_HIGH, ("diverged",))


HYPOTHESES = (very_low_is_slow, standard_is_good, high_starts_fast, high_is_unstable, very_high_diverges)


def hypotheses(study: Study) -> list[dict]:
    return [test(study) for test in HYPOTHESES]
