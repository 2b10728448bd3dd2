"""For N steps use η: right where the curves say it, and "does not know" where they do not."""

import math

import numpy as np
import pytest

from analysis import report
from analysis.budget import FEWEST, WITHIN, apart, check, law
from analysis.results import results
from analysis.runs import Series
from analysis.statistics import best_by_budget
from tests.analysis.test_study import records, study

STEPS = np.array([5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100])
RATES = [1e-4 * 10 ** (k / 2) for k in range(5)]


def curves(power=-0.5, rates=RATES, noise=0.0, rng=None, curvature=0.2):
    """Eval loss that is lowest at 6e-4 · (N/100)^power, a parabola in log10 η at each step."""
    at = np.log10(6e-4) + power * np.log10(STEPS / 100)
    rng = rng or np.random.default_rng(0)
    return {
        rate: Series(STEPS, 3 + curvature * (math.log10(rate) - at) ** 2 + noise * rng.standard_normal(len(STEPS)))
        for rate in rates
    }


def in_words(law, optimum=None):
    return report.budget_law({"budget_law": law, "optimum": optimum, "planned_steps": 100})


def told(found, schedule="constant_with_warmup", one_pass=None, seeds=()):
    rows = [best_by_budget(each, 0.01) for each in (found, *seeds)]
    return law(rows[0], rows[1:], 100, schedule, one_pass)


@pytest.mark.parametrize("power", [-0.5, -0.2, 0.0])
def test_a_power_of_the_budget_is_found_and_carried_to_twice_the_steps(power):
    found = told(curves(power))
    assert found["power"] == pytest.approx(power, abs=1e-6) and len(found["budgets"]) >= FEWEST
    beyond = found["for"][-1]
    assert (beyond["steps"], beyond["run"]) == (200, False)
    assert beyond["rate"] == pytest.approx(6e-4 * 2**power, rel=1e-3)
    assert found["check"]["said"] == pytest.approx(found["check"]["is"], rel=1e-3)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (told(curves(), schedule="cosine"), "schedule"),
        (told(curves(rates=[1e-5, 2e-4, 1e-3, 5e-3])), "coarse"),
        (told(curves(rates=[1e-2, 3e-2, 1e-1])), "coarse"),
        (told(curves(noise=0.02)), "wide"),
    ],
)
def test_what_the_curves_do_not_tell_is_not_known(found, reason):
    assert found["reason"] == reason and found["for"] == []


def test_budgets_up_to_half_the_longest_check_the_line():
    points = [(steps, 1e-3 * steps**-0.5) for steps in (10, 20, 30, 41)]
    assert check([*points, (60, 2e-4)]) == {
        "from": 30, "steps": 60, "said": pytest.approx(1e-3 * 60**-0.5), "is": 2e-4
    }  # fmt: skip
    assert check([*points, (59, 2e-4)]) is None  # two budgets are no check
    assert apart({"said": 3e-4, "is": 2e-4}) == apart({"said": 2e-4, "is": 3e-4}) == pytest.approx(1.5)
    wide = in_words(told(curves(noise=0.02)))
    assert wide.endswith("budgets leaves it open by more than a factor of 1.5.")


def test_the_interval_covers_a_new_budget_as_often_as_it_says():
    """Noise that is independent between budgets, over 400 draws of three seeds; what it calls known is within 1.5."""
    rng, hits, close, known = np.random.default_rng(1), 0, 0, 0
    for _ in range(400):
        seeds = [curves(noise=0.003, rng=rng) for _ in range(3)]
        mean = {rate: Series(STEPS, np.mean([each[rate].value for each in seeds], axis=0)) for rate in RATES}
        found = told(mean, seeds=seeds)
        beyond = next((x for x in found["for"] if not x["run"]), None)
        if beyond is not None:
            true = 6e-4 * 2**-0.5
            known += 1
            hits += beyond["interval"][0] <= true <= beyond["interval"][1]
            close += max(true / beyond["rate"], beyond["rate"] / true) <= WITHIN
    assert known > 100 and hits / known > 0.93 and close / known > 0.95


def test_no_more_than_one_pass_is_predicted_from_less():
    assert told(curves(), one_pass=130.0)["for"][-1]["steps"] == 130
    assert told(curves(), one_pass=105.0)["for"][-1]["run"]
    assert told(curves(), one_pass=40.0)["for"][-1]["steps"] == 200  # the grid itself has seen examples again


def test_early_budgets_that_point_elsewhere_end_the_line_at_the_last_that_was_run():
    """The best rate stops falling: the check fails, and nothing is said beyond."""
    found = curves(-0.6)
    late = {rate: Series(STEPS[8:], curve.value[7] + 0 * curve.value[8:]) for rate, curve in found.items()}
    bent = {rate: Series(STEPS, np.r_[curve.value[:8], late[rate].value]) for rate, curve in found.items()}
    said = told(bent)
    assert said["for"] and all(x["run"] for x in said["for"])
    assert in_words(said).endswith("For more than 100 steps this does not know the best rate.")


def test_the_words_name_the_line_its_budgets_and_what_nobody_ran():
    words = in_words(told(curves()))
    assert "use about 6e-4 · (N/100)^-0.50: a line through the parabolas of 6 budgets of 10 to 100 steps" in words
    assert "From 40 steps and less it would have said 6e-4 for 100" in words
    assert words.endswith("For 200 steps, which nobody ran: 4.2e-4 [4.2e-4, 4.2e-4].")
    placed = {"identified": True, "learning_rate": 7e-4, "interval": [3e-4, 1e-3]}
    alone = "The ends alone, without the line, say 7e-4 [3e-4, 1e-3]."
    assert alone in in_words(told(curves()), placed) and alone not in in_words(told(curves()), {"identified": False})


@pytest.mark.parametrize("power", [-0.004, 0.004])
def test_a_rate_that_no_budget_moves_has_no_power(power):
    words = in_words(told(curves(power)))
    assert words.startswith("For N steps use about 6e-4, whatever N: a line through")


def test_the_report_says_what_it_knows_of_budgets(tmp_path):
    page = report.render(results(study(records())), tmp_path, [])
    assert "For a budget that was not run this does not know the best rate" in page
