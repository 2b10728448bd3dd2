"""The report's first sentences: what to use, when to stop, and what it costs to be wrong on either side."""

import math

from analysis import behaviour
from analysis.files import number
from analysis.refinement import TIED
from analysis.statistics import BASIN_NATS, BASIN_SD, BASIN_SHARE
from analysis.words import bounds, decimals, in_words, labels, listed, plural, rate_bounds, rate_label, settings, some

TOO_NARROW = " Intervals take the examples as independent (no module column groups them), so they may be too narrow."


def row_of(r: dict, wanted: float) -> dict | None:
    return next((row for row in r["rates"] if math.isclose(row["learning_rate"], wanted, rel_tol=1e-6)), None)


def by_loss(r: dict) -> list[dict]:
    """The feasible rates, best first."""
    return sorted((x for x in r["rates"] if x["basin"]["excess"] is not None), key=lambda x: x["basin"]["excess"])


def improved(r: dict) -> bool:
    return None not in (r["base_loss"], r["best_loss"]) and r["base_loss"] > r["best_loss"]


def plain(markdown: str) -> str:
    """A sentence for the terminal: without emphasis."""
    return markdown.replace("**", "")


def answer(r: dict) -> str:
    """What to use, when to stop, and what it costs to be wrong on either side; then what the guides are worth."""
    if r["guide"] is not None:
        return guides(r)
    return f"{of_rates(r)} {guides(r)}".strip()


def guide_settings(x: dict) -> str:
    """2e-4, r 64, α 16."""
    ranks = [f"{sign} {decimals(x[key], 'g')}" for key, sign in (("lora_r", "r"), ("lora_alpha", "α"))]
    return ", ".join([rate_label(x["learning_rate"]), *ranks])


def guides(r: dict) -> str:
    """Which guide ends lowest and which highest, against the best known; "" without guides."""
    if r["guides"] is None:
        return ""
    rows = [x for x in r["guides"]["rows"] if x["compared"]]
    lost = [x["name"] for x in r["guides"]["rows"] if x["diverged"]]
    diverged = f" With {listed(lost)} runs diverged." if lost else ""
    if not rows:
        return f"No guide's runs have ended and can be compared.{diverged}"
    low, high, best = rows[0], rows[-1], r["guides"]["best"]
    first = f"{low['name']} ({guide_settings(low)}) ends lowest, {decimals(low['final_eval']['mean'])}"
    of = f"Of {in_words(len(rows))} guides" if len(rows) > 1 else "One guide:"
    if best["name"] is None and low["regret"]:
        first += f", {against(low['regret']['mean'])} {rate_label(best['learning_rate'])}, the best rate of the grid"
    parts = [f"{of} {first}"]
    if len(rows) > 1 and high["regret"]:
        steps = high["steps_lost"]
        share = f" and {decimals(steps['mean'], '.0f')} of {r['planned_steps']} steps" if steps else ""
        parts.append(f"{high['name']} ({guide_settings(high)}) costs {decimals(high['regret']['mean'])}{share}")
    left = "" if best["name"] is None else " Without a grid of rates nothing says what is left to gain."
    return f"{'; '.join(parts)}.{left}{diverged}"


def against(regret: float) -> str:
    return f"{decimals(abs(regret))} {'above' if regret >= 0 else 'below'}"


def of_rates(r: dict) -> str:
    """What the grid says."""
    if r["side_by_side"]:
        return side_by_side(r)
    order = by_loss(r)
    if not order:
        return nothing_ended(r)
    name, end, advice = rate_label(r["best_rate"]), decimals(r["best_loss"], ".2f"), r["advice"]
    if r["base_loss"] is not None and not improved(r):
        base = decimals(r["base_loss"])
        least = f"the least harmful, {name}, ended at {decimals(r['best_loss'])}"
        return f"No rate improved on the untrained model ({base}): {least}."
    if advice is None:
        return f"{name} has the lowest final eval loss, {end}, but no evaluation after step 0 says when to stop."
    if len(r["rates"]) == 1:
        use = f"Only {name} was run, so nothing says whether another rate is better. Use it"
    else:
        use = f"Of {in_words(len(r['rates']))} rates use {to_use(r, advice)}"
    first = f"{use}{when(r, advice)}."
    parts = [f"**{first}**" if r["seeds"] > 1 else first, *ties(r, advice)]
    parts += [
        *placed(r),
        *unsteady(r, advice),
        *costs(r),
        *at_the_edge(r),
        *lower_with_early_stopping(r),
        *elsewhere(r),
    ]
    return " ".join([*parts, *left_open(r)])


def side_by_side(r: dict) -> str:
    keys = r["not_comparable"] or list(r["groups"][0]["settings"])
    each = "; ".join(
        f"{settings(group_name(r, x))}: "
        + (
            f"{rate_label(x['best_rate'])} ({decimals(x['best_loss'])})"
            if x["best_rate"] is not None
            else "no rate ended"
        )
        for x in r["groups"]
    )
    verb = "differs" if len(keys) == 1 else "differ"
    if r["not_comparable"]:
        return (
            f"**Not comparable: {some(keys)} {verb}.** The runs were trained on different things, so no rate is "
            f"named. The lowest of each group by itself: {each}."
        )
    return f"**{listed(keys)} {'was' if len(keys) == 1 else 'were'} varied: each group has its own best rate.** {each}."


def group_name(r: dict, group: dict) -> dict:
    """A group's settings; of many only the first in which it differs from the first group."""
    own, first = group["settings"], r["groups"][0]["settings"]
    if len(own) <= 4:
        return own
    key = next((key for key in own if own[key] != first[key]), next(iter(own)))
    return {key: own[key]}


def scope(r: dict) -> str:
    """Which group the numbers are of, before what is the first group's alone."""
    if r["guide"] is not None:
        return f"Guide {r['guide']} only: "
    return f"First group ({settings(group_name(r, r['groups'][0]))}) only: " if r["side_by_side"] else ""


def nothing_ended(r: dict) -> str:
    diverged = [x["learning_rate"] for x in r["rates"] if x["diverged"]]
    open_rates = [x["learning_rate"] for x in r["rates"] if not x["diverged"]]
    once = max((x["n"] for x in r["rates"]), default=0) == 1
    which = f"{labels(diverged)} diverged" if once else f"runs diverged at {labels(diverged)}"
    if diverged and not open_rates:
        return f"No rate of this sweep can be used: {which}. Go lower."
    if reason := not_evaluated(r):
        return f"{reason[0].upper()}{reason[1:]}."
    if diverged:
        return f"No rate can be named yet: {which}, and {labels(open_rates)} reached no end."
    states = ", ".join(sorted({x["state"] for x in r["runs"]}))
    return f"No run has reached its end, so no learning rate can be named: {plural(len(r['runs']), 'run')} ({states})."


def not_evaluated(r: dict) -> str:
    """Why finished runs name no rate, if none of them recorded an eval loss; else ""."""
    finished = [x for x in r["runs"] if x["compared"] and x["state"] == "finished" and x["behaviour"] != "diverged"]
    if by_loss(r) or not finished or any(x["final_eval_loss"] is not None for x in finished):
        return ""
    return f"{plural(len(finished), 'run')} finished, but no eval loss was recorded: no rate can be named"


def when(r: dict, advice: dict) -> str:
    """For how long to train at the best rate."""
    end, low = decimals(advice["end"], ".2f"), decimals(advice["low"], ".2f")
    step, last, made = advice["low_step"], advice["end_step"], number(advice["low_passes"])
    fell = dict(zip([advice["rate"], *advice["tied"]], advice["falling"], strict=True))
    still = {rate: by for rate, by in fell.items() if by >= r["basin"]["width"] / 2}
    each = ", ".join(f"{rate_label(rate)} still falling by {decimals(by, '.2f')}" for rate, by in still.items())
    others = f", {each} over the last quarter" if still else ""
    if advice["stop"]:
        both = f"(step {step}: {low}; step {last}: {end}{others})"
        if made is None or made < 0.5:
            return f", and stop at step {step} of {last} {both}"
        about = "about one pass" if abs(made - 1) <= 0.1 else f"about {made:.1f} passes"
        return f", for {about} over the data {both}"
    if len(still) == len(fell):
        most = decimals(max(still.values()), ".2f")
        return f", for all {last} steps ({end}, still falling: {most} over the last quarter)"
    rise = advice["rise"]
    if rise is not None and rise["mean"] >= behaviour.REBOUND_NATS and advice["rate"] not in still:
        both = f"({low} and {end}, not told apart{others})"
        return f", and stop at step {step} of {last}: the rest gains nothing {both}"
    if not still:
        return f", for all {last} steps ({end}, flat over the last quarter)"
    flat = labels([rate for rate in fell if rate not in still])
    return f", for all {last} steps ({end}; {flat} flat{others})"


def to_use(r: dict, advice: dict) -> str:
    """The best rate, and those that do as well."""
    used = sorted([advice["rate"], *advice["tied"]])
    best = rate_label(advice["rate"])
    if len(used) < 3:
        return labels([advice["rate"], *advice["tied"]], "or")
    between = [x["learning_rate"] for x in r["rates"] if used[0] <= x["learning_rate"] <= used[-1]]
    span = (
        f"all from {rate_label(used[0])} to {rate_label(used[-1])}"
        if between == used
        else labels(sorted(advice["tied"]))
    )
    return f"{best} ({span} do as well)"


def ties(r: dict, advice: dict) -> list[str]:
    """How far the rates that do as well end from the lowest, which is not always the one to use."""
    rows = [row_of(r, rate) for rate in sorted([advice["rate"], *advice["tied"]]) if rate != r["best_rate"]]
    if not rows:
        return []
    gap = decimals(max(x["basin"]["excess"] for x in rows))
    names, best = labels([x["learning_rate"] for x in rows]), rate_label(r["best_rate"])
    where = f"{names} ends {gap} above" if len(rows) == 1 else f"They end within {gap} of"  # named before
    unsettled = any(x["basin"]["verdict"] != "in" for x in rows)
    doubt = f", though {seeds_do({x['final_eval']['n'] for x in rows})} not settle it" if unsettled else ""
    width = r["basin"]["width"]
    why = f"; of those within {decimals(TIED * width)} of it {rate_label(advice['rate'])} is the lowest, so the safest"
    why = "" if advice["rate"] == r["best_rate"] else why
    return [f"{where} {best}, less than matters here ({decimals(width)}){doubt}{why}."]


def placed(r: dict) -> list[str]:
    """Where the best of all rates lies, run or not, once a search has looked for it."""
    if r["search"] is None or not r["optimum"]["identified"]:
        return []
    return [f"Run or not, the best of all rates lies in {rate_bounds(r['optimum']['interval'])} (95 %)."]


def unsteady(r: dict, advice: dict) -> list[str]:
    """Which of the rates to use were unstable on the way, and which were not."""
    used = {rate: row_of(r, rate) for rate in (advice["rate"], *advice["tied"])}
    shaky = sorted(rate for rate, row in used.items() if "unstable" in row["behaviours"])
    if not shaky:
        return []
    calm = [rate for rate in used if rate not in shaky]
    count, n = used[shaky[0]]["behaviours"]["unstable"], used[shaky[0]]["n"]
    how_often = "" if r["seeds"] == 1 else f" in {count} of {n} runs" if len(shaky) == 1 else " in at least one run"
    instead = f": prefer {labels(calm, 'or')}" if calm else ""
    return [f"{labels(shaky)} {'was' if len(shaky) == 1 else 'were'} unstable{how_often}{instead}."]


def either_side(r: dict) -> tuple[list[dict], list[dict]]:
    """The rates whose price the first sentences name: the next above those to use and the highest, and so below."""
    used = [r["advice"]["rate"], *r["advice"]["tied"]]
    others = [x for x in r["rates"] if x["learning_rate"] not in used]
    high = [x for x in others if x["learning_rate"] > r["best_rate"]]
    low = [x for x in others if x["learning_rate"] < r["best_rate"]]
    return [*high[:1], *high[1:][-1:]], [*low[-1:], *low[:-1][:1]]


def costs(r: dict) -> list[str]:
    """What it costs to be wrong: too high, then too low."""
    sides = zip(("Higher", "Lower"), either_side(r), strict=True)
    return [f"{side}: {'; '.join(cost(r, x) for x in rows)}." for side, rows in sides if rows]


def cost(r: dict, x: dict) -> str:
    """What it costs to use this rate instead of the best, in nats per token."""
    name, base, last = rate_label(x["learning_rate"]), r["base_loss"], x["last_eval"]["mean"]
    end, best = (x["difference"][moment] for moment in ("end", "best"))
    if x["diverged"]:
        if base is not None and last is not None and last >= base:
            both = f"({decimals(last, '.2f')} against {decimals(base, '.2f')})"
            if x["cut_off"] is not None:
                return f"{name} was worse than untrained when cut off at step {x['cut_off']} {both}"
            ends = ends_of(r, x)
            worse = sum(loss >= base for loss in ends)
            if worse < len(ends):
                span = f"{decimals(min(ends), '.2f')} to {decimals(max(ends), '.2f')}"
                both = f"in {worse} of {len(ends)} runs ({span} against {decimals(base, '.2f')})"
            return f"{name} ends worse than untrained {both}"
        return f"{name} diverged" + (f" in {x['diverged']} of {x['n']} runs" if x["n"] > 1 else "")
    if end is None:
        return f"{name} reached no end"
    price = decimals(end["mean"], ".2f") if end["mean"] >= 0.01 else decimals(end["mean"])
    if 2 * x["behaviours"].get("slow", 0) > x["n"]:
        return f"{name} costs {price}, still falling"
    range_ = f" ({bounds(end['interval'], '.2f')})" if x["basin"]["verdict"] == "undecided" else ""
    if best is not None and end["mean"] - best["mean"] > max(behaviour.REBOUND_NATS, 0.1 * end["mean"]):
        at_best = decimals(best["mean"], ".2f") if best["mean"] >= 0.005 else "nothing"
        return f"{name} costs {at_best} at its best checkpoint and {price} at the end{range_}"
    return f"{name} costs {price}{range_}"


def ends_of(r: dict, x: dict) -> list[float]:
    """The last finite eval losses of a rate's runs that count."""
    runs = [run for run in r["runs"] if run["compared"] and run["learning_rate"] == x["learning_rate"]]
    return [run["last_finite"]["loss"] for run in runs if run["last_finite"] is not None]


def at_the_edge(r: dict) -> list[str]:
    """That the best rate is the outermost one, so the optimum may lie beyond."""
    o, rates, best = r["optimum"], [x["learning_rate"] for x in r["rates"]], r["best_rate"]
    if o is None or o["reason"] != "edge" or o["tested"] < 2:
        return []
    end, beyond = ("highest", "higher") if o["right"] is None else ("lowest", "lower")
    what = "was run" if best in (rates[0], rates[-1]) else "ended"
    return [f"{rate_label(best)} is the {end} rate that {what}: a {beyond} one may be better."]


def lower_with_early_stopping(r: dict) -> list[str]:
    """Whether another rate's best checkpoints are lower than those of the rate that ends lowest, by what matters."""
    used = [row_of(r, rate) for rate in (r["advice"]["rate"], *r["advice"]["tied"])]
    rivals = [x for x in r["rates"] if x not in used and x["difference"]["best"] is not None]
    rival = min(rivals, key=lambda x: x["difference"]["best"]["mean"], default=None)
    if rival is None or rival["difference"]["best"]["mean"] > -r["basin"]["width"]:
        return []
    gap, step = decimals(-rival["difference"]["best"]["mean"], ".2f"), decimals(rival["best_eval"]["step"], "g")
    return [
        f"Stopped at its best checkpoint (step {step}), {rate_label(rival['learning_rate'])} is {gap} lower than "
        f"{rate_label(r['best_rate'])} at its own."
    ]


def moved(r: dict, c: dict) -> tuple[dict, dict] | None:
    """The point that is best under a control's setting and the one that is best without, if by more than the margin
    another."""
    ended = [x for x in c["points"] if not x["diverged"] and None not in (x["final_eval"]["mean"], x["main_gain"])]
    if len(ended) < 2:
        return None
    own = min(ended, key=lambda x: x["final_eval"]["mean"])
    main = min(ended, key=lambda x: x["main_final_eval"]["mean"])
    width = r["basin"]["width"] if r["basin"] else 0.0
    gaps = [abs(own[key]["mean"] - main[key]["mean"]) for key in ("final_eval", "main_final_eval")]
    return None if own is main or min(gaps) < width else (own, main)


def elsewhere(r: dict) -> list[str]:
    """Under which control's setting another rate is the one to use."""
    found = [(c, pair) for c in r["controls"] if (pair := moved(r, c)) is not None]
    return [
        f"With {settings(c['differs'])} {rate_label(own['learning_rate'])} ends lower than "
        f"{rate_label(main['learning_rate'])} ({decimals(own['final_eval']['mean'])} against "
        f"{decimals(main['final_eval']['mean'])})."
        for c, (own, main) in found
    ]


def seeds_do(counts: set[int]) -> str:
    """One seed does, three seeds do, one to three seeds do."""
    few, many = min(counts), max(counts)
    if few < many:
        return f"{in_words(few)} to {in_words(many)} seeds do"
    return f"{in_words(few)} {'seed does' if few == 1 else 'seeds do'}"


def one_seed(r: dict) -> bool:
    """Whether no rate has ended with a second seed, so that nothing tells how seeds vary."""
    return r["seeds"] == 1 and r["basin"]["seed_sd"] is None


def left_open(r: dict) -> list[str]:
    """What the seeds do not settle: whether a price that was named matters, and with one of them how they vary."""
    named = [x for rows in either_side(r) for x in rows if x["basin"]["verdict"] == "undecided"]
    named = [x for x in named if x["difference"]["end"]]
    rates, alone = sorted(x["learning_rate"] for x in named), one_seed(r)
    if not rates and r["seeds"] == 1:
        near = [x for x in by_loss(r) if x["basin"]["excess"] < r["basin"]["width"]]
        few = [x["learning_rate"] for x in near if x["final_eval"]["n"] == 1]
        return ["One seed: how much seeds vary is unknown." if alone else f"Of {labels(few)} only one seed has ended."]
    if not rates:
        return []
    counts = {x["final_eval"]["n"] for x in named}
    at, who = "", labels(rates)
    if counts != {r["seeds"]}:
        at, who = f"at {who} ", "it" if len(rates) == 1 else "they"
    what = f"{who} {'costs' if len(rates) == 1 else 'cost'} more than matters ({decimals(r['basin']['width'])})"
    words = f"{at}{seeds_do(counts)} not settle whether {what}{', nor how much seeds vary' if alone else ''}."
    return [words[0].upper() + words[1:]]


def basis(r: dict) -> str:
    """What the first sentence stands on."""
    if r["basin"] is None or r["side_by_side"]:
        return ""
    examples = eval_set(r)
    untrained = "" if r["base_loss"] is None else f"; untrained {decimals(r['base_loss'], '.2f')}"
    counts = {x["final_eval"]["n"] for x in by_loss(r)}
    seeds = (
        "one seed" if counts == {1} else f"mean of {' to '.join(map(str, sorted({min(counts), max(counts)})))} seeds"
    )
    return (
        f"Eval loss in nats per answer token (0.1 more is 11 % more perplexity), {seeds}"
        f"{f' over {examples}' if examples else ''}{untrained}. "
        f"Differences below {decimals(r['basin']['width'])} ({margin_of(r)}) count as none."
        f"{'' if modules_known(r) else TOO_NARROW}"
    )


def margin_of(r: dict) -> str:
    """Which of the three that ε is the largest of it is."""
    choices = {
        "0.01 nats": BASIN_NATS,
        f"{100 * BASIN_SHARE:g} % of the best loss": BASIN_SHARE * r["best_loss"],
        f"{BASIN_SD:g} standard deviations over seeds": BASIN_SD * (r["basin"]["seed_sd"] or 0.0),
    }
    return max(choices, key=choices.get)


def modules_known(r: dict) -> bool:
    """Whether intervals can take the examples of one module together; where there are no examples, nothing is lost."""
    return not r["data"]["eval_examples"] or bool(r["data"]["eval_modules"])


def eval_set(r: dict) -> str:
    data = r["data"]
    if data["eval_examples"] is None:
        return ""
    return f"{data['eval_examples']} examples" + (
        f" from {data['eval_modules']} modules" if data["eval_modules"] else ""
    )
