"""Follow-up sweeps that the results call for, each a complete sweep configuration derived from the analysed one."""

import math
import re
from pathlib import Path

import yaml

from analysis.runs import save
from analysis.statistics import COARSE
from analysis.study import Study

HALF_DECADE, QUARTER_DECADE = 10**0.5, 10**0.25
SEEDS = [0, 1, 2]  # three are the fewest that give a spread


def two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def basin_rates(study: Study) -> list[float]:
    """Rates whose mean loss is within ε of the best."""
    c = study.comparison
    return [r for r, loss in zip(c.rates, c.loss, strict=True) if loss - c.loss.min() < study.basin_width]


def refinement_grid(study: Study) -> tuple[list[float], str]:
    """The rates to run next and why: half a decade apart around the basin, or left of the first diverging rate."""
    rates = study.rates
    if study.comparison is None:
        if not study.infeasible:
            return [], "no run has reached an end"
        first = min(study.infeasible)
        return [
            two_digits(first / HALF_DECADE**k) for k in (4, 3, 2, 1)
        ], f"every rate from {first:g} up diverged: go left"
    basin = basin_rates(study)
    low, high, infeasible = min(basin), max(basin), set(study.infeasible)
    left = max((r for r in rates if r < low), default=None)
    right = min((r for r in rates if r > high), default=None)
    known = [r for r in (left, *basin, right) if r is not None]
    gap = max((b / a for a, b in zip(known, known[1:], strict=False)), default=math.inf)
    # The step is halved only where the grid is already half a decade fine.
    step = HALF_DECADE if gap > COARSE * 1.1 else QUARTER_DECADE
    start = left if left is not None else low / step**2.5
    stop = right if right is not None else high * step**2.5
    best = study.best_rate
    first, last = math.ceil(math.log(start / best, step)), math.floor(math.log(stop / best, step))
    grid = [two_digits(best * step**k) for k in range(first, last + 1)]
    new = [
        r for r in grid if start * 1.1 < r < stop / 1.1 and all(abs(math.log(r / old)) > math.log(1.1) for old in rates)
    ]
    ends = [
        f"{left:g}" if left is not None else "an open left end",
        f"{right:g}" if right is not None else "an open right end",
    ]
    ends[1] += ", which diverged" if right in infeasible else ""
    width = "half" if step == HALF_DECADE else "a quarter of"
    why = f"the best rate so far is {best:g}, between {ends[0]} and {ends[1]}: {width} a decade apart there"
    return new, why


def config(study: Study, name: str, **values: list) -> dict:
    """A grid over these values; program, command, metric and constant parameters are the analysed sweep's own."""
    source = next((s["config"] for s in study.sweeps if isinstance(s.get("config"), dict)), {})
    parameters = {}
    for key, spec in (source.get("parameters") or {}).items():
        constant = isinstance(spec, dict) and ("value" in spec or len(spec.get("values") or []) == 1 or key == "seed")
        if constant:
            parameters[key] = spec
    parameters |= {key: {"values": found} for key, found in values.items()}
    kept = {key: source[key] for key in ("program", "project", "entity", "metric", "command") if key in source}
    return {"name": name, **kept, "method": "grid", "parameters": parameters}


def follow_ups(study: Study) -> list[dict]:
    """Each as {"name", "question", "why", "config"}, in the order in which they are worth running."""
    found = []

    def add(name: str, question: str, why: str, **values: list) -> None:
        found.append({"name": name, "question": question, "why": why, "config": config(study, name, **values)})

    grid, why = refinement_grid(study)
    if grid:
        add("refinement", "Where exactly is the optimum?", why, learning_rate=grid)
    if study.comparison is None:
        return found
    best = study.best_rate
    if 0 < study.seeds < len(SEEDS):
        others = sorted({int(s) for s in study.comparison.seeds})
        more = [s for s in range(10) if s not in others][: len(SEEDS) - len(others)]
        why = f"{study.seeds} seed{'s' * (study.seeds > 1)} so far: the seeds' variance is {'unknown' if study.seeds == 1 else 'uncertain'}"
        add("seeds", "Does the order of the rates survive another seed?", why, learning_rate=study.rates, seed=more)
    slow = [r for r in study.rates if any(study.verdicts[run.id].behaviour == "slow" for run in study.used[r])]
    if slow and study.planned_steps:
        why = f"eval loss was still falling at {', '.join(f'{r:g}' for r in slow)} after {study.planned_steps} steps"
        add(
            "steps",
            "Do the slow rates catch up in twice the steps?",
            why,
            learning_rate=sorted({*slow, best}),
            max_steps=[2 * study.planned_steps],
        )
    alpha = study.recipe.get("lora_alpha")
    if isinstance(alpha, int | float) and alpha >= 2:
        why = f"η {best:g} at α {alpha:g} was best: if α·η decides, the best η halves when α doubles"
        alphas = [alpha // 2 if isinstance(alpha, int) and alpha % 2 == 0 else alpha / 2, 2 * alpha]
        add(
            "alpha_rate",
            "Is it α·η that matters?",
            why,
            learning_rate=[two_digits(best * k) for k in (0.5, 1, 2)],
            lora_alpha=alphas,
        )
    warmup = max((run.warmup_steps for runs in study.used.values() for run in runs), default=0)
    early = [
        r
        for r in study.rates
        if any(study.diverged(run) and run_onset(study, run.id) == "early" for run in study.used[r])
    ]
    if early and study.planned_steps:
        longer = sorted({max(2 * warmup, round(share * study.planned_steps)) for share in (0.1, 0.2)})
        why = f"{', '.join(f'{r:g}' for r in early)} diverged early, with {warmup} steps of warm-up"
        add(
            "warmup",
            "Does a longer warm-up make the diverging rate usable?",
            why,
            learning_rate=[early[0]],
            warmup_steps=longer,
        )
    shaky = [
        r
        for r in study.rates
        if any(study.verdicts[run.id].behaviour in ("unstable", "diverged") for run in study.used[r])
    ]
    steps = study.recipe.get("gradient_accumulation_steps")
    if shaky and isinstance(steps, int):
        why = f"{', '.join(f'{r:g}' for r in shaky)} became unstable or diverged: a larger batch has less noise to amplify"
        add(
            "batch_size",
            "Is it the batch's noise?",
            why,
            learning_rate=sorted({best, shaky[0]}),
            gradient_accumulation_steps=[4 * steps],
        )
    return found


def run_onset(study: Study, run_id: str) -> str | None:
    from analysis.behaviour import onset

    return onset(study.verdicts[run_id], study.evidence[run_id].run)


def to_yaml(configuration: dict) -> str:
    """YAML whose floats PyYAML reads back as floats (1.0e-05, never 1e-05)."""
    return yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True)


def sweep_file(name: str) -> str:
    """The file of a sweep inside the output directory."""
    return f"sweeps/{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.yaml"


def write(study: Study, directory: Path) -> None:
    """The analysed sweeps and their follow-ups as files beside the report; earlier ones that no longer hold go."""
    files = {sweep_file(s["id"]): s["config"] for s in study.sweeps if isinstance(s.get("config"), dict)}
    files |= {sweep_file(f["name"]): f["config"] for f in follow_ups(study)}
    for old in directory.glob("sweeps/*.yaml"):
        if f"sweeps/{old.name}" not in files:
            old.unlink()
    for name, configuration in files.items():
        save(directory / name, to_yaml(configuration))
