"""The mathematics of one run's curves: smoothing, robust z, paired ratio, crossings. Losses in nats per token."""

import math
from bisect import bisect_left, insort

import numpy as np

from analysis.runs import COMPLETE, EvalNLL, Run, Series


def rolling_median(values: np.ndarray, width: int) -> np.ndarray:
    """Centred median (n,) over an odd `width`; at the ends over the part of the window that exists."""
    width = min(width, 2 * len(values) + 1)
    half, window, out = width // 2, [], np.empty(len(values))
    for entering in range(len(values) + half):
        if entering < len(values):
            insort(window, values[entering])
        if entering >= width:
            del window[bisect_left(window, values[entering - width])]
        if entering >= half:
            middle = len(window) // 2
            out[entering - half] = window[middle] if len(window) % 2 else (window[middle - 1] + window[middle]) / 2
    return out


def ema(values: np.ndarray, planned_steps: int) -> np.ndarray:
    """Bias-corrected exponential mean (n,), for display only; a non-finite value breaks the line where it stands."""
    b, mean, weight, out = (0.9 if planned_steps <= 200 else 0.98), 0.0, 0.0, np.full(len(values), np.nan)
    for t, value in enumerate(values):
        if math.isfinite(value):
            mean, weight = b * mean + (1 - b) * value, b * weight + (1 - b)
            out[t] = mean / weight
    return out


def robust_z(values: np.ndarray, window: int, history: int) -> tuple[np.ndarray, np.ndarray]:
    """z (n,) of each value against the median and MAD of the `window` values before it, and that median (n,).

    The scale is max(1.4826·MAD, 1 % of the median); z is 0 until `history` values exist.
    """
    n, centre, spread = len(values), np.full(len(values), np.nan), np.full(len(values), np.nan)
    for t in range(history, min(window, n)):
        centre[t] = np.median(values[:t])
        spread[t] = np.median(np.abs(values[:t] - centre[t]))
    if n > window:
        before = np.lib.stride_tricks.sliding_window_view(values[:-1], window)
        centre[window:] = np.median(before, axis=1)
        spread[window:] = np.median(np.abs(before - centre[window:, None]), axis=1)
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
    """Standard error, in nats per token, of the eval loss difference between two steps; 0 if not recorded.

    Linearised ratio estimator over examples: sd of (d_i − d·n_i) / mean tokens / sqrt(N).
    """
    if eval_nll is None or not {step_a, step_b} <= set(eval_nll.steps.astype(int)):
        return 0.0
    steps = eval_nll.steps.astype(int).tolist()
    if not np.isfinite(eval_nll.nll[[steps.index(step_a), steps.index(step_b)]]).all():
        return 0.0
    difference = eval_nll.nll[steps.index(step_a)] - eval_nll.nll[steps.index(step_b)]
    residual = difference - difference.sum() / eval_nll.tokens.sum() * eval_nll.tokens
    se = math.sqrt((residual**2).sum()) / eval_nll.tokens.sum()
    return se if math.isfinite(se) else 0.0


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


def area_under(series: Series, base_loss: float, best_loss: float, planned_steps: int) -> float:
    """Mean over the run of (e − l*)/(l0 − l*): 0 at the best from the start, 1 nothing learned; ∞ if not finite."""
    if len(series) < 2 or not np.isfinite(series.value).all() or series.step[-1] < COMPLETE * planned_steps:
        return math.inf
    height = (series.value - best_loss) / (base_loss - best_loss)
    return float(((height[1:] + height[:-1]) / 2 * np.diff(series.step)).sum() / (series.step[-1] - series.step[0]))
