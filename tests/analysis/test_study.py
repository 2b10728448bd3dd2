"""Instrument checks fail loudly, follow-ups are ready to run, several sweeps merge."""

import copy
import math

import pytest
import yaml

from analysis import followups
from analysis.checks import checks
from analysis.results import results
from analysis.runs import read_run
from analysis.study import build
from tests.analysis import simulate


def records(rates=None, seeds=1, **options):
    rates = rates or simulate.SEED_RATES
    options = {"planned": 100, "examples": 20} | options
    return [simulate.record(kind, rate, seed, **options) for rate, kind in rates.items() for seed in range(seeds)]


def study(found, sweeps=None):
    rates = sorted({record["config"]["learning_rate"] for record in found})
    seeds = sorted({record["config"]["seed"] for record in found})
    return build(sweeps or [simulate.sweep_of(rates, seeds)], [read_run(copy.deepcopy(record)) for record in found])


def failed(found, sweeps=None):
    return {check["check"]: check["detail"] for check in checks(study(found, sweeps)) if check["passed"] is False}


def test_a_good_sweep_passes_every_check():
    assert [check["passed"] for check in checks(study(records()))] == [True] * 9


def shift_base(record):
    for row in record["history"]:
        if "eval/loss" in row and row["train/global_step"] == 0:
            row["eval/loss"] += 0.01


def halve_rate(record):
    for row in record["history"]:
        if "train/learning_rate" in row:
            row["train/learning_rate"] /= 2


@pytest.mark.parametrize(
    ("check", "words", "change"),
    [
        ("step-0 eval equal", "runs slow-1e-05-0, good-0.0002-0", shift_base),
        ("same first batch", "2 different first batches", lambda r: r["summary"].update(first_batch_hash="other")),
        ("peak rate = requested", "asked for 2e-4, its peak was 1e-4", halve_rate),
        ("adapters float32", "bfloat16", lambda r: r["config"].update(adapter_dtype="torch.bfloat16")),
        ("same recipe", "lora_r differs (16, 8)", lambda r: r["config"].update(lora_r=8)),
        ("eval loss = its examples", "its examples sum to", lambda r: r["files"]["eval_nll.json"]["nll"].reverse()),
        (
            "same eval examples",
            "2 different eval sets",
            lambda r: r["files"]["eval_nll.json"]["tokens"].__setitem__(0, 99),
        ),
    ],
)
def test_each_check_fails_on_its_own_fault(check, words, change):
    found = records()
    change(found[1])
    if check == "adapters float32":
        for record in found:
            change(record)
    result = failed(found)
    assert words in result[check] and set(result) <= {
        check,
        "no run missing",
        "rates = grid",
        "eval loss = its examples",
    }


def test_missing_and_unfinished_points_are_named():
    found = records({1e-5: "slow", 2e-4: "cut"})
    result = failed(found, [simulate.sweep_of([1e-5, 2e-4, 1e-3], [0])])
    assert result["rates = grid"] == "no run at 1e-3"
    assert "no run at 1e-3, seed 0" in result["no run missing"] and "crashed" in result["no run missing"]


def test_a_rate_outside_the_grid_is_named():
    assert failed(records(), [simulate.sweep_of([1e-5, 2e-4, 1e-3], [0])])["rates = grid"] == "5e-3 is not in the grid"


def test_a_random_sweep_has_no_grid_to_miss():
    sweep = simulate.sweep_of([1e-5], [0])
    sweep["config"] |= {"method": "random"}
    assert {c["check"]: c["passed"] for c in checks(study(records(), [sweep]))}["rates = grid"] is None


def test_follow_ups_are_whole_sweeps_whose_rates_read_back_as_floats():
    found = study(records())
    for follow in followups.follow_ups(found):
        back = yaml.safe_load(followups.to_yaml(follow["config"]))
        assert back == follow["config"]
        assert all(isinstance(rate, float) for rate in back["parameters"]["learning_rate"]["values"])
        assert back["program"] == "train.py" and "recipes/starter.yaml" in back["command"] and back["method"] == "grid"
        assert set(back["parameters"]) <= {
            "learning_rate",
            "seed",
            "lora_alpha",
            "warmup_steps",
            "gradient_accumulation_steps",
            "max_steps",
        }


def names(rates, **options):
    return {follow["name"] for follow in followups.follow_ups(study(records(rates, **options)))}


def test_follow_ups_are_triggered_by_the_data():
    assert "warmup" in names({2e-4: "good", 5e-3: "harmed"}) and "warmup" not in names({2e-4: "good", 5e-3: "stopped"})
    assert "batch_size" in names({2e-4: "good", 1e-3: "spike"}) and "batch_size" not in names({2e-4: "good"})
    assert "steps" in names({1e-5: "slow", 2e-4: "good"}) and "steps" not in names({2e-4: "good"})
    assert "seeds" in names({2e-4: "good"}, seeds=2) and "seeds" not in names({2e-4: "good"}, seeds=3)


@pytest.mark.parametrize(
    ("rates", "grid"),
    [
        ({1e-5: "slow", 2e-4: "good", 1e-3: "suboptimal", 5e-3: "stopped"}, [2e-5, 6.3e-5, 6.3e-4]),
        ({1e-3: "stopped", 5e-3: "stopped"}, [1e-5, 3.2e-5, 1e-4, 3.2e-4]),
        ({2e-4: "good", 1e-3: "suboptimal"}, [2e-5, 6.3e-5, 6.3e-4]),
        ({1e-4: "suboptimal", 3.2e-4: "good", 1e-3: "suboptimal"}, [1.8e-4, 5.7e-4]),
        ({2e-4: "suboptimal", 1e-3: "good", 2e-3: "stopped"}, [3.2e-4]),
        ({2e-4: "cut"}, []),
    ],
)
def test_the_refinement_grid(rates, grid):
    assert followups.refinement_grid(study(records(rates)))[0] == grid


def test_two_sweeps_merge_into_one_study():
    first, second = records(), records({6.3e-5: "suboptimal", 6.3e-4: "good"}, sweep="sw2")
    sweeps = [simulate.sweep_of(list(simulate.SEED_RATES), [0]), simulate.sweep_of([6.3e-5, 6.3e-4], [0], "sw2")]
    found = results(study(first + second, sweeps))
    assert len(found["rates"]) == 6 and not [c for c in found["checks"] if c["passed"] is False]
    assert {row["sweep"] for row in found["runs"]} == {"sw1", "sw2"}


def test_sweeps_of_other_recipes_are_named_and_not_compared():
    other = records({6.3e-4: "good"}, sweep="sw2", lora_alpha=64)
    found = results(study(records() + other))
    assert found["differing"] == {"lora_alpha": [32, 64]}
    assert [row["excluded"] for row in found["runs"] if row["sweep"] == "sw2"] == ["another recipe: lora_alpha = 64"]
    assert next(c for c in found["checks"] if c["check"] == "same recipe")["passed"] is False


def test_flags():
    rows = {row["learning_rate"]: row for row in results(study(records({2e-4: "good", 1e-3: "overfitting"})))["rates"]}
    assert "edge of the feasible range" in rows[2e-4]["flags"]
    assert all("clip-bound" in row["flags"] for row in rows.values())


def test_a_share_of_one_run_has_a_wide_interval():
    found = {h["name"]: h for h in results(study(records()))["hypotheses"]}
    assert found["H4"]["verdict"] == "confirmed" and found["H4"]["interval"][0] < 0.25
    assert not any(isinstance(h.get("value"), float) and math.isnan(h["value"]) for h in found.values())


def test_the_alpha_follow_up_is_answered():
    """The best rate halves when α doubles: the report shows it by α."""
    low = records({1e-4: "suboptimal", 2e-4: "suboptimal", 4e-4: "good"}, lora_alpha=16)
    high = records({1e-4: "good", 2e-4: "suboptimal", 4e-4: "suboptimal"}, lora_alpha=64)
    rows = results(study(low + high))["by_setting"]["lora_alpha"]
    assert [(row["value"], row["best_rate"], row["n"]) for row in rows] == [(16, 4e-4, 1), (64, 1e-4, 1)]
    assert [row["alpha_rate"] for row in rows] == [6.4e-3, 6.4e-3]
