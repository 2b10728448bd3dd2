"""Why: how far the first Adam step moves the weights, and how soon A moves, from the run's own d, r and α."""

import math

from analysis.behaviour import FAST_START
from analysis.files import number
from analysis.runs import Run
from analysis.study import Study

RULE_OF_THUMB = 1e-3  # update:weight ratio of a healthy step (cs231n, "Ratio of weights:updates")


def mechanism(study: Study) -> dict | None:
    """For each rate: ‖ΔW‖/‖W‖ after one full-rate Adam step, A's time-scale in steps, and the measured ratios.

    B = ±η elementwise after the first Adam step and A is still at init, U(±1/sqrt(d_in)), so
    ‖ΔW‖_F = (α/r)·η·sqrt(d_out·r/3); A moves by its own standard deviation in 1/(sqrt(3·d_in)·η) steps.
    None if no run records its adapted modules, r and α.
    """
    runs = [run for group in study.used.values() for run in group]
    source = next((run for run in runs if shapes(run)), None)
    rank, alpha = number(study.recipe.get("lora_r")), number(study.recipe.get("lora_alpha"))
    if source is None or not rank or not alpha:
        return None
    modules = shapes(source)
    update = math.sqrt(sum(n * (alpha / rank) ** 2 * d_out * rank / 3 for n, d_in, d_out, _ in modules))
    weight = math.sqrt(sum(n * d_in * d_out * std**2 for n, d_in, d_out, std in modules))
    widths = [d_in for _, d_in, _, _ in modules]
    rows = []
    for rate, group in study.used.items():
        first = [early_ratio(run) for run in group]
        last = [float(s.value[-1]) for run in group if len(s := run["eval/update_ratio"].finite)]
        rows.append(
            {
                "learning_rate": rate,
                "first_step": rate * update / weight,
                "a_steps": [1 / (math.sqrt(3 * max(widths)) * rate), 1 / (math.sqrt(3 * min(widths)) * rate)],
                "measured_early": mean([r for r in first if r is not None]),
                "measured_end": mean(last),
            }
        )
    step = next(
        (int(s.step[s.value > 0][0]) for run in runs if ((s := run["eval/update_ratio"]).value > 0).any()), None
    )
    return {
        "rank": rank,
        "alpha": alpha,
        "widths": [min(widths), max(widths)],
        "matrices": sum(n for n, *_ in modules),
        "early_step": step,
        "rows": rows,
    }


def shapes(run: Run) -> list[tuple[float, float, float, float]]:
    """(count, d_in, d_out, weight std) of each kind of adapted module; [] if not recorded."""
    modules = run.config.get("adapted_modules")
    if not isinstance(modules, dict):
        return []
    keys = ("count", "d_in", "d_out", "weight_std")
    rows = [tuple(number(m.get(k)) for k in keys) for m in modules.values() if isinstance(m, dict)]
    return rows if all(x and x > 0 for row in rows for x in row) else []


def early_ratio(run: Run) -> float | None:
    """The first measured ‖ΔW‖/‖W‖ after a step, at or before 10 % of the run."""
    series = run["eval/update_ratio"].finite.between(1, max(2.0, FAST_START[1] * (run.planned_steps or 0)))
    moved = series.value[series.value > 0]  # the warm-up's first rate is 0
    return float(moved[0]) if len(moved) else None


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
