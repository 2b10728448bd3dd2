"""The behaviour of one run: eight classes, first match wins, each verdict with the step and the number that fired.

The classes are the rows of DYNAMICS and OUTCOMES, in order; docs/behaviour.md has their confusion matrix.
Losses are in nats per token, ratios have no unit, steps are optimiser steps.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.curves import paired_ratio, paired_se, robust_z, rolling_median, roughness
from analysis.runs import COMPLETE, TAIL, TAIL_STEPS, Run, Series

# Thresholds: unit, and why this value.
TAIL_RISE = 1.5  # ratio D of the tail's median loss to the smoothed minimum: 0 % false alarms at 15 % batch noise
RISE_OF_FALL = 0.10  # share of the fall so far that a rise must undo: a ratio alone fires on losses near zero
UNIFORM_SHARE = 0.9  # of ln(vocabulary), the loss of a uniform guess: at that loss the model says nothing
EARLY = 0.10  # share of the steps within which divergence is called early (or within the warm-up, if longer)
SPIKE_Z = 4.0  # robust standard deviations above the causal median
SPIKE_RATIO = 1.15  # and relative height: z alone fires on very quiet curves
SPIKE_STEPS = 3  # consecutive steps: heavy-tailed batches make one or two, not three
SPIKE_WINDOW = (20, 64)  # steps in the causal window, T/4 between these: short enough to follow the descent
SPIKE_HISTORY = 10  # steps before the first z: a median of fewer is noise
BUMP_RATIO = 1.2  # ratio R of the smoothed loss to its running minimum
BUMP_NOISE = 10.0  # standard errors of the rolling median that a bump must exceed: 6 fire on 25 % of quiet runs
REBOUND_NATS = 0.01  # rise of the eval loss above its minimum that matters
REBOUND_SE = 2.0  # and paired standard errors over examples that it must exceed
REBOUND_ROUGHNESS = 4.0  # and standard deviations of the eval curve about its own course: steps are noisy as well
REBOUND_NOISE = 3.0  # standard errors of the rolling median by which the train loss must have risen too, to be unstable
REBOUND_SHARE = 0.10  # last share of the steps in which every evaluation must show the rebound: one may be luck
GAIN = 0.90  # captured gain G from which a run is as good as a small refinement away from the best
FALLING_SHARE = 0.25  # last share of the steps over which "still falling" is judged
FALLING_GAIN = 0.01  # share of l0 − l* by which the eval loss must fall there
FALLING_ROUGHNESS = 3.0  # and standard deviations of the eval curve about its own course
CLIP_BOUND = 0.5  # share of clipped steps from which clipping, not the rate, sets the step (Tuning Playbook)
FAST_START = (0.05, 0.10)  # shares of the steps between which "fast start" compares train losses

BEHAVIOURS = (
    "incomplete",
    "diverged",
    "unstable",
    "overfitting",
    "slow",
    "plateaued",
    "stable, suboptimal",
    "stable, good",
)


@dataclass(frozen=True)
class Verdict:
    """A behaviour class with the step and the number that decided it, in words."""

    behaviour: str
    step: int | None
    measured: float | None
    reason: str


@dataclass
class Evidence:
    """What the classes are decided on: one run, its reference (the lowest rate, same seed), and the study's losses."""

    run: Run
    reference: Run | None = None
    base_loss: float | None = None  # l0, nats per token
    best_loss: float | None = None  # l*, nats per token; None until the best rate is known
    near_best: bool | None = None  # is its rate inside the basin? None until that is known

    @cached_property
    def train(self) -> Series:
        return self.run["train/loss"].finite

    @cached_property
    def width(self) -> int:
        return max(9, int(0.05 * (self.run.planned_steps or 0)) // 2 * 2 + 1)

    @cached_property
    def smoothed(self) -> np.ndarray:
        """lm_t (n,): rolling median of the train loss."""
        return rolling_median(self.train.value, self.width)

    @cached_property
    def noise(self) -> float:
        """Relative standard error of the rolling median: 1.25 robust sd of l_t/lm_t over sqrt(width)."""
        if not len(self.train):
            return 0.0
        residual = self.train.value / self.smoothed - 1
        return 1.25 * 1.4826 * float(np.median(np.abs(residual - np.median(residual)))) / math.sqrt(self.width)

    @cached_property
    def long_enough(self) -> bool:
        """Whether ratios to the smoothed minimum mean anything: enough steps, and a minimum above 0."""
        return len(self.train) >= 2 * TAIL_STEPS and float(self.smoothed.min()) > 0

    @cached_property
    def tail(self) -> np.ndarray:
        """Whether each step (n,) is among the last 10 % (at least 10)."""
        return self.train.step > self.run.last_step - max(TAIL_STEPS, TAIL * (self.run.planned_steps or 0))

    @cached_property
    def tail_rise(self) -> float | None:
        """D = median loss over the last 10 % of the steps over the minimum of lm_t."""
        if not self.long_enough or not self.tail.any():
            return None
        return float(np.median(self.train.value[self.tail]) / self.smoothed.min())

    @cached_property
    def late_rise(self) -> float | None:
        """The same over the minimum of lm_t before those steps: below 1 while the loss still falls."""
        if not self.long_enough or not self.tail.any() or self.tail.all():
            return None
        return float(np.median(self.train.value[self.tail]) / self.smoothed[~self.tail].min())

    @cached_property
    def bump(self) -> tuple[float, int] | None:
        """R = max over t > warm-up of lm_t / min_{s<t} lm_s, and its step; only rises that undo RISE_OF_FALL count."""
        if not self.long_enough:
            return None
        lowest = np.minimum.accumulate(self.smoothed)
        before = np.concatenate([lowest[:1], lowest[:-1]])
        fall = self.smoothed[0] - before
        counts = (self.train.step > self.run.warmup_steps) & (self.smoothed - before >= RISE_OF_FALL * fall)
        if not counts.any():
            return None
        ratio = np.where(counts, self.smoothed / before, 0.0)
        return float(ratio.max()), int(self.train.step[ratio.argmax()])

    @cached_property
    def roughness(self) -> float:
        """Standard deviation, in nats, of the eval loss about its own course over the second half of the run."""
        return roughness(self.run["eval/loss"].finite.between((self.run.planned_steps or 0) / 2, np.inf).value)

    @cached_property
    def gain(self) -> float | None:
        """G = (l0 − E)/(l0 − l*)."""
        return captured_gain(self.run.final_eval_loss, self.base_loss, self.best_loss)

    @cached_property
    def clipped(self) -> float | None:
        """Share of the steps whose gradient norm exceeds max_grad_norm; None if either is not recorded."""
        limit, norms = self.run.config.get("max_grad_norm"), self.run["train/grad_norm"]
        if not isinstance(limit, int | float) or limit <= 0 or not len(norms):
            return None
        return float(np.mean(~(norms.value <= limit)))


def captured_gain(loss: float | None, base_loss: float | None, best_loss: float | None) -> float | None:
    """G: 1 the best, 0 no better than untrained, < 0 harmed; None unless the best rate improved on the base."""
    if None in (loss, base_loss, best_loss) or not base_loss > best_loss or not math.isfinite(loss):
        return None
    return (base_loss - loss) / (base_loss - best_loss)


def incomplete(e: Evidence) -> Verdict | None:
    run = e.run
    broken = any(not np.isfinite(run[c].value).all() for c in ("train/loss", "train/grad_norm", "eval/loss"))
    if run.complete or broken or run.diverged_at_step is not None:
        return None
    share = run.last_step / run.planned_steps if run.planned_steps else 0.0
    reason = f"{run.last_step} of {run.planned_steps or 'unknown'} planned steps, below {100 * COMPLETE:g} %"
    return Verdict("incomplete", run.last_step, share, reason)


def not_finite(e: Evidence) -> Verdict | None:
    names = {"train/loss": "train loss", "train/grad_norm": "gradient norm", "eval/loss": "eval loss"}
    lost = []
    for column, name in names.items():
        series = e.run[column]
        bad = ~np.isfinite(series.value)
        if len(series) and bad[-1]:
            start = len(bad) - int(np.argmin(bad[::-1])) if not bad.all() else 0
            lost.append((int(series.step[start]), name, float(series.value[start])))
    stop = e.run.diverged_at_step
    if not lost and stop is None:
        return None
    if not lost or (stop is not None and stop < min(lost)[0]):
        return Verdict("diverged", stop, None, f"training stopped itself as diverged at step {stop}")
    step, name, value = min(lost)
    return Verdict("diverged", step, value, f"{name} not finite from step {step} on")


def harmed(e: Evidence) -> Verdict | None:
    loss, base = e.run.final_eval_loss, e.base_loss
    if loss is None or base is None or loss < base:
        return None
    series = e.run["eval/loss"]
    worse = ~(series.value <= base)  # equal is not yet worse: a warm-up's first rate is 0
    start = len(worse) - int(np.argmin(worse[::-1])) if not worse.all() else min(1, len(worse) - 1)
    start = min(start, len(worse) - 1)
    step = int(series.step[start])
    return Verdict("diverged", step, loss, f"final eval loss {loss:.3f} ≥ untrained {base:.3f}, so from step {step} on")


def rose(e: Evidence) -> Verdict | None:
    ratio = e.tail_rise
    if ratio is None or ratio <= TAIL_RISE:
        return None
    low = e.smoothed.min()
    if ratio * low - low < RISE_OF_FALL * (e.smoothed[0] - low):
        return None
    after = np.arange(len(e.smoothed)) > e.smoothed.argmin()
    high = np.flatnonzero(after & (e.smoothed > TAIL_RISE * low))
    step = int(e.train.step[high[0]]) if len(high) else e.run.last_step
    reason = f"train loss ended at {ratio:.2f} × its smoothed minimum (limit {TAIL_RISE}), above that from step {step}"
    return Verdict("diverged", step, ratio, reason)


def uniform(e: Evidence) -> Verdict | None:
    vocabulary = e.run.config.get("vocab_size")
    if not isinstance(vocabulary, int | float) or vocabulary <= 1 or len(e.train) < 2 * TAIL_STEPS:
        return None
    limit = UNIFORM_SHARE * math.log(vocabulary)
    tail = float(np.median(e.train.value[-max(TAIL_STEPS, int(TAIL * len(e.train))) :]))
    if tail <= limit or (e.base_loss is not None and e.base_loss > limit):
        return None  # a base that starts there says nothing about the rate
    step = int(e.train.step[np.flatnonzero(e.smoothed > limit)[0]]) if (e.smoothed > limit).any() else e.run.last_step
    reason = f"train loss ended at {tail:.2f} > {UNIFORM_SHARE} ln(vocabulary) = {limit:.2f}, from step {step} on"
    return Verdict("diverged", step, tail, reason)


def recovered_nan(e: Evidence) -> Verdict | None:
    for column, name in (
        ("train/loss", "train loss"),
        ("train/grad_norm", "gradient norm"),
        ("eval/loss", "eval loss"),
    ):
        bad = ~np.isfinite(e.run[column].value)
        if bad.any():
            step = int(e.run[column].step[bad.argmax()])
            reason = f"{name} not finite at step {step} ({int(bad.sum())} steps), recovered"
            return Verdict("unstable", step, float(bad.sum()), reason)
    return None


def spiked(e: Evidence) -> Verdict | None:
    series = paired_ratio(e.run, e.reference) or e.train
    if len(series) <= SPIKE_HISTORY:
        return None
    low, high = SPIKE_WINDOW
    z, centre = robust_z(series.value, min(high, max(low, (e.run.planned_steps or 0) // 4)), SPIKE_HISTORY)
    hot = (z >= SPIKE_Z) & (series.value >= SPIKE_RATIO * np.nan_to_num(centre, nan=np.inf))
    streak = np.convolve(hot, np.ones(SPIKE_STEPS, int))[: len(hot)] == SPIKE_STEPS
    if not streak.any():
        return None
    first = int(streak.argmax()) - SPIKE_STEPS + 1
    worst = float(z[first : first + SPIKE_STEPS].max())
    what = "train loss" if series is e.train else "paired loss ratio"
    reason = f"{what} ≥ {SPIKE_STEPS} steps at z ≥ {SPIKE_Z:g} from step {series.step[first]} (z = {worst:.1f} there)"
    return Verdict("unstable", int(series.step[first]), worst, reason)


def bumped(e: Evidence) -> Verdict | None:
    limit = max(BUMP_RATIO, 1 + BUMP_NOISE * e.noise)
    if e.bump is None or e.bump[0] <= limit:
        return None
    ratio, step = e.bump
    reason = f"smoothed train loss rose to {ratio:.2f} × its minimum before, at step {step} (limit {limit:.2f})"
    return Verdict("unstable", step, ratio, reason)


def rebound(e: Evidence) -> tuple[float, int] | None:
    """Smallest rise of the eval loss above its minimum over the last evaluations, in nats, and the minimum's step."""
    series = e.run["eval/loss"].finite
    late = series.between((1 - REBOUND_SHARE) * (e.run.planned_steps or 0), np.inf)
    if len(late) < 2:
        return None
    lowest = int(series.value.argmin())
    rise = float(late.value.min() - series.value[lowest])
    limit = max(
        REBOUND_NATS,
        REBOUND_SE * paired_se(e.run.eval_nll, int(late.step[-1]), int(series.step[lowest])),
        REBOUND_ROUGHNESS * e.roughness,
    )
    return (rise, int(series.step[lowest])) if rise > limit else None


def rebounded(e: Evidence) -> Verdict | None:
    found = rebound(e)
    if found is None:
        return None
    rise, step = found
    words = f"eval loss ended ≥ {rise:.3f} above its minimum of step {step}"
    margin, ratio = 1 + REBOUND_NOISE * e.noise, e.late_rise
    if ratio is not None and ratio > margin:
        reason = f"{words}, and train loss at {ratio:.2f} × its minimum before (limit {margin:.2f})"
        return Verdict("unstable", step, rise, reason)
    return Verdict("overfitting", step, rise, f"{words}, while train loss is at its minimum")


def no_end(e: Evidence) -> Verdict | None:
    """A run whose end cannot be valued: no final eval loss, or no rate that improved on the base."""
    if e.gain is not None:
        return None
    missing = (
        "no final eval loss" if e.run.final_eval_loss is None else "no eval loss at step 0, or no rate improved on it"
    )
    return Verdict("incomplete", e.run.last_step, None, f"{missing} to judge its end by")


def small_gain(e: Evidence) -> Verdict | None:
    if e.gain >= GAIN:
        return None
    series = e.run["eval/loss"].finite
    before = series.between(0, (1 - FALLING_SHARE) * e.run.planned_steps)
    fell = float(before.value[-1] - series.value[-1]) if len(before) else 0.0
    least = max(FALLING_GAIN * (e.base_loss - e.best_loss), FALLING_ROUGHNESS * e.roughness)
    late = f"the last {100 * FALLING_SHARE:g} % of the steps"
    words = f"captured {100 * e.gain:.0f} % of the gain; eval loss fell {fell:.3f} over {late}"
    behaviour = "slow" if fell > least else "plateaued"
    return Verdict(behaviour, e.run.last_step, e.gain, words)


def stable(e: Evidence) -> Verdict | None:
    where = "inside" if e.near_best else "outside"
    reason = f"captured {100 * e.gain:.0f} % of the gain, {where} the best rates' basin, no instability"
    return Verdict("stable, good" if e.near_best else "stable, suboptimal", e.run.last_step, e.gain, reason)


# The order is the definition: the first that returns a verdict decides.
DYNAMICS = (incomplete, not_finite, harmed, rose, uniform, recovered_nan, spiked, bumped, rebounded)
OUTCOMES = (no_end, small_gain, stable)


def dynamics(e: Evidence) -> Verdict | None:
    """The verdict of classes 0–3, which need no other rate; None for a run that only its outcome classifies."""
    return next((verdict for detect in DYNAMICS if (verdict := detect(e))), None)


def outcome(e: Evidence) -> Verdict:
    """The verdict of classes 4–7; `e` holds the study's l0, l* and whether the rate is inside the basin."""
    return next(verdict for detect in OUTCOMES if (verdict := detect(e)))


def classify(e: Evidence) -> Verdict:
    """The verdict of all eight classes."""
    return dynamics(e) or outcome(e)


def onset(verdict: Verdict, run: Run) -> str | None:
    """When a diverged run diverged: early (within the warm-up or the first 10 % of the steps) or mid."""
    if verdict.behaviour != "diverged":
        return None
    return "early" if verdict.step <= max(run.warmup_steps, EARLY * (run.planned_steps or 0)) else "mid"
