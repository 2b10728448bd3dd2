"""From a study to `all_results.json`: every run, every rate, every number that the report may use."""

import math

import numpy as np

from analysis import behaviour, statistics
from analysis.checks import checks
from analysis.curves import area_under, first_crossing
from analysis.followups import follow_ups, sweep_file
from analysis.hypotheses import hypotheses
from analysis.mechanism import mechanism
from analysis.runs import Run
from analysis.study import Study, gain_interval, median_steps


def results(study: Study) -> dict:
    """The whole analysis as plain data, deterministic for given runs: no time, no path, no order of arrival."""
    flags = {run.id: run_flags(study, run) for run in study.runs}
    computed = {
        "recipe": study.recipe,
        "differing": study.differing,
        "by_setting": by_setting(study),
        "planned_steps": study.planned_steps,
        "base_loss": study.base_loss,
        "best_rate": study.best_rate,
        "best_loss": study.best_loss,
        "seeds": study.seeds,
        "basin": basin(study),
        "optimum": None if study.comparison is None else statistics.optimum(study.comparison, study.infeasible),
        "sensitivity": sensitivity(study),
        "rates": [rate_row(study, rate, flags) for rate in study.rates],
        "hypotheses": hypotheses(study),
        "checks": checks(study),
        "mechanism": mechanism(study),
        "follow_ups": [follow | {"file": sweep_file(follow["name"])} for follow in follow_ups(study)],
    }
    rows = [rounded(run_row(study, run, flags[run.id])) | recorded(run) for run in study.runs]
    return {"sweeps": study.sweeps, **rounded(computed), "runs": rows}


def rounded(value: object) -> object:
    """Computed numbers to 9 digits: sums may differ in the last bits between machines, the page must not."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def recorded(run: Run) -> dict:
    return {"generations": run.generations, "config": run.config, "summary": run.summary}


def run_row(study: Study, run: Run, flags: list[str]) -> dict:
    """Identity, computed quantities and verdict of one run."""
    evidence, verdict = study.evidence[run.id], study.verdicts[run.id]
    ratio, rank = run["eval/update_ratio"], run["eval/stable_rank"]
    return {
        "id": run.id,
        "name": run.name,
        "sweep": run.sweep,
        "state": run.state,
        "created_at": run.created_at,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "compared": run.id not in study.excluded,
        "excluded": study.excluded.get(run.id),
        "last_step": run.last_step,
        "planned_steps": run.planned_steps,
        "base_loss": run.base_loss,
        "final_train_loss": run.final_train_loss,
        "final_eval_loss": run.final_eval_loss,
        "captured_gain": evidence.gain,
        "tail_rise": evidence.tail_rise,
        "bump": evidence.bump and evidence.bump[0],
        "clipped": evidence.clipped,
        "seconds_per_step": run.seconds_per_step,
        "convergence": convergence(study, run),
        "update_ratio": float(ratio.value[-1]) if len(ratio) else None,
        "stable_rank": float(rank.value[-1]) if len(rank) else None,
        "behaviour": verdict.behaviour,
        "onset": behaviour.onset(verdict, run),
        "step": verdict.step,
        "measured": verdict.measured,
        "reason": verdict.reason,
        "flags": flags,
        "notes": run.notes,
    }


def convergence(study: Study, run: Run) -> dict | None:
    """Steps, tokens and seconds to each target, ∞ for a miss, and the normalised area under the eval curve."""
    if None in (study.base_loss, study.best_loss) or study.base_loss <= study.best_loss:
        return None
    tokens, pace = run["train/num_tokens"].finite, run.seconds_per_step
    found = {"area": area_under(run["eval/loss"], study.base_loss, study.best_loss, run.planned_steps or 0)}
    for q in statistics.TARGETS:
        target = study.base_loss - q * (study.base_loss - study.best_loss)
        steps = first_crossing(run["eval/loss"], target)
        found[f"{q:g}"] = {
            "target": target,
            "steps": steps,
            "seconds": None if pace is None else steps * pace,
            "tokens": None
            if not len(tokens)
            else math.inf
            if math.isinf(steps)
            else float(np.interp(steps, [0, *tokens.step], [0, *tokens.value])),
        }
    return found


def rate_row(study: Study, rate: float, flags: dict[str, list[str]]) -> dict:
    """One rate over its seeds: means, spreads and intervals; None where a number does not exist."""
    runs, place, c = study.used[rate], study.index(rate), study.comparison
    alpha = study.recipe.get("lora_alpha")
    row = {
        "learning_rate": rate,
        "alpha_rate": alpha * rate if isinstance(alpha, int | float) else None,
        "n": len(runs),
        "diverged": sum(study.diverged(r) for r in runs),
        "final_train": spread([r.final_train_loss for r in runs]),
        "final_eval": spread([r.final_eval_loss for r in runs]),
        "interval": None,
        "difference": None,
        "gain": None,
        "basin": {"verdict": "out", "excess": None, "interval": None},
        "steps": {f"{q:g}": median_steps(study, rate, q) for q in statistics.TARGETS},
        "clipped": spread([study.evidence[r.id].clipped for r in runs])["mean"],
        "behaviours": count([study.verdicts[r.id].behaviour for r in runs]),
        "flags": count([flag for r in runs for flag in flags[r.id]]),
    }
    if place is None:
        return row
    over, best = statistics.excess(c), study.best
    excess_interval = None if over is None else statistics.interval(over[:, place])
    row["basin"] = {
        "verdict": statistics.basin_verdict(excess_interval, study.basin_width),
        "excess": float(c.loss[place] - c.loss[best]),
        "interval": excess_interval,
    }
    row["interval"] = None if c.replicates is None else statistics.interval(c.replicates[:, place])
    if place != best:
        differences = None if c.replicates is None else c.replicates[:, place] - c.replicates[:, best]
        row["difference"] = {
            "mean": float(c.loss[place] - c.loss[best]),
            "interval": statistics.interval(differences),
            "p": None if differences is None else holm_p(study, place),
        }
    if study.base_loss is not None and study.base_loss > study.best_loss:
        gain = behaviour.captured_gain(float(c.loss[place]), study.base_loss, study.best_loss)
        row["gain"] = {"mean": gain, "interval": gain_interval(study, place)}
    return row


def by_setting(study: Study) -> dict[str, list[dict]]:
    """For each recipe key that runs differ in, the best rate at each of its values: what follow-up sweeps ask.

    Over all runs that ended without diverging, other keys mixed; means over seeds, without intervals.
    """
    found = {}
    for key, values in study.differing.items():
        found[key] = []
        for setting in values:
            runs = [run for run in study.runs if run.config.get(key) == setting and run.learning_rate is not None]
            ended: dict[float, list[float]] = {}
            for run in runs:
                if run.final_eval_loss is not None and not study.diverged(run):
                    ended.setdefault(run.learning_rate, []).append(run.final_eval_loss)
            means = {rate: float(np.mean(losses)) for rate, losses in ended.items()}
            best = min(means, key=means.get, default=None)
            alpha = setting if key == "lora_alpha" else study.recipe.get("lora_alpha")
            found[key].append(
                {
                    "value": setting,
                    "best_rate": best,
                    "loss": means.get(best),
                    "n": len(ended.get(best, [])),
                    "rates": len({run.learning_rate for run in runs}),
                    "diverged": sum(study.diverged(run) for run in runs),
                    "alpha_rate": alpha * best if isinstance(alpha, int | float) and best else None,
                }
            )
    return found


def holm_p(study: Study, place: int) -> float:
    """Holm-adjusted p-value of one rate's difference from the best, over all such comparisons."""
    c, best = study.comparison, study.best
    others = [i for i in range(len(c.rates)) if i != best]
    adjusted = statistics.holm([statistics.p_value(c.replicates[:, i] - c.replicates[:, best]) for i in others])
    return adjusted[others.index(place)]


def basin(study: Study) -> dict | None:
    """What the basin test stands on."""
    if study.comparison is None:
        return None
    c = study.comparison
    return {
        "width": study.basin_width,
        "seed_sd": statistics.seed_sd(study.feasible),
        "paired_seeds": len(c.seeds),
        "left_out": c.left_out,
        "examples": c.examples,
        "covers": c.covers,
        "replicates": statistics.REPLICATES if c.replicates is not None else 0,
    }


def sensitivity(study: Study) -> dict | None:
    """Wortsman's S over the rates that have an end, diverged ones at l0; also as a share of l0 − l*."""
    if None in (study.base_loss, study.best_loss) or study.base_loss <= study.best_loss:
        return None
    losses = []
    for runs in study.used.values():
        ended = [r for r in runs if study.verdicts[r.id].behaviour != "incomplete"]
        capped = [
            min(study.base_loss, e) if (e := r.final_eval_loss) is not None and e == e else math.inf for r in ended
        ]
        if ended:
            losses.append(float(np.mean([min(study.base_loss, e) for e in capped])))
    value = statistics.sensitivity(losses, study.base_loss, study.best_loss)
    return {"nats": value, "share": value / (study.base_loss - study.best_loss), "rates": len(losses)}


def run_flags(study: Study, run: Run) -> list[str]:
    """Remarks that are not classes: fast start, crossed, clip-bound, best rate at the edge."""
    flags = []
    if run.id in study.excluded:
        return flags
    peers = [r for runs in study.used.values() for r in runs if r.seed == run.seed]
    planned = run.planned_steps or 0

    def start(r: Run) -> float:
        part = r["train/loss"].between(behaviour.FAST_START[0] * planned, behaviour.FAST_START[1] * planned).value
        return float(part.mean()) if len(part) and np.isfinite(part).all() else math.inf

    if len(peers) > 1 and math.isfinite(start(run)) and start(run) == min(map(start, peers)):
        flags.append("fast start")
    if len(peers) > 1 and led_early(run, peers) and not study.evidence[run.id].near_best:
        flags.append("crossed")
    if (study.evidence[run.id].clipped or 0) > behaviour.CLIP_BOUND:
        flags.append("clip-bound")
    if run.learning_rate == study.best_rate and len(study.feasible) > 1:
        ends = (study.comparison.rates[0], study.comparison.rates[-1])
        flags += ["edge of the feasible range"] if study.best_rate in ends else []
    return flags


def led_early(run: Run, peers: list[Run]) -> bool:
    """Whether the run had the lowest eval loss of its seed at some evaluation in the first half."""
    mine = run["eval/loss"].between(1, (run.planned_steps or 0) / 2).finite
    for step, value in zip(mine.step, mine.value, strict=True):
        others = [p["eval/loss"].between(step, step).finite.value for p in peers if p is not run]
        if others and all(not len(v) or value < v[0] for v in others) and any(len(v) for v in others):
            return True
    return False


def spread(values: list[float | None]) -> dict:
    """Mean and sample sd of the finite values, with their number; sd None for fewer than two."""
    kept = np.array([v for v in values if v is not None and abs(v) < 1e100])  # squares of more are no floats
    return {
        "mean": float(kept.mean()) if len(kept) else None,
        "sd": float(kept.std(ddof=1)) if len(kept) > 1 else None,
        "n": len(kept),
    }


def count(words: list[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words), key=words.index)}
