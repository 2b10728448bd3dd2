"""The report: one small function for each question, put in place by `report.md.jinja`.

Every function takes the results as `all_results.json` has them and returns markdown; if the data flip, it flips.
`render` escapes every string of the results once, on entry, so no value of a run can reach the page as markup.
"""

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import appendix, behaviour, statistics
from analysis.files import number
from analysis.hypotheses import STANDARD
from analysis.wording import (
    bounds,
    decimals,
    escape,
    grid,
    labels,
    median,
    p_value,
    percent,
    plural,
    rate_label,
    steps,
)


def render(results: dict, directory: Path, pictures: list[str]) -> str:
    """The whole README.md of an output directory."""
    r = escape(results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the page is markdown: `escape` is its filter
    )
    return environment.get_template("report.md.jinja").render(
        answer=answer(r),
        alarms=[f"{c['check']}: {c['detail']}" for c in r["checks"] if c["passed"] is False],
        pictures=pictures,
        conditions=appendix.conditions(r),
        caption=caption(r),
        table=table(r),
        legend=legend(r),
        hypotheses=hypotheses(r),
        lowest=lowest(r),
        instability=instability(r),
        speed=speed(r),
        standard=standard(r),
        convergence=convergence(r),
        insights=insights(r),
        why=appendix.why(r),
        samples=appendix.samples(r),
        limits=appendix.limits(r),
        follow_ups=appendix.follow_ups(r, directory),
        checks=appendix.checks(r),
        runs=appendix.runs(r),
        reproduction=appendix.reproduction(r, results, directory),
        docs=appendix.docs(directory),
    )


def row_of(r: dict, wanted: float) -> dict | None:
    return next((row for row in r["rates"] if math.isclose(row["learning_rate"], wanted, rel_tol=1e-6)), None)


def compared(r: dict) -> list[dict]:
    """The feasible rates, best first."""
    return sorted((x for x in r["rates"] if x["basin"]["excess"] is not None), key=lambda x: x["basin"]["excess"])


def with_flag(r: dict, flag: str) -> list[float]:
    return [x["learning_rate"] for x in r["rates"] if flag in x["flags"]]


def winner(r: dict) -> float | None:
    """The rate that may be printed bold: the only one not outside the basin, over at least two seeds."""
    inside = [x["learning_rate"] for x in r["rates"] if x["basin"]["verdict"] != "out"]
    return r["best_rate"] if r["seeds"] > 1 and inside == [r["best_rate"]] else None


def improved(r: dict) -> bool:
    return None not in (r["base_loss"], r["best_loss"]) and r["base_loss"] > r["best_loss"]


def difference(x: dict, comma: bool = False) -> str:
    d = x["difference"]
    return f"{rate_label(x['learning_rate'])}{',' * comma} is {decimals(d['mean'], '+.3f')}, {bounds(d['interval'])}"


def answer(r: dict) -> str:
    """Which learning rate, in one sentence with its number, interval and n."""
    order = compared(r)
    if not order:
        diverged = [x["learning_rate"] for x in r["rates"] if x["diverged"]]
        if diverged:
            return f"No learning rate of this sweep is feasible: at least one run diverged at {labels(diverged)}."
        states = ", ".join(sorted({x["state"] for x in r["runs"]}))
        return (
            f"No run has reached its end, so no learning rate can be named: {plural(len(r['runs']), 'run')} ({states})."
        )
    best, name = order[0], rate_label(order[0]["learning_rate"])
    loss = f"{decimals(r['best_loss'])} nats per token ({bounds(best['interval'])}, n = {plural(r['seeds'], 'seed')})"
    if r["base_loss"] is not None and not improved(r):
        base = decimals(r["base_loss"])
        return f"No rate improved on the untrained model ({base}): the least harmful, {name}, ended at {loss}."
    strong = "**" if winner(r) else ""
    text = f"{strong}{name} has the lowest final eval loss: {loss}{strong}"
    tied = [x for x in order[1:] if x["basin"]["verdict"] != "out"]
    if len(order) == 1:
        text += "; it is the only feasible rate"
    elif tied:
        text += f", but not clearly: within ε = {decimals(r['basin']['width'])} of it or not told from it, "
        text += "; ".join(map(difference, tied))
    else:
        text += f"; the next, {difference(order[1], comma=True)}"
    return text + (". One seed: seed variance unknown." if r["seeds"] < 2 else ".")


def plain(markdown: str) -> str:
    """A sentence for the terminal: without emphasis."""
    return markdown.replace("**", "")


def caption(r: dict) -> str:
    c = r["basin"]
    bars = ""
    if c is not None and c["replicates"]:
        bars = (
            f" C: bars are 95 % intervals of the difference from the best rate, over {c['covers']}; "
            f"the band is ε = {decimals(c['width'])} nats."
        )
    lines = (
        "Thin lines are single runs, bold their mean."
        if max((x["n"] for x in r["rates"]), default=0) > 1
        else "One run a rate."
    )
    return (
        f"Nats per answer token over {r['planned_steps']} steps. {lines} Diverged runs are dashed, with a red cross "
        f"at the "
        f"first bad step.{bars} F: “>{r['planned_steps']}” was not reached."
    )


def table(r: dict) -> str:
    """The seed document's results table, with what is needed to judge its numbers."""
    header = ["Learning Rate", "α·η", "Final Train Loss", "Final Eval Loss", "Δ vs best [95 %]", "G [95 %]"]
    header += ["Steps to 80 %", "Clipped", "Behavior"]
    rows = []
    for x in r["rates"]:
        strong = "**" if x["learning_rate"] == winner(r) else ""
        rows.append(
            [
                f"{strong}{rate_label(x['learning_rate'])}{strong}",
                decimals(x["alpha_rate"], ".2g"),
                mean_sd(x["final_train"], x["n"]),
                f"{strong}{mean_sd(x['final_eval'], x['n'])}{strong}",
                "best" if x["learning_rate"] == r["best_rate"] else with_interval(x["difference"], "+.3f"),
                with_interval(x["gain"], ".2f"),
                steps(x["steps"]["0.8"], r["planned_steps"]),
                percent(x["clipped"]),
                behaviours(x),
            ]
        )
    return grid(header, rows)


def mean_sd(spread: dict, runs: int) -> str:
    if spread["mean"] is None:
        return "—"
    sd = "" if spread["sd"] is None else f" ± {decimals(spread['sd'])}"
    return f"{decimals(spread['mean'])}{sd} (n = {spread['n']}{'' if spread['n'] == runs else f' of {runs}'})"


def with_interval(found: dict | None, form: str) -> str:
    if found is None or found["mean"] is None:
        return "—"
    pair = found["interval"]
    interval = f" [{decimals(pair[0], form)}, {decimals(pair[1], form)}]" if pair else ""
    return decimals(found["mean"], form) + interval


def behaviours(x: dict) -> str:
    words = ", ".join(f"{word} {count}/{x['n']}" if x["n"] > 1 else word for word, count in x["behaviours"].items())
    return words + (f" ({', '.join(x['flags'])})" if x["flags"] else "")


def legend(r: dict) -> str:
    c, clip = r["basin"], r["recipe"].get("max_grad_norm")
    words = (
        "Nats per answer token. Final train loss: mean of the finite per-step losses over the last 10 % of the "
        "steps (at "
        "least 10). Final eval loss: mean ± standard deviation over n seeds. G: share of the best rate's gain over the "
        "untrained model (1 the best, 0 untrained, below 0 harmed)."
    )
    words += "" if clip is None else f" Clipped: steps with a gradient norm above {decimals(clip, 'g')}."
    if c is not None and c["replicates"]:
        words += f" Intervals: percentile bootstrap over {c['covers']}, {c['replicates']:,} replicates."
    if winner(r) is None and compared(r):
        open_rates = [x["learning_rate"] for x in r["rates"] if x["basin"]["verdict"] != "out"]
        reason = (
            "one seed"
            if r["seeds"] < 2
            else f"the basin test leaves {labels(open_rates)}"
            if open_rates
            else "none passed"
        )
        words += f" No winner is printed bold: {reason}."
    return words


def hypotheses(r: dict) -> str:
    rows = [[h["name"], h["claim"], f"**{h['verdict']}**", h["evidence"], str(h["n"])] for h in r["hypotheses"]]
    seeds = "\n\nOne seed: each verdict holds for this seed; how seeds vary is unknown." if r["seeds"] == 1 else ""
    return grid(["", "Hypothesis, fixed before the runs", "Verdict", "Evidence", "Seeds"], rows) + seeds


def lowest(r: dict) -> str:
    order = compared(r)
    if not order:
        return "None can be named: no feasible rate has a final eval loss."
    loss = f"{decimals(r['best_loss'])} ({bounds(order[0]['interval'])}, n = {plural(r['seeds'], 'seed')})"
    text = f"{rate_label(order[0]['learning_rate'])}: final eval loss {loss}"
    text += f"; against it {'; '.join(map(difference, order[1:]))}" if len(order) > 1 else ""
    trained = [x for x in r["rates"] if x["final_train"]["mean"] is not None]
    if trained:
        x = min(trained, key=lambda x: x["final_train"]["mean"])
        text += f". Lowest final train loss: {rate_label(x['learning_rate'])}, {mean_sd(x['final_train'], x['n'])}"
    return text + "."


def instability(r: dict) -> str:
    found = [x for x in r["runs"] if x["compared"] and x["behaviour"] in ("diverged", "unstable")]
    total = plural(sum(x["compared"] for x in r["runs"]), "run")
    if not found:
        return f"No: of {total} none diverged and none was unstable."
    diverged = sum(x["behaviour"] == "diverged" for x in found)
    lines = [f"Yes: of {total} {diverged} diverged and {len(found) - diverged} were unstable."]
    for x in found:
        seed = "" if x["seed"] is None else f", seed {x['seed']}"
        when = f" ({x['onset']})" if x["onset"] else ""
        lines.append(f"   - {rate_label(x['learning_rate'])}{seed}: {x['behaviour']}{when}, {x['reason']}.")
    return "\n".join(lines)


def speed(r: dict) -> str:
    known = [(number(x["steps"]["0.8"]), x) for x in r["rates"] if x["steps"]["0.8"] is not None]
    if not known:
        return "Undefined: no rate improved on the untrained model, so there is no target to reach."
    reached = sorted((pair for pair in known if math.isfinite(pair[0])), key=lambda pair: pair[0])
    missed = [x["learning_rate"] for count, x in known if not math.isfinite(count)]
    text = "No rate reached 80 % of the best gain in the median of its seeds"
    if reached:
        (first_steps, first), (last_steps, last) = reached[0], reached[-1]
        name = rate_label(first["learning_rate"])
        text = f"{name} was first to 80 % of the best gain, after {first_steps:.0f} of {r['planned_steps']} steps"
        if len(reached) > 1:
            slower = f"{last_steps:.0f} ({last_steps / max(first_steps, 1e-9):.1f}×)"
            text += (
                f"; the last of the {len(reached)} that reached it, {rate_label(last['learning_rate'])}, took {slower}"
            )
    if missed:
        text += f"; {labels(missed)} did not reach it in {r['planned_steps']} steps"
    lost = [x["learning_rate"] for _, x in reached if x["diverged"]]
    if lost:
        text += f". To reach it is not to keep it: at {labels(lost)} at least one run diverged"
    return text + "."


def standard(r: dict) -> str:
    """Whether 2e-4, the rate that the seed document calls standard, is optimal here."""
    x, name = row_of(r, STANDARD), rate_label(STANDARD)
    if x is None:
        return f"Not tested: no run at {name}."
    if x["diverged"]:
        return f"No: {x['diverged']} of {plural(x['n'], 'run')} diverged there."
    test = x["basin"]
    if test["excess"] is None:
        return "Undecided: no run there reached its end."
    word = {"in": "Yes, within what matters", "out": "No", "undecided": "Undecided"}[test["verdict"]]
    above = f"its mean is {decimals(test['excess'])} nats above that of {rate_label(r['best_rate'])}"
    place = "it has the lowest mean" if x["learning_rate"] == r["best_rate"] else above
    width = decimals(r["basin"]["width"])
    text = (
        f"{word}: {place}; excess over the best rate {bounds(test['interval'])}, against a margin of ε = {width} nats."
    )
    if r["seeds"] < 2:
        text += " With one seed this is about the eval examples, not about seeds."
    return f"{text} {appendix.spacing(r)}".strip()


def convergence(r: dict) -> str:
    """Steps, tokens and seconds to the targets by rate, medians over seeds."""
    if not improved(r):
        return ""
    rows = []
    for x in r["rates"]:
        runs = [y for y in r["runs"] if y["compared"] and y["learning_rate"] == x["learning_rate"]]
        found = [y["convergence"] for y in runs if y["convergence"]]
        cells = [steps(x["steps"][f"{q:g}"], r["planned_steps"]) for q in statistics.TARGETS]
        for key, form in (("tokens", ",.0f"), ("seconds", ",.1f")):
            values = [number(c["0.8"][key]) for c in found]
            cells.append("—" if not values or None in values else median(values, form))
        cells.append(median([number(c["area"]) for c in found], ".2f") if found else "—")
        rows.append([rate_label(x["learning_rate"]), *cells, str(len(found))])
    header = ["Learning Rate", "Steps to 50 %", "80 %", "95 %", "Tokens to 80 %", "Seconds to 80 %", "Area", "n"]
    return (
        f"{grid(header, rows)}\n\nTargets: l0 − q·(l0 − l*), q = 50, 80, 95 %, with l0 = {decimals(r['base_loss'])} "
        f"(untrained) "
        f"and l* = {decimals(r['best_loss'])} (best rate). Medians over n runs; a miss (“>”, ∞) stays in the "
        f"median. Area: mean "
        "of (e − l*)/(l0 − l*) over the run, 0 at the best loss from the start, 1 nothing learned, ∞ without an end."
    )


def insights(r: dict) -> list[str]:
    """What else the numbers say, one sentence each."""
    found, s, o = [], r["sensitivity"], r["optimum"]
    if s is not None:
        found.append(
            f"Sensitivity to the learning rate: S = {decimals(s['nats'])} nats over {s['rates']} rates, "
            f"{percent(s['share'])} of "
            "the gain l0 − l* (mean of min(E, l0) − l*, a diverged run counting as untrained; Wortsman et al., "
            "arXiv:2309.14322)."
        )
    if with_flag(r, "crossed"):
        crossed = labels(with_flag(r, "crossed"))
        found.append(
            f"Early lead, later loss: {crossed} led on eval loss in the first half, and ended outside the basin."
        )
    fast = [
        f"{rate_label(x['learning_rate'])} in {plural(x['flags']['fast start'], 'seed')}"
        for x in r["rates"]
        if "fast start" in x["flags"]
    ]
    if fast:
        first, last = (100 * share for share in behaviour.FAST_START)
        found.append(f"Fastest start, the lowest train loss over steps {first:g}–{last:g} %: {', '.join(fast)}.")
    if with_flag(r, "clip-bound"):
        found.append(
            f"Clip-bound: at {labels(with_flag(r, 'clip-bound'))} more than {percent(behaviour.CLIP_BOUND)} of the "
            f"steps are "
            "clipped. Adam cancels a constant factor of the gradient, so clipping evens the steps out more than it "
            "shortens them."
        )
    for key, settings in r["by_setting"].items():
        parts = []
        for x in settings:
            if x["best_rate"] is None:
                parts.append(f"{x['value']}: no run ended without diverging")
                continue
            of = f"of {plural(x['rates'], 'rate')}, n = {x['n']}, {x['diverged']} diverged"
            product = f", α·η {decimals(x['alpha_rate'], '.2g')}" if key == "lora_alpha" else ""
            parts.append(f"{x['value']}: {rate_label(x['best_rate'])} at {decimals(x['loss'])} ({of}{product})")
        found.append(f"Best rate by {key} (means, without interval): {'; '.join(parts)}.")
    if o is not None and o["identified"]:
        pair = o["interval"]
        spread = "no interval" if pair is None else f"95 % [{rate_label(pair[0])}, {rate_label(pair[1])}]"
        found.append(
            f"A quadratic in log10 η through {o['n']} rates is lowest at {rate_label(o['learning_rate'])}, "
            f"{spread}, if it is one."
        )
    elif o is not None:
        found.append(f"A quadratic in log10 η does not identify the optimum: {o['reason']}.")
    tested = [x for x in compared(r)[1:] if x["difference"]["p"] is not None]
    if tested:
        parts = ", ".join(f"{rate_label(x['learning_rate'])} {p_value(x['difference']['p'])}" for x in tested)
        found.append(
            f"Difference from {rate_label(r['best_rate'])}, bootstrap with Holm's correction for {len(tested)}: "
            f"{parts}."
        )
    return found or ["None: too few runs have reached an end."]
