"""The answers to the document's questions, number by number."""

import pytest

from analysis import questions


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([20.4], "1e-4 was first to 80 % of the best gain, after 20 of 100 steps."),
        ([20, 50], "after 20 of 100 steps; 2e-4 took 50 (about 2.5 ×)."),
        ([50, 20, 31], "2e-4 was first to 80 % of the best gain, after 20 of 100 steps; the slowest of the 3 that "),
        ([50, 20, 31], "that reached it, 1e-4, took 50 (about 2.5 ×)."),
        ([20, 20.1], "after 20 of 100 steps; 2e-4 took 20."),
        ([0, 50], "after 0 of 100 steps; 2e-4 took 50 (about 5e+10 ×)."),  # an untrained model that differs
        ([20, "Infinity", None], "after 20 of 100 steps; 2e-4 did not reach it in 100 steps."),
        (["Infinity"], "No rate reached 80 % of the best gain in 100 steps, in the median of its seeds."),
    ],
)
def test_who_was_first_and_who_was_slowest(steps, said):
    rates = (1e-4, 2e-4, 4e-4)[: len(steps)]
    rows = [{"learning_rate": r, "diverged": 0, "steps": {"0.8": x}} for r, x in zip(rates, steps, strict=True)]
    r = {"rates": rows, "planned_steps": 100, "seeds": 1}
    assert said in questions.speed(r)
    if steps[0] != "Infinity":
        assert questions.speed(r | {"seeds": 2}) == questions.speed(r)[:-1] + " (medians over seeds)."
    rows[0]["diverged"] = 1
    lost = "To reach it is not to keep it: at 1e-4 at least one run diverged."
    assert questions.speed(r).endswith(lost) is (steps[0] != "Infinity")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tested": 1}, ""),
        ({"left": 1e-4, "right": 4e-4}, "2e-4 is the best of two rates that ended."),
        ({"left": 2e-4 / 3.47, "right": 2e-4 * 3.48}, "ended; between 2e-4 and 6.96e-4 (3.48 ×) nothing was run."),
        ({"left": 2e-5, "right": 4e-4}, "ended; between 2e-5 and 2e-4 (10 ×) nothing was run."),
        ({"left": 2e-5, "right": 2e-3}, "(10 ×) and between 2e-4 and 2e-3 (10 ×) nothing was run."),
        ({"right": 4e-4, "wall": 4e-4}, "ended; its right neighbour, 4e-4, diverged."),
        ({"right": 4e-4, "reason": "edge"}, "ended, at the edge of them: the optimum may lie beyond."),
        ({"identified": True, "learning_rate": 3e-4, "n": 5, "interval": [2e-4, 4e-4]}, "about 3e-4, 95 % [2e-4, 4e"),
    ],
)  # fmt: skip
def test_how_far_the_tested_rates_place_the_optimum(changes, said):
    known = {"identified": False, "reason": None, "tested": 2, "left": None, "right": None, "wall": None}
    found = questions.optimum({"optimum": known | changes, "best_rate": 2e-4})
    assert said in found and (found == "") is (said == "")


def test_the_standard_rate_is_judged_by_its_basin_and_seeds():
    test = {"excess": 0.01, "interval": [0.0, 0.02], "verdict": "in"}
    row = {"learning_rate": 2e-4, "diverged": 0, "n": 2, "basin": test}
    r = {
        "rates": [row, {"learning_rate": 1e-4}],
        "seeds": 2,
        "best_rate": 1e-4,
        "optimum": None,
        "basin": {"width": 0.03},
    }
    above = (
        "its mean is 0.010 nats above that of 1e-4; above the best, whichever that is, 95 % [0.000, 0.020], against a "
        "margin of 0.030 nats."
    )
    for verdict, word in (("in", "Yes, within what matters"), ("out", "No"), ("undecided", "Undecided")):
        found = r | {"rates": [row | {"basin": test | {"verdict": verdict}}, *r["rates"][1:]]}
        assert questions.standard(found) == f"{word}: {above}"
    best = "Yes, within what matters: it has the lowest mean"
    assert questions.standard(r | {"best_rate": 2e-4}) == f"{best}, though another may be lower by 0.020."
    alone = r | {"rates": [row | {"basin": test | {"interval": None}}, {}], "best_rate": 2e-4, "seeds": 1}
    assert questions.standard(alone) == f"{best}. With one seed this is about the eval examples, not about seeds."
    assert questions.standard(r | {"rates": [row]}) == "Undecided: 2e-4 is the only rate that was run."
