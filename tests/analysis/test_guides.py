"""Guides are ranked against each other and the best rate known, each as a whole, where nothing else differs."""

import copy

import numpy as np
import pytest

from analysis import figures, headline, report
from analysis.checks import checks
from analysis.results import results
from analysis.runs import read_run
from analysis.study import build
from tests.analysis import simulate

SOURCE = {"title": "The paper", "url": "https://example.org/a_b.md", "date": "2026-01-01", "left_out": "dropout 0.1"}
# name: (rate, r, alpha, what the curve is lowered by)
GUIDES = {
    "low": (2e-4, 64, 16, 0.3),
    "near": (1e-3, 32, 32, 0.002),
    "far": (2e-5, 8, 16, 0.6),
    "mid": (5e-5, 16, 16, 0.45),
}


def grid(seeds=3):
    rates = {1e-5: 0.7, 2e-4: 0.2, 1e-3: 0.0}
    return [simulate.record("good", r, s, planned=100, shift=up) for r, up in rates.items() for s in range(seeds)]


def follow(name, seeds=3, kind="good", **config):
    rate, r, alpha, up = GUIDES[name]
    options = {"sweep": "sw2", "guide": name, "lora_r": r, "lora_alpha": alpha, "guide_source": SOURCE} | config
    found = [simulate.record(kind, rate, s, planned=100, shift=up, **options) for s in range(seeds)]
    for one in found:
        one["id"] += name
    return found


def followed(*names, **options):
    return [one for name in names or GUIDES for one in follow(name, **options)]


def study(records, *asked):
    sweeps = (
        [simulate.sweep_of([1e-5, 2e-4, 1e-3], [0, 1, 2])] if any("guide" not in x["config"] for x in records) else []
    )
    config = {"method": "grid", "parameters": {"guide": {"values": list(asked or GUIDES)}}}
    sweeps.append({"id": "sw2", "name": "guides", "state": "FINISHED", "config": config})
    return build(sweeps, [read_run(copy.deepcopy(record)) for record in records])


def test_guides_are_ranked_by_what_they_cost_against_the_grids_best():
    found = results(study(grid() + followed()))
    g = found["guides"]
    assert [x["name"] for x in g["rows"]] == ["near", "low", "mid", "far"]
    assert g["best"]["learning_rate"] == found["best_rate"] == 1e-3 and g["best"]["name"] is None
    for x in g["rows"]:
        low, high = x["regret"]["interval"]
        assert low <= GUIDES[x["name"]][3] <= high and x["regret"]["mean"] == pytest.approx(
            GUIDES[x["name"]][3], abs=0.01
        )
    assert [x["verdict"] for x in g["rows"]] == ["in", "out", "out", "out"]
    lost = [x["steps_lost"]["mean"] for x in g["rows"]]
    assert lost == sorted(lost) and lost[0] < 20 < 80 < lost[-1] < 100
    assert g["rows"][1]["axes"] == pytest.approx({"η": 2e-4, "α·η": 3.2e-3})


def test_the_grid_is_what_it_is_without_the_guides():
    """Not even a guide of the same rank and alpha becomes a rate of the grid."""
    alone, both = results(study(grid())), results(study(grid() + followed(lora_r=16, lora_alpha=32)))
    for key in ("rates", "best_rate", "optimum", "budget", "hypotheses", "groups", "controls", "follow_ups"):
        assert both[key] == alone[key], key
    assert not both["side_by_side"] and len(both["runs"]) == len(alone["runs"]) + 12


def test_the_report_says_why_the_comparison_holds_and_where_it_was_read(tmp_path):
    found = results(study(grid() + followed()))
    page = report.render(found, tmp_path, [])
    assert "| near: [The paper](https://example.org/a_b.md) | 1e-3, r 32, α 32 |" in page
    assert "it does not say which of the three does it" in page
    assert "Of four guides near (1e-3, r 32, α 32) ends lowest" in headline.answer(found)
    assert "the best rate of the grid" in headline.answer(found)


def test_what_rank_alone_does_is_said(tmp_path):
    records = grid() + [one for r in (8, 64) for one in follow("low", guide=f"r{r}", lora_r=r)]
    g = results(study(records, "r8", "r64"))["guides"]
    assert g["ranks"] == {"lora_r": [8, 64], "learning_rate": 2e-4, "lora_alpha": 16, "range": 0}
    page = report.render(results(study(records, "r8", "r64")), tmp_path, [])
    assert "At 2e-4 and α 16, r 8 and 64 end within 0.000 of each other." in page


def test_no_address_but_a_plain_one_is_a_link(tmp_path):
    source = SOURCE | {"url": "javascript:alert(1)", "title": "<b>[x](y)"}
    page = report.render(results(study(grid() + followed(guide_source=source))), tmp_path, [])
    assert "javascript" not in page and "<b>" not in page


def test_without_a_grid_the_guides_are_set_against_the_lowest_of_them(tmp_path):
    found = results(study(followed()))
    assert found["guide"] == "near" == found["guides"]["best"]["name"]
    assert [x["regret"] is None for x in found["guides"]["rows"]] == [True, False, False, False]
    assert headline.answer(found).startswith("Of four guides near") and "Without a grid" in headline.answer(found)
    assert "Guide near only:" in report.render(found, tmp_path, [])


def test_a_guide_that_differs_in_more_than_its_own_is_not_compared():
    records = grid() + followed("near", "low") + follow("far", gradient_accumulation_steps=4)
    made = study(records, "near", "low", "far")
    row = results(made)["guides"]["rows"][-1]
    assert row["name"] == "far" and not row["compared"] and row["regret"] is None
    assert row["differs"] == {"gradient_accumulation_steps": 4}
    (words,) = [check["detail"] for check in checks(made) if check["passed"] is False]
    assert words == "guide far is not compared: its runs differ in gradient_accumulation_steps"


def test_a_diverged_and_a_missing_guide_are_said():
    records = grid() + followed("near") + follow("low", kind="stopped")
    made = study(records, "near", "low", "far")
    found = results(made)
    row = found["guides"]["rows"][-1]
    assert (row["name"], row["diverged"], row["regret"]) == ("low", 3, None)
    assert found["guides"]["missing"] == ["far"]
    assert "With low runs diverged." in headline.answer(found)
    failed = {check["check"]: check["detail"] for check in checks(made) if check["passed"] is False}
    assert "no run of guide far has ended" in failed["no run missing"]


def test_every_check_passes_on_guides_beside_their_grid():
    assert [check["passed"] for check in checks(study(grid() + followed()))] == [None, *[True] * 9]


@pytest.mark.parametrize("beside", [True, False], ids=["a grid", "no grid"])
def test_the_figure_shows_each_guide_and_only_guides_have_one(beside, tmp_path):
    made = study((grid() if beside else []) + followed())
    assert figures.draw(made, tmp_path)[-1] == "guides.png" and (tmp_path / "guides.png").stat().st_size > 10_000
    legend = figures.guides_figure(made).axes[0].get_legend().get_texts()
    assert {text.get_text().split(":")[0] for text in legend if "grid" not in text.get_text()} == set(GUIDES)
    assert "guides.png" not in figures.draw(study(grid()), tmp_path)


def test_the_axis_on_which_guides_lie_as_the_grid_does_is_found():
    """A grid of half decades whose cost is linear in log η; here a guide's is that of its α·η / 32."""
    points, costs = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], [0.8, 0.6, 0.4, 0.2, 0.0]
    records = [
        simulate.record("good", r, s, planned=100, shift=up)
        for r, up in zip(points, costs, strict=True)
        for s in range(3)
    ]
    settings = {"a": (2e-5, 8, 64), "b": (1e-4, 32, 16), "c": (4e-4, 64, 16), "d": (2e-4, 16, 8), "far": (2e-6, 16, 32)}
    for name, (rate, r, alpha) in settings.items():
        up = float(np.interp(np.log(rate * alpha / 32), np.log(points), costs))
        options = {"sweep": "sw2", "guide": name, "lora_r": r, "lora_alpha": alpha, "shift": up}
        records += [simulate.record("good", rate, s, planned=100, **options) | {"id": f"{name}{s}"} for s in range(3)]
    g = results(study(records, *settings))["guides"]
    assert g["between"] == 4 and g["distance"]["α·η"] < 0.01 < 0.1 < g["distance"]["η"]
