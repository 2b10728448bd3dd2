"""The experiment's questions, each answered from the results: which rate, did any diverge, how fast, is 2e-4 right?"""

import math

from analysis import tables
from analysis.files import number
from analysis.headline import by_loss, not_evaluated, row_of
from analysis.hypotheses import STANDARD
from analysis.statistics import COARSE
from analysis.words import bounds, decimals, in_words, labels, plural, rate_bounds, rate_label

SHOWN_RUNS = 12  # runs that a sentence lists one by one; the table at the end has all


def answers(r: dict) -> list[tuple[str, str]]:
    """Each question and its answer."""
    return [
        ("Which LR gave lowest final loss?", lowest(r)),
        ("Did any LRs diverge or show instability?", instability(r)),
        ("How did convergence speed differ?", speed(r)),
        ("Does 2e-4 appear optimal for this setup?", standard(r)),
    ]


def none_ended(r: dict) -> str:
    """Why no rate can be compared."""
    alive = not any(x["diverged"] for x in r["rates"])
    return not_evaluated(r) or ("no run reached its end" if alive else "no rate ended without diverging")


def lowest(r: dict) -> str:
    order = by_loss(r)
    if not order:
        return f"None can be named: {none_ended(r)}."
    level = order[0]["final_eval"]["level"]
    name = rate_label(order[0]["learning_rate"])
    text = f"{name}: final eval loss {decimals(level['mean'])}, {bounds(level['interval'])}"
    rest = [
        f"{rate_label(x['learning_rate'])} is {decimals(d['mean'], '+.3f')}, {bounds(d['interval'])}"
        for x in order[1:]
        if (d := x["difference"]["end"])
    ]
    text += f"; against it {'; '.join(rest)}" if rest else ""
    trained = [x for x in r["rates"] if x["final_train"]["mean"] is not None]
    if trained:
        x = min(trained, key=lambda x: x["final_train"]["mean"])
        text += f". Lowest final train loss: {rate_label(x['learning_rate'])}, {tables.mean_sd(x['final_train'])}"
    return text + "."


def instability(r: dict) -> str:
    counted = [x for x in r["runs"] if x["compared"]]
    found = [x for x in counted if x["behaviour"] in ("diverged", "unstable")]
    total = plural(len(counted), "run")
    diverged = sum(x["behaviour"] == "diverged" for x in found)
    unstable = len(found) - diverged
    late = [f"{sum(x['behaviour'] == word for x in counted)} {word}" for word in ("overfitting", "drifting")]
    others = [words for words in late if not words.startswith("0 ")]
    rest = f" Stable, but worse at the end than before: {' and '.join(others)}." if others else ""
    if not found:
        cut = sum(x["behaviour"] == "incomplete" and x["state"] != "finished" for x in counted)
        none = f"of {total} none diverged and none was unstable" if len(counted) != 1 else "the only run did neither"
        return f"No: {none}{f', but {cut} reached no end' if cut else ''}.{rest}"
    words = (
        f"{n or 'none'} {verb}"
        for n, verb in ((diverged, "diverged"), (unstable, f"{'was' if unstable < 2 else 'were'} unstable"))
    )
    lines = [f"Yes: of {total} {' and '.join(words)}.{rest}"]
    for x in found[:SHOWN_RUNS]:
        seed = "" if x["seed"] is None else f", seed {x['seed']}"
        onset = f" ({x['onset']})" if x["onset"] else ""
        lines.append(f"   - {rate_label(x['learning_rate'])}{seed}: {x['behaviour']}{onset}, {x['reason']}.")
    if len(found) > SHOWN_RUNS:
        lines.append(f"   - and {len(found) - SHOWN_RUNS} more, in the table of every run.")
    return "\n".join(lines)


def speed(r: dict) -> str:
    known = [(number(x["steps"]["0.8"]), x) for x in r["rates"] if x["steps"]["0.8"] is not None]
    if not known:
        gain = "no rate improved on the untrained model" if r["base_loss"] is not None else "no eval loss at step 0"
        why = gain if by_loss(r) else none_ended(r)
        return f"Undefined: {why}, so there is no target to reach."
    reached = sorted((pair for pair in known if math.isfinite(pair[0])), key=lambda pair: pair[0])
    missed = [x["learning_rate"] for count, x in known if not math.isfinite(count)]
    text = f"No rate reached 80 % of the best gain in {r['planned_steps']} steps, in the median of its seeds"
    if reached:
        (first_steps, first), (last_steps, last) = reached[0], reached[-1]
        name = rate_label(first["learning_rate"])
        text = f"{name} was first to 80 % of the best gain, after {first_steps:.0f} of {r['planned_steps']} steps"
        if len(reached) > 1:
            times = float(f"{last_steps / max(first_steps, 1e-9):.2g}")
            slower = f"{last_steps:.0f}" + (f" (about {times:g} ×)" if times > 1 else "")
            who = f"the slowest of the {len(reached)} that reached it, " if len(reached) > 2 else ""
            text += f"; {who}{rate_label(last['learning_rate'])}{',' * bool(who)} took {slower}"
    if missed and reached:
        text += f"; {labels(missed)} did not reach it in {r['planned_steps']} steps"
    if r["seeds"] > 1:
        text += " (medians over seeds)"
    lost = [x["learning_rate"] for _, x in reached if x["diverged"]]
    if lost:
        text += f". To reach it is not to keep it: at {labels(lost)} at least one run diverged"
    return text + "."


def standard(r: dict) -> str:
    """Whether 2e-4, the rate that the seed document calls standard, is optimal here."""
    x, name = row_of(r, STANDARD), rate_label(STANDARD)
    if x is None:
        return f"Not tested: no run at {name}. {optimum(r)}".strip()
    if x["diverged"]:
        return f"No: {x['diverged']} of {plural(x['n'], 'run')} diverged there."
    test = x["basin"]
    if test["excess"] is None:
        return f"Undecided: {not_evaluated(r) or 'no run there reached its end'}."
    if len(r["rates"]) == 1:
        return f"Undecided: {name} is the only rate that was run."
    word = {"in": "Yes, within what matters", "out": "No", "undecided": "Undecided"}[test["verdict"]]
    above = f"its mean is {decimals(test['excess'])} nats above that of {rate_label(r['best_rate'])}"
    width = decimals(r["basin"]["width"])
    if x["learning_rate"] == r["best_rate"]:
        lost = test["interval"][1] if test["interval"] else 0.0
        text = f"{word}: it has the lowest mean{f', though another may be lower by {decimals(lost)}' if lost else ''}."
    else:
        whichever = f"; above the best, whichever that is, {bounds(test['interval'])}" if test["interval"] else ""
        text = f"{word}: {above}{whichever}, against a margin of {width} nats."
    if r["seeds"] < 2:
        text += " With one seed this is about the eval examples, not about seeds."
    return f"{text} {optimum(r)}".strip()


def optimum(r: dict) -> str:
    """Where the optimum is, as far as the tested rates tell."""
    o, best = r["optimum"], rate_label(r["best_rate"])
    if o is None or o["tested"] < 2:
        return ""
    if o["identified"]:
        return (
            f"The best rate lies at about {rate_label(o['learning_rate'], 2)}, 95 % {rate_bounds(o['interval'])}: "
            f"the lowest point of a two-sided curve in the rate's logarithm through {in_words(o['n'])} rates."
        )
    gaps = [(a, b) for a, b in ((o["left"], r["best_rate"]), (r["best_rate"], o["right"])) if None not in (a, b)]
    wide = [f"between {rate_label(a)} and {rate_label(b)} ({b / a:.3g} ×)" for a, b in gaps if b / a > COARSE]
    words = f"{best} is the best of {in_words(o['tested'])} rates that ended"
    if o["wall"] is not None:
        words += f"; its right neighbour, {rate_label(o['wall'])}, diverged"
    if o["reason"] == "edge":
        words += ", at the edge of them: the optimum may lie beyond"
    return words + (f"; {' and '.join(wide)} nothing was run" if wide else "") + "."
