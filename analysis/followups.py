"""Follow-up sweeps that the results call for, each a complete sweep configuration derived from the analysed one."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import yaml

from analysis import rounds
from analysis.behaviour import onset
from analysis.files import save
from analysis.folder import RECIPE, shown
from analysis.refinement import Round, two_digits
from analysis.study import Study
from analysis.sweep import parameters
from analysis.sweep import values as constants
from analysis.words import listed, plural, rate_label

PASSES = 2.0  # most passes over the data that a follow-up makes: later ones measure overfitting, not the rate
SEEDS = 3  # the fewest that give a spread worth the name


def config(study: Study, name: str, **values: list) -> dict:
    """A grid over these values; program, command, metric and constant parameters are the analysed sweep's own."""
    size = Counter(run.sweep for run in study.counted)  # a control has settings of its own
    known = [sweep for sweep in study.sweeps if isinstance(sweep.get("config"), dict)]
    source: dict = max(known, key=lambda sweep: size[sweep["id"]], default={"config": {}})["config"]
    kept: dict[str, dict] = {}
    for key, spec in parameters({"config": source}).items():
        fixed = constants(spec)
        if len(fixed) == 1 or (key == "seed" and fixed):
            kept[key] = {"values": fixed} if len(fixed) > 1 else {"value": fixed[0]}
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


def passes(study: Study, steps: float, batch: float = 1.0) -> tuple[bool, str]:
    """Whether so many steps with a batch so many times as large stay within PASSES; how many passes, in words."""
    if study.steps_per_pass is None:
        return True, "how many passes over the data that makes is not recorded"
    made = steps * batch / study.steps_per_pass
    return made <= PASSES, f"that makes {made:.1f} passes over the data"


def round_of(study: Study, found: Round) -> dict:
    """The next round of the search as a sweep; its description is what it asks."""
    name = f"round-{len(rounds.made(study)) + 1}"
    sweep = config(study, name, learning_rate=list(found.rates))
    seeds = list(found.seeds)
    sweep["parameters"]["seed"] = {"values": seeds} if len(seeds) > 1 else {"value": seeds[0]}
    return {"name": name, "description": found.asked} | sweep


def refinement(study: Study) -> dict | None:
    found = rounds.following(study)
    if not isinstance(found, Round):
        return None
    best = rounds.chosen(study, study.points)
    so_far = "no rate has ended" if best is None else f"{rate_label(best)} is the rate to use so far"
    sweep = round_of(study, found)
    return {"name": sweep["name"], "question": found.asked, "why": so_far, "config": sweep}


def seeds(study: Study) -> dict | None:
    """The seeds that one of the rates that may be best lacks and another has; new ones for all rates if none is."""
    compared = study.comparison
    if compared is None or study.seeds >= SEEDS:
        return None
    near = [rate for place, rate in enumerate(compared.rates) if compared.near(place)]
    ended = {rate: {run.seed for run in study.feasible[rate]} for rate in near}
    fewest = min(ended.values(), key=len)
    if lacking := sorted(set().union(*ended.values()) - fewest - {None})[: SEEDS - study.seeds]:
        rates = [rate for rate in near if ended[rate].isdisjoint(lacking)]
        which = f"seed{'s' if len(lacking) > 1 else ''} {listed([str(seed) for seed in lacking])}"
        why = f"{labels(rates)} {'has' if len(rates) == 1 else 'have'} not ended with {which}, as others have"
        question = "Does the order survive the same seeds at each rate?"
        return follow_up(study, "seeds", question, why, learning_rate=rates, seed=lacking)
    have = {run.seed for run in study.counted}
    more = [s for s in range(2 * SEEDS + len(have)) if s not in have][: SEEDS - study.seeds]
    variance = "unknown" if compared.seed_sd is None else "uncertain"
    why = f"{plural(study.seeds, 'seed')} so far: how much seeds vary is {variance}"
    question = "Does the order survive another seed?" if len(study.rates) > 1 else "How much do seeds vary?"
    return follow_up(study, "seeds", question, why, learning_rate=study.rates, seed=more)


def steps(study: Study) -> dict | None:
    slow = behaving(study, "slow")
    if not slow or study.best_rate is None:
        return None
    within, words = passes(study, 2 * study.planned_steps)
    why = f"eval loss was still falling at {labels(slow)} after {study.planned_steps} steps; {words}"
    rates = sorted({*slow, study.best_rate})
    question = "Do the slow rates catch up in twice the steps?"
    return (
        follow_up(study, "steps", question, why, learning_rate=rates, max_steps=[2 * study.planned_steps])
        if within
        else None
    )


def alpha_rate(study: Study) -> dict | None:
    alpha, best = study.recipe.get("lora_alpha"), study.best_rate
    if not isinstance(alpha, int) or alpha < 2 or best is None or len(study.rates) < 2:
        return None
    why = f"the best rate was {rate_label(best)} at α = {alpha}; if their product decides, it halves when α doubles"
    rates = [two_digits(best * factor) for factor in (0.5, 1, 2)]
    question = "Is it the rate, or its product with α?"
    return follow_up(study, "alpha_rate", question, why, learning_rate=rates, lora_alpha=[alpha // 2, 2 * alpha])


def warmup(study: Study) -> dict | None:
    early = [rate for rate, runs in study.used.items() if any(onset(study.verdicts[r.id], r) == "early" for r in runs)]
    if not early or not study.planned_steps:
        return None
    now = max(run.warmup_steps for run in study.counted)
    longer = sorted({max(2 * now, round(share * study.planned_steps)) for share in (0.1, 0.2)})
    why = f"{labels(early)} diverged early, with {now} steps of warm-up"
    question = "Does a longer warm-up make the diverging rate usable?"
    return follow_up(study, "warmup", question, why, learning_rate=early[:1], warmup_steps=longer)


def batch_size(study: Study) -> dict | None:
    shaky, now = behaving(study, "unstable"), study.recipe.get("gradient_accumulation_steps")
    within, words = passes(study, study.planned_steps or 0, 4)
    if not shaky or not isinstance(now, int) or not within:
        return None
    why = f"{labels(shaky)} became unstable: a batch 4 × as large has half the noise; {words}"
    rates = sorted({shaky[0], study.best_rate or shaky[0]})
    question = "Is it the batch's noise?"
    return follow_up(study, "batch_size", question, why, learning_rate=rates, gradient_accumulation_steps=[4 * now])


# In the order in which they are worth running; each returns None where the data do not call for it.
FOLLOW_UPS = (refinement, seeds, steps, alpha_rate, warmup, batch_size)


def follow_ups(study: Study) -> list[dict]:
    """Each as {"name", "question", "why", "config"}; none of runs that cannot be compared, none of guides alone."""
    return [] if study.undeclared or study.guide else [found for follow in FOLLOW_UPS if (found := follow(study))]


def to_yaml(configuration: dict) -> str:
    """YAML whose floats PyYAML reads back as floats (1.0e-05, never 1e-05)."""
    return yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True)


def sweep_file(name: str) -> str:
    """The file of a sweep inside the output directory."""
    return f"sweeps/{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.yaml"


def file_of(sweep: dict) -> str:
    """The file of an analysed sweep: of its id, or of its round."""
    return sweep_file(sweep["config"]["name"] if rounds.number_of(sweep) else sweep["id"])


def write(study: Study, directory: Path) -> None:
    """The analysed sweeps and their follow-ups as files beside the report; earlier ones that no longer hold go."""
    files = {file_of(s): s["config"] for s in study.sweeps if isinstance(s.get("config"), dict)}
    files |= {sweep_file(f["name"]): f["config"] for f in follow_ups(study)}
    for old in directory.glob("sweeps/*.yaml"):
        if f"sweeps/{old.name}" not in files:
            old.unlink()
    for name, configuration in files.items():
        save(directory / name, to_yaml(with_recipe_as_used(configuration, study, directory)))


def with_recipe_as_used(configuration: dict, study: Study, directory: Path) -> dict:
    """The sweep with the copy of the recipe that lies beside the report: the recipe itself may change."""
    used = {recipe for sweep in study.sweeps for recipe in recipes(sweep.get("config"))}
    if len(used) != 1 or not (directory / RECIPE).is_file():
        return configuration
    words = configuration["command"]
    copy = f"{shown(directory)}/{RECIPE}"
    return configuration | {"command": [copy if before == "--config" else w for before, w in pairwise(["", *words])]}


def recipes(configuration: dict | None) -> list[str]:
    """The recipes that a sweep's command names."""
    words = map(str, (configuration or {}).get("command") or ())
    return [word for flag, word in pairwise(words) if flag == "--config"]
