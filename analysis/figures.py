"""The figures: `lr_comparison.png` (its PANELS, each with its letter), `paired_loss_ratio.png` and `guides.png`.

A rate has the same colour in every report and on every page, from dark (low) to light (high), so the order survives in
grey; markers differ as well. Thin lines are seeds, bold ones their mean; diverged runs are dashed, with a red cross
where their divergence began.
"""

import io
import math
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from analysis.curves import ema, paired_ratio
from analysis.files import InputError
from analysis.guides import guides
from analysis.rates import mean_series
from analysis.runs import Series
from analysis.study import Study
from analysis.words import rate_label

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

POINTS = 1000
DPI = 150  # 12 inches are 1800 pixels, twice what GitHub shows
ACROSS = 3  # panels in a row
MARKERS = "osD^vPX*<>ph"
DIVERGED = "#d62728"
QUIET = "#555555"
SPAN = (5e-6, 1e-2)  # rates between which the colour runs, the same for every report
SHADES = (0.25, 0.85)  # the part of viridis that is read on white paper and on a dark page
STYLE: dict = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def place_on_scale(rate: float) -> float:
    """Where a rate stands between the ends of SPAN on a logarithmic scale, 0 to 1."""
    low, high = map(math.log10, SPAN)
    return min(1.0, max(0.0, (math.log10(rate) - low) / (high - low)))


def colour(rate: float) -> str:
    """A rate's colour, tied to its value."""
    return to_hex(plt.get_cmap("viridis")(SHADES[0] + (SHADES[1] - SHADES[0]) * place_on_scale(rate)))


def marker(study: Study, rate: float) -> str:
    return MARKERS[study.rates.index(rate) % len(MARKERS)]


def thinned(series: Series) -> Series:
    """Every k-th point, so that no line has more than twice as many as it has pixels."""
    every = max(1, len(series) // POINTS)
    return Series(series.step[::every], series.value[::every])


def draw_lines(axes: Axes, study: Study, column: str, smooth: bool = True) -> None:
    """Every counted run's column: raw faint, smoothed thin, mean over seeds bold; diverged dashed."""
    for rate, runs in study.used.items():
        shade, shown = colour(rate), []
        for run in runs:
            series = run[column]
            if axes.get_yscale() == "log":  # 0 before the first step
                series = Series(series.step[series.value > 0], series.value[series.value > 0])
            if not len(series):
                continue
            line = thinned(Series(series.step, ema(series.value, run.planned_steps or 0))) if smooth else series
            if smooth:
                raw = thinned(series)
                axes.plot(raw.step, raw.value, color=shade, alpha=0.18, linewidth=0.6)
            style, alone = "--" if study.diverged(run) else "-", len(runs) == 1
            width = 1.8 if alone else 0.9
            about = marks(study, rate) if alone and not smooth else {}
            axes.plot(line.step, line.value, style, color=shade, linewidth=width, alpha=0.9, **about)
            if not study.diverged(run):
                shown.append(line)
        if len(shown) > 1:
            middle = mean_series(shown)
            axes.plot(middle.step, middle.value, color=shade, linewidth=2.4, **({} if smooth else marks(study, rate)))


def marks(study: Study, rate: float) -> dict:
    """The rate's marker on every fifth point, starting elsewhere for each rate: lines stay apart in grey."""
    return {"marker": marker(study, rate), "markevery": (2 + study.rates.index(rate) % 5, 5), "markersize": 4.5}


def mark_divergence(axes: Axes, study: Study, column: str) -> None:
    """A red cross where each diverged run began to, at the last height that the axes show."""
    low, high = axes.get_ylim()
    for run in filter(study.diverged, study.counted):
        step = study.verdicts[run.id].step
        before = run[column].finite.between(-1, step)
        before = Series(before.step, ema(before.value, run.planned_steps or 0)) if column == "train/loss" else before
        top = high - 0.03 * (high - low)  # below the title
        height = min(max(before.value[-1], low), top) if len(before) else top
        axes.plot(step, height, "X", color=DIVERGED, markersize=9, markeredgecolor="white", clip_on=False, zorder=5)


def mark_passes(axes: Axes, study: Study) -> None:
    """A dotted line where each of the first few passes over the data ends."""
    if study.steps_per_pass and study.planned_steps:
        for count in range(1, min(6, int(study.planned_steps / study.steps_per_pass) + 1)):
            axes.axvline(count * study.steps_per_pass, color=QUIET, linestyle=(0, (1, 2)), linewidth=1)


def mark_base(axes: Axes, study: Study) -> None:
    low, high = axes.get_ylim()
    if study.base_loss is not None and low <= study.base_loss <= high:
        axes.axhline(study.base_loss, color=QUIET, linestyle=":", linewidth=1.2)
        where = (1.005, study.base_loss)
        axes.annotate("untrained", where, xycoords=("axes fraction", "data"), va="center", fontsize=8, rotation=90)


def loss_limits(study: Study, column: str) -> tuple[float, float] | None:
    """Limits that show every run that learns; a diverging one leaves through the top."""
    values = [v for run in study.counted for v in run[column].finite.value]
    if not values:
        return None
    base = [] if study.base_loss is None else [study.base_loss]
    top = max([*base, np.quantile(values, 0.5)])
    low, high = min([*values, *base]), min(max([*values, *base]), 1.1 * top)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def basin_limits(study: Study) -> tuple[float, float] | None:
    """Limits of the eval loss around the best rates: from the lowest point to the costliest near rate."""
    if study.comparison is None or study.base_loss is None or study.base_loss <= study.best_loss:
        return loss_limits(study, "eval/loss")
    lowest = min(float(run["eval/loss"].finite.value.min()) for run in study.counted if len(run["eval/loss"].finite))
    reach = study.base_loss - study.best_loss
    prices = sorted(float(loss) - lowest for loss in study.comparison.loss)
    near = [price for price in prices if price < 0.35 * reach] or prices[:1]
    high = lowest + min(0.6 * reach, max(1.35 * near[-1], 0.12 * reach))
    return lowest - 0.06 * (high - lowest), high


def empty(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="#666666")
    axes.set_xticks([])
    axes.set_yticks([])


def nothing_to_compare(study: Study) -> str:
    """Why rates have no order, or ""."""
    if not any(len(run["eval/loss"]) for run in study.counted):
        return "no eval loss recorded"
    if study.comparison is None:
        return "no rate ended without diverging" if study.infeasible else "no run reached its end"
    return "one rate: nothing to compare" if len(study.rates) < 2 else ""


def train_loss(axes: Axes, study: Study) -> None:
    draw_lines(axes, study, "train/loss")
    limits = loss_limits(study, "train/loss")
    if limits is None:
        return empty(axes, "no train loss recorded")
    axes.set_ylim(limits)
    mark_base(axes, study)
    mark_passes(axes, study)
    mark_divergence(axes, study, "train/loss")
    axes.set(xlabel="optimiser step", ylabel="nats per token")


def eval_loss(axes: Axes, study: Study) -> None:
    limits = basin_limits(study)
    if limits is None:
        return empty(axes, "no eval loss recorded")
    for rate, runs in study.used.items():
        whole = [run["eval/loss"] for run in runs if not study.diverged(run) and len(run["eval/loss"])]
        if len(whole) > 1:
            middle = mean_series(whole)
            table = np.array([s.value[np.isin(s.step, middle.step)] for s in whole])
            axes.fill_between(middle.step, table.min(0), table.max(0), color=colour(rate), alpha=0.2, linewidth=0)
    draw_lines(axes, study, "eval/loss", smooth=False)
    axes.set_ylim(limits)
    mark_base(axes, study)
    mark_passes(axes, study)
    mark_divergence(axes, study, "eval/loss")
    axes.set(xlabel="optimiser step", ylabel="nats per token")


def price(axes: Axes, study: Study) -> None:
    """What each rate costs: at the end, at the best checkpoints (hollow), at the end of diverged runs (crosses).

    A rate whose diverged runs have no finite loss at their end has no cost: its cross is at the top.
    """
    if why := nothing_to_compare(study):
        return empty(axes, why)
    width, rates = study.basin_width, study.rates
    axes.set_xscale("log")
    floor = width / 4  # what is below it cannot be told from nothing
    best_low = next(row.best_eval.mean for row in study.rows if row.learning_rate == study.best_rate)
    tops, lost = [width], []
    for row in study.rows:
        rate, end = row.learning_rate, row.moments["end"]
        shade, shape = colour(rate), marker(study, rate)
        if rate == study.best_rate:
            axes.plot(rate, floor, shape, color=shade, markersize=8, zorder=4, clip_on=False)
            axes.annotate("best", (rate, floor), (0, 9), textcoords="offset points", ha="center", fontsize=8.5)
            continue
        if row.excess is not None and end is not None:
            if end.interval is not None:
                bounds = [max(floor, bound) for bound in end.interval]
                axes.plot([rate, rate], bounds, color=shade, linewidth=2.2, zorder=2)
                tops.append(bounds[1])
            axes.plot(rate, max(floor, end.mean), shape, color=shade, markersize=8, zorder=4, clip_on=False)
            tops.append(end.mean)
        elif row.diverged:
            loss = width if row.last_eval.mean is None else row.last_eval.mean - study.best_loss
            lost.append((rate, loss if row.ended else math.inf))
            tops.append(loss)
        if row.best_eval.mean is not None and best_low is not None:
            at_best = max(floor, row.best_eval.mean - best_low)
            axes.plot(rate, at_best, shape, color=shade, markerfacecolor="white", markersize=7, zorder=3, clip_on=False)
            tops.append(at_best)
    top = 1.6 * max(tops)
    for rate, loss in lost:
        height = min(max(floor, loss), 0.8 * top)  # clear of the numbers above
        axes.plot(rate, height, "X", color=DIVERGED, markersize=10, markeredgecolor="white", zorder=4, clip_on=False)
    axes.set_yscale("log")
    axes.set_ylim(floor, top)
    axes.axhspan(floor, width, color="#f0c75e", alpha=0.35, linewidth=0, zorder=1)
    plain_log_ticks(axes)
    rate_ticks(axes, rates, study.recipe.get("lora_alpha"))
    axes.set(xlabel="learning rate η", ylabel="nats above the best rate")


def rate_ticks(axes: Axes, rates: list[float], alpha: Any) -> None:
    """A tick at each rate below and at its α·η above; where rates are close, turned below and only the ends above."""
    span = max(math.log10(rates[-1] / rates[0]), 0.5)
    close = any(math.log10(b / a) / span < 0.14 for a, b in pairwise(rates))
    axes.set_xticks(rates, [rate_label(r) for r in rates], rotation=90 if close else 0, fontsize=8.5)
    axes.minorticks_off()
    axes.set_xlim(rates[0] / 10 ** (0.08 * span), rates[-1] * 10 ** (0.08 * span))
    if isinstance(alpha, int | float) and alpha > 0:
        there_and_back: Any = (lambda x: x * alpha, lambda x: x / alpha)
        above = axes.secondary_xaxis("top", functions=there_and_back)
        ends = [rates[0], rates[-1]] if rates[-1] > 3 * rates[0] else rates[:1]
        shown = [alpha * r for r in (ends if close else rates)]
        above.set_xticks(shown, [rate_label(x) for x in shown])
        above.minorticks_off()
        above.tick_params(labelsize=8.5)
        axes.annotate("α·η", (1.04, 1.03), xycoords="axes fraction", fontsize=9)


def plain_log_ticks(axes: Axes) -> None:
    """Plain numbers on a log y axis: the decades, or a few round values where it spans less than two."""
    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    elif high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1e-3 else rate_label(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def gradient_norm(axes: Axes, study: Study) -> None:
    if not any(len(run["train/grad_norm"]) for run in study.counted):
        return empty(axes, "no gradient norm recorded")
    axes.set_yscale("log")
    draw_lines(axes, study, "train/grad_norm")
    plain_log_ticks(axes)
    mark_passes(axes, study)
    limit = study.recipe.get("max_grad_norm")
    if isinstance(limit, int | float) and limit > 0:
        axes.axhline(limit, color=QUIET, linestyle=":", linewidth=1.2)
        axes.annotate("clip", (1.005, limit), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        clipped = {row.learning_rate: row.clipped for row in study.rows if row.clipped is not None}
        shares = {f"{share:.0%}" for share in clipped.values()}
        if len(shares) == 1 and len(clipped) > 1:
            axes.text(
                0,
                1.015,
                f"clipped steps: {shares.pop()} at every rate",
                transform=axes.transAxes,
                fontsize=8.5,
                va="bottom",
            )
        elif len(clipped) <= 4:  # more do not fit
            axes.text(0, 1.015, "clipped steps:", transform=axes.transAxes, fontsize=8.5, va="bottom")
            for i, (rate, share) in enumerate(clipped.items()):
                x = 0.29 + 0.71 * i / max(len(clipped), 4)
                axes.text(x, 1.015, "■", color=colour(rate), transform=axes.transAxes, fontsize=9, va="bottom")
                axes.text(x + 0.045, 1.015, f"{share:.0%}", transform=axes.transAxes, fontsize=8.5, va="bottom")
    axes.set(xlabel="optimiser step", ylabel="‖g‖ before clipping")


def update_ratio(axes: Axes, study: Study) -> None:
    if not any(len(run["eval/update_ratio"]) for run in study.counted):
        return empty(axes, "no update ratio recorded")
    axes.set_yscale("log")
    draw_lines(axes, study, "eval/update_ratio", smooth=False)
    plain_log_ticks(axes)
    mark_passes(axes, study)
    axes.set(xlabel="optimiser step", ylabel="‖ΔW‖ / ‖W‖")


def best_by_budget(axes: Axes, study: Study) -> None:
    """The rate with the lowest mean eval loss at each step, and (hollow) those within the margin of it.

    Dashed: the parabola's place between the rates, with its band; a bar: what the line says of a budget not run.
    """
    if why := nothing_to_compare(study):
        return empty(axes, why)
    rates = study.rates
    axes.set_yscale("log")
    for row in study.budget:
        for rate in row["within"]:
            axes.plot(row["step"], rate, marker(study, rate), color=colour(rate), markerfacecolor="white", markersize=5)
        best = row["best_rate"]
        axes.plot(row["step"], best, marker(study, best), color=colour(best), markersize=7, zorder=4)
    between = [(row["step"], row["between"]) for row in study.budget if row["between"] is not None]
    if len(between) > 1:
        axes.plot(*zip(*between, strict=True), color=QUIET, linewidth=1.2, linestyle="--", zorder=1)
        bands = [(row["step"], *row["band"]) for row in study.budget if row["band"] is not None]
        steps, lower, upper = zip(*bands, strict=True)
        axes.fill_between(steps, lower, upper, color="#f0c75e", alpha=0.35, linewidth=0, zorder=0)
    for told in (x for x in study.budget_law["for"] if not x["run"]):
        axes.plot([told["steps"]] * 2, told["interval"], color=QUIET, linewidth=2, zorder=1)
        axes.plot(told["steps"], told["rate"], "_", color=QUIET, markersize=9, zorder=1)
    mark_passes(axes, study)
    close = any(b / a < 1.25 for a, b in pairwise(rates)) or len(rates) > 8
    axes.set_yticks(rates, [rate_label(rate) for rate in rates], fontsize=6.5 if close else 8.5)
    axes.minorticks_off()
    axes.set_ylim(rates[0] / 1.6, rates[-1] * 1.6)
    axes.set_xlim(left=0)
    axes.set(xlabel="optimiser step", ylabel="best rate for so many steps")


# Title and drawing of each panel; the letters and the grid follow.
PANELS: tuple[tuple[str, Callable[[Axes, Study], None]], ...] = (
    ("Train loss", train_loss),
    ("Eval loss around the best", eval_loss),
    ("Cost against the best rate", price),
    ("Gradient norm", gradient_norm),
    ("Size of the update", update_ratio),
    ("Best rate by budget", best_by_budget),
)


def legend(figure: Figure, study: Study, symbols: bool = True) -> None:
    """One legend for all panels, above them: the rates, then what the line styles mean."""
    handles = [
        Line2D(
            [],
            [],
            color=colour(rate),
            linewidth=3,
            marker=marker(study, rate) if symbols else "",
            label=rate_label(rate),
        )
        for rate in study.rates
    ]
    if any(len(runs) > 1 for runs in study.used.values()):
        handles.append(Line2D([], [], color="#444444", linewidth=2.4, label="mean of seeds"))
        handles.append(Line2D([], [], color="#444444", linewidth=0.9, label="one seed"))
    if study.infeasible:
        handles.append(Line2D([], [], color="#444444", linestyle="--", linewidth=1.4, label="diverged"))
        cross = Line2D([], [], color=DIVERGED, linestyle="", marker="X", markersize=8, label="divergence began")
        handles += [cross] if symbols else []
    if study.steps_per_pass and (study.planned_steps or 0) > study.steps_per_pass:
        handles.append(Line2D([], [], color=QUIET, linestyle=(0, (1, 2)), linewidth=1.2, label="end of a pass"))
    fit = int(figure.get_figwidth() * 0.75)  # entries that a row has room for
    rows = math.ceil(len(handles) / fit)
    columns = math.ceil(len(handles) / rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=9.5, title="learning rate η")


def comparison_figure(study: Study) -> Figure:
    rows = math.ceil(len(PANELS) / ACROSS)
    figure, grid = plt.subplots(rows, ACROSS, figsize=(12, 3.9 * rows))
    for axes in grid.ravel()[len(PANELS) :]:
        axes.set_visible(False)
    for letter, axes, (title, draw) in zip(ascii_uppercase, grid.ravel(), PANELS, strict=False):
        draw(axes, study)
        if axes.get_xlabel() == "optimiser step":
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(f"{letter}  {title}", pad=20)  # room for the second scale and the clipped shares
    legend(figure, study)
    return figure


def paired_ratio_figure(study: Study) -> Figure | None:
    """rho_t of every rate against the lowest, same seed: the batches' noise cancels. None where no two are paired."""
    ratios = {
        rate: [(run, found) for run in runs if (found := paired_ratio(run, study.evidence[run.id].reference))]
        for rate, runs in study.used.items()
    }
    if not any(ratios.values()):
        return None
    figure, axes = plt.subplots(figsize=(9, 4.6))
    heights = []
    for rate, pairs in ratios.items():
        shade, whole = colour(rate), []
        for run, ratio in pairs:
            smooth = Series(ratio.step, ema(ratio.value, run.planned_steps or 0))
            raw, shown = thinned(ratio), thinned(smooth)
            axes.plot(raw.step, raw.value, color=shade, alpha=0.2, linewidth=0.6)
            style = "--" if study.diverged(run) else "-"
            axes.plot(shown.step, shown.value, style, color=shade, linewidth=0.9 if len(pairs) > 1 else 1.8)
            whole += [] if study.diverged(run) else [shown]
            heights += ratio.value.tolist()
        if len(whole) > 1:
            middle = mean_series(whole)
            axes.plot(middle.step, middle.value, color=shade, linewidth=2.4)
    axes.axhline(1, color=QUIET, linestyle=":", linewidth=1.2)
    axes.set_ylim(max(0, min(heights) - 0.05), min(max(heights), 1.5) + 0.05)
    axes.set(xlabel="optimiser step", ylabel=f"train loss / train loss at {rate_label(study.rates[0])}")
    mark_passes(axes, study)
    legend(figure, study, symbols=False)
    axes.set_title("Train loss on equal batches: below 1 is lower than at the lowest rate")
    return figure


def guides_figure(study: Study) -> Figure | None:
    """What each guide costs against its α·η, with 95 % intervals; the line: the grid's rates, at its own rank and α."""
    if (found := guides(study)) is None:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.6))
    axes.set_xscale("log")
    alpha = study.recipe.get("lora_alpha")
    if study.guide is None and isinstance(alpha, int | float) and study.best_loss is not None:
        grid = [(alpha * row.learning_rate, row.excess) for row in study.rows if row.excess is not None]
        label = f"the grid, r {study.recipe.get('lora_r')}, α {alpha:g}"
        axes.plot(*zip(*grid, strict=True), "-o", color="#bbbbbb", markersize=4, zorder=1, label=label)
    compared = [x for x in found["rows"] if x["compared"] and x["axes"]["α·η"]]
    lows, size = [0.0], 13.0
    for x, shape in zip(compared, cycle(MARKERS)):  # fewer or more than MARKERS
        regret = x["regret"] or {"mean": 0.0, "interval": None}
        shade, at = colour(x["learning_rate"]), x["axes"]["α·η"]
        if regret["interval"]:
            axes.plot([at, at], regret["interval"], color=shade, linewidth=2, zorder=2)
            lows.append(regret["interval"][0])
        label = f"{x['name']}: {rate_label(x['learning_rate'])}, r {x['lora_r']:g}, α {x['lora_alpha']:g}"
        axes.plot(at, regret["mean"], shape, color=shade, markeredgecolor="white", markersize=size, label=label)
        size = max(5.0, size - 1.5)  # what lies at one place stays visible
    axes.axhspan(0, found["width"] or 0.0, color="#f0c75e", alpha=0.35, linewidth=0, zorder=0)
    highest = max([x["regret"]["mean"] for x in compared if x["regret"]], default=0.1)
    top = max(1.25 * highest, 2 * (found["width"] or 0.0))
    axes.set_ylim(min(-0.04 * top, *lows), top)
    axes.legend(fontsize=8.5)
    axes.set(xlabel="α·η", ylabel="nats above the best known")
    axes.set_title("What following a guide costs")
    return figure


FIGURES = {
    "lr_comparison.png": comparison_figure,
    "paired_loss_ratio.png": paired_ratio_figure,
    "guides.png": guides_figure,
}


def draw(study: Study, directory: Path) -> list[str]:
    """Write the figures; identical bytes for identical data. A figure that has nothing to show is not left behind."""
    drawn = []
    for name, figure_of in FIGURES.items():
        with plt.rc_context(STYLE):
            figure = figure_of(study) if study.used else None
            if figure is None:
                (directory / name).unlink(missing_ok=True)
                continue
            drawn.append(name)
            drawing = io.BytesIO()
            figure.savefig(drawing, dpi=DPI)
            plt.close(figure)
            # A quarter of the bytes. Pillow's default way would give a rate that has few pixels its neighbour's colour.
            picture = Image.open(drawing).convert("RGB")
            palette = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            try:
                palette.save(directory / name, optimize=True)
            except OSError as error:
                raise InputError(f"cannot write {directory / name}: {error.strerror}") from None
    return drawn
