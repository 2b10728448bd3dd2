"""The report: a sentence flips when its data flip, nothing of a run is markup, one seed claims no winner."""

import json
import re

import numpy as np
import pytest

from analysis import headline, questions, report, tables
from analysis.files import to_json
from analysis.results import results
from analysis.runs import load, read_run
from analysis.study import build
from analysis.words import escape, rate_label
from tests.analysis import simulate

FOUR = {1e-5: "slow", 2e-4: "good", 1e-3: "suboptimal", 5e-3: "stopped"}


def analyse(rates=None, seeds=3, change=None, **options):
    """The results of a simulated sweep, as all_results.json has them."""
    rates = rates or FOUR
    options = {"planned": 100, "examples": 40} | options
    records = [simulate.record(kind, rate, seed, **options) for rate, kind in rates.items() for seed in range(seeds)]
    for record in records:
        if change:
            change(record)
    sweep = simulate.sweep_of(list(rates), list(range(seeds)))
    return json.loads(to_json(results(build([sweep], [read_run(record) for record in records]))))


def even(record):
    """Seeds that differ by 0.002 nats only: the simulator draws each curve's shape, which seeds cannot average."""
    kind, planned = record["id"].split("-")[0], record["config"]["max_steps"]
    *_, steps, held_out = simulate.curves(kind, planned, 0.08, 0)
    for row in record["history"]:
        if "eval/loss" in row and row["train/global_step"] in steps:
            place = steps.tolist().index(row["train/global_step"])
            row["eval/loss"] = float(held_out[place]) + 0.002 * record["config"]["seed"] * (place > 0)
    nll = record["files"]["eval_nll.json"]
    share = np.array(nll["tokens"]) / np.sum(nll["tokens"])
    losses = [row["eval/loss"] for row in record["history"] if "eval/loss" in row]
    nll["nll"] = [(loss * np.sum(nll["tokens"]) * share).tolist() for loss in losses]


def page(found, tmp_path):
    return report.render(found, tmp_path, [])


def verdicts(found):
    return {h["name"]: h["verdict"] for h in found["hypotheses"]}


def test_the_answer_says_what_to_use_when_to_stop_and_what_else_costs():
    text = headline.answer(analyse(change=even))
    use = r"\*\*Of four rates use 2e-4, for all 100 steps \(2\.\d\d, flat over the last quarter\)\.\*\* "
    higher = r"Higher: 1e-3 costs 0\.0\d; 5e-3 diverged in 3 of 3 runs\. "
    assert re.match(use + higher + r"Lower: 1e-5 costs 0\.\d\d, still falling\.", text)


def loadable(record):
    record["summary"]["load_adapter"] = 'model = load("a_b")\n```\n<b>'
    record["config"]["output_dir"] = f"outputs/adapters/{record['id']}"


def test_the_adapter_to_use_is_the_lowest_of_the_best_rate_with_the_lines_that_load_it(tmp_path):
    found = analyse(change=loadable)
    best = [run for run in found["runs"] if run["learning_rate"] == found["best_rate"]]
    lowest = min(best, key=lambda run: run["final_eval_loss"])
    assert found["adapter"]["run"] == lowest["id"]
    text = page(found, tmp_path)
    assert f"outputs/adapters/{lowest['id']}, and in W&B as model-{lowest['id']}:latest" in text.replace("\\", "")
    assert '```python\nmodel = load("a_b")\n???\n<b>\n```' in text
    assert analyse()["adapter"] is None and "The adapter to use" not in page(analyse(), tmp_path)


def test_the_answer_flips_with_the_data():
    assert "use 1e-3," in headline.answer(analyse({2e-4: "suboptimal", 1e-3: "good"}))
    assert "use 2e-4," in headline.answer(analyse({2e-4: "good", 1e-3: "suboptimal"}))
    found = analyse({2e-4: "good", 5e-3: "harmed"})
    assert "5e-3 ends worse than untrained (" in headline.answer(found)
    next(run for run in found["runs"] if run["learning_rate"] == 5e-3)["last_finite"]["loss"] = 1.0
    assert "5e-3 ends worse than untrained in 2 of 3 runs (1.00 to " in headline.answer(found)


@pytest.mark.parametrize(("gap", "used"), [(0.2, 2e-4), (0.4, 4e-4)])
def test_of_rates_within_a_quarter_of_the_margin_the_lower_one_is_to_use(gap, used):
    """4e-4 ends lower by this share of the margin; to use is what the search takes, and its adapter."""

    def lower(record):
        loadable(record)
        for row in record["history"]:
            if "eval/loss" in row and row["train/global_step"] > 0 and record["config"]["learning_rate"] == 4e-4:
                row["eval/loss"] -= gap * width

    rates = {1e-5: "slow", 2e-4: "good", 4e-4: "good"}
    width = analyse(rates)["basin"]["width"]
    found = analyse(rates, change=lower)
    assert (found["best_rate"], found["advice"]["rate"]) == (4e-4, used)
    run = next(run for run in found["runs"] if run["id"] == found["adapter"]["run"])
    assert run["learning_rate"] == used
    text, safer = headline.answer(found), " of it 2e-4 is the lowest, so the safest"
    assert re.search(rf"use {rate_label(used)} or .*2e-4 ends 0\.0\d\d above 4e-4", text)
    assert (safer in text) == (used == 2e-4)


def test_the_answer_says_to_stop_where_a_second_pass_makes_it_worse():
    text = headline.answer(analyse({2e-4: "two epochs", 1e-5: "slow"}, change=even))
    assert re.search(
        r"use 2e-4, for about (one pass|\d\.\d passes) over the data \(step \d+: 2\.\d\d; step 100: \d", text
    )


def test_a_rate_whose_end_overfits_is_priced_at_both_moments():
    text = headline.answer(analyse({2e-4: "good", 1e-3: "two epochs"}, change=even))
    assert re.search(r"1e-3 costs 0\.0\d at its best checkpoint and 0\.\d\d at the end", text)


def test_early_stopping_that_turns_the_order_is_said():
    def later_worse(record):
        if record["config"]["learning_rate"] == 1e-3:
            for row in record["history"]:
                step = row["train/global_step"]
                if "eval/loss" in row:
                    row["eval/loss"] = 4.2 - 1.8 * step / 40 if step <= 40 else 2.4 + 0.02 * (step - 40)

    text = headline.answer(analyse({2e-4: "good", 1e-3: "good"}, change=later_worse))
    assert "use 2e-4" in text and "Stopped at its best checkpoint (step 40), 1e-3 is 0." in text
    assert " lower than 2e-4 at its own." in text


def test_a_best_rate_that_still_falls_is_said_to():
    assert "still falling:" in headline.answer(analyse({1e-5: "slow"}))


def test_each_of_the_rates_to_use_is_said_to_fall_or_not():
    def falls(record):
        if record["config"]["learning_rate"] == 2e-4:
            for row in record["history"]:
                if "eval/loss" in row and row["train/global_step"] > 0:
                    row["eval/loss"] += 0.001 * (100 - row["train/global_step"])

    found = analyse({2e-4: "good", 1e-3: "good"}, change=falls)
    fell = dict(zip([found["advice"]["rate"], *found["advice"]["tied"]], found["advice"]["falling"], strict=True))
    assert fell[2e-4] == pytest.approx(0.025, abs=0.01) and abs(fell[1e-3]) < 0.01
    assert re.search(
        r"\(2\.\d\d; 1e-3 flat, 2e-4 still falling by 0\.0\d over the last quarter\)", headline.answer(found)
    )


def test_where_the_rest_gains_nothing_it_says_to_stop():
    found = analyse({2e-4: "good"})
    advice = found["advice"] | {"stop": False, "low": 2.68, "end": 2.71, "low_step": 60, "falling": [-0.02]}
    words = headline.when(found, advice | {"rise": {"mean": 0.03, "interval": [-0.002, 0.062]}})
    assert words == ", and stop at step 60 of 100: the rest gains nothing (2.68 and 2.71, not told apart)"
    for passes, said in (
        (None, "and stop at step 60 of 100 ("),
        (0.4, "and stop at step 60 of 100 ("),
        (0.95, "for about one pass over the data ("),
        (1.05, "for about one pass over the data ("),
        (1.2, "for about 1.2 passes over the data ("),
        (2.0, "for about 2.0 passes over the data ("),
    ):
        assert headline.when(found, advice | {"stop": True, "low_passes": passes}).startswith(f", {said}")


def test_a_best_rate_at_the_edge_is_said_to_be():
    assert "2e-4 is the highest rate that was run: a higher one may be better." in headline.answer(
        analyse({1e-5: "slow", 2e-4: "good"})
    )
    text = headline.answer(analyse({2e-4: "good", 1e-3: "suboptimal"}))
    assert "2e-4 is the lowest rate that was run: a lower one may be better." in text
    inside = analyse({1e-5: "slow", 2e-4: "good", 1e-3: "suboptimal"})
    assert "may be better" not in headline.answer(inside) + headline.answer(analyse({2e-4: "good"}))


def test_a_rate_that_a_fault_cut_off_did_not_end():
    found = analyse({2e-4: "good", 5e-3: "harmed"})
    assert {row["cut_off"] for row in found["rates"]} == {None}
    found["rates"][1]["cut_off"] = 53
    assert "5e-3 was worse than untrained when cut off at step 53 (" in headline.answer(found)


def test_rates_that_are_not_told_apart_are_named_together():
    text = headline.answer(analyse({2e-4: "good", 1e-3: "good"}))
    assert re.match(r"\*\*Of two rates use (2e-4 or 1e-3|1e-3 or 2e-4), ", text) and "than matters here" in text
    assert tables.winner(analyse({2e-4: "good", 1e-3: "good"})) is None


def test_a_rate_to_use_that_was_unstable_is_said_to_be():
    text = headline.answer(analyse({2e-4: "good", 1e-3: "spike"}, change=even))
    assert "1e-3 was unstable in 3 of 3 runs: prefer 2e-4." in text
    assert "1e-3 was unstable in 3 of 3 runs." in headline.answer(analyse({1e-3: "spike"}))
    assert "unstable" not in headline.answer(analyse({2e-4: "good", 1e-3: "good"}))


def test_what_the_seeds_leave_open_is_said_once():
    found = analyse({2e-4: "good", 5e-4: "suboptimal", 1e-3: "suboptimal"}, 2)
    for row in found["rates"][1:]:
        row["basin"]["verdict"] = "undecided"
    text = headline.answer(found)
    assert re.search(r"Higher: 5e-4 costs 0\.\d\d \(95 % \[.*?\]\); 1e-3 costs", text)
    assert re.search(r"Two seeds do not settle whether 5e-4 and 1e-3 cost more than matters \(0\.\d{3}\)\.$", text)
    found["rates"][1]["final_eval"]["n"] = 1
    assert "At 5e-4 and 1e-3 one to two seeds do not settle whether they cost more than matters" in headline.answer(
        found
    )
    assert ", mean of 1 to 2 seeds over " in headline.basis(found)


def test_a_seed_that_crashed_settles_nothing():
    found = analyse({2e-4: "good", 1e-3: "suboptimal"}, change=lambda x: x["config"]["seed"] == 2 and crash(x))
    assert "mean of 2 seeds over" in headline.basis(found)
    assert "Two seeds do not settle whether 1e-3 costs more" in headline.answer(found)


def test_a_setting_under_which_another_rate_is_best_is_said_at_once():
    found = analyse({2e-4: "good", 1e-3: "suboptimal"}, change=even)
    one = {"diverged": 0, "main_gain": 1.0}
    means = {2e-4: (3.2, 3.0), 1e-3: (3.1, 3.1)}
    points = [
        one | {"learning_rate": rate, "final_eval": {"mean": own}, "main_final_eval": {"mean": main}}
        for rate, (own, main) in means.items()
    ]
    found["controls"] = [{"differs": {"lr_scheduler_type": "cosine"}, "points": points}]
    said = "With lr_scheduler_type = cosine 1e-3 ends lower than 2e-4 (3.100 against 3.200)."
    assert said in headline.answer(found)
    points[1]["final_eval"]["mean"] = 3.19  # by less than the margin
    assert "cosine" not in headline.answer(found)


def test_of_many_rates_the_next_and_the_outermost_are_priced():
    many = {10 ** (-5.5 + 0.25 * i): kind for i, kind in enumerate(["slow"] * 6 + ["good"] + ["suboptimal"] * 5)}
    text = headline.answer(analyse(many, change=even))
    assert text.startswith("**Of twelve rates use 1e-4") and text.count("costs") == 4


def test_what_cannot_be_used_is_said_with_what_came_nearest():
    found = analyse({2e-4: "good", 1e-3: "suboptimal"})
    said = headline.answer(found | {"base_loss": 2.0})
    assert re.fullmatch(
        r"No rate improved on the untrained model \(2\.000\): the least harmful, 2e-4, ended at 2\.\d{3}\.", said
    )
    said = headline.answer(found | {"advice": None})
    assert re.match(
        r"2e-4 has the lowest final eval loss, 2\.\d\d, but no evaluation after step 0 says when to stop", said
    )
    guides = {
        "rows": [{"compared": False, "diverged": 1, "name": "A"}, {"compared": False, "diverged": 0, "name": "B"}]
    }
    assert (
        headline.guides({"guides": guides}) == "No guide's runs have ended and can be compared. With A runs diverged."
    )


def test_one_rate_is_used_without_a_comparison():
    text = headline.answer(analyse({2e-4: "good"}))
    assert text.startswith("**Only 2e-4 was run, so nothing says whether another rate is better. Use it, for all 100")
    assert "costs" not in text


@pytest.mark.parametrize("rates", [{1e-4: "slow", 5e-4: "good"}, {1e-4: "suboptimal", 5e-4: "good", 2e-3: "spike"}])
def test_rates_of_ones_own_with_two_seeds_read_well(tmp_path, rates):
    found = analyse(rates, 2)
    text = page(found, tmp_path)
    assert "Hypotheses" not in text and "not tested" not in text.lower().replace("not tested: no run at 2e-4", "")
    sentences = [line for line in text.split("## Every run")[0].splitlines() if not line.startswith(("   - ", "<pre>"))]
    assert not [line for line in sentences if re.search(r"\bNone\b(?!:)|\bnan\b|[{}]|\S  ", line)]
    assert f"Of {'two' if len(rates) == 2 else 'three'} rates use 5e-4" in text


def test_one_seed_bolds_no_winner_and_says_what_it_does_not_know(tmp_path):
    found = analyse(seeds=1)
    assert headline.answer(found).endswith("One seed: how much seeds vary is unknown.")
    assert "**" not in headline.answer(found) and tables.winner(found) is None
    assert "the intervals cover 40 examples, not seeds" in page(found, tmp_path)
    told = analyse(change=even)
    assert tables.winner(told) == 2e-4 and "| **2e-4** |" in page(told, tmp_path)


def test_one_seed_of_the_best_rate_beside_several_of_others_is_not_one_seed_in_all(tmp_path):
    def alone(record):
        if record["config"]["learning_rate"] == 2e-4 and record["config"]["seed"] > 0:
            crash(record)

    found = analyse({1e-5: "suboptimal", 2e-4: "good", 1e-3: "suboptimal"}, change=alone)
    assert headline.answer(found).endswith(" Of 2e-4 only one seed has ended.")
    own = next(row["final_eval"] for row in found["rates"] if row["learning_rate"] == 2e-4)["level"]
    assert found["advice"]["end"] == own["mean"]  # the end of the curve whose lowest point says when to stop
    assert (
        questions.lowest(found).startswith(f"2e-4: final eval loss {own['mean']:.3f}, ")
        and own["mean"] != found["best_loss"]
    )
    text = page(found, tmp_path)
    assert "One seed:" not in text and "seeds vary is unknown" not in text and "several seeds, standard dev" in text


def test_the_seed_documents_hypotheses_flip():
    as_predicted = verdicts(analyse({1e-5: "slow", 2e-4: "good", 1e-3: "good", 5e-3: "stopped"}))
    assert (as_predicted["H1"], as_predicted["H2"], as_predicted["H4"]) == ("confirmed", "confirmed", "confirmed")
    assert as_predicted["H3b"] == "refuted"
    flipped = verdicts(analyse({1e-5: "good", 2e-4: "plateaued", 1e-3: "spike", 5e-3: "good"}))
    assert (flipped["H1"], flipped["H2"], flipped["H4"]) == ("refuted", "refuted", "refuted")
    assert flipped["H3b"] == "confirmed"
    assert verdicts(analyse({2e-4: "slow", 1e-3: "good"}))["H3a"] == "confirmed"
    assert verdicts(analyse({2e-4: "good", 1e-3: "slow"}))["H3a"] == "refuted"


def test_hypotheses_that_no_run_can_judge_are_hidden():
    assert verdicts(analyse({3e-4: "good", 6e-4: "good"})) == {}
    assert set(verdicts(analyse({2e-4: "good", 6e-4: "good"}))) == {"H2"}


def test_a_share_of_three_seeds_says_that_it_is_of_these():
    found = {h["name"]: h for h in analyse()["hypotheses"]}
    share = "over other seeds the share may be 0.44 to 1.00, so less than half is not excluded"
    assert found["H4"]["evidence"] == f"diverged in 3 of these 3 seeds; {share}"
    assert found["H3b"]["evidence"].endswith("may be 0.00 to 0.56, so half is not excluded")


def test_a_good_rate_that_overfits_is_good_and_its_price_is_printed():
    """H2 asks for stability and the lowest end; the rebound is its price and not its refutation."""
    found = {h["name"]: h for h in analyse({2e-4: "two epochs", 1e-5: "slow"})["hypotheses"]}
    assert found["H2"]["verdict"] == "confirmed"
    assert re.search(r"its end lies 0\.\d{3} above its best checkpoints", found["H2"]["evidence"])


def test_the_question_on_2e4_flips():
    assert questions.standard(analyse()).startswith("Yes, within what matters: it has the lowest mean")
    assert questions.standard(analyse({2e-4: "suboptimal", 1e-3: "good"})).startswith("No: its mean is")
    assert questions.standard(analyse({2e-4: "stopped", 1e-3: "good"})).startswith("No: 3 of 3 runs diverged")
    assert questions.standard(analyse({1e-4: "good", 1e-3: "good"})).startswith("Not tested")


def test_the_question_on_instability_flips():
    assert "3 diverged and none was unstable" in questions.instability(analyse())
    assert questions.instability(analyse({2e-4: "good"})) == "No: of 3 runs none diverged and none was unstable."


def test_of_many_troubled_runs_the_first_are_named():
    shown = questions.SHOWN_RUNS
    for seeds, more in ((shown, None), (shown + 2, "   - and 2 more, in the table of every run.")):
        lines = questions.instability(analyse({5e-3: "stopped"}, seeds)).splitlines()
        assert len(lines) == 1 + shown + (more is not None) and (more is None or lines[-1] == more)


CONTROL = {
    "learning_rate": 2e-4, "diverged": 0, "main_gain": 0.75, "main_at_its_size": None, "final_eval": {"mean": None},
    "main_final_eval": {"mean": None},
}  # fmt: skip
MAIN = {"basin": {"width": 0.03}, "base_loss": 4.0, "best_loss": 3.0}


@pytest.mark.parametrize(
    ("mean", "interval", "said"),
    [
        (0.029, [0.010, 0.031], "its effect is not told from one that does not matter (+0.029 [+0.010, +0.031])"),
        (0.029, [-0.031, 0.029], "its effect is not told from one that does not matter (+0.029 [-0.031, +0.029])"),
        (0.029, [0.028, 0.030], "its effect does not matter (+0.029)"),
        (-0.029, None, "its effect does not matter (-0.029)"),
        (0.03, [0.01, 0.05], "it costs 0.030, 4 % of what that rate gains"),
        (0.03, None, "it costs 0.030, 4 % of what that rate gains"),
        (0.03, [0.0, 0.06], "it costs 0.030, 4 % of what that rate gains, not told from nothing"),
        (-0.03, [-0.05, -0.01], "it gains 0.030"),
        (-0.03, [-0.06, 0.0], "it gains 0.030, not told from nothing"),
    ],
)
def test_what_a_control_costs_is_told_from_nothing_and_from_what_matters(mean, interval, said):
    point = CONTROL | {"difference": {"mean": mean, "interval": interval}}
    assert report.control(MAIN, {"points": [point]}) == f"beside the main grid: at 2e-4 {said}."
    if said.startswith("it costs"):
        for unknown in (MAIN | {"base_loss": 2.9}, MAIN | {"base_loss": None}):
            assert "of what that rate gains" not in report.control(unknown, {"points": [point]})


def test_what_a_control_leaves_open_and_how_it_moves_the_best_rate():
    alone = [CONTROL | {"difference": None, "diverged": n} for n in (0, 1)]
    assert report.control(MAIN | {"basin": None}, {"points": alone}) == (
        "beside the main grid: at 2e-4 it has no run that ended beside one of the main grid; at 2e-4 it diverged."
    )
    means = {2e-4: (3.10, 3.00), 1e-3: (3.04, 3.05)}
    points = [
        CONTROL
        | {"learning_rate": rate, "difference": None, "final_eval": {"mean": own}, "main_final_eval": {"mean": main}}
        for rate, (own, main) in means.items()
    ]
    moves = "It moves the best rate: of these 1e-3 is lowest with it, 2e-4 without"
    assert report.best_moves(MAIN, {"points": points}) == f" {moves}."
    lower = report.best_moves(MAIN | {"best_loss": 3.05}, {"points": points})
    assert lower == f" {moves}; 3.040 is also below the main grid's lowest, 3.050."
    assert report.best_moves(MAIN | {"basin": {"width": 0.051}}, {"points": points}) == ""
    assert report.best_moves(MAIN, {"points": [points[0], points[1] | {"diverged": 1}]}) == ""


def test_a_search_says_what_it_takes_and_whether_it_is_settled():
    rounds = [
        {"runs": 4, "device_seconds": 9.0},
        {"runs": 2, "device_seconds": 3.4},
        {"runs": 1, "device_seconds": None},
    ]
    found = {"rounds": rounds, "runs": 3, "rate": 1e-4, "why": "The budget ends.", "next": None}
    words = report.search({"search": found, "best_rate": 2e-4})
    assert words.startswith("The grid's 4 runs were followed by a search")
    assert words.endswith(
        "the best: 3 runs in 2 rounds, 3 device seconds in training steps. It takes 1e-4, the lowest rate within a "
        "quarter of the margin of the best. It stopped: the budget ends."
    )
    found |= {"why": None, "next": "Is 5e-4 better?", "rate": 2e-4, "rounds": [rounds[0], rounds[2]], "runs": 1}
    words = report.search({"search": found, "best_rate": 2e-4})
    assert words.endswith("the best: 1 run in 1 round. It is not settled; next it would ask: Is 5e-4 better?")
    assert report.search({"search": None}) == ""


def test_the_question_on_speed_names_first_last_and_misses():
    text = questions.speed(analyse({1e-5: "slow", 2e-4: "good", 1e-3: "suboptimal"}))
    assert "was first to 80 %" in text and "1e-5 did not reach it in 100 steps" in text


def test_a_wide_grid_is_said_to_place_no_optimum():
    text = questions.standard(analyse())
    assert (
        "2e-4 is the best of three rates that ended; between 1e-5 and 2e-4 (20 ×)" in text and "nothing was run" in text
    )
    fine = questions.standard(analyse({1e-4: "suboptimal", 2e-4: "good", 4e-4: "suboptimal"}))
    assert "nothing was run" not in fine


def test_a_diverged_rate_shows_its_last_finite_loss_and_is_not_imputed(tmp_path):
    found = analyse()
    row = next(line for line in page(found, tmp_path).splitlines() if line.startswith("| 5e-3 | 3 |"))
    assert "diverged 3/3" in row and re.search(r"\| \d\.\d{3} ± \d\.\d{3}, last finite, step \d+ \|", row)
    assert found["rates"][3]["final_eval"]["mean"] is None and found["rates"][3]["last_eval"]["n"] == 3


def test_the_passes_say_how_much_of_a_cost_a_second_pass_makes():
    kinds = {2e-4: "overfitting", 1e-3: "two epochs"}
    (first, second, *_) = report.passes(analyse(kinds, change=even))
    assert first == "The runs make 2.00 passes over the training examples; the first ends at step 50."
    assert re.match(
        r"2e-4 − 1e-3: [+-]0\.\d{3} after one pass \(step 50\), [+-]0\.\d{3} at the best checkpoints, \+0\.\d{3} at",
        second,
    )
    assert "of its cost at the end arises when examples are seen again" in second
    assert len(report.passes(analyse(kinds))) == 2  # seeds that vary widely: the cost is within the margin


def test_the_caption_explains_what_the_figure_has():
    lines, crosses, ends = (
        "Thin: one seed; bold: mean.",
        " Dashed: diverged",
        " Dotted vertical: a pass over the data ends.",
    )
    found = analyse({2e-4: "overfitting"}, 1)
    said = "Nats per answer token over 100 steps. One run a rate."
    assert report.caption(found) == said + ends
    for passes, rates in ((1.0, found["rates"]), (None, []), (0.9, [])):
        assert report.caption(found | {"data": found["data"] | {"passes": passes}, "rates": rates}) == said
    assert lines + ends in report.caption(found | {"rates": [found["rates"][0] | {"n": 2}]})
    assert crosses in report.caption(found | {"rates": [found["rates"][0] | {"diverged": 1}]})


def test_the_best_rate_by_budget_is_told():
    def head_start(record, last=20):
        if record["config"]["learning_rate"] == 1e-3:
            for row in record["history"]:
                if "eval/loss" in row and 0 < row["train/global_step"] <= last:
                    row["eval/loss"] = 2.5

    words = report.budget(analyse({2e-4: "good", 1e-3: "suboptimal"}, change=head_start))
    assert words.startswith("Best is 1e-3 from step 1, then 2e-4 from step") and "would choose too high" in words
    early = report.budget(analyse({2e-4: "good", 1e-3: "suboptimal"}, change=lambda record: head_start(record, 8)))
    assert early.startswith("Best is 1e-3 from step 1, then 2e-4") and "too high" not in early
    always = "2e-4 is best at every budget, or within the margin of the best."
    assert report.budget(analyse({2e-4: "good", 1e-3: "slow"})) == always


def crash(record):
    record["state"] = "crashed"
    record["history"] = [row for row in record["history"] if row["train/global_step"] < 42]


def test_a_crash_costs_no_rate_its_lead_and_is_no_miss():
    """One run of the best rate and the only one of the slowest crash before a step that the others reach."""

    def some(record):
        if (record["config"]["learning_rate"], record["config"]["seed"]) in ((2e-4, 1), (1e-5, 0), (1e-5, 1)):
            crash(record)

    found = analyse({1e-5: "slow", 2e-4: "good", 1e-3: "suboptimal"}, 2, some)
    assert report.budget(found) == "2e-4 is best at every budget, or within the margin of the best."
    assert "1e-5" not in questions.speed(found) and "2e-4 was first" in questions.speed(found)


def test_leads_within_the_margin_are_no_change_of_the_best_rate():
    found = analyse({2e-4: "good", 1e-3: "good"})
    rows = [(10, 2e-4, [2e-4]), (20, 1e-3, [2e-4, 1e-3]), (50, 2e-4, [2e-4, 1e-3]), (100, 2e-4, [2e-4])]
    found["budget"] = [{"step": step, "best_rate": best, "within": within} for step, best, within in rows]
    assert report.budget(found).startswith("2e-4 is best at every budget") and "too high" not in report.budget(found)


def test_the_untrained_models_sample_is_shown_where_it_is_recorded(tmp_path):
    def add(record):
        for sample in record["files"]["generations.json"]:
            sample["untrained"] = "def add"

    assert "| *untrained* | def add |" in page(analyse(seeds=1, change=add), tmp_path)
    assert "*untrained*" not in page(analyse(seeds=1), tmp_path)


def test_what_was_trained_on_and_its_price_are_told(tmp_path):
    text = page(analyse(seeds=1, train_examples=1737, train_tokens=54321), tmp_path)
    assert "1,737 training examples, 54,321 training tokens, 100 steps (0.90 passes)" in text
    assert "240 device seconds in training steps" in text
    assert "about 1,778 training examples" in page(analyse(seeds=1), tmp_path)
    assert "7 test rows are training rows too" in page(analyse(seeds=1, rows_in_both_splits=7), tmp_path)


def test_an_early_lead_says_how_often_it_ended_in_divergence():
    found = analyse({2e-4: "good", 1e-3: "suboptimal", 5e-3: "harmed"})
    for row in found["rates"][1:]:
        row["flags"] = {"crossed": 3}
    for diverged, told in ((3, "diverged"), (1, "diverged in 1 of 3 runs")):
        found["rates"][2]["diverged"] = diverged
        (lead,) = [words for words in report.insights(found) if words.startswith("Early lead")]
        assert f"1e-3 (ended outside the margin) and 5e-3 ({told}) led at some point" in lead


def test_the_modules_of_the_examples_are_told(tmp_path):
    def name(record):
        record["files"]["eval_nll.json"]["module"] = [f"m{i % 7}" for i in range(40)]

    text = page(analyse(change=name), tmp_path)
    assert "- The best rate is chosen by the eval examples that also tell its loss" in text
    assert "3 seeds and 7 modules." in text and "independent" not in text
    found = analyse(change=name)
    row = next(x for x in found["rates"] if x["difference"]["end"])
    row["difference"]["end"]["covers"] = "7 modules"
    assert "each by itself, over 3 seeds and 7 modules, or 7 modules where there is one seed." in report.legend(found)
    for count, row in enumerate(report.by_loss(found)[1:], 2):  # of one length, they stand in the order of the rates
        row["difference"]["end"]["covers"] = f"{count} seeds and 7 modules"
    assert "over 2 seeds and 7 modules, or 3 seeds and 7 modules." in report.legend(found)
    text = page(analyse(), tmp_path)
    assert (
        "No module column says which" in text and "(no module column groups them), so they may be too narrow." in text
    )
    assert "3 seeds and 40 examples; examples taken as independent (no module column), so perhaps too narrow." in text


def test_one_diverged_seed_makes_a_rate_infeasible_and_shows_the_others():
    def break_one(record):
        if record["id"] == "good-0.0002-1":
            record["summary"]["diverged_at_step"] = 99

    found = analyse(change=break_one)
    row = next(row for row in found["rates"] if row["learning_rate"] == 2e-4)
    assert row["diverged"] == 1 and row["basin"]["verdict"] == "out" and row["final_eval"]["n"] == 3
    assert found["best_rate"] == 1e-3


def test_runs_that_ended_are_counted_where_no_rate_can_be_valued():
    def break_one(record):
        if record["config"]["seed"] == 1:
            record["summary"]["diverged_at_step"] = 99

    found = analyse({2e-4: "good", 1e-3: "good"}, change=break_one)
    told = {h["name"]: h for h in found["hypotheses"]}
    assert told["H2"]["evidence"].startswith("diverged or unstable in 1 of 3 seeds")
    assert told["H3b"]["verdict"] == "refuted"
    assert any("(2e-4, finished) has no class: no rate whose runs all ended" in line for line in report.limits(found))


def test_nothing_ended_is_a_report(tmp_path):
    found = analyse({1e-5: "cut", 2e-4: "cut"}, 1)
    assert headline.answer(found) == "No run has reached its end, so no learning rate can be named: 2 runs (crashed)."
    assert "incomplete" in page(found, tmp_path)


def without_eval(record):
    record["history"] = [
        {key: value for key, value in row.items() if not key.startswith("eval/")} for row in record["history"]
    ]
    record["files"].pop("eval_nll.json", None)
    record["summary"] = {key: value for key, value in record["summary"].items() if "eval" not in key}


def test_finished_runs_without_an_eval_loss_are_said_to_be_so(tmp_path):
    found = analyse({2e-4: "good", 1e-3: "suboptimal"}, change=without_eval)
    why = "6 runs finished, but no eval loss was recorded: no rate can be named"
    assert headline.answer(found) == f"{why}."
    assert why in questions.lowest(found) and why in questions.standard(found) and why in report.insights(found)[0]
    text = page(found, tmp_path)
    assert "diverging" not in text and "reached" not in text


def test_without_an_evaluation_at_step_0_nothing_is_said_of_the_untrained_model():
    def unevaluated(record):
        record["history"] = [row for row in record["history"] if row["train/global_step"] > 0]

    found = analyse(change=unevaluated)
    assert questions.speed(found) == "Undefined: no eval loss at step 0, so there is no target to reach."
    assert "untrained" not in headline.basis(found)


def test_one_rate_is_told_to_have_nothing_to_compare():
    found = analyse({2e-4: "good"}, seeds=1)
    assert report.insights(found) == ["None: one rate has nothing to compare."]
    assert verdicts(found)["H2"] == "inconclusive" and tables.budget(found) is None


def test_all_diverged_is_a_report(tmp_path):
    found = analyse({1e-3: "stopped", 5e-3: "exploding"}, 1)
    assert headline.answer(found).startswith("No rate of this sweep can be used")
    assert "Does a rate below 1e-3 end?" in page(found, tmp_path)
    found = analyse({2e-4: "cut", 5e-3: "stopped"}, 1)
    assert headline.answer(found) == "No rate can be named yet: 5e-3 diverged, and 2e-4 reached no end."


def test_no_gain_is_a_report(tmp_path):
    def never_better(record):
        for row in record["history"]:
            if "eval/loss" in row:
                row["eval/loss"] = 4.2
        record["files"] = {}

    text = page(analyse({2e-4: "good", 1e-3: "good"}, 2, never_better), tmp_path)
    assert "No rate" in text and "Undefined: no rate ended without diverging" in text


NASTY = "<script>alert(1)</script> | `x` **b** [a](http://e.vil) ![i](//e.vil/i.png) <b\n# head\n$x$ @me _it_ ~~s~~"


def test_no_value_of_a_run_is_markup(tmp_path):
    def poison(record):
        record["name"] = record["state"] = NASTY
        record["id"] += NASTY
        keys = ("model_name_or_path", "dataset_name", "hardware", "lr_scheduler_type")
        record["config"] |= dict.fromkeys(keys, NASTY)
        record["config"]["versions"] = {NASTY: NASTY}
        record["summary"]["first_batch_hash"] = record["id"]
        record["files"]["generations.json"] = [{"prompt": NASTY, "reference": NASTY, "completion": NASTY}]

    found = analyse(seeds=2, change=poison)
    found["sweeps"][0] |= {"id": NASTY, "name": NASTY, "entity": NASTY, "state": NASTY}
    text = page(found, tmp_path)
    outside = re.sub(r"```bash\n.*?\n```", "", text, flags=re.S)
    assert outside.count("alert(1)") > 10
    for markup in ("<script", "<b", "](http", "](//", "**b**", "`x`", "\n# head", "$x$", "@me", "_it_", "~~s"):
        assert markup not in outside
    rows = [line for line in text.splitlines() if line.startswith(("| 1e-5 | 2 |", "| 2e-4 | 2 |", "| 1e-3 | 2 |"))]
    assert len(rows) == 3 and all(len(re.findall(r"(?<!\\)\|", line)) == 11 for line in rows)
    for block in re.findall(r"```bash\n(.*?)\n```", text, flags=re.S):
        assert "`" not in block and "\n# head" not in block


def test_escaping_leaves_plain_text_alone():
    plain = "constant_with_warmup: def f(a, b): return a + b  # 95 %".replace("  ", " ")
    assert escape({"k": [plain, 1, None]}) == {"k": [plain, 1, None]}


def test_missing_columns_shorten_the_report_and_break_nothing(tmp_path):
    def bare(record):
        record["history"] = [
            {k: v for k, v in row.items() if k in ("train/global_step", "train/loss", "eval/loss")}
            for row in record["history"]
        ]
        record["files"], record["summary"] = {}, {}
        record["config"] = {k: record["config"][k] for k in ("learning_rate", "max_steps")}

    text = page(analyse(seeds=1, change=bare), tmp_path)
    assert "do not record their adapted modules" in text and "No run recorded generated samples" in text
    assert "no interval" in text


def test_first_steps_are_those_of_the_runs_own_shapes():
    """d = 2048, r = 16, α = 32, weight std 0.02: 5e-5, 1e-3, 5e-3, 2.5e-2; an entry of A 1276, 64, 13, 2.6 steps."""
    shape = {"q_proj": {"count": 4, "d_in": 2048, "d_out": 2048, "weight_std": 0.02}}
    rows = analyse(seeds=1, adapted_modules=shape)["mechanism"]["rows"]
    assert [row["full_step"] for row in rows] == pytest.approx([5e-5, 1e-3, 5e-3, 2.5e-2], rel=0.05)
    assert [row["entry_steps"][0] for row in rows] == pytest.approx([1276, 64, 13, 2.6], rel=0.02)
    assert rows[0]["direction_steps"][0] == pytest.approx(1 / (3**0.5 * 2048 * 1e-5))


def test_what_the_sizes_mean_is_said_only_where_it_holds():
    shape = {"q_proj": {"count": 4, "d_in": 2048, "d_out": 2048, "weight_std": 0.02}}
    found = analyse(seeds=1, adapted_modules=shape)
    wanted = r"At 1e-5 single entries of A hardly move in 100 steps \(they need 1276\), but along .* it can turn within"
    assert re.search(wanted, "\n".join(report.why(found)))
    rows = found["mechanism"]["rows"]
    for row in rows:
        row |= {"step": 2, "ratio": 0.82, "first_move": True}
    same = "0.82 times the predicted, necessarily the same at every rate (nothing had moved before step 2): two noisy"
    assert same in report.why(found)[0]
    rows[0]["first_move"] = False
    assert "necessarily" not in report.why(found)[0]
    first, told = rows[0], lambda: "single entries" in "\n".join(report.why(found))
    for entry, direction, turns in ((501, 99, True), (500, 99, False), (501, 100, False)):  # of 100 steps
        first |= {"entry_steps": [1, entry], "direction_steps": [1, direction]}
        assert told() is turns
    rows[1] |= rows[0] | {"direction_steps": [1, 99], "learning_rate": rows[1]["learning_rate"]}
    first["direction_steps"] = [1, 99]
    assert "At 1e-5 and 2e-4 single entries of A hardly move in 100 steps (at 1e-5 they need" in report.why(found)[1]


@pytest.mark.parametrize(
    ("shares", "said"),
    [((0.0, 0.0, 0.0, 0.0), None), ((None, 0.0, 0.5, 1.0), "0 % (2e-4) to 100 % (5e-3)"), ((1.0,) * 4, "100 %")],
)
def test_clipping_is_told_from_the_least_to_the_most(shares, said):
    found = analyse(seeds=1, max_grad_norm=1.0)
    for rate, share in zip(found["rates"], shares, strict=True):
        rate["clipped"] = share
    told = [words for words in report.why(found | {"mechanism": {"rows": []}}) if words.startswith("Clipping")]
    assert [words.partition("gradient of ")[2].partition(" of the steps")[0] for words in told] == [said] * bool(said)


def test_a_gap_within_one_pass_is_no_memory():
    def last(rates):
        return next(line for line in report.insights(analyse(rates)) if line.startswith("Eval loss minus"))

    assert "no training example was seen twice" in last({2e-4: "good", 1e-3: "drifting"})
    assert "learned of the training examples alone" in last({2e-4: "two epochs", 1e-3: "overfitting"})
    same = report.insights(analyse({2e-4: "good", 1e-3: "suboptimal"}, change=even))
    assert same == ["Nothing beyond the answers above."]


def test_the_first_size_is_predicted_at_the_rates_that_were_logged():
    """A warm-up over 5 steps: at step 1 a fifth of the rate, so a fifth of a full step."""
    row = analyse({2e-4: "good"}, 1)["mechanism"]["rows"][0]
    assert row["step"] == 1 and row["predicted"] == pytest.approx(row["full_step"] / 5)


def test_the_seed_documents_headings_are_there(tmp_path):
    text = page(analyse(seeds=1), tmp_path)
    for words in (
        "# Learning Rate Exploration Experiment",
        "| Learning Rate |",
        "Final Train Loss",
        "Final Eval Loss",
        "Behavior",
        "**Which LR gave lowest final loss?**",
        "**Did any LRs diverge or show instability?**",
        "**How did convergence speed differ?**",
        "**Does 2e-4 appear optimal for this setup?**",
        "### Were Hypotheses Confirmed?",
        "### Key Insights",
        "### Follow-up Questions",
        "[QLoRA Concept](../../docs/concepts/qlora.md)",
    ):
        assert words in text


def test_a_repeated_run_is_listed_and_the_ended_one_counts(tmp_path):
    first, again = simulate.record("cut", 2e-4, examples=20), simulate.record("good", 2e-4, examples=20)
    again["created_at"] = "2026-01-02"
    simulate.write(tmp_path, [first, again], [simulate.sweep_of([2e-4], [0])])
    found = results(build(*load(tmp_path)))
    assert [row["excluded"] for row in found["runs"]] == ["repeated by run good-0.0002-0", None]
    assert "repeated by run" in page(found, tmp_path) and found["rates"][0]["n"] == 1
