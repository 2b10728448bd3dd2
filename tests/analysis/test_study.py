"""Instrument checks fail loudly, follow-ups are ready to run, several sweeps merge."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis import followups, headline, report, sweep, tables
from analysis.checks import checks, grid, members
from analysis.controls import at_the_size
from analysis.results import results
from analysis.runs import Series, read_run
from analysis.study import build, fell, led_early
from tests.analysis import simulate


def records(rates=None, seeds=1, **options):
    rates = rates or simulate.SEED_RATES
    options = {"planned": 100, "examples": 20} | options
    return [simulate.record(kind, rate, seed, **options) for rate, kind in rates.items() for seed in range(seeds)]


def study(found, sweeps=None):
    rates = sorted({record["config"]["learning_rate"] for record in found})
    seeds = sorted({record["config"]["seed"] for record in found})
    return build(sweeps or [simulate.sweep_of(rates, seeds)], [read_run(copy.deepcopy(record)) for record in found])


def test_two_rates_are_enough_to_compare():
    rows = [row for rates in ({2e-4: "good"}, {2e-4: "good", 1e-3: "good"}) for row in study(records(rates)).rows]
    assert [row.excess_interval is None for row in rows] == [True, False, False]


def failed(found, sweeps=None):
    return {check["check"]: check["detail"] for check in checks(study(found, sweeps)) if check["passed"] is False}


def test_a_good_sweep_passes_every_check():
    assert [check["passed"] for check in checks(study(records()))] == [None, *[True] * 9]


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
        ("same recipe", "lora_r differ between runs", lambda r: r["config"].update(lora_r=8)),
        ("eval loss = its examples", "its examples sum to", lambda r: r["files"]["eval_nll.json"]["nll"].reverse()),
        (
            "same eval examples",
            "2 different eval sets",
            lambda r: r["files"]["eval_nll.json"]["tokens"].__setitem__(0, 99),
        ),
        ("same eval examples", "has finished without its eval_nll.json", lambda r: r["files"].pop("eval_nll.json")),
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


def test_what_passes_says_of_how_many():
    passed = {check["check"]: check["detail"] for check in checks(study(records(gang="a", gang_size=4)))}
    assert passed == {
        "not finite alone": "in 1 gang",
        "rates = grid": "4 rates run, 4 in the grid",
        "no run missing": "4 of 4 points reached an end",
        "step-0 eval equal": "untrained loss between 4.2000 and 4.2000 over 4 runs",
        "same first batch": "one first batch in each of 1 seed",
        "peak rate = requested": "in 4 runs",
        "adapters float32": "in 4 runs",
        "same recipe": "every setting agrees over all runs",
        "same eval examples": "20 examples in all runs",
        "eval loss = its examples": "nats per token over the examples, in 3 runs",
    }


@pytest.mark.parametrize(("moved", "passed"), [(0.00099, True), (0.00101, False), (-0.00101, False)])
def test_what_the_instruments_may_differ_by(moved, passed):
    def base(record):
        for row in record["history"]:
            if "eval/loss" in row and row["train/global_step"] == 0:
                row["eval/loss"] += moved

    def peak(record):
        for row in record["history"]:
            if "train/learning_rate" in row:
                row["train/learning_rate"] *= 1 + moved

    def end(record):
        nll = record["files"]["eval_nll.json"]
        nll["nll"][-1] = [loss + moved * tokens for loss, tokens in zip(nll["nll"][-1], nll["tokens"], strict=True)]

    for change, name in (
        (base, "step-0 eval equal"),
        (peak, "peak rate = requested"),
        (end, "eval loss = its examples"),
    ):
        found = records()
        change(found[1])
        assert {check["check"]: check["passed"] for check in checks(study(found))}[name] is passed


def test_a_peak_is_looked_for_where_the_warm_up_is_over():
    found = records({2e-4: "good"})
    for warmup, checked in ((99, None), (98, False), (0, False)):  # of 100 steps
        found[0]["config"] |= {"warmup_steps": warmup, "learning_rate": 4e-4}
        assert {check["check"]: check["passed"] for check in checks(study(found))}["peak rate = requested"] is checked


def test_missing_and_unfinished_points_are_named():
    found = records({1e-5: "slow", 2e-4: "cut"})
    result = failed(found, [simulate.sweep_of([1e-5, 2e-4, 1e-3], [0])])
    assert result["rates = grid"] == "no run at 1e-3"
    assert "no run at 1e-3, seed 0" in result["no run missing"] and "crashed" in result["no run missing"]


def test_a_rate_outside_the_grid_is_named():
    assert failed(records(), [simulate.sweep_of([1e-5, 2e-4, 1e-3], [0])])["rates = grid"] == "5e-3 is not in the grid"


def test_the_grid_is_in_order():
    sweep = simulate.sweep_of([2e-4, 1e-5], [9, 3, 14, 0, 5, 0.5])
    found = study(records(), [sweep, simulate.sweep_of([1e-5], [], "sw2", seed={"value": None})])
    assert grid(found) == [(1e-5, None), *((rate, seed) for rate in (1e-5, 2e-4) for seed in (0, 0.5, 3, 5, 9, 14))]


def test_runs_without_a_sweep_file_have_no_grid_to_miss():
    (check,) = [c for c in checks(build([], [read_run(r) for r in records()])) if c["check"] == "rates = grid"]
    assert check["passed"] is None and check["detail"] == "no sweep file"


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


def forget_passes(record):
    for row in record["history"]:
        row.pop("train/epoch", None)


def names(rates, change=None, **options):
    return set(asked(rates, change, **options))


def asked(rates, change=None, **options):
    """The values of each follow-up's parameters, seeds apart that are as they were."""
    found = records(rates, **options)
    for record in found:
        if change:
            change(record)
    configs = {follow["name"]: follow["config"]["parameters"] for follow in followups.follow_ups(study(found))}
    return {
        name: {key: x["values"] for key, x in parameters.items() if (key, x) != ("seed", {"value": 0})}
        for name, parameters in configs.items()
    }


def test_a_follow_up_changes_what_it_asks_about():
    slow, harmed = asked({1e-5: "slow", 2e-4: "good"}), asked({2e-4: "good", 5e-3: "harmed"})
    assert slow["seeds"] == {"learning_rate": [1e-5, 2e-4], "seed": [1, 2]}
    assert slow["steps"] == {"learning_rate": [1e-5, 2e-4], "max_steps": [200]}
    assert slow["alpha_rate"] == {"learning_rate": [1e-4, 2e-4, 4e-4], "lora_alpha": [16, 64]}
    assert harmed["warmup"] == {"learning_rate": [5e-3], "warmup_steps": [10, 20]}
    shaky = asked({2e-4: "good", 1e-3: "spike"}, forget_passes)
    assert shaky["batch_size"] == {"learning_rate": [2e-4, 1e-3], "gradient_accumulation_steps": [4]}


def test_the_seeds_that_a_rate_lacks_come_before_new_ones():
    def proposed(*left_out):
        found = records({1e-5: "slow", 2e-4: "good", 3e-4: "good", 4e-4: "good"}, seeds=3)
        found = [x for x in found if (x["config"]["learning_rate"], x["config"]["seed"]) not in left_out]
        by_name = {follow["name"]: follow for follow in followups.follow_ups(study(found))}
        return by_name.get("seeds")

    def grid(follow):
        parameters = follow["config"]["parameters"]
        return [parameters[key]["values"] for key in ("learning_rate", "seed")]

    one = proposed((3e-4, 1))
    assert grid(one) == [[3e-4], [1]] and one["why"] == "3e-4 has not ended with seed 1, as others have"
    some = (3e-4, 1), (3e-4, 2), (4e-4, 1), (4e-4, 2)
    assert grid(proposed(*some)) == [[3e-4, 4e-4], [1, 2]]
    assert "have not ended with seeds 1 and 2," in proposed(*some)["why"]
    assert grid(proposed(*some[:3])) == [[3e-4], [1, 2]]  # no run is proposed that was made
    assert grid(proposed(*((rate, 1) for rate in (1e-5, 2e-4, 3e-4, 4e-4)))) == [[1e-5, 2e-4, 3e-4, 4e-4], [1]]
    assert proposed((1e-5, 1)) is None  # it cannot be the best


def test_follow_ups_are_triggered_by_the_data():
    assert "warmup" in names({2e-4: "good", 5e-3: "harmed"}) and "warmup" not in names({2e-4: "good", 5e-3: "stopped"})
    assert "steps" in names({1e-5: "slow", 2e-4: "good"}) and "steps" not in names({2e-4: "good"})
    assert "seeds" in names({2e-4: "good"}, seeds=2) and "seeds" not in names({2e-4: "good"}, seeds=3)
    assert "batch_size" in names({2e-4: "good", 1e-3: "spike"}, forget_passes)
    assert "batch_size" not in names({2e-4: "good"}, forget_passes)


def test_no_follow_up_makes_more_than_two_passes_over_the_data():
    def two_passes(record):
        for row in record["history"]:
            if "train/epoch" in row:
                row["train/epoch"] *= 2

    assert "batch_size" not in names({2e-4: "good", 1e-3: "spike"})  # 4 × 0.9 passes
    assert "steps" not in names({1e-5: "slow", 2e-4: "good"}, two_passes)
    found = followups.follow_ups(study(records({1e-5: "slow", 2e-4: "good"})))
    assert "that makes 1.8 passes over the data" in next(f["why"] for f in found if f["name"] == "steps")


def test_a_follow_up_keeps_what_its_sweep_holds_constant():
    constants = {"lora_r": {"value": 8}, "lora_alpha": {"values": [16]}, "warmup_steps": {"values": [2, 3]}}
    found = records({2e-4: "good", 1e-3: "spike"}, 2, gradient_accumulation_steps=2, lora_alpha=16)
    for record in found:
        forget_passes(record)
    sweep = simulate.sweep_of([2e-4, 1e-3], [0, 1], **constants)
    other = simulate.sweep_of([2e-4], [0], "sw0", lora_r={"value": 4})
    follow = {f["name"]: f["config"]["parameters"] for f in followups.follow_ups(study(found, [other, sweep]))}
    assert follow["batch_size"] == {
        "learning_rate": {"values": [2e-4, 1e-3]}, "seed": {"values": [0, 1]}, "lora_r": {"value": 8},
        "lora_alpha": {"value": 16}, "gradient_accumulation_steps": {"values": [8]},
    }  # fmt: skip
    assert follow["seeds"]["seed"] == {"values": [2]} and follow["alpha_rate"]["lora_alpha"] == {"values": [8, 32]}


def test_two_sweeps_merge_into_one_study():
    first, second = records(), records({6.3e-5: "suboptimal", 6.3e-4: "good"}, sweep="sw2")
    sweeps = [simulate.sweep_of(list(simulate.SEED_RATES), [0]), simulate.sweep_of([6.3e-5, 6.3e-4], [0], "sw2")]
    found = results(study(first + second, sweeps))
    assert len(found["rates"]) == 6 and not [c for c in found["checks"] if c["passed"] is False]
    assert {row["sweep"] for row in found["runs"]} == {"sw1", "sw2"}


def command(sweep, *flags):
    sweep["config"]["command"] += flags
    return sweep


def test_what_no_sweep_sets_is_not_comparable_and_names_no_winner(tmp_path):
    other = records({2e-4: "good", 1e-3: "suboptimal"}, sweep="sw2", load_in_4bit=False)
    found = results(study(records(load_in_4bit=True) + other))
    assert found["not_comparable"] == ["load_in_4bit"] and found["side_by_side"] and not found["follow_ups"]
    assert [group["settings"] for group in found["groups"]] == [{"load_in_4bit": True}, {"load_in_4bit": False}]
    assert next(c for c in found["checks"] if c["check"] == "same recipe")["passed"] is False
    assert headline.answer(found).startswith("**Not comparable: load_in_4bit differs.**")
    assert tables.winner(found) is None
    assert report.render(found, tmp_path, []).splitlines()[2] == headline.answer(found)


def test_what_a_sweep_asks_for_and_sets_on_purpose():
    config = {"method": "grid", "parameters": {"learning_rate": {"values": ["1e-5", 2e-4, "fast"]}, "seed": 3}}
    assert sweep.points({"config": config}) == {(1e-5, 3.0), (2e-4, 3.0)}
    assert sweep.points({"config": config | {"parameters": {"learning_rate": {"value": 1e-4}}}}) == {(1e-4, None)}
    for other in (config | {"method": "random"}, config | {"parameters": {"seed": 3}}, None):
        assert sweep.points({"config": other}) is None
    command = ["${env}", "python", "--config", "r.yaml", "--lora_r=8", "--dtype", "x", 3]
    found = sweep.declared({"config": {"parameters": {"seed": 1}, "command": command}})
    assert found == {"seed", "lora_r", "dtype"} and sweep.declared({"config": None}) == set()
    assert sweep.declared({"config": {"command": "text"}}) == set()
    same = ([None, False, ""], [0, 0.0], [1, 1.0], [True], ["1"], [1.5], [{"a": 1, "b": 2}, {"b": 2, "a": 1}])
    tokens = [{sweep.token(value) for value in group} for group in same]
    assert {len(group) for group in tokens} == {1} and len(set().union(*tokens)) == len(same)
    assert sweep.values({"values": [1, None, 2]}) == [1, 2] and sweep.values(7) == [7] and sweep.values({}) == []
    assert sweep.values({"values": "text"}) == []
    assert sweep.asked_guides([{"config": {"parameters": {"guide": {"values": ["a", "b"]}}}}] * 2) == ["a", "b"]


class Curve(dict):
    """A run of 100 steps by its eval loss alone, at steps 0, 50 and 100."""

    planned_steps = 100

    def __init__(self, values):
        super().__init__({"eval/loss": Series(np.array([0, 50, 100]), np.array(values, float))})


def test_a_loss_at_the_size_is_taken_of_the_same_seed_and_where_it_was_reached():
    def run(seed, sizes, losses=(4, 3, 2)):
        steps = np.array([0, 50, 100])
        columns = {"eval/update_ratio": sizes, "eval/loss": losses}
        found = Curve(losses)
        found |= {name: Series(steps[: len(x)], np.array(x, float)) for name, x in columns.items()}
        found.seed = seed
        return found

    twins = [run(int("1000"), (0, 0.2, 0.4)), run(2, (0, 0.2, 0.4), (4, 2, 1))]
    assert at_the_size(twins, [run(int("1000"), (0, 0.05, 0.1))]) == 3.5
    assert at_the_size(twins, [run(2, (0, 0.05, 0.3)), run(1000, (0.0, 0.2, 0.4))]) == pytest.approx((1.5 + 2) / 2)
    for unknown in (run(2, (0, 0.2, 0.5)), run(2, ()), run(3, (0, 0.1, 0.2))):  # never so large; not recorded; no twin
        assert at_the_size(twins, [unknown]) is None
    assert at_the_size([run(2, ())], [run(2, (0, 0.1, 0.2))]) is None
    assert at_the_size([run(2, (0, 0.1, 0.2), ())], [run(2, (0, 0.1, 0.2))]) is None


@pytest.mark.parametrize(
    ("mine", "other", "led"),
    [
        ([4, 3, 2], [4, 3.1, 1], True),
        ([4, 3, 2], [4, 3, 1], False),
        ([4, 3, 1], [4, 2, 3], False),  # after the first half is no early lead
        ([3, 3, 2], [4, 2, 1], False),  # nor is step 0
        ([4, 3, 2], [4, math.nan, 1], False),
    ],
)
def test_an_early_lead_is_one_at_an_evaluation_of_the_first_half(mine, other, led):
    one, two = Curve(mine), Curve(other)
    assert led_early(one, [one, two]) is led and led_early(one, [one]) is False


def test_groups_of_as_many_rates_stand_side_by_side():
    for more, together in (({}, True), ({1e-3: "suboptimal"}, False)):
        main = records({1e-4: "good", 2e-4: "good"} | more, 2)
        other = records({1e-4: "good", 2e-4: "good"}, sweep="sw2", lora_alpha=64)
        sweeps = [
            simulate.sweep_of([1e-4, 2e-4], [0, 1]),
            simulate.sweep_of([1e-4], [0], "sw2", lora_alpha={"value": 64}),
        ]
        assert results(study(main + other, sweeps))["side_by_side"] is together


def test_a_sweep_over_steps_sets_the_warm_up_that_follows_from_them():
    short, long = ({"planned": steps, "max_steps": steps, "warmup_steps": steps * 3 // 100} for steps in (100, 200))
    runs = records({2e-4: "good", 1e-3: "suboptimal"}, **short) + records({2e-4: "good"}, **long)
    for record in runs[-1:]:
        record["id"] += "-200"
    found = study(runs, [simulate.sweep_of([2e-4, 1e-3], [0], max_steps={"values": [100, 200]})])
    assert found.undeclared == () and found.beside[0].differs == {"max_steps": 200, "warmup_steps": 6}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("load_in_4bit", (True, False)),
        ("bnb_4bit_quant_type", ("nf4", "fp4")),
        ("dtype", ("bfloat16", "float32")),
        ("max_length", (256, 512)),
        ("assistant_only_loss", (True, False)),
        ("dataset_train_split", ("train", "test")),
        ("chat_template_path", (None, "chat.jinja")),
        ("attn_implementation", ("sdpa", "eager")),
        ("versions", ({"torch": "2.11.0"}, {"torch": "2.13.0"})),
        ("a_key_of_the_future", (1, 2)),
    ],
)
def test_everything_that_a_run_trains_on_is_compared(key, values):
    first = records({2e-4: "good", 1e-3: "suboptimal"}, **{key: values[0]})
    found = study(first + records({2e-4: "good"}, sweep="sw2", **{key: values[1]}))
    assert found.undeclared == (key if key != "versions" else "versions.torch",)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("output_dir", ("a", "b")),
        ("versions", ({"wandb": "1"}, {"wandb": "2"})),
        ("versions", ({"torch": "2.13.0+cpu"}, {"torch": "2.13.0"})),
        ("gang_size", (4, 2)),
        ("lora_dropout", (0, 0.0)),
        ("freeze_a", (False, None)),
        ("eval_steps", (5, 10)),
    ],
)
def test_what_nothing_trains_on_separates_no_runs(key, values):
    first = records({2e-4: "good", 1e-3: "suboptimal"}, **{key: values[0]})
    second = records({4e-4: "good"}, sweep="sw2", **{key: values[1]})
    assert not study(first + second).beside


def test_a_setting_that_older_records_lack_is_that_which_they_had():
    old, frozen = records({2e-4: "good", 1e-3: "good"}), records({2e-4: "slow"}, sweep="sw2", freeze_a=True)
    assert [part.differs for part in study(old + frozen).beside] == [{"freeze_a": True}]
    assert not study(old + records({4e-4: "good"}, sweep="sw2", freeze_a=False)).beside


def test_a_control_stands_beside_the_grid_and_never_enters_its_statistics(tmp_path):
    main = records(seeds=2)
    alone = results(study(main))
    for record in (control := records({1e-5: "plateaued", 2e-4: "good"}, 2, sweep="sw2", adapter_dtype="bfloat16")):
        record["id"] += "-bf16"
    sweeps = [simulate.sweep_of(list(simulate.SEED_RATES), [0, 1])]
    sweeps += [command(simulate.sweep_of([1e-5, 2e-4], [0, 1], "sw2"), "--adapter_dtype", "bfloat16")]
    found = results(study(main + control, sweeps))
    same = ("rates", "best_rate", "best_loss", "basin", "budget", "hypotheses", "advice", "optimum", "mechanism")
    assert {key: found[key] for key in same} == {key: alone[key] for key in same}
    assert headline.answer(found) == headline.answer(alone) and not found["not_comparable"]
    (one,) = found["controls"]
    assert one["differs"] == {"adapter_dtype": "bfloat16"}
    low, _ = one["points"]
    assert low["learning_rate"] == 1e-5 and len(low["by_seed"]) == 2
    assert low["difference"]["mean"] == pytest.approx(sum(low["by_seed"]) / 2)
    words = report.control(found, one)
    assert words.startswith("beside the main grid: at 1e-5 it ")
    assert "at 2e-4 its effect " in words
    cost = {"mean": 0.2, "interval": [0.1, 0.3]}  # the simulator's own is told from nothing or not, by chance
    sized = {"difference": cost, "main_at_its_size": low["main_final_eval"]["mean"] + 0.05}
    sized |= {"update_ratio": {"mean": 0.9}, "main_update_ratio": {"mean": 1.0}}
    said = report.control(found, one | {"points": [low | sized, one["points"][1]]})
    assert "At 1e-5 the update ends 10 % smaller" in said and "its size accounts for 25 % of the cost" in said
    said = report.control(found, one | {"points": [low | sized | {"main_at_its_size": 9.0}]})
    assert said.endswith("the main grid's, when as small, was at 9.000: its size accounts for more than the cost.")
    said = report.control(found, one | {"points": [low | sized | {"update_ratio": {"mean": 1.0}}]})
    assert said.endswith("At 1e-5 the update ends as large, so its size is not the reason.")
    free = {"difference": {"mean": 0.0, "interval": None}}  # of a rate at which nothing is lost
    assert "update" not in report.control(found, one | {"points": [low | sized | free]})
    for interval, effect in (([-0.001, 0.001], "does not matter (+0.000)"), ([-9.0, 9.0], "is not told from one that")):
        even = {"difference": {"mean": 0.0, "interval": interval}}
        assert f"at 1e-5 its effect {effect}" in report.control(found, one | {"points": [low | even]})
    assert tables.control_difference(low | {"difference": cost}, found) == "+0.200 [+0.100, +0.300]"
    assert tables.control_difference(low | {"difference": None}, found) == tables.NONE
    text = report.render(found, tmp_path, [])
    assert words in text and "beside the main grid: adapter_dtype = bfloat16" in text
    assert [c["passed"] for c in found["checks"] if c["check"] in ("adapters float32", "same recipe")] == [True, True]


def test_two_halves_of_one_size_are_shown_side_by_side_without_a_winner():
    small, large = (records(sweep=name, lora_r=rank) for name, rank in (("sw1", 8), ("sw2", 16)))
    for record in large:
        record["id"] += "-16"
    sweeps = [simulate.sweep_of(list(simulate.SEED_RATES), [0], lora_r={"values": [8, 16]})]
    found = results(study(small + large, sweeps))
    assert found["side_by_side"] and not found["not_comparable"] and len(found["runs"]) == 8
    assert headline.answer(found).startswith(
        "**lora_r was varied: each group has its own best rate.** lora_r = 8: 2e-4 ("
    )
    said = report.context(found, Path("out"), [])
    assert all(said[key].startswith("First group (lora_r = 8) only: ") for key in ("caption", "conditions", "scope"))
    assert ", 4 runs" in said["conditions"]


def test_groups_that_differ_in_many_settings_are_each_named_by_one():
    first, other = ({"settings": dict.fromkeys("abcdef", value)} for value in (1, 2))
    other["settings"]["a"] = 1
    r = {"groups": [first, other]}
    assert [headline.group_name(r, group) for group in r["groups"]] == [{"a": 1}, {"b": 2}]


def test_runs_again_at_one_point_are_the_noise_floor_and_change_nothing(tmp_path):
    first = records({2e-4: "good", 1e-3: "suboptimal"}, gang="a", gang_size=2)
    again = copy.deepcopy(first[:1]) + records({2e-4: "good"}, sweep="sw3", shift=0.004)
    again[0] |= {"id": "again", "created_at": "2026-01-02"}
    again[1] |= {"id": "alone", "created_at": "2026-01-03"}
    for row in again[0]["history"]:
        if row.get("train/global_step") and "eval/loss" in row:
            row["eval/loss"] += 0.002
    found = results(study(first + again))
    assert found["best_loss"] == results(study(first))["best_loss"]
    assert [(x["runs"][1], round(x["difference"], 6), x["solo"]) for x in found["repeats"]] == [
        ("again", 0.002, False),
        ("alone", 0.004, True),
    ]
    assert found["noise_floor"] == pytest.approx(0.002)
    words = report.repeats(found)
    assert words in report.render(found, tmp_path, [])
    assert "ended 0.002 nats apart" in words and "train.py alone ended at most 0.004 nats apart." in words
    found["repeats"].append(found["repeats"][1] | {"differs": {"freeze_a": True}, "difference": -0.01})
    assert "at most 0.004 nats apart; with freeze_a = True at most 0.01 nats apart." in report.repeats(found)


def test_a_control_that_repeats_a_point_earlier_does_not_stand_for_it():
    alone = records({2e-4: "good"}, sweep="sw0", shift=0.1)
    alone[0] |= {"id": "alone", "created_at": "2025-01-01"}
    found = study(alone + records({2e-4: "good", 1e-3: "suboptimal"}, 2, gang="a", gang_size=4))
    assert "alone" in found.excluded and found.repeats[0].runs == ("good-0.0002-0", "alone")


def test_two_members_of_a_gang_that_go_non_finite_together_fail_loudly():
    found = records({1e-4: "good", 2e-4: "good", 1e-3: "fault"}, 2, gang_size=6)
    cut = min(
        row["train/global_step"]
        for record in found
        for row in record["history"]
        if row.get("train/loss") != row.get("train/loss")
    )
    for record in found:
        if record["config"]["learning_rate"] == 1e-3:  # both at the same step
            record["history"] = [row for row in record["history"] if row["train/global_step"] <= cut]
            for row in record["history"]:
                if row["train/global_step"] == cut and "train/loss" in row:
                    row["train/loss"] = float("nan")
    result = failed(found)
    words = f"Both 1e-3 runs became NaN at the same step, {cut}: a software fault, not the rate."
    assert result["not finite alone"].startswith(words)
    judged = study(found)
    assert {judged.verdicts[run.id].behaviour for run in judged.at(1e-3)} == {"incomplete"}
    for record, name in zip(found, "abcdef", strict=True):  # each its own gang: then it is the rate
        record["config"]["gang"] = name
    assert "not finite alone" not in failed(found)


def test_the_members_that_a_fault_took_are_counted():
    assert members("5e-3", 1, 1) == "the only 5e-3 run" and members("5e-3", 2, 2) == "both 5e-3 runs"
    assert members("5e-3", 3, 3) == "all three 5e-3 runs"
    assert members("5e-3", 2, 3) == "two of three 5e-3 runs"


def test_device_seconds_of_gangs_that_were_split_and_of_runs_that_tell_none():
    def seconds(*runs):
        found = records({2e-4: "good"}, len(runs))
        for i, (record, (gang, size, summary)) in enumerate(zip(found, runs, strict=True)):
            record["config"] |= {"gang": gang, "gang_size": size}
            record["summary"] = {"first_batch_hash": i, **summary}
        return study(found).device_seconds

    trained = {"train_seconds": 50.0, "train_runtime": 60.0}
    assert seconds(("a", 2, trained), ("a", 2, trained | {"train_seconds": 40.0})) == 50
    assert seconds(*[("a", 2, trained)] * 3) == 100  # two gangs of one name, one after the other
    assert seconds((None, None, trained), (None, 1, {"train_runtime": 60.0})) == 110
    assert seconds((None, None, trained), (None, None, {"train_seconds": 0.0})) == 50
    assert seconds((None, None, {"train_seconds": 1e10})) is None is seconds((None, None, {}))
    assert seconds((None, 2, trained), (None, 2, trained)) == 50  # older records name no gang: the sweep is one


def test_where_the_optimum_is_looked_for():
    def found(*rates, lost=()):
        built = study(records(dict.fromkeys(rates, "suboptimal") | {2e-4: "good"} | dict.fromkeys(lost, "stopped")))
        told = built.optimum
        return told["reason"], told["left"], told["right"], told["wall"]

    assert found(1e-4, 4e-4) == (None, 1e-4, 4e-4, None)
    assert found(1e-4) == ("edge", 1e-4, None, None) and found(4e-4) == ("edge", None, 4e-4, None)
    assert found(1e-4, lost=(4e-4,)) == (None, 1e-4, 4e-4, 4e-4)
    assert found(5e-5, 4e-4) == ("coarse", 5e-5, 4e-4, None) and found(1e-4, 8e-4) == ("coarse", 1e-4, 8e-4, None)
    assert found(6e-5, 6.9e-4)[0] is None


def test_what_a_curve_still_fell_over_the_last_quarter():
    steps = np.array([0, 74, 75, 76, 100])
    assert fell(Series(steps, np.array([4, 3.5, 3.25, 3.1, 3.0]))) == 0.25
    assert fell(Series(steps[3:], np.array([3.1, 3.0]))) == 0.0 == fell(Series(steps[:0], np.zeros(0)))


def test_device_seconds_count_a_gang_once():
    gang = records({2e-4: "good", 1e-3: "good"}, gang="a", gang_size=2)
    for record in gang:
        record["summary"]["train_seconds"] = 50.0
    alone = records({4e-4: "good"})
    assert study(gang + alone).device_seconds == 50 + 60


@pytest.mark.parametrize(
    ("rises", "stop"),
    [
        ([0.05, 0.051], True),
        ([0.005, 0.0051], False),  # told from nothing, and does not matter
        ([0.02, 0.2], False),  # not told
        ([0.05], True),  # one seed: by more than ε
        ([0.025], False),
        ([-0.05, -0.051], False),
    ],
)
def test_it_says_to_stop_where_the_rest_makes_it_worse(rises, stop):
    """The loss of each seed falls to step 60 and then rises by so much."""
    found = records({2e-4: "good"}, seeds=len(rises))
    for record, rise in zip(found, rises, strict=True):
        record["files"].pop("eval_nll.json")
        for row in record["history"]:
            if "eval/loss" in row:
                step = row["train/global_step"]
                row["eval/loss"] = 4.2 - 0.02 * min(step, 60) + rise * max(step - 60, 0) / 40
    advice = study(found).advice
    assert advice.stop is stop
    if min(rises) > 0:
        assert (advice.low_step, advice.end_step, advice.low) == (60, 100, pytest.approx(3.0))
        assert advice.low_passes == pytest.approx(0.54) and advice.rise.mean == pytest.approx(sum(rises) / len(rises))
        assert advice.end == pytest.approx(3.0 + advice.rise.mean)
    else:
        assert (advice.low_step, advice.rise) == (100, None)


def test_flags():
    rows = {row["learning_rate"]: row for row in results(study(records({2e-4: "good", 1e-3: "overfitting"})))["rates"]}
    assert "edge of the feasible range" in rows[2e-4]["flags"]


def test_a_share_of_one_run_has_a_wide_interval():
    found = {h["name"]: h for h in results(study(records()))["hypotheses"]}
    assert found["H4"]["verdict"] == "confirmed" and found["H4"]["interval"][0] < 0.25
    assert not any(isinstance(h.get("value"), float) and math.isnan(h["value"]) for h in found.values())


def test_the_alpha_follow_up_is_answered():
    """The best rate halves when α doubles: each α is a group beside the grid."""
    main = records({1e-4: "suboptimal", 2e-4: "good", 4e-4: "suboptimal", 1e-3: "suboptimal"})
    low = records({1e-4: "suboptimal", 2e-4: "suboptimal", 4e-4: "good"}, sweep="sw2", lora_alpha=16)
    high = records({1e-4: "good", 2e-4: "suboptimal", 4e-4: "suboptimal"}, sweep="sw2", lora_alpha=64)
    sweeps = [simulate.sweep_of([1e-4, 2e-4, 4e-4, 1e-3], [0])]
    sweeps += [simulate.sweep_of([1e-4, 2e-4, 4e-4], [0], "sw2", lora_alpha={"values": [16, 64]})]
    found = results(study(main + low + high, sweeps))
    assert [(x["settings"]["lora_alpha"], x["best_rate"]) for x in found["groups"]] == [
        (32, 2e-4),
        (16, 4e-4),
        (64, 1e-4),
    ]
    assert not found["side_by_side"] and len(found["controls"]) == 2
