"""The report: a sentence flips when its data flip, nothing of a run is markup, one seed claims no winner."""

import json
import re

import numpy as np
import pytest

from analysis import headline, report, tables
from analysis.files import to_json
from analysis.results import results
from analysis.runs import load, read_run
from analysis.study import build
from analysis.words import escape
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
    wanted = r"\*\*Of four rates use 2e-4, for all 100 steps \(2\.\d\d, flat over the last quarter\)\.\*\* "
    assert re.match(
        wanted + r"1e-3 costs 0\.0\d; 1e-5 costs 0\.\d\d, still falling; 5e-3 diverged in 3 of 3 runs\.", text
    )


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
    assert "5e-3 ends worse than untrained" in headline.answer(analyse({2e-4: "good", 5e-3: "harmed"}))


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


def test_a_best_rate_that_still_falls_is_said_to():
    assert "still falling:" in headline.answer(analyse({1e-5: "slow"}))


def test_rates_that_are_not_told_apart_are_named_together():
    text = headline.answer(analyse({2e-4: "good", 1e-3: "good"}))
    assert re.match(r"\*\*Of two rates use (2e-4 or 1e-3|1e-3 or 2e-4), ", text) and "than matters here" in text
    assert tables.winner(analyse({2e-4: "good", 1e-3: "good"})) is None


def test_of_many_rates_the_next_and_the_outermost_are_priced():
    many = {10 ** (-5.5 + 0.25 * i): kind for i, kind in enumerate(["slow"] * 6 + ["good"] + ["suboptimal"] * 5)}
    text = headline.answer(analyse(many, change=even))
    assert text.startswith("**Of twelve rates use 1e-4") and text.count("costs") == 4


def test_one_rate_is_used_without_a_comparison():
    text = headline.answer(analyse({2e-4: "good"}))
    assert text.startswith("**Only 2e-4 was run; use it, for all 100 steps") and "costs" not in text


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
    assert "in these 3 seeds; the share's 95 % [0.44, 1.00] contains the half" in found["H4"]["evidence"]


def test_a_good_rate_that_overfits_is_good_and_its_price_is_printed():
    """H2 asks for stability and the lowest end; the rebound is its price and not its refutation."""
    found = {h["name"]: h for h in analyse({2e-4: "two epochs", 1e-5: "slow"})["hypotheses"]}
    assert found["H2"]["verdict"] == "confirmed"
    assert re.search(r"its end lies 0\.\d{3} above its best checkpoints", found["H2"]["evidence"])


def test_the_question_on_2e4_flips():
    assert report.standard(analyse()).startswith("Yes, within what matters: it has the lowest mean")
    assert report.standard(analyse({2e-4: "suboptimal", 1e-3: "good"})).startswith("No: its mean is")
    assert report.standard(analyse({2e-4: "stopped", 1e-3: "good"})).startswith("No: 3 of 3 runs diverged")
    assert report.standard(analyse({1e-4: "good", 1e-3: "good"})).startswith("Not tested")


def test_the_question_on_instability_flips():
    assert "3 diverged and none was unstable" in report.instability(analyse())
    assert report.instability(analyse({2e-4: "good"})) == "No: of 3 runs none diverged and none was unstable."


def test_the_question_on_speed_names_first_last_and_misses():
    text = report.speed(analyse({1e-5: "slow", 2e-4: "good", 1e-3: "suboptimal"}))
    assert "was first to 80 %" in text and "1e-5 did not reach it in 100 steps" in text


def test_a_wide_grid_is_said_to_place_no_optimum():
    text = report.standard(analyse())
    assert (
        "2e-4 is the best of three rates that ended; between 1e-5 and 2e-4 (20 ×)" in text and "nothing was run" in text
    )
    fine = report.standard(analyse({1e-4: "suboptimal", 2e-4: "good", 4e-4: "suboptimal"}))
    assert "nothing was run" not in fine


def test_a_diverged_rate_shows_its_last_finite_loss_and_is_not_imputed(tmp_path):
    found = analyse()
    row = next(line for line in page(found, tmp_path).splitlines() if line.startswith("| 5e-3 | 3 |"))
    assert "diverged 3/3" in row and re.search(r"\| \d\.\d{3} ± \d\.\d{3}, last finite, step \d+ \|", row)
    assert found["rates"][3]["final_eval"]["mean"] is None and found["rates"][3]["last_eval"]["n"] == 3


def test_the_passes_say_how_much_of_a_cost_a_second_pass_makes():
    (first, second, *_) = report.passes(analyse({2e-4: "overfitting", 1e-3: "two epochs"}))
    assert first == "The runs make 2.00 passes over the training examples; the first ends at step 50."
    assert re.match(
        r"2e-4 − 1e-3: [+-]0\.\d{3} after one pass, [+-]0\.\d{3} at the best checkpoints, \+0\.\d{3} at", second
    )
    assert "of its cost at the end arises when examples are seen again" in second


def test_the_best_rate_by_budget_is_told():
    def head_start(record):
        if record["config"]["learning_rate"] == 1e-3:
            for row in record["history"]:
                if "eval/loss" in row and 0 < row["train/global_step"] <= 20:
                    row["eval/loss"] = 3.0

    words = report.budget(analyse({2e-4: "good", 1e-3: "suboptimal"}, change=head_start))
    assert words.startswith("1e-3 is best after 1 steps, then 2e-4 from step") and "would choose too high" in words
    assert report.budget(analyse({2e-4: "good", 1e-3: "slow"})) == "2e-4 is best at every budget."


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


def test_the_modules_of_the_examples_are_told(tmp_path):
    def name(record):
        record["files"]["eval_nll.json"]["module"] = [f"m{i % 7}" for i in range(40)]

    assert "3 seeds and 7 modules" in page(analyse(change=name), tmp_path)
    assert "do not say which module" in page(analyse(), tmp_path)


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
    assert headline.answer(found) == "No run has reached its end, so no learning rate can be named: 2 runs (crashed)."
    assert "incomplete" in page(found, tmp_path)


def test_all_diverged_is_a_report(tmp_path):
    found = analyse({1e-3: "stopped", 5e-3: "exploding"}, 1)
    assert headline.answer(found).startswith("No rate of this sweep can be used")
    assert "go left" in page(found, tmp_path)


def test_no_gain_is_a_report(tmp_path):
    def never_better(record):
        for row in record["history"]:
            if "eval/loss" in row:
                row["eval/loss"] = 4.2
        record["files"] = {}

    text = page(analyse({2e-4: "good", 1e-3: "good"}, 2, never_better), tmp_path)
    assert "No rate" in text and "Undefined: no rate improved" in text


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
