"""Why: the size of the first Adam steps, predicted from the run's own d, r, α and logged rates, beside the measured."""

import math

import numpy as np

from analysis.files import number
from analysis.rates import Rate
from analysis.runs import Run
from analysis.statistics import spread

EARLY = 0.10  # share of the steps within which a measured ratio counts as early


def mechanism(rates: list[Rate], rank: float | None, alpha: float | None) -> dict | None:
    """For each rate: ‖ΔW‖/‖W‖ predicted and measured at the first evaluation after a step, and A's time-scales.

    While A is at its start, U(±1/sqrt(d_in)), and each Adam step moves every entry of B by ±η_t with a steady sign,
    ‖ΔW‖_F = (α/r)·Σ η_t·sqrt(d_out·r/3), with the η_t that were logged (a warm-up's are below η). One entry of A moves
    by its own standard deviation in 1/(sqrt(3·d_in)·η) steps; along one direction of the input, where all entries move
    together, A does so in 1/(sqrt(3)·d_in·η). None if no run records its adapted modules, r and α.
    """
    runs = [run for row in rates for run in row.runs]
    source = next((run for run in runs if shapes(run)), None)
    if source is None or not rank or not alpha:
        return None
    modules = shapes(source)
    update = math.sqrt(sum(n * (alpha / rank) ** 2 * d_out * rank / 3 for n, _, d_out, _ in modules))
    weight = math.sqrt(sum(n * d_in * d_out * std**2 for n, d_in, d_out, std in modules))
    widths = [d_in for _, d_in, _, _ in modules]
    rows = []
    for row in rates:
        found = [pair for run in row.runs if (pair := predicted_and_measured(run, update / weight)) is not None]
        eta = row.learning_rate
        rows.append(
            {
                "learning_rate": eta,
                "full_step": eta * update / weight,
                "step": found[0][0] if found else None,
                "first_move": bool(found) and all(first for *_, first in found),
                "predicted": spread([predicted for _, predicted, *_ in found]).mean,
                "measured": spread([measured for _, _, measured, _ in found]).mean,
                "ratio": spread([measured / predicted for _, predicted, measured, _ in found]).mean,
                "end": row.update_ratio.mean,
                "stable_rank": row.stable_rank.mean,
                "entry_steps": [1 / (math.sqrt(3 * d) * eta) for d in (max(widths), min(widths))],
                "direction_steps": [1 / (math.sqrt(3) * d * eta) for d in (max(widths), min(widths))],
            }
        )
    about = {"rank": rank, "alpha": alpha, "widths": [min(widths), max(widths)]}
    return about | {"matrices": sum(n for n, *_ in modules), "rows": rows}


def shapes(run: Run) -> list[tuple[float, ...]]:
    """(count, d_in, d_out, weight std) of each kind of adapted module; [] if not recorded."""
    modules = run.config.get("adapted_modules")
    if not isinstance(modules, dict):
        return []
    keys = ("count", "d_in", "d_out", "weight_std")
    rows = [tuple(number(m.get(k)) for k in keys) for m in modules.values() if isinstance(m, dict)]
    return rows if all(x and x > 0 for row in rows for x in row) else []


def predicted_and_measured(run: Run, unit: float) -> tuple[int, float, float, bool] | None:
    """The first evaluation within the first tenth whose ‖ΔW‖ is not 0: (step, predicted, measured) ‖ΔW‖/‖W‖.

    Last, whether that step is the first with a rate above 0: until then all rates' runs are the same.
    """
    series = run["eval/update_ratio"].finite.between(1, max(2.0, EARLY * (run.planned_steps or 0)))
    moved = np.flatnonzero(series.value > 0)  # a warm-up's first rate is 0
    if not len(moved):
        return None
    step, logged = int(series.step[moved[0]]), run["train/learning_rate"].finite
    travelled = float(logged.between(1, step).value.sum())
    first = step == 1 or (len(logged.between(1, step - 1)) > 0 and not logged.between(1, step - 1).value.any())
    return (step, unit * travelled, float(series.value[moved[0]]), first) if travelled > 0 else None
