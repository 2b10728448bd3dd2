"""Instrument checks: what must hold for the comparison to mean anything. A failed one is printed first and loudly."""

import math

from analysis.files import number
from analysis.runs import Run, learning_rate
from analysis.study import Study, parameters, values
from analysis.wording import plural, rate_label

BASE_TOLERANCE = 1e-3  # nats per token: LoRA's B is 0 at step 0, so every run is the base model there
RATE_TOLERANCE = 1e-3  # relative: the schedule's peak against the requested rate


def result(name: str, failures: list[str], passed: str, known: bool = True) -> dict:
    """One check: passed True/False, or None where the runs do not record what it needs."""
    if not known:
        return {"check": name, "passed": None, "detail": "not recorded by these runs"}
    return {"check": name, "passed": not failures, "detail": "; ".join(failures) if failures else passed}


def compared(study: Study) -> list[Run]:
    return [run for runs in study.used.values() for run in runs]


def grid(study: Study) -> list[tuple[float, int | None]] | None:
    """The (rate, seed) points that the sweeps ask for; None if a sweep is not a grid."""
    points = set()
    for sweep in study.sweeps:
        asked = parameters(sweep)
        if "learning_rate" not in asked or sweep["config"].get("method") != "grid":
            return None
        rates = [rate for value in values(asked["learning_rate"]) if (rate := learning_rate({"learning_rate": value}))]
        seeds = [number(value) for value in values(asked.get("seed"))] or [None]
        points |= {(rate, seed) for rate in rates for seed in seeds}
    return sorted(points, key=lambda p: (p[0], p[1] is not None, p[1] or 0))


def rates_are_the_grid(study: Study) -> dict:
    points = grid(study)
    if points is None:
        return result("rates = grid", [], "", known=False) | {"detail": "the sweep is not a grid over learning_rate"}
    asked, got = {rate for rate, _ in points}, set(study.used)
    missing = [f"no run at {rate_label(rate)}" for rate in sorted(asked) if not study.at(rate)]
    known = [next((g for g in got if math.isclose(rate, g, rel_tol=1e-6)), None) for rate in asked]
    extra = [f"{rate_label(rate)} is not in the grid" for rate in sorted(got - set(known))]
    return result("rates = grid", missing + extra, f"{len(got)} rates run, {len(asked)} in the grid")


def no_run_missing(study: Study) -> dict:
    points = grid(study) or []
    failures = []
    for rate, seed in points:
        runs = [r for r in study.at(rate) if seed is None or r.seed == seed]
        where = f"{rate_label(rate)}" if seed is None else f"{rate_label(rate)}, seed {seed:g}"
        if not runs:
            failures.append(f"no run at {where}")
        elif all(study.verdicts[r.id].behaviour == "incomplete" for r in runs):
            failures += [f"run {r.id} at {where} is {r.state}, {study.verdicts[r.id].reason}" for r in runs]
    return result("no run missing", failures, f"{len(points)} of {len(points)} points reached an end", bool(points))


def base_equal(study: Study) -> dict:
    bases = {run.id: run.base_loss for run in compared(study) if run.base_loss is not None}
    if not bases:
        return result("step-0 eval equal", [], "", known=False)
    spread = max(bases.values()) - min(bases.values())
    low, high = min(bases, key=bases.get), max(bases, key=bases.get)
    words = f"l0 between {bases[low]:.4f} and {bases[high]:.4f} over {plural(len(bases), 'run')}"
    return result("step-0 eval equal", [f"{words} (runs {low}, {high})"] if spread >= BASE_TOLERANCE else [], words)


def same_first_batch(study: Study) -> dict:
    hashes: dict[object, dict] = {}
    for run in compared(study):
        if run.summary.get("first_batch_hash") is not None:
            hashes.setdefault(run.seed, {}).setdefault(str(run.summary["first_batch_hash"]), []).append(run.id)
    failures = [
        f"seed {seed}: {len(found)} different first batches (runs {', '.join(ids[0] for ids in found.values())})"
        for seed, found in hashes.items()
        if len(found) > 1
    ]
    return result(
        "same first batch", failures, f"one first batch in each of {plural(len(hashes), 'seed')}", bool(hashes)
    )


def peak_rate(study: Study) -> dict:
    failures, checked = [], 0
    for run in compared(study):
        logged = run["train/learning_rate"].finite
        if len(logged) and run.last_step > run.warmup_steps + 1:
            checked += 1
            peak = float(logged.value.max())
            if not math.isclose(peak, run.learning_rate, rel_tol=RATE_TOLERANCE):
                failures.append(
                    f"run {run.id} asked for {rate_label(run.learning_rate)}, its peak was {rate_label(peak)}"
                )
    return result("peak rate = requested", failures, f"in {plural(checked, 'run')}", bool(checked))


def adapters_float32(study: Study) -> dict:
    kinds = {run.id: str(run.config["adapter_dtype"]) for run in compared(study) if "adapter_dtype" in run.config}
    wrong = sorted({kind for kind in kinds.values() if "float32" not in kind})
    words = f"adapters stored in {', '.join(wrong)}: small updates round away, which makes low rates look slow"
    return result("adapters float32", [words] if wrong else [], f"in {plural(len(kinds), 'run')}", bool(kinds))


def same_recipe(study: Study) -> dict:
    failures = [
        f"{key} differs ({', '.join(map(str, values))})"
        for key, values in study.differing.items()
        if key != "learning_rate"
    ]
    return result("same recipe", failures, f"{len(study.recipe)} settings agree over all runs", bool(study.recipe))


def same_eval_examples(study: Study) -> dict:
    tokens = {}
    for run in compared(study):
        if run.eval_nll is not None:
            tokens.setdefault(run.eval_nll.tokens.tobytes(), []).append(run.id)
    failures = [f"{len(tokens)} different eval sets (runs {', '.join(ids[0] for ids in tokens.values())})"]
    counts = {len(run.eval_nll.tokens) for run in compared(study) if run.eval_nll is not None}
    words = f"{max(counts, default=0)} examples in all runs"
    return result("same eval examples", failures if len(tokens) > 1 else [], words, bool(tokens))


def eval_is_the_sum(study: Study) -> dict:
    failures, checked = [], 0
    for run in compared(study):
        nll, loss = run.end_nll(), run.final_eval_loss
        if nll is not None and loss is not None:
            checked += 1
            total = float(nll.sum() / run.eval_nll.tokens.sum())
            if not abs(total - loss) < BASE_TOLERANCE:
                failures.append(f"run {run.id} logged {loss:.4f}, its examples sum to {total:.4f}")
    words = f"nats per token over the examples, in {plural(checked, 'run')}"
    return result("eval loss = its examples", failures, words, bool(checked))


CHECKS = (
    rates_are_the_grid,
    no_run_missing,
    base_equal,
    same_first_batch,
    peak_rate,
    adapters_float32,
    same_recipe,
    same_eval_examples,
    eval_is_the_sum,
)


def checks(study: Study) -> list[dict]:
    return [check(study) for check in CHECKS]
