"""The report: one small function for each section, put in place by `report.md.jinja` and `report.html.jinja`.

Every function takes the results as `all_results.json` has them and returns the report's little markdown; if the data
flip, it flips. `render` escapes every string of the results once, on entry, so no value of a run can reach the page as
markup. Its first sentences are in headline.py, the questions in questions.py, tables in tables.py, rounding and lists
in words.py.
"""

import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import behaviour, folder, provenance, questions, tables
from analysis.budget import WITHIN
from analysis.files import number
from analysis.headline import (
    answer,
    basis,
    by_loss,
    guide_settings,
    improved,
    modules_known,
    moved,
    not_evaluated,
    one_seed,
    scope,
)
from analysis.questions import SHOWN_RUNS
from analysis.tables import winner
from analysis.words import (
    code,
    decimals,
    escape,
    fence,
    html,
    in_words,
    labels,
    listed,
    percent,
    plural,
    rate_bounds,
    rate_label,
    settings,
    shortened,
    small,
)


def render(results: dict, directory: Path, pictures: list[str]) -> str:
    """The whole README.md of an output directory."""
    return fill("report.md.jinja", context(results, directory, pictures))


def fill(template: str, values: dict) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # `escape` has made every value inert as markdown and as HTML
    )
    environment.filters |= {"html": html, "code": code}
    return environment.get_template(template).render(values)


def context(results: dict, directory: Path, pictures: list[str]) -> dict:
    """What both templates put in place: sentences, lists of sentences and tables, by name."""
    r = escape(results)
    return {
        "r": r,
        "answer": answer(r),
        "basis": basis(r),
        "adapter": None if r["side_by_side"] else provenance.adapter(r, results),
        "alarms": [f"{c['check']}: {c['detail']}" for c in r["checks"] if c["passed"] is False],
        "groups": tables.table(tables.GROUPS, r["groups"], r) if r["side_by_side"] else None,
        "pictures": pictures,
        "scope": scope(r),
        "caption": scope(r) + caption(r),
        "conditions": ("" if r["guide"] else scope(r)) + provenance.conditions(r),
        "rates": tables.table(tables.RATES, r["rates"], r),
        "legend": legend(r),
        "moments": tables.table(tables.MOMENTS, r["rates"], r) if r["best_rate"] is not None else None,
        "passes": passes(r),
        "budget": tables.budget(r),
        "budget_words": budget(r),
        "budget_law": budget_law(r),
        "search": tables.table(tables.SEARCH, r["search"]["rounds"], r) if r["search"] else None,
        "search_words": search(r),
        "guides": tables.table(tables.GUIDES, r["guides"]["rows"], r) if r["guides"] else None,
        "guide_words": guides(r),
        "hypotheses": tables.table(tables.HYPOTHESES, r["hypotheses"], r),
        "one_seed": one_seed(r),
        "questions": questions.answers(r),
        "insights": insights(r),
        "controls": [
            {
                "title": settings(c["differs"]),
                "words": control(r, c),
                "table": tables.table(tables.CONTROL, c["points"], r),
            }
            for c in ([] if r["side_by_side"] else r["controls"])
        ],
        "repeats": tables.table(tables.REPEATS, r["repeats"], r),
        "repeat_words": repeats(r),
        "mechanism": tables.table(tables.MECHANISM, r["mechanism"]["rows"], r) if r["mechanism"] else None,
        "why": why(r),
        "samples": samples(r),
        "limits": limits(r),
        "follow_ups": follow_ups(r, directory),
        "checks": tables.table(tables.CHECKS, r["checks"], r),
        "runs": tables.table(tables.RUNS, r["runs"], r),
        "sweeps": provenance.reproduction(r, results, directory),
        "again": fence([f"python -m analysis {shlex.quote(folder.shown(directory))}"]),
        "settings": tables.table(tables.SETTINGS, provenance.settings(r), r),
        "margin": decimals(r["basin"]["width"]) if r["basin"] else None,
        "docs": folder.docs(directory),
    }


def caption(r: dict) -> str:
    lines = "Thin: one seed; bold: mean." if max((x["n"] for x in r["rates"]), default=0) > 1 else "One run a rate."
    diverged = " Dashed: diverged, with a red cross where that began." if any(x["diverged"] for x in r["rates"]) else ""
    epochs = " Dotted vertical: a pass over the data ends." if (number(r["data"]["passes"]) or 0) > 1 else ""
    return f"Nats per answer token over {r['planned_steps']} steps. {lines}{diverged}{epochs}"


def legend(r: dict) -> str:
    """What the intervals cover, and why no winner is named if none is."""
    words = ""
    found = [d["covers"] for x in by_loss(r)[1:] if (d := x["difference"]["end"]) and d["interval"]]
    if found:
        narrow = "" if modules_known(r) else "; examples taken as independent (no module column), so perhaps too narrow"
        over = sorted(dict.fromkeys(found), key=len, reverse=True)  # what has no seeds in it comes last
        alone = " where there is one seed" if len(over) > 1 and "seeds" not in over[-1] else ""
        words += f"Intervals: 95 % each by itself, over {', or '.join(over)}{alone}{narrow}."
    if winner(r) is None and by_loss(r) and len(r["rates"]) > 1:
        open_rates = [x["learning_rate"] for x in r["rates"] if x["basin"]["verdict"] != "out"]
        if r["side_by_side"]:
            reason = "groups are not ranked against each other; this table is the first group's"
        elif r["seeds"] < 2:
            reason = "one seed"
        else:
            reason = f"{labels([rate for rate in open_rates if rate != r['best_rate']])} may cost less than the margin"
        words += f" No winner is printed bold: {reason}."
    return words


def passes(r: dict) -> list[str]:
    """What the number of passes over the data has to do with the result."""
    data, found = r["data"], []
    made, per_pass = number(data["passes"]), number(data["steps_per_pass"])
    if made is None:
        return ["The runs do not record their passes over the data."]
    ending = f"the first ends at step {per_pass:.0f}" if made > 1 else "no example was seen twice"
    found.append(f"The runs make {made:.2f} passes over the training examples; {ending}.")
    for x in by_loss(r)[1:]:
        end, best, first = (x["difference"][moment] for moment in ("end", "best", "one_pass"))
        if None in (end, best) or end["mean"] < r["basin"]["width"]:
            continue
        if end["mean"] - best["mean"] <= max(behaviour.REBOUND_NATS, 0.1 * end["mean"]):
            continue
        name, over = rate_label(x["learning_rate"]), rate_label(r["best_rate"])
        parts = [f"{decimals(first['mean'], '+.3f')} after one pass (step {x['one_pass']['step']})"] if first else []
        parts += [
            f"{decimals(best['mean'], '+.3f')} at the best checkpoints",
            f"{decimals(end['mean'], '+.3f')} at the end",
        ]
        again = first is not None and made > 1 and x["behaviours"].get("overfitting", 0) * 2 > x["n"]
        late = max(0.0, min(1.0, 1 - (first if again else best)["mean"] / end["mean"]))
        cause = "when examples are seen again" if again else "after its best checkpoint"
        found.append(f"{name} − {over}: {', '.join(parts)}. {percent(late)} of its cost at the end arises {cause}.")
    chosen = [x["best_eval"] for x in r["rates"] if x["best_eval"]["n"]]
    if chosen:
        found.append(
            "Best checkpoints are selected on the eval set among all evaluations, so they look a little too good."
        )
    return found


def budget(r: dict) -> str:
    """How the best rate depends on the number of steps: every prefix of a run at a constant rate is a run."""
    rows = r["budget"]
    if not rows or len(r["rates"]) < 2:
        return ""
    leads: list[dict] = []
    for row in rows:
        before = next((i for i, lead in enumerate(leads) if stayed(lead, row, rows)), None)
        if before is None:
            leads.append(row)
        else:
            del leads[before + 1 :]  # what led in between led by less than ε: noise
    if len(leads) == 1:
        return f"{rate_label(leads[0]['best_rate'])} is best at every budget, or within the margin of the best."
    path = ", then ".join(f"{rate_label(x['best_rate'])} from step {x['step']}" for x in leads[-5:])
    words = f"Best is {path}; leads that are lost again within the margin do not count."
    trial, last = 0.1 * (r["planned_steps"] or 0), rows[-1]  # a lead before a tenth of the steps misleads no trial run
    higher = [x for x in rows if x["step"] >= trial and x["best_rate"] > last["best_rate"]]
    if any(last["best_rate"] not in x["within"] for x in higher):
        words += " Short trial runs, range tests and successive halving would choose too high a rate here."
    schedule = str(r["recipe"].get("lr_scheduler_type", ""))
    if schedule.startswith("constant"):
        return f"{words} Under this schedule every prefix of a run is a run of that length with the same warm-up."
    return f"{words} The schedule is not constant, so a prefix is not what a shorter run would give."


def stayed(lead: dict, row: dict, rows: list[dict]) -> bool:
    """Whether the best rate of `lead` is that of the later `row` too, and was within ε of the best in between."""
    between = [x for x in rows if lead["step"] <= x["step"] <= row["step"]]
    return lead["best_rate"] == row["best_rate"] and all(row["best_rate"] in x["within"] for x in between)


def budget_law(r: dict) -> str:
    """For N steps use η; or that this is not known, and why."""
    law, words = r["budget_law"], "For a budget that was not run this does not know the best rate"
    steps = law["budgets"]
    if law["reason"] == "schedule":
        return f"{words}: the schedule is not constant."
    if law["reason"] == "coarse":
        return (
            f"{words}: that takes four budgets at which rates half a decade away or less lie on both sides of the "
            f"best; here {'is' if len(steps) == 1 else 'are'} {in_words(len(steps)) if steps else 'none'}."
        )
    if law["reason"] == "wide":
        return f"{words}: the line through {len(steps)} budgets leaves it open by more than a factor of {WITHIN}."
    last = [x for x in law["for"] if x["run"]][-1]
    covers = f"{plural(law['seeds'], 'seed')} and the line" if law["seeds"] > 1 else "the line alone, one seed"
    power = decimals(law["power"], "z.2f")
    grows = ", whatever N" if float(power) == 0 else f" · (N/{last['steps']})^{power}"
    found = [
        f"For N steps use about {rate_label(last['rate'], 2)}{grows}: a "
        f"line through the parabolas of {len(steps)} budgets of {steps[0]} to {steps[-1]} steps. At {last['steps']} "
        f"steps {tables.rate_with_interval(last)}, over {covers}."
    ]
    o = r["optimum"]
    if o and o["identified"] and last["steps"] == r["planned_steps"]:
        found.append(
            f"The ends alone, without the line, say {rate_label(o['learning_rate'], 2)} {rate_bounds(o['interval'])}."
        )
    check, beyond = law["check"], [x for x in law["for"] if not x["run"]]
    if check:
        found.append(
            f"From {check['from']} steps and less it would have said {rate_label(check['said'], 2)} for "
            f"{check['steps']}, where the parabola has {rate_label(check['is'], 2)}."
        )
    if beyond:
        found.append(f"For {beyond[0]['steps']} steps, which nobody ran: {tables.rate_with_interval(beyond[0])}.")
    else:
        found.append(f"For more than {steps[-1]} steps this does not know the best rate.")
    return " ".join(found)


def search(r: dict) -> str:
    """What the rounds of the search cost, and why it stops or what it would ask next."""
    found = r["search"]
    if found is None:
        return ""
    grid, *rounds = found["rounds"]
    seconds = [x["device_seconds"] for x in rounds if x["device_seconds"] is not None]
    cost = f", {sum(seconds):.0f} device seconds in training steps" if seconds else ""
    words = (
        f"The grid's {plural(grid['runs'], 'run')} were followed by a search for a rate within the margin of the best: "
        f"{plural(found['runs'], 'run')} in {plural(len(rounds), 'round')}{cost}. "
    )
    if found["rate"] not in (None, r["best_rate"]):
        words += f"It takes {rate_label(found['rate'])}, the lowest rate within a quarter of the margin of the best. "
    if found["why"] is None:
        return f"{words}It is not settled; next it would ask: {found['next']}"
    return f"{words}It stopped: {found['why'][0].lower()}{found['why'][1:]}"


def guides(r: dict) -> list[str]:
    """What the guides' table means, whom it tells from the best known, and on which axis they lie."""
    g = r["guides"]
    if g is None:
        return []
    best = g["best"]
    alone = best["name"] is not None
    what = "the lowest guide; no grid of rates is beside it" if alone else "the best rate of the grid"
    found = [
        "Each guide as a whole: its rate, r and α on the same base, data, steps, batch, schedule and seeds. So this "
        "ranks what following a guide costs here; it does not say which of the three does it. Dropout, and whatever "
        f"else a guide sets, is left out. Regret and steps lost are against {guide_settings(best)}: {what}. Its mean "
        "curve passed the guide's final loss so many steps before its end."
    ]
    words = {"in": "As good as the best known", "undecided": "Not settled", "out": "Worse by more than matters"}
    for verdict, label in words.items():
        names = [x["name"] for x in g["rows"] if x["compared"] and x["verdict"] == verdict and x["regret"]]
        found += [f"{label}: {listed(names)}."] if names else []
    found += [f"No run of {listed(g['missing'])}."] if g["missing"] else []
    on = [x["axes"]["α·η"] for x in g["rows"] if x["compared"] and x["axes"]["α·η"]]
    if on and best["axes"]["α·η"]:
        here = small(best["axes"]["α·η"])
        found.append(f"α·η runs from {small(min(on))} to {small(max(on))} over the guides; the best known has {here}.")
    if g["ranks"]:
        ranks = listed([decimals(r, "g") for r in g["ranks"]["lora_r"]])
        same = f"{rate_label(g['ranks']['learning_rate'])} and α {decimals(g['ranks']['lora_alpha'], 'g')}"
        found.append(f"At {same}, r {ranks} end within {decimals(g['ranks']['range'])} of each other.")
    if g["distance"]:
        each = ", ".join(f"{axis} {decimals(gap)}" for axis, gap in g["distance"].items())
        found.append(
            f"How far they lie from the grid's curve at the same place of an axis (root mean square, nats, "
            f"{g['between']} guides that lie between rates half a decade apart or less): {each}."
        )
    return found


def insights(r: dict) -> list[str]:
    """What else the numbers say, one sentence each."""
    found = []
    ended = [x for x in r["rates"] if x["diverged"] or x["basin"]["excess"] is not None]
    crossed = [x for x in ended if 2 * x["flags"].get("crossed", 0) > x["n"]]
    sides: dict[str, list[float]] = {}
    for x in crossed:
        often = "" if x["diverged"] == x["n"] else f" in {x['diverged']} of {x['n']} runs"
        end = f"diverged{often}" if x["diverged"] else "ended outside the margin"
        sides.setdefault(end, []).append(x["learning_rate"])
    leads = [f"{labels(rates)} ({end})" for end, rates in sides.items()]
    if leads:
        found.append(f"Early lead, later loss: {' and '.join(leads)} led at some point in the first half.")
    gaps = [x for x in r["rates"] if x["gap"]["n"] and not x["diverged"]]
    low, high = (pick(gaps, key=lambda x: x["gap"]["mean"], default=None) for pick in (min, max))
    if r["basin"] and gaps and high["gap"]["mean"] - low["gap"]["mean"] > r["basin"]["width"]:
        found.append(
            f"Eval loss minus train loss at the end runs from {decimals(low['gap']['mean'], '+.2f')} at "
            f"{rate_label(low['learning_rate'])} to {decimals(high['gap']['mean'], '+.2f')} at "
            f"{rate_label(high['learning_rate'])}{gap_means(number(r['data']['passes']))}."
        )
    found += [f"{settings(c['differs'])} {control(r, c)}" for c in ([] if r["side_by_side"] else r["controls"])]
    few = not_evaluated(r) or (
        "one rate has nothing to compare" if by_loss(r) and len(r["rates"]) == 1 else "too few runs have reached an end"
    )
    if by_loss(r) and len(r["rates"]) > 1:
        return found or ["Nothing beyond the answers above."]
    return found or [f"None: {few}."]


def gap_means(passes: float | None) -> str:
    """What a gap between train and eval loss can mean, by how often the examples were seen."""
    if passes is None:
        return ""
    if passes > 1:
        return ": the more, the more was learned of the training examples alone"
    fit = "so this is fit to the training modules (and harder or easier batches), not memory"
    return f": no training example was seen twice, {fit}"


def control(r: dict, c: dict) -> str:
    """What a control's setting costs, rate by rate, and whether the size of the update says why."""
    parts, sizes = [], []
    width = number(r["basin"]["width"]) if r["basin"] else 0.0
    for x in c["points"]:
        rate, d = rate_label(x["learning_rate"]), x["difference"]
        if d is None:
            alone = "diverged" if x["diverged"] else "has no run that ended beside one of the main grid"
            parts.append(f"at {rate} it {alone}")
            continue
        settled = d["interval"] is None or not d["interval"][0] <= 0 <= d["interval"][1]
        if abs(d["mean"]) < width:
            wide = d["interval"] is not None and max(map(abs, d["interval"])) > width
            said = "is not told from one that does not matter" if wide else "does not matter"
            found = tables.with_interval(d["mean"], d["interval"], "+.3f") if wide else decimals(d["mean"], "+.3f")
            parts.append(f"at {rate} its effect {said} ({found})")
            continue
        verb = "costs" if d["mean"] > 0 else "gains"
        gained = number(x["main_gain"])
        reach = gained * (r["base_loss"] - r["best_loss"]) if gained and improved(r) else 0.0
        share = f", {percent(d['mean'] / reach)} of what that rate gains" if reach > 0 and d["mean"] > 0 else ""
        doubt = "" if settled else ", not told from nothing"
        parts.append(f"at {rate} it {verb} {decimals(abs(d['mean']))}{share}{doubt}")
        if d["mean"] > 0 and settled and x["main_at_its_size"] is not None:
            smaller = 1 - x["update_ratio"]["mean"] / x["main_update_ratio"]["mean"]
            due = (x["main_at_its_size"] - x["main_final_eval"]["mean"]) / d["mean"]
            sizes.append(
                f" At {rate} the update ends {percent(smaller)} smaller; the main grid's, when as small, was at "
                f"{decimals(x['main_at_its_size'])}: its size accounts for "
                + (f"{percent(due)} of the cost." if due <= 1 else "more than the cost.")
                if smaller >= 0.005
                else f" At {rate} the update ends as large, so its size is not the reason."
            )
    return f"beside the main grid: {'; '.join(parts)}.{best_moves(r, c)}{''.join(sizes)}"


def best_moves(r: dict, c: dict) -> str:
    """Whether another rate is best under a control's setting by more than the margin, and whether that ends lowest."""
    if (found := moved(r, c)) is None:
        return ""
    own, main = found
    rate, loss = rate_label(own["learning_rate"]), own["final_eval"]["mean"]
    text = f" It moves the best rate: of these {rate} is lowest with it, {rate_label(main['learning_rate'])} without"
    if loss < number(r["best_loss"]):
        text += f"; {decimals(loss)} is also below the main grid's lowest, {decimals(r['best_loss'])}"
    return text + "."


def repeats(r: dict) -> str:
    floor, alone = r["noise_floor"], [x for x in r["repeats"] if x["solo"]]
    words = []
    if floor is not None:
        n = sum(not x["solo"] and not x["diverged"] for x in r["repeats"])
        words.append(
            f"The same recipe, rate and seed run again ended {decimals(floor, '.2g')} nats apart (root mean square of "
            f"{plural(n, 'pair')}): smaller differences are noise."
        )
    worst: dict[str, float] = {}
    for x in sorted((x for x in alone if not x["diverged"]), key=lambda x: bool(x["differs"])):
        where = f"with {settings(x['differs'])} " if x["differs"] else ""
        worst[where] = max(worst.get(where, 0.0), abs(x["difference"]))
    if worst:
        apart = (
            where + (f"at most {decimals(gap, '.2g')} nats apart" if gap else "at the same loss, to the last digit")
            for where, gap in worst.items()
        )
        words.append(f"At the same point a gang and train.py alone ended {'; '.join(apart)}.")
    if chaos := [abs(x["difference"]) for x in r["repeats"] if x["diverged"]]:
        words.append(
            f"Where a run diverged, another of the same point ended up to {decimals(max(chaos), '.2g')} away: small "
            "differences grow there."
        )
    return " ".join(words)


def why(r: dict) -> list[str]:
    """What the sizes of the steps say, as far as these data bear it."""
    m = r["mechanism"]
    if m is None:
        return [
            "The runs do not record their adapted modules, r and α, so the size of the first steps cannot be computed."
        ]
    found, rows = [], [x for x in m["rows"] if x["ratio"] is not None]
    if rows:
        ratios = [x["ratio"] for x in rows]
        even, step = max(ratios) - min(ratios) < 0.05, rows[0]["step"]
        same = f"At step {step} the measured size is"
        which = f"{min(ratios):.2f}" if even else f"{min(ratios):.2f} to {max(ratios):.2f}"
        every = " at every rate" if even and len(rows) > 1 else ""
        if even and len(rows) > 1 and all(x["first_move"] and x["step"] == step for x in rows):
            noisy = f": {in_words(step)} noisy gradients average in Adam" if step > 1 and max(ratios) < 1 else ""
            found.append(
                f"{same} {min(ratios):.2f} times the predicted, necessarily the same at every rate (nothing had moved "
                f"before step {step}){noisy}."
            )
        else:
            noisy = ": noisy gradients average in Adam, and the rate sets the size" if even and max(ratios) < 1 else ""
            found.append(f"{same} {which} times that predicted for a gradient of steady sign{every}{noisy}.")
    planned = r["planned_steps"] or 0
    turned = [x for x in m["rows"] if number(x["entry_steps"][1]) > 5 * planned > 5 * number(x["direction_steps"][1])]
    if turned:
        x = turned[0]
        at = f"at {rate_label(x['learning_rate'])} " if len(turned) > 1 else ""
        found.append(
            f"At {labels([t['learning_rate'] for t in turned])} single entries of A hardly move in {planned} steps "
            f"({at}they need {tables.span(x['entry_steps'])}), but along one direction, where they move together, "
            f"A needs {tables.span(x['direction_steps'])} by the same formula: it can turn within the run."
        )
    ends = [x for x in m["rows"] if x["end"]]
    if len(ends) > 1:
        low, high = ends[0], ends[-1]
        found.append(
            f"At the end ‖ΔW‖/‖W‖ is {small(low['end'])} at {rate_label(low['learning_rate'])} and "
            f"{small(high['end'])} at {rate_label(high['learning_rate'])}: {high['end'] / low['end']:.0f} × for a rate "
            f"{high['learning_rate'] / low['learning_rate']:.0f} × as high."
        )
    config: dict = next((x["config"] for x in r["runs"] if x["compared"]), {})
    shares = [(x["clipped"], x["learning_rate"]) for x in r["rates"] if x["clipped"] is not None]
    limit = number(config.get("max_grad_norm"))
    if limit and any(share for share, _ in shares):
        few, many = min(shares), max(shares)
        least, most = percent(few[0]), percent(many[0])
        where = most if least == most else f"{least} ({rate_label(few[1])}) to {most} ({rate_label(many[1])})"
        found.append(
            f"Clipping at {limit:g} shortened the gradient of {where} of the steps. Adam divides by "
            "the gradient's own size, so that does not bound a step: it evens out how much each batch counts."
        )
    trained, total = number(config.get("trainable_parameters")), number(config.get("all_parameters"))
    if trained and total:
        found.append(f"The adapters are {trained:,.0f} of {total:,.0f} parameters, {100 * trained / total:.2f} %.")
    return found


def samples(r: dict) -> list[dict]:
    """Greedy completions of the fixed prompts: reference, untrained model, one run for each rate (its first seed)."""
    shown: dict[float, dict] = {}
    for x in r["runs"]:
        if x["compared"] and x["generations"]:
            shown.setdefault(x["learning_rate"], x)
    if not shown:
        return []
    found = []
    for i, sample in enumerate(next(iter(shown.values()))["generations"]):
        rows = [{"who": "*reference*", "text": sample.get("reference")}]
        if sample.get("untrained") is not None:
            rows.append({"who": "*untrained*", "text": sample["untrained"]})
        for rate, x in shown.items():
            completion = x["generations"][i].get("completion") if i < len(x["generations"]) else None
            rows.append({"who": rate_label(rate), "text": completion})
        # In <pre> an entity is a character, line ends included, and nothing is markdown.
        found.append({"prompt": shortened(sample.get("prompt"), 600), "table": tables.table(tables.SAMPLES, rows, r)})
    return found


def limits(r: dict) -> list[str]:
    """What the sweep cannot say, one sentence each."""
    found, c = [], r["basin"]
    if c is None:
        why = questions.none_ended(r)
        found.append(f"{why[0].upper()}{why[1:]}, so nothing is compared.")
    elif one_seed(r):
        found.append(f"One seed: the intervals cover {c['covers']}, not seeds.")
    elif c["seed_sd"] is not None:
        count = f"{r['seeds']} seeds" if r["seeds"] > 1 else "Where there are several seeds"
        found.append(f"{count}, standard deviation {decimals(c['seed_sd'], '.4f')} nats (median over rates).")
    data = r["data"]
    if c is not None and data["eval_examples"] and not data["eval_modules"]:
        found.append(
            "No module column says which eval examples belong together: the intervals take them as independent and are "
            "too narrow if some resemble each other."
        )
    shared = max((number(x["config"].get("rows_in_both_splits")) or 0 for x in r["runs"]), default=0)
    if shared:
        found.append(
            f"{shared:.0f} test rows are training rows too: there the eval loss shows what was learned by heart."
        )
    if len(by_loss(r)) > 1:
        found.append(
            "The best rate is chosen by the eval examples that also tell its loss: it looks a little too good."
        )
    unpaired = [x["learning_rate"] for x in by_loss(r) if (d := x["difference"]["end"]) and not d["paired"]]
    if unpaired:
        who = f"{labels(unpaired)} {'shares' if len(unpaired) == 1 else 'share'}"
        found.append(f"{who} no seed with the best rate: not paired by seed.")
    fewer = sorted({x["final_eval"]["n"] for x in by_loss(r)})
    if len(fewer) > 1:
        found.append(
            f"The rates have from {fewer[0]} to {fewer[-1]} seeds: differences are as if each had every seed (least "
            "squares), their errors those of the seeds that both rates have."
        )
    if r["recipe"].get("lr_scheduler_type") is not None:
        warm = decimals(r["recipe"].get("warmup_steps"), "g")
        found.append(
            f"The schedule is {r['recipe']['lr_scheduler_type']}{'' if warm == '—' else f' with a warm-up of {warm}'}; "
            "another moves the best peak rate."
        )
    if r["planned_steps"]:
        found.append("One base model, one data set, one batch size: a rate found here is a guess elsewhere.")
    again = {x["runs"][1] for x in r["repeats"]} & {x["id"] for x in r["runs"] if x["excluded"]}
    if again:
        words = "1 run repeats another and is" if len(again) == 1 else f"{len(again)} runs repeat others and are"
        found.append(f"{words} not in the statistics, but among the controls.")
    lost = [x for x in r["runs"] if x["id"] not in again and (x["excluded"] or x["behaviour"] == "incomplete")]
    for x in lost[:SHOWN_RUNS]:
        who = f"Run {x['id']} ({rate_label(x['learning_rate'])}, {x['state']})"
        found.append(
            f"{who} is not in the statistics: {x['excluded']}."
            if x["excluded"]
            else f"{who} has {'no class' if x['final_eval_loss'] is not None else 'no end'}: {x['reason']}."
        )
    if len(lost) > SHOWN_RUNS:
        found.append(
            f"{len(lost) - SHOWN_RUNS} more are not in the statistics or have no class: see the table of every run."
        )
    return found


def follow_ups(r: dict, directory: Path) -> list[str]:
    lines = []
    for f in r["follow_ups"]:
        swept = [
            f"{key} {', '.join(rate_label(v) if isinstance(v, float) else str(v) for v in spec['values'])}"
            for key, spec in f["config"]["parameters"].items()
            if "values" in spec
        ]
        command = f"`wandb sweep {folder.shown(directory)}/{f['file']}`"
        lines.append(
            f"**{f['question']}** Because {f['why']}. {'; '.join(swept)}: [{f['file']}]({f['file']}), {command}"
        )
    return lines
