"""The tables of the report: each a tuple of columns, a header with the function that fills its cells.

A column that is empty in every row is left out. Cells are text with the report's little markdown; `Table` writes
itself as markdown and as HTML.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import unescape

from analysis.files import number
from analysis.headline import guide_settings
from analysis.words import (
    decimals,
    html,
    labels,
    listed,
    percent,
    rate_bounds,
    rate_label,
    settings,
    shortened,
    small,
    steps,
)

NONE, BEST = "—", "best"
EMPTY = (NONE, BEST, "")  # cells that alone make no column
SHORT, LONG = 32, ' class="long"'  # characters that stay on one line
Columns = tuple[tuple[str, Callable[[dict, dict], str]], ...]


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]

    @property
    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in lines).replace("&#10;", " ")

    @property
    def html(self) -> str:
        """The table in a box that scrolls; cells of class "long" may be broken into lines on a narrow screen."""
        head = "".join(f"<th>{html(cell)}</th>" for cell in self.header)
        rows = [
            "".join(f"<td{LONG if len(cell) > SHORT else ''}>{html(cell)}</td>" for cell in row) for row in self.rows
        ]
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def table(columns: Columns, rows: Iterable[dict], r: dict) -> Table | None:
    """The table of these rows; None without any."""
    rows = list(rows)
    cells = [[fill(row, r) for _, fill in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] not in EMPTY for row in cells)]
    return Table([columns[i][0] for i in kept], [[row[i] for i in kept] for row in cells]) if rows else None


def winner(r: dict) -> float | None:
    """The rate that may be printed bold: the only one not outside the basin, over at least two seeds."""
    inside = [x["learning_rate"] for x in r["rates"] if x["basin"]["verdict"] != "out"]
    alone = r["seeds"] > 1 and not r["side_by_side"] and len(r["rates"]) > 1
    return r["best_rate"] if alone and inside == [r["best_rate"]] else None


def strong(x: dict, r: dict, text: str) -> str:
    return f"**{text}**" if x["learning_rate"] == winner(r) else text


def mean_sd(spread: dict, form: str = ".3f") -> str:
    if spread["mean"] is None:
        return NONE
    return decimals(spread["mean"], form) + (
        "" if spread["sd"] is None else f" ± {decimals(spread['sd'], form.lstrip('+'))}"
    )


def with_interval(mean: object, pair: list | None, form: str) -> str:
    if mean is None:
        return NONE
    interval = f" [{decimals(pair[0], form)}, {decimals(pair[1], form)}]" if pair else ""
    return decimals(mean, form) + interval


def cost(moment: str) -> Callable[[dict, dict], str]:
    def cell(x: dict, r: dict) -> str:
        if x["learning_rate"] == r["best_rate"]:
            return BEST
        found = x["difference"][moment]
        return NONE if found is None else with_interval(found["mean"], found["interval"], "+.3f")

    return cell


def final_eval(x: dict, r: dict) -> str:
    """Mean ± sd; of a rate without an end its last finite loss and where that was."""
    if x["final_eval"]["mean"] is not None and not (x["diverged"] and x["final_eval"]["n"] < x["n"]):
        return strong(x, r, mean_sd(x["final_eval"]))
    last = x["last_eval"]
    return NONE if last["mean"] is None else f"{mean_sd(last)}, last finite, step {last['step']}"


def best_checkpoint(x: dict, r: dict) -> str:
    best = x["best_eval"]
    return NONE if best["mean"] is None else f"{mean_sd(best)}, step {decimals(best['step'], 'g')}"


def gain(x: dict, r: dict) -> str:
    return NONE if x["gain"] is None or x["gain"]["mean"] is None else percent(x["gain"]["mean"])


def behaviours(x: dict, r: dict) -> str:
    words = ", ".join(f"{word} {count}/{x['n']}" if x["n"] > 1 else word for word, count in x["behaviours"].items())
    return words + (f" ({', '.join(x['flags'])})" if x["flags"] else "")


def seeds(x: dict, r: dict) -> str:
    return str(x["n"])


RATES: Columns = (
    ("Learning Rate", lambda x, r: strong(x, r, rate_label(x["learning_rate"]))),
    ("Seeds", seeds),
    ("Final Train Loss", lambda x, r: mean_sd(x["final_train"])),
    ("Final Eval Loss", final_eval),
    ("Cost at the end [95 %]", cost("end")),
    ("Best checkpoint", best_checkpoint),
    ("Cost there [95 %]", cost("best")),
    ("Share of the best gain", gain),
    ("Steps to 80 %", lambda x, r: steps(x["steps"]["0.8"], r["planned_steps"])),
    ("Behavior", behaviours),
)


def level(x: dict, r: dict) -> str:
    found = x["final_eval"]["level"]
    return (
        NONE if found is None or found["interval"] is None else with_interval(found["mean"], found["interval"], ".3f")
    )


def one_pass(x: dict, r: dict) -> str:
    found = x["one_pass"]
    return NONE if found["mean"] is None else f"{mean_sd(found)}, step {found['step']}"


MOMENTS: Columns = (
    ("Learning Rate", lambda x, r: rate_label(x["learning_rate"])),
    ("Level at the end [95 %]", level),
    ("Eval − train loss", lambda x, r: mean_sd(x["gap"], "+.3f")),
    ("After one pass", one_pass),
    ("Cost after one pass [95 %]", cost("one_pass")),
    ("Steps to 50 % of the best gain", lambda x, r: steps(x["steps"]["0.5"], r["planned_steps"])),
    ("to 95 %", lambda x, r: steps(x["steps"]["0.95"], r["planned_steps"])),
)

BUDGET: Columns = (
    ("Budget in steps", lambda x, r: str(x["step"])),
    ("Passes", lambda x, r: decimals(x["passes"], ".2f")),
    ("Best rate", lambda x, r: "not run" if x["best_rate"] is None else rate_label(x["best_rate"])),
    ("Eval loss", lambda x, r: decimals(x["loss"])),
    (
        "Within the margin of it",
        lambda x, r: labels(others) if (others := [y for y in x["within"] if y != x["best_rate"]]) else NONE,
    ),
    ("Between the rates", lambda x, r: between(x)),
    ("The line says [95 %]", lambda x, r: NONE if x["law"] is None else rate_with_interval(x["law"])),
)


def between(x: dict) -> str:
    """The parabola's lowest point, and in brackets where it is less than the margin above that."""
    if x["between"] is None:
        return NONE
    low, high = (rate_label(end, 2) for end in x["band"])
    return f"about {rate_label(x['between'], 2)} ({low} to {high})"


def rate_with_interval(x: dict) -> str:
    low, high = (rate_label(end, 2) for end in x["interval"])
    return f"{rate_label(x['rate'], 2)} [{low}, {high}]"


SEARCH: Columns = (
    ("Round", lambda x, r: x["name"].removeprefix("round-")),
    ("Asked", lambda x, r: x["asked"] or NONE),
    ("Rates", lambda x, r: labels(x["rates"]) or NONE),
    ("Seeds", lambda x, r: listed([str(seed) for seed in x["seeds"]]) or NONE),
    ("Runs", lambda x, r: str(x["runs"])),
    ("Device seconds", lambda x, r: decimals(x["device_seconds"], ".0f")),
    ("Rate to use then", lambda x, r: NONE if x["rate"] is None else rate_label(x["rate"])),
    ("The best lies in [95 %]", lambda x, r: NONE if x["interval"] is None else rate_bounds(x["interval"])),
)


def guide(x: dict, r: dict) -> str:
    """Who recommends it, with a link to where that was read; no other address is made a link."""
    title, url = x["source"].get("title", ""), unescape(x["source"].get("url", ""))
    linked = f"[{title}]({url})" if re.fullmatch(r"https://[\w./@-]+", url) else title
    return f"{x['name']}: {linked}" if title else x["name"]


def regret(x: dict, r: dict) -> str:
    if x["regret"] is None:
        return BEST if x["compared"] else NONE
    return with_interval(x["regret"]["mean"], x["regret"]["interval"], "+.3f")


def steps_lost(x: dict, r: dict) -> str:
    found = x["steps_lost"]
    return NONE if found is None else with_interval(found["mean"], found["interval"], ".0f")


def guide_verdict(x: dict, r: dict) -> str:
    if x["differs"]:
        return f"not compared: {settings(x['differs'])}"
    return {"in": "as good", "out": "worse", "undecided": "open"}[x["verdict"]] if x["compared"] else NONE


GUIDES: Columns = (
    ("Guide", guide),
    ("Settings", lambda x, r: guide_settings(x)),
    ("α·η", lambda x, r: small(x["axes"]["α·η"])),
    ("Seeds", seeds),
    ("Final Eval Loss", lambda x, r: mean_sd(x["final_eval"])),
    ("Regret [95 %]", regret),
    ("Steps lost [95 %]", steps_lost),
    ("Against the best known", guide_verdict),
    ("Behavior", lambda x, r: behaviours(x | {"flags": {}}, r)),
    ("It also sets, left out here", lambda x, r: x["source"].get("left_out", NONE)),
    ("Read on", lambda x, r: x["source"].get("date", NONE)),
)

HYPOTHESES: Columns = (
    ("", lambda x, r: x["name"]),
    ("Hypothesis, fixed before the runs", lambda x, r: x["claim"]),
    ("Verdict", lambda x, r: " ".join(filter(None, (f"**{x['verdict']}**", x.get("scope"))))),
    ("Evidence", lambda x, r: x["evidence"]),
    ("Seeds", lambda x, r: str(x["n"])),
)


def span(pair: list) -> str:
    low, high = map(number, pair)
    form = ".1f" if high < 10 else ".0f"
    return format(low, form) if math.isclose(low, high, rel_tol=0.02) else f"{low:{form}}–{high:{form}}"


MECHANISM: Columns = (
    ("Learning Rate", lambda x, r: rate_label(x["learning_rate"])),
    ("One full-rate step", lambda x, r: small(x["full_step"])),
    ("Predicted at the first measurement", lambda x, r: small(x["predicted"])),
    ("Measured there", lambda x, r: small(x["measured"])),
    ("Measured / predicted", lambda x, r: decimals(x["ratio"], ".2f")),
    ("At the end", lambda x, r: small(x["end"])),
    ("Stable rank at the end", lambda x, r: decimals(x["stable_rank"], ".1f")),
    ("Steps until an entry of A moves by its size", lambda x, r: span(x["entry_steps"])),
    ("... until A does along one direction", lambda x, r: span(x["direction_steps"])),
)


def beside(key: str, form: str = "") -> Callable[[dict, dict], str]:
    """A control's number, and in brackets the main grid's."""

    def text(value: float) -> str:
        return decimals(value, form) if form else small(value)

    def cell(x: dict, r: dict) -> str:
        own, main = x[key], x[f"main_{key}"]
        own, main = (found["mean"] if isinstance(found, dict) else found for found in (own, main))
        return NONE if own is None else f"{text(own)}{'' if main is None else f' ({text(main)})'}"

    return cell


def control_difference(x: dict, r: dict) -> str:
    found = x["difference"]
    return NONE if found is None else with_interval(found["mean"], found["interval"], "+.3f")


CONTROL: Columns = (
    ("Learning Rate", lambda x, r: rate_label(x["learning_rate"])),
    ("Runs", lambda x, r: str(x["runs"])),
    ("Final Eval Loss (main grid)", beside("final_eval", ".3f")),
    ("Difference [95 %]", control_difference),
    ("By seed", lambda x, r: ", ".join(decimals(gap, "+.3f") for gap in x["by_seed"]) or NONE),
    ("Share of the best gain", beside("gain", ".2f")),
    ("‖ΔW‖/‖W‖", beside("update_ratio")),
    ("Stable rank", beside("stable_rank", ".2f")),
    ("Behavior among these", lambda x, r: ", ".join(f"{word} {n}/{x['runs']}" for word, n in x["behaviours"].items())),
)

GROUPS: Columns = (
    ("Group", lambda x, r: settings(x["settings"])),
    ("Rates", lambda x, r: labels(x["rates"]) if x["rates"] else NONE),
    ("Runs", lambda x, r: str(x["runs"])),
    ("Diverged", lambda x, r: str(x["diverged"])),
    ("Untrained", lambda x, r: decimals(x["base_loss"])),
    ("Lowest at", lambda x, r: NONE if x["best_rate"] is None else rate_label(x["best_rate"])),
    ("Final Eval Loss [95 %]", lambda x, r: level({"final_eval": x}, r)),
)


def repeat_kind(x: dict, r: dict) -> str:
    words = ["gang against train.py" if x["solo"] else "the same again"]
    words += ["diverged"] if x["diverged"] else []
    return ", ".join(words + ([settings(x["differs"])] if x["differs"] else []))


REPEATS: Columns = (
    ("Learning Rate", lambda x, r: rate_label(x["learning_rate"])),
    ("Seed", lambda x, r: NONE if x["seed"] is None else str(x["seed"])),
    ("Runs", lambda x, r: " and ".join(x["runs"])),
    ("Difference", lambda x, r: decimals(x["difference"], "+.5f")),
    ("", repeat_kind),
)

CHECKS: Columns = (
    ("Check", lambda x, r: x["check"]),
    ("Result", lambda x, r: {True: "passed", False: "**FAILED**", None: "unknown"}[x["passed"]]),
    ("Detail", lambda x, r: x["detail"]),
)


def end_of(x: dict, r: dict) -> str:
    if x["final_eval_loss"] is not None:
        return decimals(x["final_eval_loss"])
    last = x["last_finite"]
    return NONE if last is None else f"{decimals(last['loss'])} at step {last['step']}"


def remarks(x: dict, r: dict) -> str:
    beside = ", ".join(f"{key} = {value}" for key, value in x["differs"].items())
    guide = x["config"].get("guide")
    excluded = f"not compared: {x['excluded']}" if x["excluded"] else ""
    parts = [f"guide {guide}" if guide else "", x["reason"], *x["notes"], excluded]
    return "; ".join(part for part in (*parts, f"beside the main grid: {beside}" if beside else "") if part)


RUNS: Columns = (
    ("Run", lambda x, r: x["id"]),
    ("Rate", lambda x, r: rate_label(x["learning_rate"])),
    ("Seed", lambda x, r: NONE if x["seed"] is None else str(x["seed"])),
    ("State", lambda x, r: x["state"]),
    ("Steps", lambda x, r: f"{x['last_step']} of {x['planned_steps'] or '?'}"),
    ("Train", lambda x, r: decimals(x["final_train_loss"])),
    ("Eval", end_of),
    ("Behavior", lambda x, r: x["behaviour"] + (f" ({x['onset']})" if x["onset"] else "")),
    ("Why, and what the reading repaired", remarks),
)

SETTINGS: Columns = (("Setting", lambda x, r: x["key"]), ("Value", lambda x, r: x["value"]))
SAMPLES: Columns = (("Learning Rate", lambda x, r: x["who"]), ("Completion", lambda x, r: shortened(x["text"])))


def budget(r: dict) -> Table | None:
    """A few budgets, about doubling, and the one beyond, each with its passes; None if rates have no order."""
    if len(r["rates"]) < 2 or r["best_rate"] is None:
        return None
    rows: list[dict] = r["budget"]
    shown: list[dict] = []
    for row in reversed(rows):
        if not shown or row["step"] * 1.9 <= shown[-1]["step"]:
            shown.append(row)
    per_pass = number(r["data"]["steps_per_pass"])
    law = {x["steps"]: x for x in r["budget_law"]["for"]}
    beyond = [{"step": x["steps"], "best_rate": None} for x in law.values() if not x["run"]]
    empty: dict = {"loss": None, "within": [], "between": None, "band": None}
    more = {
        x["step"]: {"passes": x["step"] / per_pass if per_pass else None, "law": law.get(x["step"])}
        for x in [*shown, *beyond]
    }
    return table(BUDGET, [empty | x | more[x["step"]] for x in [*shown[:5][::-1], *beyond]], r)
