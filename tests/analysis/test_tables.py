"""The cells of the tables, what is not known among them."""

import pytest

from analysis import tables
from analysis.tables import BEST, NONE


def cells(columns: tables.Columns, row: dict, r: dict | None = None) -> dict:
    return {name: cell(row, r or {}) for name, cell in columns}


def some(mean: float | None = 3.0, sd: float | None = None, **more) -> dict:
    return {"mean": mean, "sd": sd, "n": 2} | more


def test_columns_without_any_value_are_left_out():
    columns = (("A", lambda x, r: x["a"]), ("B", lambda x, r: NONE), ("C", lambda x, r: r["c"]))
    found = tables.table(columns, [{"a": "1"}, {"a": "b&#10;" + "c" * 30}], {"c": "9"})
    assert found.markdown == f"| A | C |\n| --- | --- |\n| 1 | 9 |\n| b {'c' * 30} | 9 |"
    rows = f'<tr><td>1</td><td>9</td></tr>\n<tr><td class="long">b&#10;{"c" * 30}</td><td>9</td></tr>'
    assert rows in found.html and "<th>A</th><th>C</th>" in found.html
    assert "long" not in tables.Table(["A"], [["c" * 32]]).html
    assert tables.table(columns, [], {"c": "9"}) is None


def test_means_spreads_and_intervals():
    assert [tables.mean_sd(some(*x)) for x in ((None,), (3.0,), (3.0, 0.25))] == [NONE, "3.000", "3.000 ± 0.250"]
    assert tables.mean_sd(some(3.0, 0.25), "+.1f") == "+3.0 ± 0.2"
    assert [tables.with_interval(*x, "+.2f") for x in ((None, [1, 2]), (0.5, None), (0.5, [-1, 2]))] == [
        NONE, "+0.50", "+0.50 [-1.00, +2.00]",
    ]  # fmt: skip
    assert [tables.span(x) for x in ([2.6, 2.6], [2.6, 2.64], [2.6, 9.9], [2.6, 10], [500, 1276])] == [
        "2.6", "2.6", "2.6–9.9", "3–10", "500–1276",
    ]  # fmt: skip


def basin(rate: float, verdict: str) -> dict:
    return {"learning_rate": rate, "basin": {"verdict": verdict}}


def test_a_winner_is_alone_in_the_basin_over_two_seeds():
    rates = [basin(1e-4, "out"), basin(2e-4, "in"), basin(4e-4, "out")]
    r = {"rates": rates, "seeds": 2, "side_by_side": False, "best_rate": 2e-4}
    assert (
        tables.winner(r) == 2e-4
        and tables.strong(rates[1], r, "x") == "**x**"
        and tables.strong(rates[0], r, "x") == "x"
    )
    for other in ({"seeds": 1}, {"side_by_side": True}, {"rates": rates[1:2]}, {"best_rate": 1e-4}):
        assert tables.winner(r | other) is None
    assert tables.winner(r | {"rates": [basin(1e-4, "undecided"), *rates[1:]]}) is None


def test_a_rate_shows_its_end_or_the_last_that_was_finite():
    r = {"rates": [], "seeds": 1, "side_by_side": False, "best_rate": 1e-4, "planned_steps": 100}
    cost = {"mean": 0.1, "interval": [0.05, 0.15]}
    row = {
        "learning_rate": 2e-4, "n": 3, "final_train": some(), "final_eval": some(2.5, 0.1) | {"n": 3, "level": None},
        "last_eval": some(9.0, step=42), "best_eval": some(2.4, step=80.5), "gain": {"mean": 0.876}, "diverged": 0,
        "difference": {"end": cost, "best": None, "one_pass": cost},
        "steps": {"0.8": "Infinity", "0.5": 3.6, "0.95": None},
        "behaviours": {"slow": 2, "diverged": 1}, "flags": {}, "gap": some(0.25), "one_pass": some(2.6, step=50),
    }  # fmt: skip
    assert cells(tables.RATES, row, r) == {
        "Learning Rate": "2e-4", "Seeds": "3", "Final Train Loss": "3.000", "Final Eval Loss": "2.500 ± 0.100",
        "Cost at the end [95 %]": "+0.100 [+0.050, +0.150]", "Best checkpoint": "2.400, step 80.5",
        "Cost there [95 %]": NONE, "Share of the best gain": "88 %", "Steps to 80 %": "> 100",
        "Behavior": "slow 2/3, diverged 1/3",
    }  # fmt: skip
    assert cells(tables.MOMENTS, row, r) == {
        "Learning Rate": "2e-4", "Level at the end [95 %]": NONE, "Eval − train loss": "+0.250",
        "After one pass": "2.600, step 50", "Cost after one pass [95 %]": "+0.100 [+0.050, +0.150]",
        "Steps to 50 % of the best gain": "4", "to 95 %": NONE,
    }  # fmt: skip
    last = "9.000, last finite, step 42"
    assert tables.final_eval(row | {"diverged": 1}, r) == "2.500 ± 0.100"  # all of them ended, one worse than untrained
    assert tables.final_eval(row | {"diverged": 1, "n": 4}, r) == last
    assert tables.final_eval(row | {"final_eval": some(None)}, r) == last
    assert tables.final_eval(row | {"final_eval": some(None), "last_eval": some(None)}, r) == NONE
    assert tables.cost("end")(row | {"learning_rate": 1e-4}, r) == BEST
    assert (
        tables.best_checkpoint(row | {"best_eval": some(None)}, r)
        == NONE
        == tables.one_pass({"one_pass": some(None)}, r)
    )
    assert tables.gain({"gain": None}, r) == NONE == tables.gain({"gain": {"mean": None}}, r)
    alone = row | {"n": 1, "behaviours": {"slow": 1}, "flags": {"crossed": 1, "fast start": 1}}
    assert tables.behaviours(alone, r) == "slow (crossed, fast start)"
    found = {"mean": 2.5, "interval": [2.4, 2.6]}
    assert tables.level({"final_eval": {"level": found}}, r) == "2.500 [2.400, 2.600]"
    assert tables.level({"final_eval": {"level": found | {"interval": None}}}, r) == NONE


def test_a_guide_has_a_link_where_its_address_is_plain():
    source = {"title": "T", "url": "https://a.b/c-d"}
    for url, text in (("https://a.b/c-d", "[T](https://a.b/c-d)"), ("http://a.b", "T"), ("https://a.b/)x", "T")):
        assert tables.guide({"name": "A", "source": source | {"url": url}}, {}) == f"A: {text}"
    assert tables.guide({"name": "A", "source": {}}, {}) == "A"
    for compared, found in ((True, BEST), (False, NONE)):
        assert tables.regret({"regret": None, "compared": compared}, {}) == found
    assert tables.regret({"regret": {"mean": 0.1, "interval": None}}, {}) == "+0.100"
    assert tables.steps_lost({"steps_lost": None}, {}) == NONE
    assert tables.steps_lost({"steps_lost": {"mean": 9.6, "interval": [5, 20]}}, {}) == "10 [5, 20]"
    verdicts = ("in", "out", "undecided")
    told = [tables.guide_verdict({"differs": {}, "compared": True, "verdict": v}, {}) for v in verdicts]
    assert told == ["as good", "worse", "open"]
    assert tables.guide_verdict({"differs": {}, "compared": False, "verdict": "in"}, {}) == NONE
    assert tables.guide_verdict({"differs": {"lora_r": 8}}, {}) == "not compared: lora_r = 8"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "the same again"),
        ({"solo": True}, "gang against train.py"),
        ({"diverged": True}, "the same again, diverged"),
        ({"differs": {"dtype": "x"}}, "the same again, dtype = x"),
    ],
)
def test_repeats_say_what_they_repeat(changes, kind):
    row = {"learning_rate": 2e-4, "seed": 0, "runs": ["a", "b"], "difference": 0.0012, "solo": False, "diverged": False}
    assert list(cells(tables.REPEATS, row | {"differs": {}} | changes).values()) == [
        "2e-4",
        "0",
        "a and b",
        "+0.00120",
        kind,
    ]
    assert tables.REPEATS[1][1](row | {"seed": None}, {}) == NONE


def test_a_control_shows_the_main_grids_number_beside_its_own():
    cell = tables.beside("gain", ".2f")
    assert cell({"gain": 0.5, "main_gain": 0.75}, {}) == "0.50 (0.75)"
    assert cell({"gain": {"mean": 0.5}, "main_gain": {"mean": None}}, {}) == "0.50"
    assert cell({"gain": None, "main_gain": 0.75}, {}) == NONE
    assert tables.beside("size")({"size": 5e-6, "main_size": 0.25}, {}) == "5e-6 (0.25)"
    assert tables.control_difference({"difference": None}, {}) == NONE


def test_a_run_shows_where_it_ended_and_why_it_does_not_count():
    row = {
        "id": "r", "learning_rate": 2e-4, "seed": None, "state": "crashed", "last_step": 40, "planned_steps": None,
        "final_train_loss": None, "final_eval_loss": None, "last_finite": {"loss": 3.0, "step": 30},
        "behaviour": "diverged", "onset": "early", "differs": {"lora_r": 8}, "config": {"guide": "G"},
        "excluded": "old", "reason": "why", "notes": ["n"],
    }  # fmt: skip
    assert list(cells(tables.RUNS, row).values()) == [
        "r", "2e-4", NONE, "crashed", "40 of ?", NONE, "3.000 at step 30", "diverged (early)",
        "guide G; why; n; not compared: old; beside the main grid: lora_r = 8",
    ]  # fmt: skip
    plain = row | {
        "differs": {},
        "config": {},
        "excluded": None,
        "notes": [],
        "onset": None,
        "seed": 0,
        "planned_steps": 50,
    }
    assert list(cells(tables.RUNS, plain | {"final_eval_loss": 2.5}).values())[2:] == [
        "0", "crashed", "40 of 50", NONE, "2.500", "diverged", "why",
    ]  # fmt: skip
    assert tables.end_of(row | {"last_finite": None}, {}) == NONE


def test_of_the_budgets_some_are_shown_each_about_twice_the_one_before():
    row = {"best_rate": 2e-4, "loss": 3.0, "within": [1e-4, 2e-4], "between": None, "band": None}
    steps = (5, 10, 20, 21, 40, 80, 100, 190)
    law = {"steps": 400, "rate": 1e-4, "interval": [9e-5, 1.2e-4], "run": False}
    r = {
        "rates": [1, 2], "best_rate": 2e-4, "data": {"steps_per_pass": 100.0},
        "budget": [row | {"step": step} for step in steps],
        "budget_law": {"for": [law, law | {"steps": 190, "run": True}]},
    }  # fmt: skip
    found = tables.budget(r)
    assert [line[0] for line in found.rows] == ["10", "21", "40", "100", "190", "400"]
    assert found.rows[-2] == ["190", "1.90", "2e-4", "3.000", "1e-4", "1e-4 [9e-5, 1.2e-4]"]
    assert found.rows[-1] == ["400", "4.00", "not run", NONE, NONE, "1e-4 [9e-5, 1.2e-4]"]
    assert found.rows[0][-1] == NONE and tables.budget(r | {"best_rate": None}) is None is tables.budget(
        r | {"rates": [1]}
    )
    assert tables.between({"between": 2e-4, "band": [1.5e-4, 3.3e-4]}) == "about 2e-4 (1.5e-4 to 3.3e-4)"
