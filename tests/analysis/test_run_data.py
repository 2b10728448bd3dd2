"""Reading: whatever the files hold, a Run or one clear line, never a traceback and never a silent drop."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.files import InputError, strict, to_json
from analysis.runs import COLUMNS, STEP, load, merge, read_history, read_run
from tests.analysis import simulate

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["NaN", "-Infinity"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def one(**changes):
    return read_run(simulate.record("good") | changes)


@given(st.lists(st.dictionaries(st.sampled_from([*COLUMNS, STEP, "_step"]), json_values, max_size=4), max_size=6))
def test_any_history_reads_with_increasing_steps(rows):
    notes = []
    for series in read_history(rows, notes).values():
        assert (np.diff(series.step) > 0).all() and len(series.step) == len(series.value)


@given(st.dictionaries(st.sampled_from(["id", "config", "summary", "files", "history", "state"]), json_values))
def test_any_record_reads(record):
    run = read_run(record)
    assert run.complete in (True, False) and run.final_train_loss is None


@given(json_values)
def test_written_json_is_strict(value):
    text = to_json(value)
    assert json.loads(text, parse_constant=lambda word: pytest.fail(f"bare {word}")) == json.loads(
        json.dumps(strict(value))
    )


def test_non_finite_words_are_numbers():
    rows = [{STEP: 1, "train/loss": "NaN"}, {STEP: 2, "train/loss": "Infinity"}, {STEP: 3, "train/loss": "3.5"}]
    values = read_history(rows, [])["train/loss"].value
    assert math.isnan(values[0]) and values[1] == math.inf and values[2] == 3.5


def test_a_resumed_run_keeps_the_last_record_of_a_step():
    notes = []
    rows = [{STEP: s, "train/loss": float(s)} for s in (1, 2, 3, 4)] + [
        {STEP: s, "train/loss": 10.0 + s} for s in (3, 4, 5)
    ]
    series = read_history(rows, notes)["train/loss"]
    assert series.step.tolist() == [1, 2, 3, 4, 5] and series.value.tolist() == [1, 2, 13, 14, 15]
    assert "2 steps recorded more than once" in notes[0]


def test_unreadable_values_are_counted_and_missing_ones_are_not():
    notes = []
    rows = [{STEP: 1, "train/loss": "oops"}, {STEP: 2, "train/loss": None}, {STEP: 3, "train/loss": 2}]
    assert read_history(rows, notes)["train/loss"].value.tolist() == [2.0]
    assert notes == ["1 value of the history not a number: left out"]


def test_missing_columns_are_named():
    rows = [
        {key: v for key, v in row.items() if key != "train/grad_norm"} for row in simulate.record("good")["history"]
    ]
    run = one(history=rows)
    assert len(run["train/grad_norm"]) == 0 and all(len(run[name]) for name in COLUMNS if name != "train/grad_norm")
    assert one(history=[]).notes == ["no train/loss recorded", "no eval/loss recorded"]


def test_final_train_loss_is_the_mean_of_the_tail_not_of_the_run():
    record = simulate.record("good", planned=200)
    record["history"].append({STEP: 200, "train/train_loss": 3.9})
    run = read_run(record)
    tail = [row["train/loss"] for row in record["history"] if row.get("train/loss") and row[STEP] > 180]
    assert len(tail) == 20 and run.final_train_loss == pytest.approx(np.mean(tail))


def test_final_train_loss_takes_at_least_ten_steps():
    run = read_run(simulate.record("good", planned=40))
    losses = run["train/loss"].value
    assert run.final_train_loss == pytest.approx(losses[-10:].mean()) != pytest.approx(losses[-4:].mean())


def test_passes_and_the_size_of_the_training_set():
    run = read_run(simulate.record("overfitting", planned=200))
    assert run.passes == pytest.approx(2.0) and run.steps_per_pass == pytest.approx(100) and run.train_examples == 1600
    assert run.one_pass.step == 100 and run.best.step < run.end.step == 200
    assert read_run(simulate.record("good", train_examples=1737)).train_examples == 1737
    assert read_run(simulate.record("good")).one_pass is None
    for rows, known in ((1, 1), (2**53 - 1, 2**53 - 1), (2**53, None), (0, None)):
        assert read_run(simulate.record("good", train_examples=rows)).train_examples == known
    unknown = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None}
    assert read_run(simulate.record("good", **unknown)).train_examples is None


def test_the_untrained_loss_is_that_of_step_0_alone():
    record = simulate.record("good")
    assert read_run(record).base_loss == simulate.BASE
    (first,) = [row for row in record["history"] if row[STEP] == 0]
    assert one(history=[row for row in record["history"] if row is not first]).base_loss is None
    first["eval/loss"] = "NaN"
    assert read_run(record).base_loss is None


def test_one_pass_is_the_evaluation_nearest_to_its_end():
    record = simulate.record("overfitting", planned=200)
    for row in record["history"]:
        if "train/epoch" in row:
            row["train/epoch"] = row[STEP] / 109
    assert read_run(record).one_pass.step == 110


def test_a_resumed_run_is_noted_and_an_evaluation_at_a_logged_step_is_not():
    assert read_run(simulate.record("good")).notes == []


def test_out_of_memory_is_a_state_that_says_what_would_fit():
    why = "Tried to allocate 2.00 GiB; per_device_train_batch_size: 2 fits"
    run = one(state="failed", summary={"out_of_memory": why}, history=[])
    assert run.state == "out of memory" and f"out of memory: {why}" in run.notes


def test_a_run_without_sample_answers_says_why():
    assert "no sample answers: ValueError: no" in one(summary={"no_answers": "ValueError: no"}).notes


def test_modules_of_the_examples_are_read_and_must_fit():
    record = simulate.record("good", examples=6)
    record["files"]["eval_nll.json"]["module"] = ["a", "a", "b", "b", "b", "c"]
    assert read_run(record).eval_nll.module.tolist() == [0, 0, 1, 1, 1, 2]
    record["files"]["eval_nll.json"]["module"] = ["a"]
    assert read_run(record).eval_nll is None


def test_a_run_before_a_fault_has_no_later_row():
    run = read_run(simulate.record("fault"))
    before = run.before(run.not_finite_step)
    assert before.not_finite_step is None and before.last_step == run.not_finite_step - 1
    assert before.eval_nll.steps.max() < run.not_finite_step and "instrument fault" in before.notes[-1]


def test_final_losses_of_a_cut_run_do_not_exist():
    run = read_run(simulate.record("cut"))
    assert run.final_eval_loss is None and run.final_train_loss is None and not run.complete


@pytest.mark.parametrize("rate", ["1e-5", 1e-5, "0.00001"])
def test_a_rate_written_as_a_string_is_that_rate(rate):
    assert one(config={"learning_rate": rate}).learning_rate == 1e-5


@pytest.mark.parametrize("rate", [None, "fast", 0, -1, "NaN", [1], True])
def test_an_unusable_rate_is_none_and_noted(rate):
    run = one(config={"learning_rate": rate})
    assert run.learning_rate is None and "no usable learning rate" in run.notes[0]


def test_eval_nll_of_another_shape_is_noted():
    run = one(files={"eval_nll.json": {"steps": [0], "tokens": [1, 2], "nll": [[1]]}})
    assert run.eval_nll is None and "eval_nll.json" in run.notes[0]


@pytest.mark.parametrize(
    ("given", "steps"), [(0.03, 6), (0.031, 7), (0, 0), (1, 1), (5, 5), (-1, 0), (None, 0), (2**53, 0)]
)
def test_warmup_below_one_is_a_share(given, steps):
    assert read_run(simulate.record("good", planned=200, warmup_steps=given)).warmup_steps == steps


def test_numbers_that_no_run_can_have_are_none():
    for said, planned in ((1, 1), (2**53 - 1, 2**53 - 1), (2**53, None), (0.9, None), (0, None), ("NaN", None)):
        assert read_run(simulate.record("good") | {"config": {"max_steps": said}}).planned_steps == planned
    for said, seed in ((0, 0), ("3", 3), ("Infinity", None), (None, None), ("x", None)):
        run = one(config={"seed": said}, summary={"diverged_at_step": said})
        assert run.seed == seed and run.diverged_at_step == seed
    rows = [{STEP: step, "train/loss": 1.0} for step in (-1, 0, 5, 2**53 - 1, 2**53)]
    assert read_history(rows, [])["train/loss"].step.tolist() == [0, 5, 2**53 - 1]


def test_an_end_is_at_95_percent_of_the_steps_and_a_pass_ends_near_an_evaluation():
    run = read_run(simulate.record("overfitting", planned=200))
    for planned, whole in ((210, True), (211, False), (None, False)):
        run.planned_steps = planned
        assert run.complete is whole and (run.final_eval_loss is not None) is whole
    for per_pass, step in ((100, 100), (104.9, 100), (105.1, 110), (206, 200), (211, None), (None, None)):
        run.__dict__["steps_per_pass"] = per_pass
        assert (run.one_pass and run.one_pass.step) == step
    assert run.best.step == int(run["eval/loss"].step[run["eval/loss"].value.argmin()]) and run.last.step == 200
    assert one(history=[]).last is one(history=[]).best is None


def test_a_column_or_an_evaluation_that_is_not_there():
    run = one()
    assert run.at(7) is None and run.at(200).loss == run.final_eval_loss and len(one(history=[])["eval/loss"]) == 0
    with pytest.raises(KeyError):
        run["eval/los"]


def test_without_max_steps_the_longest_run_is_taken_as_planned(tmp_path):
    records = [simulate.record("good", rate, planned=planned) for rate, planned in ((1e-4, 100), (2e-4, 120))]
    for record in records:
        record["config"] |= {"max_steps": None}
    simulate.write(tmp_path, records, [])
    _, runs = load(tmp_path)
    assert [run.planned_steps for run in runs] == [120, 120] and "last step, 120, is taken" in runs[0].notes[-1]


def test_seconds_per_step_leave_evaluations_out():
    assert read_run(simulate.record("good")).seconds_per_step == pytest.approx(0.25)


def test_a_directory_without_runs_is_named(tmp_path):
    with pytest.raises(InputError, match="has no lr_"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0.5, 0.999, 0])
def test_torn_files_are_named(tmp_path, kept):
    path = simulate.study(tmp_path, planned=100, examples=5) / "lr_0.0002" / "run_data.json"
    text = path.read_text()
    path.write_text(text[: int(kept * len(text))] if kept else '{"runs": 3}')
    with pytest.raises(InputError, match=r"lr_0\.0002/run_data\.json is not whole"):
        load(tmp_path)


def test_merged_directories_hold_each_run_once_and_the_later_one(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    options = {"planned": 100, "examples": 5}
    again = simulate.record("good", **options) | {"name": "again"}
    simulate.write(old, [simulate.record("good", **options)], [simulate.sweep_of([2e-4], [0])])
    more = [again, simulate.record("good", seed=1, **options), simulate.record("good", 1e-4, sweep="sw2", **options)]
    simulate.write(new, more, [simulate.sweep_of([2e-4], [0, 1]), simulate.sweep_of([1e-4], [0], "sw2")])
    merge([old, new], tmp_path / "both")
    sweeps, runs = load(tmp_path / "both")
    assert [sweep["id"] for sweep in sweeps] == ["sw1", "sw2"]
    assert [(run.learning_rate, run.seed) for run in runs] == [(1e-4, 0), (2e-4, 0), (2e-4, 1)]
    assert runs[1].name == "again"
    with pytest.raises(InputError, match="has no lr_"):
        merge([old, tmp_path / "none"], tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_runs_come_by_rate_seed_and_age(tmp_path):
    simulate.study(tmp_path, seeds=2, planned=100, examples=5)
    simulate.write(tmp_path, [simulate.record("good", "?", planned=100, examples=5)], [simulate.sweep_of([1e-5], [0])])
    sweeps, runs = load(tmp_path)
    assert [(r.learning_rate, r.seed) for r in runs][:3] == [(1e-5, 0), (1e-5, 1), (2e-4, 0)]
    assert runs[-1].learning_rate is None and (tmp_path / "lr_unknown").is_dir() and len(sweeps) == 1
