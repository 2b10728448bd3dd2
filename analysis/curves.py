"""The mathematics of one run's curves: smoothing, robust z, paired ratio, crossings. Losses in nats per token."""

import math
from bisect import insort

import numpy as np
from scipy.ndimage import median_filter

from analysis.runs import EvalNLL, Run, Series
from analysis.statistics import clustered


def rolling_median(values: np.ndarray, width: int) -> np.ndarray:
    """Centred median (n,) over an odd `width`; at the ends over the part of the window that exists."""
    n, half = len(values), min(width, 2 * len(values) + 1) // 2
    out = median_filter(values, 2 * half + 1, mode="nearest") if n else np.empty(0)
    ends = min(half, n)
    out[:ends] = opening_medians(values, half)[:ends]
    out[n - ends :] = opening_medians(values[::-1], half)[:ends][::-1]
    return out


def opening_medians(values: np.ndarray, half: int) -> list[float]:
    """Medians of the first half + 1, half + 2, ... values, for the first `half` places of a rolling median."""
    window: list[float] = []
    found: list[float] = []
    for entering, value in enumerate(values[: 2 * half].tolist()):
        insort(window, value)
        if entering >= half:
            middle = len(window) // 2
            found.append(window[middle] if len(window) % 2 else (window[middle - 1] + window[middle]) / 2)
    return (
        found + found[-1:] * (half - len(found)) if found else [float(np.median(values))] * half if len(values) else []
    )


def ema(values: np.ndarray, planned_steps: int) -> np.ndarray:
    """Bias-corrected exponential mean (n,), for display only; a non-finite value breaks the line where it stands."""
    b, mean, weight, out = (0.9 if planned_steps <= 200 else 0.98), 0.0, 0.0, np.full(len(values), np.nan)
    for t, value in enumerate(values):
        if math.isfinite(value):
            mean, weight = b * mean + (1 - b) * value, b * weight + (1 - b)
            out[t] = mean / weight
    return out


def robust_z(values: np.ndarray, window: int, history: int, least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """z (n,) of each value against the median and MAD of the `window` values before it, and that median (n,).

    The scale is max(1.4826·MAD, 1 % of the median); z is 0 until `history` values exist, and for values below `least`
    times the median, whose MAD need not be known.
    """
    n, centre, spread = len(values), np.full(len(values), np.nan), np.full(len(values), np.nan)
    for t in range(history, min(window, n)):
        centre[t] = np.median(values[:t])
        spread[t] = np.median(np.abs(values[:t] - centre[t]))
    if n > window:
        before = np.lib.stride_tricks.sliding_window_view(values[:-1], window)
        centre[window:] = np.median(before, axis=1)
        high = np.flatnonzero(values[window:] >= least * centre[window:])
        spread[window + high] = np.median(np.abs(before[high] - centre[window + high, None]), axis=1)
    with np.errstate(all="ignore"):  # a curve at exactly 0 has no scale, and no spikes
        z = (values - centre) / np.maximum(1.4826 * spread, 0.01 * np.abs(centre))
    return np.nan_to_num(z, nan=0.0, posinf=0.0), centre


def paired_ratio(run: Run, reference: Run | None) -> Series | None:
    """rho_t = l_t/l_t(reference), same seed, so the batches' noise cancels; None without a finite reference."""
    if reference is None or reference is run:
        return None
    a, b = run["train/loss"].finite, reference["train/loss"].finite
    step, at_a, at_b = np.intersect1d(a.step, b.step, return_indices=True)
    if len(step) < 0.9 * len(a) or (b.value[at_b] <= 0).any():
        return None
    return Series(step, a.value[at_a] / b.value[at_b])


def paired_se(eval_nll: EvalNLL | None, step_a: int, step_b: int) -> float:
    """Standard error, in nats per token, of the eval loss difference between two steps; 0 if not recorded."""
    a, b = (eval_nll.at(step) if eval_nll else None for step in (step_a, step_b))
    if a is None or b is None:
        return 0.0
    variance, _ = clustered(a - b, eval_nll.tokens, eval_nll.module)
    return math.sqrt(variance) if math.isfinite(variance) else 0.0


def roughness(values: np.ndarray) -> float:
    """Standard deviation of a curve about its own course, from second differences; 0 for fewer than 6 points."""
    return float(np.sqrt(np.mean(np.diff(values, 2) ** 2) / 6)) if len(values) >= 6 else 0.0


def first_crossing(series: Series, target: float) -> float:
    """Step at which the eval curve first reaches `target`, linearly interpolated; infinity if it never does."""
    below = np.flatnonzero(series.value <= target)
    if not len(below):
        return math.inf
    i = int(below[0])
    if i == 0 or not np.isfinite(series.value[i - 1]):
        return float(series.step[i])
    fall = (series.value[i - 1] - target) / (series.value[i - 1] - series.value[i])
    return float(series.step[i - 1] + fall * (series.step[i] - series.step[i - 1]))


def batch_difficulty(reference: Run) -> Series | None:
    """How hard each batch is, by a run that learns steadily: log of its train loss over its eval curve, centred."""
    train, held_out = reference["train/loss"].finite, reference["eval/loss"].finite
    if not len(train) or len(held_out) < 2 or (train.value <= 0).any() or (held_out.value <= 0).any():
        return None
    course = np.interp(train.step, held_out.step, np.log(held_out.value))
    hard = np.log(train.value) - course
    return Series(train.step, hard - np.median(hard))


def onset_of_rise(values: np.ndarray, threshold: float, after: int) -> int | None:
    """The first place after `after` from which on all values (n,) are above the threshold; None if the last is not."""
    above = values >= threshold
    above[: after + 1] = False
    if not len(above) or not above[-1]:
        return None
    return len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
