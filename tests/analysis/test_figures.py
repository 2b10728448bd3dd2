"""Figures: no two labels collide, and every rate and every diverged run is there to see."""

import json
import re
from itertools import combinations, pairwise
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.text import Text
from PIL import Image

from analysis import figures
from analysis.runs import read_run
from analysis.study import build
from tests.analysis import simulate

NINE = {
    1e-5: "slow",
    3.2e-5: "slow",
    1e-4: "plateaued",
    2e-4: "good",
    3.2e-4: "good",
    6.3e-4: "suboptimal",
    1e-3: "spike",
    2e-3: "harmed",
    5e-3: "exploding",
}
CASES = {
    "4 rates x 1 seed": (simulate.SEED_RATES, 1),
    "4 rates x 3 seeds": (simulate.SEED_RATES, 3),
    "6 rates x 1 seed": (simulate.SEED_RATES | {3e-2: "harmed", 3e-1: "exploding"}, 1),
    "9 rates x 2 seeds": (NINE, 2),
    "12 rates x 1 seed": (NINE | {5e-6: "slow", 1.5e-4: "good", 1.4e-3: "suboptimal"}, 1),
    "two passes": ({2e-4: "two epochs", 1e-3: "overfitting", 5e-3: "slow divergence"}, 2),
    "2 rates": ({2e-4: "good", 2.2e-4: "good"}, 1),
    "1 rate": ({2e-4: "good"}, 1),
    "all diverged": ({1e-3: "stopped", 5e-3: "exploding"}, 2),
}


def study(rates, seeds, **options):
    records = [simulate.record(kind, rate, seed, **options) for rate, kind in rates.items() for seed in range(seeds)]
    return build([simulate.sweep_of(list(rates), list(range(seeds)))], [read_run(record) for record in records])


def boxes(figure):
    """Every text that is drawn, with its box in pixels; tick labels beyond an axis exist but are not drawn."""
    figure.canvas.draw()
    hidden = set()
    for axes in figure.findobj(lambda artist: hasattr(artist, "xaxis")):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            margin = 1e-6 * (high - low)
            for tick in [*axis.majorTicks, *axis.minorTicks]:
                if not low - margin <= tick.get_loc() <= high + margin:
                    hidden |= {tick.label1, tick.label2}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    return [(t.get_text(), t.get_window_extent()) for t in texts]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", figures.FIGURES)
def test_labels_do_not_collide(case, name):
    with plt.rc_context(figures.STYLE):
        figure = figures.FIGURES[name](study(*CASES[case], planned=100, examples=20))
        if figure is None:  # said by a test of its own
            assert name == "guides.png" or (name == "paired_loss_ratio.png" and case in ("1 rate", "all diverged"))
            return
        found = boxes(figure)
        plt.close(figure)
    for (a, box_a), (b, box_b) in combinations(found, 2):
        overlap = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0), min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        assert min(overlap) < 3, (a, b, overlap)  # pixels of 1800: the boxes are larger than the letters
    width, height = figure.canvas.get_width_height()
    for text, box in found:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text


def test_colours_grow_lighter_with_the_rate():
    shades = [figures.colour(rate) for rate in (1e-5, 2e-4, 1e-3, 5e-3)]
    luminance = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(to_rgb, shades)]
    assert luminance == sorted(luminance) and min(b - a for a, b in pairwise(luminance)) > 0.05
    assert luminance[-1] < 0.85 and all(rgb_to_hsv(to_rgb(shade))[1] > 0.4 for shade in shades)
    assert figures.colour(1e-9) == figures.colour(3e-6) and figures.colour(1.0) == figures.colour(3e-2)


LOOKS = ("local_wandb/static/page.css", "analysis/report.html.jinja")


def test_the_local_page_has_the_colours_of_the_report():
    script = (Path(__file__).parents[2] / "local_wandb/static/page.js").read_text()
    span, stops = (json.loads(re.search(rf"const {name} = (.*);", script)[1]) for name in ("SPAN", "STOPS"))
    low, high = span
    assert tuple(span) == figures.SPAN
    styles = [(Path(__file__).parents[2] / name).read_text() for name in LOOKS]
    light, dark = (
        [dict(re.findall(r"--(\w+): (#\w+);", style.split(":root {")[i])) for style in styles] for i in (1, 2)
    )
    assert len(light[0]) > 5 and all(page[0].items() <= page[1].items() for page in (light, dark))
    assert stops == [figures.colour(low * (high / low) ** (i / 10)) for i in range(11)]


def test_a_rates_colour_is_the_same_beside_other_rates():
    """In the legend of two studies that share one rate."""
    shades = []
    for kinds in ({2e-4: "good", 1e-3: "good"}, {1e-5: "slow", 2e-4: "good", 5e-3: "stopped"}):
        figure = figures.comparison_figure(study(kinds, 1, planned=100, examples=20))
        shades += [line.get_color() for line in figure.legends[0].get_lines() if line.get_label() == "2e-4"]
        plt.close(figure)
    assert len(shades) == 2 and shades[0] == shades[1]


def test_a_seventh_panel_is_one_entry(monkeypatch):
    monkeypatch.setattr(figures, "PANELS", (*figures.PANELS, ("Tokens", figures.update_ratio)))
    figure = figures.comparison_figure(study(simulate.SEED_RATES, 1, planned=100, examples=20))
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    plt.close(figure)
    letters = list(ascii_uppercase[: len(figures.PANELS)])
    assert [title[0] for title in titles if title] == letters and f"{letters[-1]}  Tokens" in titles


@pytest.mark.parametrize("case", ["9 rates x 2 seeds", "2 rates"])
def test_no_colour_is_lost_in_the_file(case, tmp_path):
    shown = study(*CASES[case], planned=100, examples=20)
    for name in figures.draw(shown, tmp_path):
        with plt.rc_context(figures.STYLE):
            figure = figures.FIGURES[name](shown)
            figure.set_dpi(figures.DPI)
            figure.canvas.draw()
            drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
            plt.close(figure)
        kept = np.asarray(Image.open(tmp_path / name).convert("RGB"), int)
        assert np.abs(drawn - kept).max() <= 20, name  # of 255


def test_a_figure_without_anything_to_compare_is_not_left_behind(tmp_path):
    (tmp_path / "paired_loss_ratio.png").touch()
    assert figures.draw(study({2e-4: "good"}, 1, planned=100, examples=20), tmp_path) == ["lr_comparison.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["lr_comparison.png"]


@pytest.mark.parametrize(("kind", "at_the_top"), [("stopped", True), ("rising", False)])
def test_a_diverged_rate_costs_what_it_ended_at_or_is_at_the_top(kind, at_the_top):
    found = study({2e-4: "good", 1e-3: kind}, 2, planned=100, examples=20)
    figure = figures.comparison_figure(found)
    axes = next(axes for axes in figure.axes if "Cost" in axes.get_title("left") + axes.get_title())
    (cross,) = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "X"]
    plt.close(figure)
    assert (cross == pytest.approx(0.8 * axes.get_ylim()[1])) == at_the_top
    assert at_the_top or cross == pytest.approx(found.rows[1].last_eval.mean - found.best_loss)


def test_every_diverged_run_has_its_cross():
    found = study(simulate.SEED_RATES, 3, planned=100, examples=20)
    figure = figures.comparison_figure(found)
    for axes in figure.axes[:2]:
        assert sum(line.get_marker() == "X" for line in axes.lines) == 3
    plt.close(figure)
