"""Instrument checks: what must hold for the comparison to mean anything. A failed one is printed first and loudly."""

import math
from collections import Counter

from analysis.rates import example_set
from analysis.study import Study, gang_of
from analysis.sweep import GUIDED, asked_guides, parameters, points
from analysis.words import in_words, listed, plural, rate_label

BASE_TOLERANCE = 1e-3  # nats per token: LoRA's B is 0 at step 0, so every run is the base model there
RATE_TOLERANCE = 1e-3  # relative: the schedule's peak against the requested rate


def result(name: str, failures: list[str], passed: str, known: bool = True) -> dict:
    """One check: passed True/False, or None where the runs do not record what it needs."""
    if not known:
        return {"check": name, "passed": None, "detail": "not recorded by these runs"}
    return {"check": name, "passed": not failures, "detail": "; ".join(failures) if failures else passed}


def grid(study: Study) -> list[tuple[float, float | None]] | None:
    """The (rate, seed) points that the sweeps ask for; None without a sweep file, or if a sweep is not a grid."""
    asked = [points(sweep) for sweep in study.sweeps if "guide" not in parameters(sweep)]
    if not asked or None in asked:
        return None
    return sorted(set().union(*asked), key=lambda p: (p[0], p[1] is not None, p[1] or 0))


def rates_are_the_grid(study: Study) -> dict:
    asked_points = grid(study)
    if asked_points is None:
        why = "the sweep is not a grid over learning_rate" if study.sweeps else "no sweep file"
        return result("rates = grid", [], "", known=False) | {"detail": why}
    asked = {rate for rate, _ in asked_points}
    got = {run.learning_rate for part in study.groups for run in part.runs if run.learning_rate is not None}
    missing = [
        f"no run at {rate_label(r)}" for r in sorted(asked) if not any(math.isclose(r, g, rel_tol=1e-6) for g in got)
    ]
    extra = [
        f"{rate_label(g)} is not in the grid"
        for g in sorted(got)
        if not any(math.isclose(g, r, rel_tol=1e-6) for r in asked)
    ]
    return result("rates = grid", missing + extra, f"{len(got)} rates run, {len(asked)} in the grid")


def no_run_missing(study: Study) -> dict:
    asked, failures = grid(study) or [], []
    verdicts = {id: verdict for part in study.groups for id, verdict in part.verdicts.items()}
    for rate, seed in asked:
        runs = [
            run
            for part in study.groups
            for run in part.runs
            if run.learning_rate is not None
            and math.isclose(run.learning_rate, rate, rel_tol=1e-6)
            and seed in (None, run.seed)
        ]
        where = f"{rate_label(rate)}" if seed is None else f"{rate_label(rate)}, seed {seed:g}"
        if not runs:
            failures.append(f"no run at {where}")
        elif all(verdicts[run.id].behaviour == "incomplete" for run in runs):
            failures += [f"run {run.id} at {where} is {run.state}, {verdicts[run.id].reason}" for run in runs]
    ended = {part.guide for part in study.guides for run in part.counted if run.complete}
    followed = asked_guides(study.sweeps)
    failures += [f"no run of guide {name} has ended" for name in followed if name not in ended]
    words = f"{len(asked)} of {len(asked)} points reached an end" if asked else ""
    words += f"{', and ' if asked else ''}{plural(len(followed), 'guide')}" if followed else ""
    return result("no run missing", failures, words, bool(asked or followed))


def not_finite_alone(study: Study) -> dict:
    """Runs of a gang share nothing but the instrument: that two become non-finite in one step is its fault."""
    failures = []
    for fault in study.faults:
        lost = Counter(run.learning_rate for run in fault.runs)
        size = Counter(run.learning_rate for run in study.everything)
        who = listed([members(rate_label(rate), found, size[rate]) for rate, found in lost.items()])
        columns = [run[name] for run in fault.runs for name in ("train/loss", "train/grad_norm", "eval/loss")]
        values = [value for column in columns for value in column.between(fault.step, fault.step).value]
        kind = "NaN" if any(map(math.isnan, values)) else "infinite"
        failures.append(
            f"{who[0].upper()}{who[1:]} became {kind} at the same step, {fault.step}: a software fault, not the rate. "
            "They are judged by the steps before"
        )
    gangs = {gang_of(run) for run in study.runs} - {None}
    return result("not finite alone", failures, f"in {plural(len(gangs), 'gang')}", bool(gangs))


def members(rate: str, found: int, size: int) -> str:
    """All three 5e-3 runs; two of three 5e-3 runs."""
    if found < size:
        return f"{in_words(found)} of {in_words(size)} {rate} runs"
    return {1: f"the only {rate} run", 2: f"both {rate} runs"}.get(size, f"all {in_words(size)} {rate} runs")


def base_equal(study: Study) -> dict:
    bases = {run.id: run.base_loss for run in study.compared if run.base_loss is not None}
    if not bases:
        return result("step-0 eval equal", [], "", known=False)
    spread = max(bases.values()) - min(bases.values())
    low, high = min(bases, key=bases.get), max(bases, key=bases.get)
    words = f"untrained loss between {bases[low]:.4f} and {bases[high]:.4f} over {plural(len(bases), 'run')}"
    return result("step-0 eval equal", [f"{words} (runs {low}, {high})"] if spread >= BASE_TOLERANCE else [], words)


def same_first_batch(study: Study) -> dict:
    hashes: dict[object, dict] = {}
    for run in study.compared:
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
    for run in study.compared:
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
    kinds = {run.id: str(run.config["adapter_dtype"]) for run in study.compared if "adapter_dtype" in run.config}
    wrong = sorted({kind for kind in kinds.values() if "float32" not in kind})
    words = f"adapters stored in {', '.join(wrong)}: small updates round away, which makes low rates look slow"
    return result("adapters float32", [words] if wrong else [], f"in {plural(len(kinds), 'run')}", bool(kinds))


def same_recipe(study: Study) -> dict:
    """Whether all runs train on the same, but for what the sweep files set on purpose."""
    failures = [f"{listed(list(study.undeclared))} differ between runs, and no sweep file sets that"]
    failures = failures if study.undeclared else []
    for part in study.guides:
        if others := [key for key in part.differs if key not in GUIDED]:
            failures.append(f"guide {part.guide} is not compared: its runs differ in {listed(others)}")
    on_purpose = sorted({key for other in study.beside for key in other.differs})
    words = "every setting agrees over all runs" + (f", but for {listed(on_purpose)}" if on_purpose else "")
    return result("same recipe", failures, words, bool(study.recipe))


def same_eval_examples(study: Study) -> dict:
    tokens: dict[bytes, list[str]] = {}
    for run in study.compared:
        if run.eval_nll is not None:
            tokens.setdefault(run.eval_nll.tokens.tobytes(), []).append(run.id)
    failures = []
    if len(tokens) > 1:
        failures = [f"{len(tokens)} different eval sets (runs {', '.join(ids[0] for ids in tokens.values())})"]
    for run in study.compared:  # train.py writes the file before that line of the summary
        if run.state == "finished" and run.eval_nll is None and "first_batch_hash" in run.summary:
            failures.append(f"run {run.id} has finished without its eval_nll.json")
    found, module = example_set(study.compared)
    words = f"{0 if found is None else len(found)} examples in all runs"
    words += "" if module is None else f", from {plural(int(module.max()) + 1, 'module')}"
    return result("same eval examples", failures, words, bool(tokens or failures))


def eval_is_the_sum(study: Study) -> dict:
    failures, checked = [], 0
    for run in study.compared:
        if run.end is not None and run.end.nll is not None:
            checked += 1
            total = float(run.end.nll.sum() / run.eval_nll.tokens.sum())
            if not abs(total - run.end.loss) < BASE_TOLERANCE:
                failures.append(f"run {run.id} logged {run.end.loss:.4f}, its examples sum to {total:.4f}")
    words = f"nats per token over the examples, in {plural(checked, 'run')}"
    return result("eval loss = its examples", failures, words, bool(checked))


CHECKS = (
    not_finite_alone,
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
