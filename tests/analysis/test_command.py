"""The command line from files: identical bytes, one line for bad input, figures from whatever there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from analysis.__main__ import main
from tests.analysis import simulate

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("lr_comparison.png", "paired_loss_ratio.png")


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def width_and_height(path):
    head = path.read_bytes()[16:24]
    return int.from_bytes(head[:4]), int.from_bytes(head[4:])


def test_twice_is_identical_bytes(tmp_path):
    simulate.study(tmp_path, seeds=2, planned=100, examples=20)
    assert main([str(tmp_path), "--refine"]) == 0
    first = contents(tmp_path)
    assert main([str(tmp_path), "--refine"]) == 0
    assert contents(tmp_path) == first
    assert {"README.md", "all_results.json", "sweeps/round-1.yaml", *PICTURES} <= {str(path) for path in first}
    assert not [path for path in first if path.suffix == ".part"]


def test_the_order_of_arrival_does_not_matter(tmp_path):
    records = [simulate.record(kind, rate, planned=100, examples=20) for rate, kind in simulate.SEED_RATES.items()]
    sweep = simulate.sweep_of(list(simulate.SEED_RATES), [0])
    for name, order in (("a", records), ("b", records[::-1])):
        simulate.write(tmp_path / name / "out", order, [sweep])
        assert main([str(tmp_path / name / "out")]) == 0
    assert contents(tmp_path / "a")[Path("out/README.md")] == contents(tmp_path / "b")[Path("out/README.md")]


def test_the_results_are_strict_json_without_a_path_of_this_machine(tmp_path):
    simulate.study(tmp_path, planned=100, examples=20)
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "all_results.json").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"bare {word}"))
    assert len(found["runs"]) == 4 and found["best_rate"] == 2e-4
    assert str(tmp_path) not in text + (tmp_path / "README.md").read_text()


def test_figures_are_1800_pixels_or_less_wide_and_not_blank(tmp_path):
    simulate.study(tmp_path, seeds=2, planned=100, examples=20)
    assert main([str(tmp_path)]) == 0
    assert [width_and_height(tmp_path / name)[0] for name in PICTURES] == [1800, 1350]
    assert all((tmp_path / name).stat().st_size > 30_000 for name in PICTURES)


@pytest.mark.parametrize("kept", [(), ("train/loss",), ("eval/loss",), ("train/loss", "eval/loss")])
def test_missing_columns_leave_a_report_and_figures(tmp_path, kept):
    records = [simulate.record(kind, rate, planned=100, examples=20) for rate, kind in simulate.SEED_RATES.items()]
    for record in records:
        record["history"] = [
            {k: v for k, v in row.items() if k in ("train/global_step", *kept)} for row in record["history"]
        ]
    simulate.write(tmp_path, records, [simulate.sweep_of(list(simulate.SEED_RATES), [0])])
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "README.md").exists() and (tmp_path / PICTURES[0]).exists()
    assert (tmp_path / PICTURES[1]).exists() == ("train/loss" in kept)


def test_a_sweep_with_no_finished_run_is_a_report(tmp_path, capsys):
    simulate.study(tmp_path, rates={1e-5: "cut", 2e-4: "cut"}, planned=100, examples=20)
    assert main([str(tmp_path), "--refine"]) == 0
    out = capsys.readouterr()
    assert "No run has reached its end" in out.out and "No refinement: no run has reached an end." in out.out
    assert "CHECK FAILED: no run missing" in out.err
    assert not (tmp_path / "sweeps/round-1.yaml").exists()


def test_only_runs_without_a_rate_are_a_report(tmp_path):
    simulate.write(
        tmp_path, [simulate.record("good", "fast", planned=100, examples=20)], [simulate.sweep_of([1e-5], [0])]
    )
    assert main([str(tmp_path)]) == 0
    assert "no usable learning rate" in (tmp_path / "README.md").read_text()


def test_failed_checks_are_loud(tmp_path, capsys):
    simulate.study(tmp_path, planned=100, examples=20, adapter_dtype="bfloat16")
    assert main([str(tmp_path)]) == 0
    assert "CHECK FAILED: adapters float32" in capsys.readouterr().err
    assert "> **CHECK FAILED** adapters float32" in (tmp_path / "README.md").read_text()


def test_refine_says_what_to_run_next(tmp_path, capsys):
    simulate.study(tmp_path, planned=100, examples=20)
    assert main([str(tmp_path), "--refine"]) == 0
    path = tmp_path / "sweeps/round-1.yaml"
    assert f"Next: Is 6.3e-5 or 4e-4 better than 2e-4? Its sweep is {path}: wandb sweep" in capsys.readouterr().out
    sweep = yaml.safe_load(path.read_text())
    assert sweep["description"] == "Is 6.3e-5 or 4e-4 better than 2e-4?"
    assert sweep["parameters"] == {"seed": {"value": 0}, "learning_rate": {"values": [6.3e-5, 4e-4]}}


def test_a_follow_up_names_the_recipe_as_it_was_used(tmp_path):
    simulate.study(tmp_path, planned=100, examples=20)
    (tmp_path / "recipe.yaml").write_text("max_steps: 100\n")
    assert main([str(tmp_path)]) == 0
    command = yaml.safe_load((tmp_path / "sweeps/steps.yaml").read_text())["command"]
    assert command[:4] == ["${env}", "python", "${program}", "--config"] and command[5] == "${args}"
    assert command[4].endswith(f"{tmp_path.name}/recipe.yaml")


def test_follow_ups_that_no_longer_hold_go(tmp_path):
    simulate.study(tmp_path, planned=100, examples=20)
    assert main([str(tmp_path)]) == 0 and (tmp_path / "sweeps/steps.yaml").exists()
    (tmp_path / "lr_1e-05" / "run_data.json").unlink()
    assert main([str(tmp_path)]) == 0 and not (tmp_path / "sweeps/steps.yaml").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: [str(path)], "has no lr_*/run_data.json"),
        (lambda path: [str(path), str(path)], "give it with --output"),
        (lambda path: [str(path), str(path), "--output", str(path)], "give it with --output"),
        (lambda path: [str(path), "a/b/c", "--output", str(path / "x")], "a/b/c is no directory"),
        (lambda path: [str(path), "--output", str(path / "other")], "is analysed in place"),
    ],
    ids=["empty directory", "no output", "output is a source", "a sweep among directories", "another output"],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, make, words):
    assert main(make(tmp_path)) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1


def test_directories_merge_into_one_report_and_each_run_counts_once(tmp_path, capsys):
    simulate.study(tmp_path / "a", planned=100, examples=20)
    record = simulate.record("good", 4e-4, planned=100, examples=20, sweep="sw2")
    simulate.write(tmp_path / "b", [record], [simulate.sweep_of([4e-4], [0], "sw2")])
    sources = [str(tmp_path / name) for name in "aba"]
    assert main([*sources, "--output", str(tmp_path / "merged")]) == 0
    assert "Of five rates" in capsys.readouterr().out
    found = json.loads((tmp_path / "merged" / "all_results.json").read_text())
    assert len(found["runs"]) == 5 and [sweep["id"] for sweep in found["sweeps"]] == ["sw1", "sw2"]
    before = contents(tmp_path / "merged")
    assert main([str(tmp_path / "merged")]) == 0 and contents(tmp_path / "merged") == before


def test_torn_data_is_one_line_and_nothing_is_lost(tmp_path, capsys):
    simulate.study(tmp_path, planned=100, examples=5)
    assert main([str(tmp_path)]) == 0
    before = contents(tmp_path)
    path = tmp_path / "lr_1e-05" / "run_data.json"
    path.write_bytes(path.read_bytes()[:1000])
    assert main([str(tmp_path)]) == 2
    assert "lr_1e-05/run_data.json is not whole run data" in capsys.readouterr().err
    after = contents(tmp_path)
    assert {k: v for k, v in after.items() if k.parent.name != "lr_1e-05"} == {
        k: v for k, v in before.items() if k.parent.name != "lr_1e-05"
    }


@pytest.mark.slow
def test_an_analysis_from_files_needs_no_wandb_and_help_needs_no_matplotlib(tmp_path):
    simulate.study(tmp_path, planned=100, examples=5)
    script = "import sys; sys.modules['wandb'] = None; from analysis.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = "import sys, analysis.__main__; assert not {'matplotlib', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, env=os.environ)
