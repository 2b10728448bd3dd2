"""The behaviour of one run: nine classes, first match wins, each verdict with the step and the number that fired.

The classes are the rows of DYNAMICS and OUTCOMES, in order; docs/behaviour.md has their confusion matrix.
Losses are in nats per token, ratios have no unit, steps are optimiser steps.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.curves import (
    batch_difficulty,
    onset_of_rise,
    paired_ratio,
    paired_se,
    robust_z,
    rolling_median,
    roughness,
)
from analysis.runs import COMPLETE, TAIL, TAIL_STEPS, Run, Series
from analysis.words import plural

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
REBOUND_NATS = 0.01  # rise of the eval loss above its minimum that matters, in nats per token
REBOUND_RELATIVE = 0.01  # ... or as a share of that minimum, if more: the same 1 % that bounds the basin
REBOUND_SE = 2.0  # and paired standard errors over examples that it must exceed
REBOUND_ROUGHNESS = 4.0  # and standard deviations of the eval curve about its own course: steps are noisy as well
REBOUND_SHARE = 0.10  # last share of the steps in which every evaluation must show the rebound: one may be luck
TRAIN_RISE = 0.10  # rise, on the log scale, of the train loss on equal batches that makes a rebound an instability
TRAIN_RISE_SE = 5.0  # and standard errors of the rolling median: its minimum is selected among many
BATCH_SLOPE = 3.0  # most by which a batch's difficulty may count more for this run than for the reference
ONSET_SHARE = 0.10  # share of the fall l0 − e_min that the eval loss must lose for good, for divergence to have begun
GAIN = 0.90  # captured gain G from which a run is as good as a small refinement away from the best
FALLING_SHARE = 0.25  # last share of the steps over which "still falling" is judged
FALLING_GAIN = 0.01  # share of l0 − l* by which the eval loss must fall there
FALLING_ROUGHNESS = 3.0  # and standard deviations of the eval curve about its own course
FAST_START = (0.05, 0.10)  # shares of the steps between which "fast start" compares train losses

BEHAVIOURS = (
    "incomplete",
    "diverged",
    "unstable",
    "overfitting",
    "drifting",
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
    def levelled(self) -> Series | None:
        """The train loss on equal batches: how hard each batch is taken out of it. None without a reference.

        d_t = log l_t(reference) − log e_t(reference), centred, is how hard a batch is: the reference's train loss over
        its own eval curve. log l_t − b·d_t, with b the slope between the noise of the two, within 0 and BATCH_SLOPE.
        """
        hard = batch_difficulty(self.reference) if self.reference not in (None, self.run) else None
        if hard is None or not len(self.train):
            return None
        keep = np.isin(self.train.step, hard.step) & (self.train.value > 0)
        if keep.sum() < 0.9 * len(keep):
            return None
        step, u = self.train.step[keep], np.log(self.train.value[keep])
        d = hard.value[np.isin(hard.step, step)]
        noise, difficulty = u - rolling_median(u, self.width), d - rolling_median(d, self.width)
        power = float((difficulty**2).sum())
        slope = float(np.clip((noise * difficulty).sum() / power, 0, BATCH_SLOPE)) if power > 0 else 0.0
        return Series(step, np.exp(u - slope * d))

    def error(self, values: np.ndarray, smooth: np.ndarray) -> float:
        """Relative standard error of a rolling median: 1.25 robust sd of values/smooth over sqrt(width)."""
        left = values / smooth - 1
        return 1.25 * 1.4826 * float(np.median(np.abs(left - np.median(left)))) / math.sqrt(self.width)

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
    def train_rise(self) -> tuple[float, float] | None:
        """Rise of the train loss on equal batches over the last 10 % of the steps, and what it must exceed; log scale.

        The median over the tail against the minimum of the rolling median before.
        """
        tail = None if self.levelled is None else np.isin(self.levelled.step, self.train.step[self.tail])
        if tail is None or not self.long_enough or not tail.any() or tail.all():
            return None
        values = self.levelled.value
        smooth = rolling_median(values, self.width)
        rise = math.log(float(np.median(values[tail])) / float(smooth[~tail].min()))
        return rise, max(TRAIN_RISE, TRAIN_RISE_SE * self.error(values, smooth))

    @cached_property
    def divergence(self) -> dict:
        """Minimum of the eval loss, onset of its rise, crossing of l0, last finite value, first step not finite.

        (step, nats per token) each, None where there is none. The onset is the first evaluation after the minimum from
        which on the eval loss never again comes below e_min + ONSET_SHARE·(l0 − e_min).
        """
        evals, base = self.run["eval/loss"].finite, self.base_loss
        found = dict.fromkeys(("minimum", "onset", "crossing", "last"))
        if len(evals):
            low = int(evals.value.argmin())
            at = {"minimum": low, "last": len(evals) - 1}
            start = evals.value[0] if base is None else base
            at["onset"] = onset_of_rise(
                evals.value, float(evals.value[low] + ONSET_SHARE * (start - evals.value[low])), low
            )
            # Equal to l0 is not yet worse: a warm-up's first rate is 0.
            at["crossing"] = None if base is None else onset_of_rise(evals.value, np.nextafter(base, np.inf), 0)
            places = {key: place for key, place in at.items() if place is not None}
            found |= {key: (int(evals.step[place]), float(evals.value[place])) for key, place in places.items()}
        return found | {"not_finite": self.run.not_finite_step}

    @cached_property
    def bump(self) -> tuple[float, int, float] | None:
        """R = max over t > warm-up of lm_t / min_{s<t} lm_s, its step and its limit; on equal batches where known.

        Only rises that undo RISE_OF_FALL count.
        """
        if not self.long_enough:
            return None
        train = self.levelled or self.train
        smooth = rolling_median(train.value, self.width)
        lowest = np.minimum.accumulate(smooth)
        before = np.concatenate([lowest[:1], lowest[:-1]])
        counts = (train.step > self.run.warmup_steps) & (smooth - before >= RISE_OF_FALL * (smooth[0] - before))
        if not counts.any():
            return None
        ratio = np.where(counts, smooth / before, 0.0)
        limit = max(BUMP_RATIO, 1 + BUMP_NOISE * self.error(train.value, smooth))
        return float(ratio.max()), int(train.step[ratio.argmax()]), limit

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


def course(e: Evidence) -> str:
    """How a diverged run went: lowest, rising for good, above untrained, last finite, not finite."""
    d, parts = e.divergence, []
    if d["minimum"] is not None and d["onset"] is not None:
        parts.append(f"eval loss lowest at step {d['minimum'][0]} ({d['minimum'][1]:.3f})")
        parts.append(f"rising for good from step {d['onset'][0]}")
    if d["crossing"] is not None:
        parts.append(f"above the untrained {e.base_loss:.3f} from step {d['crossing'][0]}")
    if d["last"] is not None:
        parts.append(f"last finite {d['last'][1]:.3f} at step {d['last'][0]}")
    return ", ".join(parts)


def first_bad(e: Evidence, otherwise: int) -> int:
    """The step at which a diverged run began to: the onset in its eval curve, else that of the sign that fired."""
    onset = e.divergence["onset"]
    return onset[0] if onset is not None and onset[0] < otherwise else otherwise


def fault(e: Evidence) -> Verdict | None:
    """A run that an instrument fault cut off, and that had not diverged by its loss before."""
    step = e.run.fault_step
    if step is None or worse_than_untrained(e):
        return None
    reason = f"cut off by an instrument fault at step {step}, which says nothing about its rate"
    return Verdict("incomplete", e.run.last_step, None, reason)


def worse_than_untrained(e: Evidence) -> bool:
    """Whether the eval loss fell, rose for good and ended above the untrained model's, wherever the run ended."""
    d = e.divergence
    if None in (d["onset"], d["crossing"]):
        return False
    (_, low), (_, last) = d["minimum"], d["last"]
    return last - low > max(REBOUND_NATS, REBOUND_RELATIVE * low)


def incomplete(e: Evidence) -> Verdict | None:
    run = e.run
    if run.complete or run.not_finite_step is not None or run.diverged_at_step is not None or worse_than_untrained(e):
        return None
    share = run.last_step / run.planned_steps if run.planned_steps else 0.0
    reason = f"{run.last_step} of {run.planned_steps or 'unknown'} planned steps, below {100 * COMPLETE:g} %"
    return Verdict("incomplete", run.last_step, share, reason)


def harmed(e: Evidence) -> Verdict | None:
    loss, base, last = e.run.final_eval_loss, e.base_loss, e.divergence["last"]
    ended = loss is not None and base is not None and loss >= base
    if last is None or not (ended or worse_than_untrained(e)):
        return None
    crossing = e.divergence["crossing"] or last
    words = course(e) if e.divergence["onset"] else f"final eval loss {last[1]:.3f} ≥ untrained {base:.3f}"
    return Verdict("diverged", first_bad(e, crossing[0]), last[1], words)


def not_finite(e: Evidence) -> Verdict | None:
    names = {"train/loss": "train loss", "train/grad_norm": "gradient norm", "eval/loss": "eval loss"}
    lost = []
    for column, name in names.items():
        series = e.run[column]
        bad = ~np.isfinite(series.value)
        if len(series) and bad[-1]:
            start = len(bad) - int(np.argmin(bad[::-1])) if not bad.all() else 0
            lost.append((int(series.step[start]), name, float(series.value[start])))
    stop = e.run.diverged_at_step if e.run.fault_step is None else None
    if not lost and stop is None:
        return None
    if not lost or (stop is not None and stop < min(lost)[0]):
        step, value, words = stop, None, f"training stopped itself as diverged at step {stop}"
    else:
        step, name, value = min(lost)
        words = f"{name} not finite from step {step} on"
    before = course(e)
    return Verdict("diverged", first_bad(e, step), value, f"{before}; {words}" if before else words)


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
    return Verdict("diverged", first_bad(e, step), ratio, reason)


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
    return Verdict("diverged", first_bad(e, step), tail, reason)


def recovered_nan(e: Evidence) -> Verdict | None:
    for column, name in (
        ("train/loss", "train loss"),
        ("train/grad_norm", "gradient norm"),
        ("eval/loss", "eval loss"),
    ):
        bad = ~np.isfinite(e.run[column].value)
        if bad.any():
            step = int(e.run[column].step[bad.argmax()])
            reason = f"{name} not finite at step {step} ({plural(int(bad.sum()), 'step')}), recovered"
            return Verdict("unstable", step, float(bad.sum()), reason)
    return None


def spiked(e: Evidence) -> Verdict | None:
    series = paired_ratio(e.run, e.reference) or e.train
    if len(series) <= SPIKE_HISTORY:
        return None
    low, high = SPIKE_WINDOW
    z, centre = robust_z(series.value, min(high, max(low, (e.run.planned_steps or 0) // 4)), SPIKE_HISTORY, SPIKE_RATIO)
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
    if e.bump is None or e.bump[0] <= e.bump[2]:
        return None
    ratio, step, limit = e.bump
    batches = "" if e.levelled is None else " on equal batches"
    reason = (
        f"smoothed train loss{batches} rose to {ratio:.2f} × its minimum before, at step {step} (limit {limit:.2f})"
    )
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
        REBOUND_RELATIVE * float(series.value[lowest]),
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
    if e.train_rise is not None:
        up, limit = (math.expm1(value) for value in e.train_rise)
        words += f", train loss on equal batches {100 * up:+.0f} % from its own minimum (limit {100 * limit:.0f} %)"
        if up > limit:
            return Verdict("unstable", step, rise, words)
    passes = e.run.passes
    if passes is not None and passes <= 1:
        return Verdict("drifting", step, rise, f"{words}; no example was seen twice in {passes:.2f} passes")
    seen = "passes over the data not recorded" if passes is None else f"{passes:.2f} passes over the data"
    return Verdict("overfitting", step, rise, f"{words}; {seen}")


def no_end(e: Evidence) -> Verdict | None:
    """A run whose end cannot be valued: no final eval loss, or no rate that improved on the base."""
    if e.gain is not None:
        return None
    missing = (
        (e.run.final_eval_loss, "no final eval loss"),
        (e.base_loss, "no eval loss at step 0"),
        (e.best_loss, "no rate whose runs all ended"),
    )
    reason = next((words for loss, words in missing if loss is None), "no rate that improved on the untrained model")
    return Verdict("incomplete", e.run.last_step, None, f"{reason} to judge its end by")


def small_gain(e: Evidence) -> Verdict | None:
    if e.gain >= GAIN:
        return None
    series = e.run["eval/loss"].finite
    before = series.between(0, (1 - FALLING_SHARE) * e.run.planned_steps)
    fell = float(before.value[-1] - series.value[-1]) if len(before) else 0.0
    least = max(FALLING_GAIN * (e.base_loss - e.best_loss), FALLING_ROUGHNESS * e.roughness)
    late = f"the last {100 * FALLING_SHARE:g} % of the steps"
    moved = f"{'fell' if fell >= 0 else 'rose'} {abs(fell):.3f}"
    words = f"captured {100 * e.gain:.0f} % of the gain; eval loss {moved} over {late}"
    behaviour = "slow" if fell > least else "plateaued"
    return Verdict(behaviour, e.run.last_step, e.gain, words)


def stable(e: Evidence) -> Verdict | None:
    where = "within" if e.near_best else "outside"
    reason = f"captured {100 * e.gain:.0f} % of the gain, its rate's mean {where} the margin, no instability"
    return Verdict("stable, good" if e.near_best else "stable, suboptimal", e.run.last_step, e.gain, reason)


# The order is the definition: the first that returns a verdict decides.
DYNAMICS = (fault, incomplete, harmed, not_finite, rose, uniform, recovered_nan, spiked, bumped, rebounded)
OUTCOMES = (no_end, small_gain, stable)


def dynamics(e: Evidence) -> Verdict | None:
    """The verdict of the classes up to drifting, which need no other rate; None if only the outcome classifies."""
    return next((verdict for detect in DYNAMICS if (verdict := detect(e))), None)


def outcome(e: Evidence) -> Verdict:
    """The verdict of the classes from slow on; `e` holds the study's l0 and l*, and whether the rate is near best."""
    return next(verdict for detect in OUTCOMES if (verdict := detect(e)))


def classify(e: Evidence) -> Verdict:
    """The verdict of all nine classes."""
    return dynamics(e) or outcome(e)


def tells(run: Run, verdict: Verdict) -> bool:
    """Whether a run says something of its rate: it has reached its end, or lost its way; a crash says nothing."""
    return verdict.behaviour != "incomplete" or run.end is not None


def onset(verdict: Verdict, run: Run) -> str | None:
    """When a diverged run diverged: early (within the warm-up or the first 10 % of the steps) or mid."""
    if verdict.behaviour != "diverged":
        return None
    return "early" if verdict.step <= max(run.warmup_steps, EARLY * (run.planned_steps or 0)) else "mid"
