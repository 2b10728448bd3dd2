"""A Study as plain data: what stands in `all_results.json`, and what the report and the pages are made of."""

from dataclasses import asdict
from typing import Any

from analysis import rounds
from analysis.behaviour import onset
from analysis.checks import checks
from analysis.controls import control
from analysis.curves import first_crossing
from analysis.followups import follow_ups, sweep_file
from analysis.guides import guides
from analysis.rates import Rate, example_set
from analysis.runs import Checkpoint, Run
from analysis.statistics import Estimate
from analysis.study import Study, device_seconds


def results(study: Study) -> dict:
    """The whole analysis as plain data, deterministic for given runs: no time, no path, no order of arrival."""
    parts, others = (study, *study.beside), study.groups[1:]
    follow = [run for part in study.guides for run in part.runs]
    seconds = [part.device_seconds for part in study.groups if part.guide is None]
    computed = {
        "recipe": study.recipe,
        "not_comparable": list(study.undeclared),
        "side_by_side": bool(others) and bool(study.undeclared or not study.sizes_differ),
        "groups": [group(study, part) for part in study.groups] if others else [],
        "guide": study.guide,
        "guides": guides(study),
        "planned_steps": study.planned_steps,
        "data": data(study),
        "base_loss": study.base_loss,
        "commits": sorted({run.commit for run in study.runs if isinstance(run.commit, str)}),
        "best_rate": study.best_rate,
        "best_loss": study.best_loss,
        "seeds": study.seeds,
        "basin": basin(study),
        "advice": None if study.advice is None else asdict(study.advice) | {"rise": estimate(study.advice.rise)},
        "optimum": study.optimum,
        "search": rounds.story(study),
        "adapter": adapter(study),
        "rates": [rate_row(study, row) for row in study.rows],
        "budget": study.budget,
        "budget_law": study.budget_law,
        "controls": [
            {"differs": part.differs, "points": [asdict(point) for point in control(study, part)]} for part in others
        ],
        "repeats": [asdict(repeat) for part in parts for repeat in part.repeats],
        "noise_floor": study.noise_floor,
        "device_seconds": [*seconds, *([device_seconds(follow)] if follow else [])],
        "hypotheses": study.hypotheses,
        "checks": checks(study),
        "mechanism": study.mechanism,
        "follow_ups": [follow | {"file": sweep_file(follow["name"])} for follow in follow_ups(study)],
    }
    rows = [rounded(run_row(part, run, part is study)) | recorded(run) for part in parts for run in part.runs]
    return {"sweeps": study.sweeps, **rounded(computed), "runs": rows}


def rounded(value: Any) -> Any:
    """Computed numbers to the 7 digits of a float32.

    Sums differ in the last bits between machines; of ten thousand numbers with 9 digits one was rounded otherwise.
    """
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def recorded(run: Run) -> dict:
    return {"generations": run.generations, "config": run.config, "summary": run.summary}


def estimate(found: Estimate | None) -> dict | None:
    return None if found is None else asdict(found) | {"covers": found.covers}


def point(checkpoint: Checkpoint | None) -> dict | None:
    return None if checkpoint is None else {"step": checkpoint.step, "loss": checkpoint.loss}


def group(study: Study, part: Study) -> dict:
    """One group of runs by itself: its settings where groups differ, and its best rate."""
    keys = {key: None for other in study.groups[1:] for key in other.differs}
    own = {key: part.differs.get(key, setting(part, key)) for key in keys}
    return {
        "settings": own,
        "runs": len(part.runs),
        "rates": part.rates,
        "seeds": part.seeds,
        "diverged": sum(part.diverged(run) for run in part.counted),
        "base_loss": part.base_loss,
        "best_rate": part.best_rate,
        "best_loss": part.best_loss,
        "level": estimate(part.comparison.levels[part.comparison.best]) if part.comparison else None,
    }


def setting(part: Study, key: str) -> object:
    """What the group's runs have for a key of `sweep.recipe`."""
    name, _, package = key.partition(".")
    found = next((run.config[name] for run in part.runs if name in run.config), None)
    return found.get(package) if package and isinstance(found, dict) else found


def data(study: Study) -> dict:
    """How much there was to learn from, and how often it was seen."""
    tokens, module = example_set(study.counted)
    runs = study.counted
    return {
        "train_examples": next((run.train_examples for run in runs if run.train_examples), None),
        "train_examples_recorded": any("train_examples" in run.config for run in runs),
        "train_tokens": next((run.config["train_tokens"] for run in runs if "train_tokens" in run.config), None),
        "eval_examples": None if tokens is None else len(tokens),
        "eval_modules": None if module is None else int(module.max()) + 1,
        "steps_per_pass": study.steps_per_pass,
        "passes": max((run.passes for run in runs if run.passes), default=None),
    }


def adapter(study: Study) -> dict | None:
    """The run of the rate to use that ended lowest, and how its adapter is loaded; None where no run says that."""
    runs = [] if study.advice is None else study.at(study.advice.rate)
    runs = [run for run in runs if "load_adapter" in run.summary and run.final_eval_loss is not None]
    if not runs:
        return None
    best = min(runs, key=lambda run: run.final_eval_loss)
    found = {"run": best.id, "name": best.name, "loss": best.final_eval_loss}
    return found | {"folder": best.config.get("output_dir"), "load": best.summary["load_adapter"]}


def basin(study: Study) -> dict | None:
    """What the basin test stands on."""
    c = study.comparison
    return None if c is None else {"width": c.width, "seed_sd": c.seed_sd, "covers": c.levels[c.best].covers}


def rate_row(study: Study, row: Rate) -> dict:
    """One rate over its seeds; None where a number does not exist."""
    cuts = [run.fault_step for run in row.runs]  # every run's, or the rate was not cut off
    best_of_seeds = {"mean": row.best_eval.mean, "sd": row.best_eval.sd, "n": row.best_eval.n, "step": row.best_step}
    return {
        "learning_rate": row.learning_rate,
        "alpha_rate": row.alpha_rate,
        "n": len(row.runs),
        "diverged": row.diverged,
        "cut_off": None if None in cuts else min(cuts, default=None),
        "final_train": asdict(row.final_train),
        "final_eval": asdict(row.final_eval) | {"level": estimate(row.level)},
        "last_eval": asdict(row.last_eval) | {"step": row.last_step},
        "best_eval": best_of_seeds,
        "one_pass": asdict(row.one_pass) | {"step": next((p.step for run in row.runs if (p := run.one_pass)), None)},
        "gap": asdict(row.gap),
        "difference": {moment: estimate(found) for moment, found in row.moments.items()},
        "gain": None if row.gain is None else {"mean": row.gain, "interval": row.gain_interval},
        "basin": {"verdict": row.basin, "excess": row.excess, "interval": row.excess_interval},
        "steps": {f"{q:g}": steps for q, steps in row.steps.items()},
        "clipped": row.clipped,
        "update_ratio": asdict(row.update_ratio),
        "stable_rank": asdict(row.stable_rank),
        "behaviours": row.behaviours,
        "flags": row.flags,
    }


def run_row(study: Study, run: Run, main: bool) -> dict:
    """Identity, computed quantities and verdict of one run."""
    evidence, verdict = study.evidence[run.id], study.verdicts[run.id]
    tokens = run["train/num_tokens"].finite
    return {
        "id": run.id,
        "name": run.name,
        "sweep": run.sweep,
        "state": run.state,
        "created_at": run.created_at,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "compared": main and run.id not in study.excluded,
        "excluded": study.excluded.get(run.id),
        "differs": study.differs,
        "last_step": run.last_step,
        "planned_steps": run.planned_steps,
        "passes": run.passes,
        "tokens": int(tokens.value[-1]) if len(tokens) else None,
        "base_loss": run.base_loss,
        "final_train_loss": run.final_train_loss,
        "final_eval_loss": run.final_eval_loss,
        "best_checkpoint": point(run.best),
        "one_pass": point(run.one_pass),
        "last_finite": point(run.last),
        "captured_gain": evidence.gain,
        "steps_to_80": None if study.best_loss is None else steps_to(study, run, 0.8),
        "seconds_per_step": run.seconds_per_step,
        "behaviour": verdict.behaviour,
        "onset": onset(verdict, run),
        "divergence": evidence.divergence if verdict.behaviour == "diverged" else None,
        "step": verdict.step,
        "measured": verdict.measured,
        "reason": verdict.reason,
        "flags": study.flags[run.id],
        "notes": run.notes,
    }


def steps_to(study: Study, run: Run, q: float) -> float | None:
    if study.base_loss is None or study.base_loss <= study.best_loss:
        return None
    return first_crossing(run["eval/loss"], study.base_loss - q * (study.base_loss - study.best_loss))
