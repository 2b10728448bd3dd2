"""The report: one small function for each question, put in place by `report.md.jinja`.

Every function takes the results as `all_results.json` has them and returns markdown; if the data flip, the sentence flips.
`render` escapes every string of the results once, on entry, so no value of a run can reach the page as markup.
"""

import math
import os
import re
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import behaviour, statistics
from analysis.followups import sweep_file
from analysis.hypotheses import SLOWER, STANDARD, steps_text
from analysis.mechanism import RULE_OF_THUMB
from analysis.runs import number

PROJECT = Path(__file__).resolve().parent.parent
SPECIAL = re.compile(r"[\\`*|<>&\[\]#~{}$!]|(?<!\w)_|_(?!\w)|://|@")


def escape(value: object) -> object:
    """`value` with every string made inert as markdown and HTML; numbers and structure stay."""
    if isinstance(value, str):
        text = " ".join(value.split())
        return SPECIAL.sub(lambda m: "".join(f"&#{ord(c)};" for c in m.group()), text)
    if isinstance(value, dict):
        return {escape(key): escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape(item) for item in value]
    return value


def render(results: dict, directory: Path, pictures: list[str]) -> str:
    """The whole README.md of an output directory."""
    r = escape(results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the page is markdown; `escape` above is its filter
    )
    return environment.get_template("report.md.jinja").render(
        answer=answer(r),
        alarms=[f"{c['check']}: {c['detail']}" for c in r["checks"] if c["passed"] is False],
        pictures=pictures,
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
        why=why(r),
        samples=samples(r),
        limits=limits(r),
        follow_ups=follow_ups(r, directory),
        checks=checks(r),
        runs=runs(r),
        reproduction=reproduction(r, results, directory),
        docs=docs(directory),
    )


# --- numbers in words -------------------------------------------------------------------------------------------------


def rate(value: float | None) -> str:
    """A rate as people write it: 1e-5, 2e-4, 3.2e-4."""
    if value is None:
        return "unknown"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def rates(values: list[float]) -> str:
    words = [rate(v) for v in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def value(x: object, form: str = ".3f") -> str:
    x = number(x)
    return "—" if x is None else format(x, form) if math.isfinite(x) else "not finite"


def bounds(pair: list | None, form: str = ".3f") -> str:
    return "no interval" if pair is None else f"95 % [{pair[0]:{form}}, {pair[1]:{form}}]"


def percent(share: float | None) -> str:
    return "—" if share is None else f"{share:.0%}".replace("%", " %")


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def grid(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def row_of(r: dict, wanted: float | None) -> dict | None:
    same = (
        row for row in r["rates"] if wanted is not None and math.isclose(row["learning_rate"], wanted, rel_tol=1e-6)
    )
    return next(same, None)


def compared(r: dict) -> list[dict]:
    """The feasible rates, best first."""
    return sorted((x for x in r["rates"] if x["basin"]["excess"] is not None), key=lambda x: x["basin"]["excess"])


def inside(r: dict) -> list[float]:
    """Rates that the basin test does not put outside."""
    return [x["learning_rate"] for x in r["rates"] if x["basin"]["verdict"] != "out"]


def winner(r: dict) -> float | None:
    """The rate that may be printed bold: the only one not outside the basin, over at least two seeds."""
    return r["best_rate"] if r["seeds"] > 1 and inside(r) == [r["best_rate"]] else None


def improved(r: dict) -> bool:
    return None not in (r["base_loss"], r["best_loss"]) and r["base_loss"] > r["best_loss"]


# --- the answer and the table -----------------------------------------------------------------------------------------


def answer(r: dict) -> str:
    """Which learning rate, in one sentence with its number, interval and n."""
    order, ended = compared(r), [x for x in r["runs"] if x["behaviour"] != "incomplete"]
    if not ended:
        states = sorted({x["state"] for x in r["runs"]})
        return f"**No run has reached its end yet**, so no learning rate can be named: {plural(len(r['runs']), 'run')}, {', '.join(states)}."
    if not order:
        worst = [x["learning_rate"] for x in r["rates"] if x["diverged"]]
        return (
            f"**No learning rate of this sweep is feasible**: at least one run diverged at {rates(worst)}."
            if worst
            else "**No run has a final eval loss**, so no learning rate can be named."
        )
    best = order[0]
    loss = f"{value(r['best_loss'])} nats per token ({bounds(best['interval'])}, n = {plural(r['seeds'], 'seed')})"
    if r["base_loss"] is not None and not improved(r):
        return f"**No rate improved on the untrained model** ({value(r['base_loss'])} nats per token); the least harmful, {rate(best['learning_rate'])}, ended at {loss}."
    tied = [x for x in order[1:] if x["basin"]["verdict"] != "out"]
    start = "" if r["seeds"] > 1 else "In this one seed, "
    if len(order) == 1:
        text = f"{rate(best['learning_rate'])} is the only feasible rate, with a final eval loss of {loss}"
    elif tied:
        names = rates([x["learning_rate"] for x in tied])
        gap = best_gap(tied)
        text = f"**{rate(best['learning_rate'])} has the lowest final eval loss, {loss}, but {names} cannot be told from it** ({gap})"
    else:
        second = order[1]["difference"]
        text = f"**{rate(best['learning_rate'])} has the lowest final eval loss: {loss}**, {value(second['mean'])} below {rate(order[1]['learning_rate'])}, the next ({bounds(second['interval'])})"
    tail = "" if r["seeds"] > 1 else "; seed variance unknown"
    return f"{start}{text}{tail}."


def best_gap(rows: list[dict]) -> str:
    return "; ".join(
        f"{rate(x['learning_rate'])} is {value(x['difference']['mean'], '+.3f')}, {bounds(x['difference']['interval'])}"
        for x in rows
    )


def plain(markdown: str) -> str:
    """A sentence for the terminal: without emphasis."""
    return markdown.replace("**", "")


def caption(r: dict) -> str:
    c = r["basin"]
    bars = (
        ""
        if c is None
        else f" C: bars are 95 % intervals of the difference from the best rate (resampling {c['covers']}), the band is ε = {value(c['width'])} nats."
    )
    return (
        f"Loss in nats per answer token; {plural(len(r['rates']), 'rate')}, {r['planned_steps']} steps. Thin lines are single runs, bold their mean; "
        f"diverged runs are dashed with a red cross at the first bad step.{bars} F: “>{r['planned_steps']}” was not reached."
    )


def table(r: dict) -> str:
    header = [
        "Learning Rate",
        "α·η",
        "Final Train Loss",
        "Final Eval Loss",
        "Δ vs best [95 %]",
        "G",
        "Steps to 80 %",
        "Clipped",
        "Behavior",
    ]
    rows = []
    for x in r["rates"]:
        name = rate(x["learning_rate"])
        strong = "**" if x["learning_rate"] == winner(r) else ""
        difference = x["difference"]
        delta = "best" if x["learning_rate"] == r["best_rate"] else "—"
        if difference is not None:
            pair = difference["interval"]
            delta = f"{difference['mean']:+.3f}" + (f" [{pair[0]:+.3f}, {pair[1]:+.3f}]" if pair else "")
        words = ", ".join(f"{word} {count}/{x['n']}" if x["n"] > 1 else word for word, count in x["behaviours"].items())
        flags = f" ({', '.join(x['flags'])})" if x["flags"] else ""
        rows.append(
            [
                f"{strong}{name}{strong}",
                "—" if x["alpha_rate"] is None else f"{x['alpha_rate']:.2g}",
                mean_sd(x["final_train"], x["n"]),
                f"{strong}{mean_sd(x['final_eval'], x['n'])}{strong}",
                delta,
                gain(x),
                steps_text(number(x["steps"]["0.8"]), r["planned_steps"]) if x["steps"]["0.8"] is not None else "—",
                percent(x["clipped"]),
                words + flags,
            ]
        )
    return grid(header, rows)


def mean_sd(spread: dict, runs: int) -> str:
    if spread["mean"] is None:
        return "—"
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.3f}"
    return f"{spread['mean']:.3f}{sd} (n = {spread['n']}{'' if spread['n'] == runs else f' of {runs}'})"


def gain(x: dict) -> str:
    if x["gain"] is None:
        return "—"
    pair = x["gain"]["interval"]
    return f"{x['gain']['mean']:.2f}" + (f" [{pair[0]:.2f}, {pair[1]:.2f}]" if pair else "")


def legend(r: dict) -> str:
    c = r["basin"]
    words = (
        "Losses are nats per answer token. Final train loss: mean of the finite per-step losses over the last 10 % of the steps "
        "(at least 10). Final eval loss: mean ± standard deviation over seeds. "
        "G: share of the best rate's gain over the untrained model that the rate captured (1 best, 0 untrained, below 0 harmed). "
        f"Clipped: steps whose gradient norm exceeded {value(r['recipe'].get('max_grad_norm'), 'g')}."
    )
    if c is not None and c["replicates"]:
        words += f" Intervals: percentile bootstrap over {c['covers']}, {c['replicates']} replicates; p-values in the JSON are Holm-adjusted."
    if winner(r) is None and compared(r):
        reason = (
            "one seed cannot separate a winner from noise"
            if r["seeds"] < 2
            else f"the basin test does not single one out ({rates(inside(r))})"
            if inside(r)
            else "no rate passed"
        )
        words += f" No rate is printed bold: {reason}."
    return words


def hypotheses(r: dict) -> str:
    rows = [[h["name"], h["claim"], f"**{h['verdict']}**", h["evidence"], str(h["n"])] for h in r["hypotheses"]]
    seeds = "" if r["seeds"] != 1 else "\n\nOne seed: each verdict holds for this seed; how seeds vary is unknown."
    return grid(["", "Hypothesis, fixed before the runs", "Verdict", "Evidence", "Seeds"], rows) + seeds


# --- the four questions -----------------------------------------------------------------------------------------------


def lowest(r: dict) -> str:
    order = compared(r)
    if not order:
        return "None can be named: no feasible rate has a final eval loss."
    trains = [x for x in r["rates"] if x["final_train"]["mean"] is not None]
    train = min(trains, key=lambda x: x["final_train"]["mean"], default=None)
    text = f"{rate(order[0]['learning_rate'])}: final eval loss {value(r['best_loss'])} ({bounds(order[0]['interval'])}, n = {plural(r['seeds'], 'seed')})"
    if len(order) > 1:
        text += f"; against it {best_gap(order[1:])}"
    if train is not None:
        text += f". Lowest final train loss: {rate(train['learning_rate'])}, {value(train['final_train']['mean'])} (n = {train['final_train']['n']})"
    return text + "."


def instability(r: dict) -> str:
    found = [x for x in r["runs"] if x["compared"] and x["behaviour"] in ("diverged", "unstable")]
    total = sum(x["compared"] for x in r["runs"])
    if not found:
        return f"No: none of {plural(total, 'run')} diverged or was unstable."
    parts = []
    for x in found:
        seed = "" if x["seed"] is None else f", seed {x['seed']}"
        when = f" ({x['onset']})" if x["onset"] else ""
        parts.append(f"{rate(x['learning_rate'])}{seed}: {x['behaviour']}{when}, {x['reason']}")
    diverged = sum(x["behaviour"] == "diverged" for x in found)
    return (
        f"Yes: {diverged} of {plural(total, 'run')} diverged, {len(found) - diverged} were unstable. "
        + "; ".join(parts)
        + "."
    )


def speed(r: dict) -> str:
    known = [(number(x["steps"]["0.8"]), x) for x in r["rates"] if x["steps"]["0.8"] is not None]
    if not known:
        return "Undefined: no rate improved on the untrained model, so there is no target to reach."
    reached = sorted(((s, x) for s, x in known if math.isfinite(s)), key=lambda p: p[0])
    missed = [x["learning_rate"] for s, x in known if not math.isfinite(s)]
    text = "No rate reached 80 % of the best gain in the median of its seeds"
    if reached:
        steps, first = reached[0]
        text = f"{rate(first['learning_rate'])} was first to 80 % of the best gain, after {steps:.0f} of {r['planned_steps']} steps"
        if len(reached) > 1:
            last_steps, last = reached[-1]
            text += f"; the slowest of the {len(reached)} that reached it, {rate(last['learning_rate'])}, took {last_steps:.0f} ({last_steps / max(steps, 1e-9):.1f} ×)"
    if missed:
        text += f"; {rates(missed)} did not reach it in {r['planned_steps']} steps"
    harmed = [x["learning_rate"] for s, x in reached if x["diverged"]]
    if harmed:
        text += f". Reaching it is not keeping it: {rates(harmed)} diverged afterwards in at least one seed"
    return text + "."


def standard(r: dict) -> str:
    x = row_of(r, STANDARD)
    if x is None:
        return f"Not tested: this sweep has no run at {rate(STANDARD)}."
    if x["diverged"]:
        return f"No: {x['diverged']} of {plural(x['n'], 'run')} diverged there."
    test, c = x["basin"], r["basin"]
    if test["excess"] is None:
        return "Undecided: no run there reached its end."
    word = {"in": "Yes, within what matters", "out": "No", "undecided": "Undecided"}[test["verdict"]]
    place = (
        "has the lowest mean"
        if x["learning_rate"] == r["best_rate"]
        else f"is {value(test['excess'])} nats above {rate(r['best_rate'])}"
    )
    text = f"{word}: {rate(STANDARD)} {place}; its excess over the best rate is {bounds(test['interval'])} against a margin of ε = {value(c['width'])}"
    better = [y["learning_rate"] for y in compared(r) if y["basin"]["excess"] < test["excess"]]
    if test["verdict"] == "in" and better:
        text += f" ({rates(better)} had a lower mean, by less than matters)"
    if r["seeds"] < 2:
        text += "; one seed, so this is about the eval examples, not about seeds"
    coarse = gaps(r)
    return text + (f". {coarse}" if coarse else ".")


def gaps(r: dict) -> str:
    """What the grid's spacing forbids to say; empty if it is fine enough."""
    swept, best = [x["learning_rate"] for x in r["rates"]], r["best_rate"]
    if best is None:
        return ""
    place = swept.index(best)
    sides = []
    if place > 0 and best / swept[place - 1] > statistics.COARSE * 1.1:
        sides.append(f"{best / swept[place - 1]:.3g}× below it")
    if place < len(swept) - 1 and swept[place + 1] / best > statistics.COARSE * 1.1:
        sides.append(f"{swept[place + 1] / best:.3g}× above it")
    if not sides:
        return ""
    finer = next(
        (f["config"]["parameters"]["learning_rate"]["values"] for f in r["follow_ups"] if f["name"] == "refinement"), []
    )
    more = f": {rates(finer)} would" if finer else ""
    return f"The grid leaves a gap of {' and '.join(sides)}, so it cannot place the optimum around {rate(best)}{more}"


def convergence(r: dict) -> str:
    """Steps, tokens and seconds to each target by rate, medians over seeds."""
    if not improved(r):
        return ""
    rows = []
    for x in r["rates"]:
        found = [
            y["convergence"]
            for y in r["runs"]
            if y["compared"] and y["learning_rate"] == x["learning_rate"] and y["convergence"]
        ]
        cells = [rate(x["learning_rate"])]
        cells += [steps_text(number(x["steps"][f"{q:g}"]), r["planned_steps"]) for q in statistics.TARGETS]
        for key, form in (("tokens", ",.0f"), ("seconds", ",.1f")):
            values = [number(c["0.8"][key]) for c in found]
            cells.append("—" if not values or None in values else median(values, form))
        areas = [number(c["area"]) for c in found]
        cells.append(median(areas, ".2f") if areas else "—")
        rows.append([*cells, str(x["n"])])
    note = (
        f"Targets: l0 − q(l0 − l*) with l0 = {value(r['base_loss'])} and l* = {value(r['best_loss'])}; medians over seeds, “>” is a miss and stays in the median. "
        "Area: mean of (e − l*)/(l0 − l*) over the run, 0 at the best loss from the start, 1 nothing learned, ∞ for a run that did not end."
    )
    return (
        grid(["Learning Rate", "Steps to 50 %", "80 %", "95 %", "Tokens to 80 %", "Seconds to 80 %", "Area", "n"], rows)
        + "\n\n"
        + note
    )


def median(values: list[float], form: str) -> str:
    """The median with misses (∞) in place; of two middle values the mean, ∞ if either is a miss."""
    values = sorted(math.inf if v != v else v for v in values)
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return "∞" if math.isinf(high) else format((low + high) / 2, form)


# --- insights, mechanism, samples -------------------------------------------------------------------------------------


def insights(r: dict) -> list[str]:
    found = []
    s = r["sensitivity"]
    if s is not None:
        found.append(
            f"Learning-rate sensitivity S = {value(s['nats'])} nats over {s['rates']} rates, {percent(s['share'])} of the gain l0 − l* "
            "(Wortsman et al. 2023: mean over the grid of min(E, l0) − l*, so diverged runs count as untrained)."
        )
    crossed = [x["learning_rate"] for x in r["rates"] if "crossed" in x["flags"]]
    if crossed:
        found.append(
            f"Early lead, late loss: {rates(crossed)} had the lowest eval loss of their seed in the first half, but are not in the basin at the end."
        )
    fast = {x["learning_rate"]: x["flags"]["fast start"] for x in r["rates"] if "fast start" in x["flags"]}
    if fast:
        first, last = percent(behaviour.FAST_START[0]), percent(behaviour.FAST_START[1])
        found.append(
            f"Fastest start (lowest train loss over {first[:-2]}–{last} of the steps): "
            + ", ".join(f"{rate(k)} in {plural(n, 'seed')}" for k, n in fast.items())
            + "."
        )
    clipped = [x for x in r["rates"] if "clip-bound" in x["flags"]]
    if clipped:
        found.append(
            f"Clipping sets the step at {rates([x['learning_rate'] for x in clipped])}: more than {percent(behaviour.CLIP_BOUND)} of the steps are clipped. "
            "With Adam a constant factor of the gradient cancels, so this damps outliers more than it lowers the rate."
        )
    o = r["optimum"]
    if o is not None and o["identified"]:
        pair = o["interval"]
        spread = "no interval" if pair is None else f"95 % [{rate(pair[0])}, {rate(pair[1])}]"
        found.append(
            f"A quadratic in log10 η through {o['n']} points has its minimum at {rate(o['learning_rate'])}, {spread}; the interval holds if a quadratic does."
        )
    elif o is not None:
        found.append(f"The optimum is not identified by a quadratic in log10 η: {o['reason']}.")
    spread = [x for x in compared(r)[1:] if x["difference"]["p"] is not None]
    if spread:
        parts = ", ".join(f"{rate(x['learning_rate'])} p = {p_text(x['difference']['p'])}" for x in spread)
        found.append(
            f"Against {rate(r['best_rate'])}, bootstrap p-values after Holm's correction for {plural(len(spread), 'comparison')}: {parts} (over {r['basin']['covers']})."
        )
    return found or ["None: no rate has enough ended runs."]


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def why(r: dict) -> str:
    m = r["mechanism"]
    if m is None:
        return (
            "The runs do not record their adapted modules, r and α, so the size of the first step cannot be computed."
        )
    rows = []
    for row in m["rows"]:
        low, high = row["a_steps"]
        steps = f"{low:.3g}" if math.isclose(low, high, rel_tol=0.01) else f"{low:.3g}–{high:.3g}"
        rows.append(
            [
                rate(row["learning_rate"]),
                f"{row['first_step']:.1e}",
                steps,
                scientific(row["measured_early"]),
                scientific(row["measured_end"]),
            ]
        )
    early = "first evaluation" if m["early_step"] is None else f"step {m['early_step']}"
    header = [
        "Learning Rate",
        "‖ΔW‖/‖W‖ after one full step",
        "A's time-scale, steps",
        f"measured, {early}",
        "measured, end",
    ]
    above = [row["learning_rate"] for row in m["rows"] if row["first_step"] > RULE_OF_THUMB]
    below = [row["learning_rate"] for row in m["rows"] if row["first_step"] <= RULE_OF_THUMB]
    text = (
        f"Adam's first step moves every entry of B by ±η whatever the gradient's size, and A is still at its start, so "
        f"‖ΔW‖ = (α/r)·η·sqrt(d_out·r/3) for a d_out × d_in matrix; A moves by its own standard deviation in 1/(sqrt(3·d_in)·η) steps. "
        f"With r = {m['rank']:g}, α = {m['alpha']:g} and d_in from {m['widths'][0]:g} to {m['widths'][1]:g} over {m['matrices']:g} matrices of these runs:\n\n"
        + grid(header, rows)
        + f"\n\nThe rule of thumb for one step is {RULE_OF_THUMB:g} (cs231n). "
    )
    if above:
        text += f"{rates(above)} {'exceeds' if len(above) == 1 else 'exceed'} it with the first full-rate step"
        text += f"; {rates(below)} {'stays' if len(below) == 1 else 'stay'} below. " if below else ". "
    elif below:
        text += f"{rates(below)} {'stays' if len(below) == 1 else 'stay'} below it. "
    slow = [row["learning_rate"] for row in m["rows"] if r["planned_steps"] and row["a_steps"][0] > r["planned_steps"]]
    if slow:
        text += f"At {rates(slow)} A cannot move by its own size within the {r['planned_steps']} steps: only B learns. "
    share = share_trained(r)
    return (
        text
        + share
        + (
            "Two reasons often given do not hold: smaller gradients cannot explain LoRA's higher rates, since Adam is invariant to the gradient's scale; and "
            "only A starts small and random, B starts at exactly zero. The LoRA paper (arXiv:2106.09685) used 2e-4 for GPT-2 and other rates elsewhere; the 2e-4 "
            "of 7B and 13B models is QLoRA's (arXiv:2305.14314), at r = 64 and α = 16."
        )
    )


def share_trained(r: dict) -> str:
    config = next((x["config"] for x in r["runs"] if x["compared"]), {})
    trained, total = number(config.get("trainable_parameters")), number(config.get("all_parameters"))
    if not trained or not total:
        return ""
    return f"The adapters are {trained:,.0f} of {total:,.0f} parameters ({trained / total:.2%}). "


def scientific(x: object) -> str:
    x = number(x)
    return "—" if x is None else f"{x:.1e}"


def samples(r: dict) -> str:
    """Greedy completions of the fixed prompts, one run for each rate (its first seed)."""
    shown: dict[float, dict] = {}
    for x in r["runs"]:
        if x["compared"] and x["generations"]:
            shown.setdefault(x["learning_rate"], x)
    if not shown:
        return "No run recorded generated samples."
    parts = []
    first = next(iter(shown.values()))
    for i, sample in enumerate(first["generations"]):
        rows = [["*reference*", clipped_text(sample.get("reference"))]]
        for x in shown.values():
            text = x["generations"][i].get("completion") if i < len(x["generations"]) else None
            rows.append([rate(x["learning_rate"]), clipped_text(text)])
        parts.append(
            f"*Prompt {i + 1}*: {clipped_text(sample.get('prompt'), 400)}\n\n"
            + grid(["Learning Rate", "Completion"], rows)
        )
    without = [x["learning_rate"] for x in r["rates"] if x["learning_rate"] not in shown]
    tail = f"\n\nNo samples from {rates(without)}." if without else ""
    return "\n\n".join(parts) + tail


def clipped_text(text: object, limit: int = 300) -> str:
    """Escaped text cut at a length, never inside an entity."""
    if not isinstance(text, str) or not text.strip():
        return "(empty)"
    if len(text) <= limit:
        return text
    return re.sub(r"&[^;]*$", "", text[:limit]) + " …"


# --- limits, follow-ups, checks, runs, reproduction -------------------------------------------------------------------


def limits(r: dict) -> list[str]:
    found = []
    c = r["basin"]
    if r["seeds"] < 2:
        found.append(
            "Seed variance unknown: one seed. "
            + (f"The intervals cover {c['covers']}." if c else "There is no interval.")
        )
    elif c is not None:
        shrink = math.sqrt((r["seeds"] - 1) / r["seeds"])
        found.append(
            f"{r['seeds']} seeds (sd {value(c['seed_sd'], '.4f')} nats, median over rates): a percentile bootstrap of so few understates the seeds' spread, by a factor {shrink:.2f}. Intervals cover {c['covers']}."
        )
        if not c["paired_seeds"]:
            found.append("The rates share no seed, so differences are not paired.")
    if gaps(r):
        found.append(gaps(r) + ".")
    edge = row_of(r, r["best_rate"])
    if edge is not None and "edge of the feasible range" in edge["flags"]:
        found.append(
            f"The best rate, {rate(r['best_rate'])}, is at the edge of the feasible range: the optimum may lie beyond it."
        )
    schedule, warmup = r["recipe"].get("lr_scheduler_type"), r["recipe"].get("warmup_steps")
    if schedule is not None:
        found.append(
            f"The schedule is {schedule} with warm-up {value(warmup, 'g')}: another schedule moves the best peak rate."
        )
    if r["planned_steps"]:
        found.append(
            f"The best rate is that for {r['planned_steps']} steps of this model and data; it shifts with the number of steps, the batch and α."
        )
    for x in r["runs"]:
        if x["excluded"]:
            found.append(
                f"Run {x['id']} ({rate(x['learning_rate'])}, {x['state']}) is not in the statistics: {x['excluded']}."
            )
        elif x["behaviour"] == "incomplete":
            found.append(f"Run {x['id']} ({rate(x['learning_rate'])}, {x['state']}) has no end: {x['reason']}.")
    mixed = [f"{key} ({', '.join(map(str, values))})" for key, values in r["differing"].items()]
    if mixed:
        found.append(
            f"Runs differ in more than the rate and the seed: {'; '.join(mixed)}. Only runs of the most frequent recipe are compared."
        )
    return found


def follow_ups(r: dict, directory: Path) -> str:
    if not r["follow_ups"]:
        return "None: nothing has reached an end yet."
    lines = []
    for i, f in enumerate(r["follow_ups"], 1):
        parameters = "; ".join(
            f"{key} {', '.join(rate(v) if isinstance(v, float) else str(v) for v in spec['values'])}"
            for key, spec in f["config"]["parameters"].items()
            if "values" in spec
        )
        lines.append(
            f"{i}. **{f['question']}** {f['why'][0].upper()}{f['why'][1:]}. Sweep: {parameters}. Run [{f['file']}]({f['file']}): `wandb sweep {shown_path(directory)}/{f['file']}`"
        )
    return "\n".join(lines)


def checks(r: dict) -> str:
    mark = {True: "passed", False: "**FAILED**", None: "unknown"}
    return grid(["Check", "", "Detail"], [[c["check"], mark[c["passed"]], c["detail"]] for c in r["checks"]])


def runs(r: dict) -> str:
    rows = []
    for x in r["runs"]:
        rows.append(
            [
                x["id"],
                rate(x["learning_rate"]),
                "—" if x["seed"] is None else str(x["seed"]),
                x["state"],
                f"{x['last_step']} of {x['planned_steps'] or '?'}",
                value(x["final_train_loss"]),
                value(x["final_eval_loss"]),
                x["behaviour"] + (f" ({x['onset']})" if x["onset"] else ""),
                "; ".join([x["reason"], *x["notes"], *([f"not compared: {x['excluded']}"] if x["excluded"] else [])]),
            ]
        )
    return grid(
        ["Run", "Rate", "Seed", "State", "Steps", "Train", "Eval", "Behavior", "Why, and what the reading repaired"],
        rows,
    )


def reproduction(r: dict, raw: dict, directory: Path) -> str:
    """Commands from the unescaped results, each word quoted for the shell; facts from the escaped ones."""
    folder, lines = shown_path(directory), []
    for sweep, shown in zip(raw["sweeps"], r["sweeps"], strict=True):
        file = f"{folder}/{sweep_file(sweep['id'])}"
        path = "/".join(str(sweep.get(key) or "?") for key in ("entity", "project", "id"))
        lines += [
            f"Sweep {shown['id']} ({shown.get('name')}, {shown.get('state')}), in one command or in W&B's own three:",
            "",
            fence(
                [
                    f"python experiment.py --sweep {shlex.quote(file)}",
                    f"wandb sweep {shlex.quote(file)}",
                    "wandb agent ENTITY/PROJECT/SWEEP   # as wandb sweep prints it",
                    f"python -m analysis {shlex.quote(path)} --output {shlex.quote(folder)}",
                ]
            ),
            "",
        ]
    lines += [
        "This page again from the pulled data, without a network:",
        "",
        fence([f"python -m analysis {shlex.quote(folder)}"]),
        "",
    ]
    facts = [[key, str(found)] for key, found in r["recipe"].items()]
    for key in ("hardware", "gang_size", "versions"):
        values = sorted({flat(x["config"][key]) for x in r["runs"] if key in x["config"]})
        facts += [[key, "; ".join(values)]] if values else []
    return "\n".join(lines) + "\n" + grid(["Setting", "Value"], facts)


def flat(found: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else str(found)


def fence(commands: list[str]) -> str:
    """A code block that no value can close: line ends and backticks do not survive in it."""
    return "```bash\n" + "\n".join(re.sub(r"[`\r\n]", "?", c) for c in commands) + "\n```"


def shown_path(directory: Path) -> str:
    """The output directory as a user of the project writes it; outside the project only its name."""
    full = directory.resolve()
    return full.relative_to(PROJECT).as_posix() if full.is_relative_to(PROJECT) else full.name


def docs(directory: Path) -> str:
    """The relative path from the report to the project's docs."""
    full = directory.resolve()
    return Path(os.path.relpath(PROJECT / "docs", full)).as_posix() if full.is_relative_to(PROJECT) else "../../docs"
