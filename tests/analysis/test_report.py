"""The report: a sentence flips when its data flip, nothing of a run is markup, one seed claims no winner."""

import json
import re

import pytest

from analysis import report
from analysis.files import to_json
from analysis.results import results
from analysis.runs import load, read_run
from analysis.study import build
from analysis.wording import escape
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


def page(found, tmp_path):
    return report.render(found, tmp_path, [])


def verdicts(found):
    return {h["name"]: h["verdict"] for h in found["hypotheses"]}


def test_the_answer_names_the_best_rate_with_interval_and_n():
    text = report.answer(analyse())
    assert re.match(
        r"\*\*2e-4 has the lowest final eval loss: 2\.\d{3} nats per token \(95 % \[.+\], n = 3 seeds\)\*\*", text
    )


def test_the_answer_flips_with_the_data():
    assert report.answer(analyse({2e-4: "suboptimal", 1e-3: "good"})).startswith("**1e-3 has the lowest")
    assert report.answer(analyse({2e-4: "good", 1e-3: "suboptimal"})).startswith("**2e-4 has the lowest")


def test_rates_inside_the_basin_are_no_clear_answer():
    text = report.answer(analyse({2e-4: "good", 1e-3: "good"}))
    assert "but not clearly" in text and "**" not in text


def test_one_seed_bolds_no_winner_and_says_what_it_does_not_know(tmp_path):
    found = analyse(seeds=1)
    assert report.answer(found).endswith("One seed: seed variance unknown.") and "**" not in report.answer(found)
    assert "**2e-4**" not in report.table(found)
    assert "Seed variance unknown" in page(found, tmp_path) and "40 eval examples, not seeds" in page(found, tmp_path)
    assert "**2e-4**" in report.table(analyse(seeds=3))


def test_the_seed_documents_hypotheses_flip():
    as_predicted = verdicts(analyse({1e-5: "slow", 2e-4: "good", 1e-3: "good", 5e-3: "stopped"}))
    assert (as_predicted["H1"], as_predicted["H2"], as_predicted["H4"]) == ("confirmed", "confirmed", "confirmed")
    assert as_predicted["H3b"] == "refuted"
    flipped = verdicts(analyse({1e-5: "good", 2e-4: "plateaued", 1e-3: "spike", 5e-3: "good"}))
    assert (flipped["H1"], flipped["H2"], flipped["H4"]) == ("refuted", "refuted", "refuted")
    assert flipped["H3b"] == "confirmed"
    assert verdicts(analyse({2e-4: "slow", 1e-3: "good"}))["H3a"] == "confirmed"
    assert verdicts(analyse({2e-4: "good", 1e-3: "slow"}))["H3a"] == "refuted"


def test_untested_hypotheses_say_so():
    assert set(verdicts(analyse({3e-4: "good", 6e-4: "good"})).values()) == {"not tested"}


def test_the_question_on_2e4_flips():
    assert report.standard(analyse()).startswith("Yes, within what matters: it has the lowest mean")
    assert report.standard(analyse({2e-4: "suboptimal", 1e-3: "good"})).startswith("No: its mean is")
    assert report.standard(analyse({2e-4: "stopped", 1e-3: "good"})).startswith("No: 3 of 3 runs diverged")
    assert report.standard(analyse({1e-4: "good", 1e-3: "good"})).startswith("Not tested")


def test_the_question_on_instability_flips():
    assert "3 diverged and 0 were unstable" in report.instability(analyse())
    assert report.instability(analyse({2e-4: "good"})) == "No: of 3 runs none diverged and none was unstable."


def test_the_question_on_speed_names_first_last_and_misses():
    text = report.speed(analyse({1e-5: "slow", 2e-4: "good", 1e-3: "suboptimal"}))
    assert "was first to 80 %" in text and "1e-5 did not reach it in 100 steps" in text


def test_a_wide_grid_is_said_to_place_no_optimum():
    assert "20× below and 5× above 2e-4) are too wide" in report.standard(analyse())
    fine = analyse({1e-4: "suboptimal", 2e-4: "good", 4e-4: "suboptimal"})
    assert "too wide" not in report.standard(fine)


def test_a_diverged_rate_is_in_the_table_and_not_imputed():
    found = analyse()
    row = next(line for line in report.table(found).splitlines() if line.startswith("| 5e-3"))
    assert "diverged 3/3" in row and row.count("—") == 4
    assert found["rates"][3]["final_eval"] == {"mean": None, "sd": None, "n": 0}


def test_one_diverged_seed_makes_a_rate_infeasible_and_shows_the_others():
    def break_one(record):
        if record["id"] == "good-0.0002-1":
            record["summary"]["diverged_at_step"] = 99

    found = analyse(change=break_one)
    row = next(row for row in found["rates"] if row["learning_rate"] == 2e-4)
    assert row["diverged"] == 1 and row["basin"]["verdict"] == "out" and row["final_eval"]["n"] == 3
    assert found["best_rate"] == 1e-3


def test_nothing_ended_is_a_report(tmp_path):
    found = analyse({1e-5: "cut", 2e-4: "cut"}, 1)
    assert report.answer(found) == "No run has reached its end, so no learning rate can be named: 2 runs (crashed)."
    assert "incomplete" in page(found, tmp_path)


def test_all_diverged_is_a_report(tmp_path):
    found = analyse({1e-3: "stopped", 5e-3: "exploding"}, 1)
    assert report.answer(found).startswith("No learning rate of this sweep is feasible")
    assert "go left" in page(found, tmp_path)


def test_no_gain_is_a_report(tmp_path):
    def never_better(record):
        for row in record["history"]:
            if "eval/loss" in row:
                row["eval/loss"] = 4.2
        record["files"] = {}

    text = page(analyse({2e-4: "good", 1e-3: "good"}, 2, never_better), tmp_path)
    assert "No learning rate of this sweep is feasible" in text and "Undefined: no rate improved" in text


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
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 10 for line in report.table(found).splitlines())
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


def test_seconds_and_tokens_are_those_of_the_crossing():
    found = analyse(seeds=1)
    run = next(row for row in found["runs"] if row["learning_rate"] == 2e-4)
    at = run["convergence"]["0.8"]
    assert at["seconds"] == pytest.approx(0.25 * at["steps"]) and at["tokens"] == pytest.approx(900 * at["steps"])


def test_first_steps_are_those_of_the_runs_own_shapes():
    """science: d = 2048, r = 16, α = 32, weight std 0.02: 5e-5, 1e-3, 5e-3, 2.5e-2, and 1276, 64, 13, 2.6 steps."""
    shape = {"q_proj": {"count": 4, "d_in": 2048, "d_out": 2048, "weight_std": 0.02}}
    rows = analyse(seeds=1, adapted_modules=shape)["mechanism"]["rows"]
    assert [row["first_step"] for row in rows] == pytest.approx([5e-5, 1e-3, 5e-3, 2.5e-2], rel=0.05)
    assert [row["a_steps"][0] for row in rows] == pytest.approx([1276, 64, 13, 2.6], rel=0.02)


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
