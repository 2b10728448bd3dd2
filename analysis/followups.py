"""Follow-up sweeps that the results call for, each a complete sweep configuration derived from the analysed one."""

import math
import re
from itertools import pairwise
from pathlib import Path

import yaml

from analysis.behaviour import onset
from analysis.files import save
from analysis.statistics import COARSE
from analysis.study import Study, parameters
from analysis.study import values as constants
from analysis.wording import plural, rate_label

HALF_DECADE, QUARTER_DECADE = 10**0.5, 10**0.25
REACH = 2.5  # steps beyond the basin that one refinement goes, at most
SEEDS = 3  # the fewest that give a spread worth the name


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
        ], f"every rate from {rate_label(first)} up diverged: go left"
    basin = basin_rates(study)
    low, high, infeasible = min(basin), max(basin), set(study.infeasible)
    left = max((r for r in rates if r < low), default=None)
    right = min((r for r in rates if r > high), default=None)
    known = [r for r in (left, *basin, right) if r is not None]
    gap = max((b / a for a, b in pairwise(known)), default=math.inf)
    # The step is halved only where the grid is already half a decade fine.
    step = HALF_DECADE if gap > COARSE * 1.1 or None in (left, right) else QUARTER_DECADE
    start = max(left or 0.0, low / step**REACH)
    stop = min(right or math.inf, high * step**REACH)
    best = study.best_rate
    first, last = math.ceil(math.log(start / best, step)), math.floor(math.log(stop / best, step))
    grid = [two_digits(best * step**k) for k in range(first, last + 1)]
    new = [
        r for r in grid if start * 1.1 < r < stop / 1.1 and all(abs(math.log(r / old)) > math.log(1.1) for old in rates)
    ]
    ends = [
        rate_label(left) if left is not None else "an open left end",
        rate_label(right) if right is not None else "an open right end",
    ]
    ends[1] += ", which diverged" if right in infeasible else ""
    width = "half" if step == HALF_DECADE else "a quarter of"
    why = f"the best rate so far is {rate_label(best)}, between {ends[0]} and {ends[1]}: {width} a decade apart there"
    return new, why


def config(study: Study, name: str, **values: list) -> dict:
    """A grid over these values; program, command, metric and constant parameters are the analysed sweep's own."""
    source = next((s["config"] for s in study.sweeps if isinstance(s.get("config"), dict)), {})
    kept = {}
    for key, spec in parameters({"config": source}).items():
        fixed = constants(spec)
        if len(fixed) == 1 or (key == "seed" and fixed):
            kept[key] = {"values": fixed}
    kept |= {key: {"values": found} for key, found in values.items()}
    about = {key: source[key] for key in ("program", "project", "entity", "metric", "command") if key in source}
    return {"name": name, **about, "method": "grid", "parameters": kept}


def follow_up(study: Study, name: str, question: str, why: str, **values: list) -> dict:
    return {"name": name, "question": question, "why": why, "config": config(study, name, **values)}


def behaving(study: Study, *classes: str) -> list[float]:
    """Rates with at least one counted run of these classes."""
    return [rate for rate, runs in study.used.items() if any(study.verdicts[r.id].behaviour in classes for r in runs)]


def labels(rates: list[float]) -> str:
    return ", ".join(map(rate_label, rates))


def refinement(study: Study) -> dict | None:
    grid, why = refinement_grid(study)
    question = "Where exactly is the optimum?"
    return follow_up(study, "refinement", question, why, learning_rate=grid) if grid else None


def seeds(study: Study) -> dict | None:
    have = [int(s) for s in study.comparison.seeds] if study.comparison else []
    if study.comparison is None or len(have) >= SEEDS:
        return None
    more = [s for s in range(2 * SEEDS) if s not in have][: SEEDS - max(1, len(have))]
    variance = "unknown" if len(have) < 2 else "uncertain"
    why = f"{plural(max(1, len(have)), 'seed')} so far: how much seeds vary is {variance}"
    return follow_up(study, "seeds", "Does the order survive another seed?", why, learning_rate=study.rates, seed=more)


def steps(study: Study) -> dict | None:
    slow = behaving(study, "slow")
    if not slow or study.best_rate is None:
        return None
    why = f"eval loss was still falling at {labels(slow)} after {study.planned_steps} steps"
    rates = sorted({*slow, study.best_rate})
    question = "Do the slow rates catch up in twice the steps?"
    return follow_up(study, "steps", question, why, learning_rate=rates, max_steps=[2 * study.planned_steps])


def alpha_rate(study: Study) -> dict | None:
    alpha, best = study.recipe.get("lora_alpha"), study.best_rate
    if not isinstance(alpha, int) or alpha < 2 or best is None:
        return None
    why = f"the best rate was {rate_label(best)} at α = {alpha}: if α·η decides, it halves when α doubles"
    rates = [two_digits(best * factor) for factor in (0.5, 1, 2)]
    question = "Is it α·η that matters?"
    return follow_up(study, "alpha_rate", question, why, learning_rate=rates, lora_alpha=[alpha // 2, 2 * alpha])


def warmup(study: Study) -> dict | None:
    early = [rate for rate, runs in study.used.items() if any(onset(study.verdicts[r.id], r) == "early" for r in runs)]
    if not early or not study.planned_steps:
        return None
    now = max(run.warmup_steps for runs in study.used.values() for run in runs)
    longer = sorted({max(2 * now, round(share * study.planned_steps)) for share in (0.1, 0.2)})
    why = f"{labels(early)} diverged early, with {now} steps of warm-up"
    question = "Does a longer warm-up make the diverging rate usable?"
    return follow_up(study, "warmup", question, why, learning_rate=early[:1], warmup_steps=longer)


def batch_size(study: Study) -> dict | None:
    shaky, now = behaving(study, "unstable", "diverged"), study.recipe.get("gradient_accumulation_steps")
    if not shaky or not isinstance(now, int):
        return None
    why = f"{labels(shaky)} became unstable or diverged: a batch 4 × as large has half the noise"
    rates = sorted({shaky[0], study.best_rate or shaky[0]})
    question = "Is it the batch's noise?"
    return follow_up(study, "batch_size", question, why, learning_rate=rates, gradient_accumulation_steps=[4 * now])


# In the order in which they are worth running; each returns None where the data do not call for it.
FOLLOW_UPS = (refinement, seeds, steps, alpha_rate, warmup, batch_size)


def follow_ups(study: Study) -> list[dict]:
    """Each as {"name", "question", "why", "config"}."""
    return [found for follow in FOLLOW_UPS if (found := follow(study))]


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
