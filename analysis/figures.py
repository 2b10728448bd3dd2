"""The figures: `lr_comparison.png` (its PANELS), `paired_loss_ratio.png`, `best_rate_so_far.png`.

One colour per learning rate, from dark (low) to light (high), so the order survives in grey; markers differ as well.
Thin lines are seeds, bold ones their mean; diverged runs are dashed and end in a red cross at the first bad step.
"""

import math
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np

from analysis import statistics
from analysis.curves import ema, paired_ratio
from analysis.files import InputError
from analysis.runs import Run, Series
from analysis.study import Study, median_steps
from analysis.wording import rate_label

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

POINTS = 1000
DPI = 150  # 12 inches are 1800 pixels, twice what GitHub shows
MARKERS = "osD^vPX*<>ph"
DIVERGED = "#d62728"
STYLE = {
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


def colours(rates: list[float]) -> dict[float, str]:
    """A colour for each rate, sequential in log η (viridis without its lightest end)."""
    logs = np.log10(rates)
    span = max(logs.max() - logs.min(), 1e-9)
    return {
        rate: to_hex(plt.get_cmap("viridis")(0.88 * (x - logs.min()) / span))
        for rate, x in zip(rates, logs, strict=True)
    }


def mean_over_seeds(series: list[Series]) -> Series:
    """Mean over the runs at the steps that all of them have."""
    step = series[0].step
    for one in series[1:]:
        step = np.intersect1d(step, one.step)
    values = [one.value[np.isin(one.step, step)] for one in series]
    return Series(step, np.mean(values, axis=0) if len(step) else np.zeros(0))


def thinned(series: Series) -> Series:
    """Every k-th point, so that no line has more than twice as many as it has pixels."""
    every = max(1, len(series) // POINTS)
    return Series(series.step[::every], series.value[::every])


def draw_lines(axes: Axes, study: Study, column: str, smooth: bool = True) -> None:
    """Every counted run's column: raw faint, smoothed thin, mean over seeds bold; diverged dashed."""
    for rate, runs in study.used.items():
        colour, shown = colours(study.rates)[rate], []
        for run in runs:
            series = run[column]
            if axes.get_yscale() == "log":
                series = Series(
                    series.step[series.value > 0], series.value[series.value > 0]
                )  # 0 before the first step
            if not len(series):
                continue
            line = thinned(Series(series.step, ema(series.value, run.planned_steps or 0))) if smooth else series
            if smooth:
                raw = thinned(series)
                axes.plot(raw.step, raw.value, color=colour, alpha=0.18, linewidth=0.6)
            style, alone = "--" if study.diverged(run) else "-", len(runs) == 1
            axes.plot(
                line.step,
                line.value,
                style,
                color=colour,
                linewidth=1.8 if alone else 0.9,
                alpha=0.9,
                **(marks(study, rate) if alone and not smooth else {}),
            )
            if not study.diverged(run):
                shown.append(line)
        if len(shown) > 1:
            middle = mean_over_seeds(shown)
            axes.plot(middle.step, middle.value, color=colour, linewidth=2.4, **({} if smooth else marks(study, rate)))


def marks(study: Study, rate: float) -> dict:
    """The rate's marker on every fifth point, starting elsewhere for each rate: lines stay apart in grey."""
    place = study.rates.index(rate)
    return {"marker": MARKERS[place % len(MARKERS)], "markevery": (2 + place % 5, 5), "markersize": 4.5}


def mark_divergence(axes: Axes, study: Study, column: str) -> None:
    """A red cross at the first bad step of each diverged run, at the last height that the axes show."""
    low, high = axes.get_ylim()
    for run in (r for runs in study.used.values() for r in runs if study.diverged(r)):
        step = study.verdicts[run.id].step
        before = run[column].finite.between(-1, step)
        before = Series(before.step, ema(before.value, run.planned_steps or 0)) if column == "train/loss" else before
        top = high - 0.03 * (high - low)  # below the title
        height = min(max(before.value[-1], low), top) if len(before) else top
        axes.plot(step, height, "X", color=DIVERGED, markersize=9, markeredgecolor="white", clip_on=False, zorder=5)


def loss_limits(study: Study, column: str) -> tuple[float, float] | None:
    """Limits that show every run that learns; a diverging one leaves through the top."""
    values = [v for runs in study.used.values() for r in runs for v in r[column].finite.value]
    if not values:
        return None
    base = [] if study.base_loss is None else [study.base_loss]
    top = max([*base, np.quantile(values, 0.5)])
    low, high = min([*values, *base]), min(max([*values, *base]), 1.25 * top)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def empty(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="#666666")
    axes.set_xticks([])
    axes.set_yticks([])


def train_loss(axes: Axes, study: Study) -> None:
    draw_lines(axes, study, "train/loss")
    limits = loss_limits(study, "train/loss")
    if limits is None:
        return empty(axes, "no train loss recorded")
    axes.set_ylim(limits)
    if study.base_loss is not None:
        axes.axhline(study.base_loss, color="#555555", linestyle=":", linewidth=1.2)
        axes.annotate("l0", (1.005, study.base_loss), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    mark_divergence(axes, study, "train/loss")
    axes.set(xlabel="optimiser step", ylabel="nats per token")


def eval_loss(axes: Axes, study: Study) -> None:
    limits = loss_limits(study, "eval/loss")
    if limits is None:
        return empty(axes, "no eval loss recorded")
    for rate, runs in study.used.items():
        whole = [r["eval/loss"] for r in runs if not study.diverged(r) and len(r["eval/loss"])]
        if len(whole) > 1:
            middle = mean_over_seeds(whole)
            table = np.array([s.value[np.isin(s.step, middle.step)] for s in whole])
            axes.fill_between(
                middle.step, table.min(0), table.max(0), color=colours(study.rates)[rate], alpha=0.2, linewidth=0
            )
    draw_lines(axes, study, "eval/loss", smooth=False)
    axes.set_ylim(limits)
    if study.best_loss is not None and study.base_loss is not None and study.base_loss > study.best_loss:
        for q in statistics.TARGETS:
            target = study.base_loss - q * (study.base_loss - study.best_loss)
            axes.axhline(target, color="#555555", linestyle=":", linewidth=1)
            axes.annotate(f"{q:.0%}", (1.005, target), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    mark_divergence(axes, study, "eval/loss")
    axes.set(xlabel="optimiser step", ylabel="nats per token")


def final_loss(axes: Axes, study: Study) -> None:
    rates, losses = study.rates, []
    axes.set_xscale("log")
    c = study.comparison
    for rate, runs in study.used.items():
        ends = [e for r in runs if not study.diverged(r) and (e := r.final_eval_loss) is not None and math.isfinite(e)]
        losses += ends
        marker = MARKERS[rates.index(rate) % len(MARKERS)]
        axes.plot([rate] * len(ends), ends, marker, color=colours(rates)[rate], markersize=6, alpha=0.75, zorder=3)
    if c is not None:
        axes.plot(c.rates, c.loss, "-", color="#444444", linewidth=1.2, zorder=2)
        if c.replicates is not None:
            # Paired: the spread that all rates share (which examples, which batches) is not in these bars.
            differences = c.replicates - c.replicates[:, [study.best]]
            bounds = study.best_loss + np.array([statistics.interval(column) for column in differences.T])
            axes.vlines(c.rates, bounds[:, 0], bounds[:, 1], color=[colours(rates)[r] for r in c.rates], linewidth=2.2)
            losses += [float(bounds.min()), float(bounds.max())]
        axes.axhspan(
            study.best_loss, study.best_loss + study.basin_width, color="#f0c75e", alpha=0.5, linewidth=0, zorder=1
        )
    if study.base_loss is not None:
        losses.append(study.base_loss)
        axes.axhline(study.base_loss, color="#555555", linestyle=":", linewidth=1.2)
        axes.annotate("l0", (1.005, study.base_loss), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    if losses:
        margin = 0.06 * (max(losses) - min(losses) + 0.01)
        axes.set_ylim(min(losses) - margin, max(losses) + 3 * margin)
    for rate in study.infeasible:
        count = sum(study.diverged(r) for r in study.used[rate])
        axes.plot(
            rate,
            0.965,
            "X",
            color=DIVERGED,
            markersize=10,
            markeredgecolor="white",
            transform=axes.get_xaxis_transform(),
        )
        axes.text(
            rate,
            0.91,
            f"{count}/{len(study.used[rate])}",
            ha="center",
            va="top",
            fontsize=8,
            color=DIVERGED,
            transform=axes.get_xaxis_transform(),
        )
    rate_ticks(axes, rates, study.recipe.get("lora_alpha"))
    axes.set(xlabel="learning rate η", ylabel="nats per token")


def rate_ticks(axes: Axes, rates: list[float], alpha: object) -> None:
    """A tick at each rate below and at its α·η above; where rates are close, turned below and only the ends above."""
    span = max(math.log10(rates[-1] / rates[0]), 0.5)
    close = any(math.log10(b / a) / span < 0.14 for a, b in pairwise(rates))
    axes.set_xticks(rates, [rate_label(r) for r in rates], rotation=90 if close else 0, fontsize=8.5)
    axes.minorticks_off()
    axes.set_xlim(rates[0] / 10 ** (0.08 * span), rates[-1] * 10 ** (0.08 * span))
    if isinstance(alpha, int | float) and alpha > 0:
        above = axes.secondary_xaxis("top", functions=(lambda x: x * alpha, lambda x: x / alpha))
        ends = [rates[0], rates[-1]] if rates[-1] > 3 * rates[0] else rates[:1]
        shown = [alpha * r for r in (ends if close else rates)]
        above.set_xticks(shown, [rate_label(x) for x in shown])
        above.minorticks_off()
        above.tick_params(labelsize=8.5)
        axes.annotate("α·η", (1.01, 1.03), xycoords="axes fraction", fontsize=9)


def plain_log_ticks(axes: Axes) -> None:
    """Plain numbers on a log y axis: the decades, or a few round values where it spans less than one."""
    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def gradient_norm(axes: Axes, study: Study) -> None:
    if not any(len(r["train/grad_norm"]) for runs in study.used.values() for r in runs):
        return empty(axes, "no gradient norm recorded")
    axes.set_yscale("log")
    draw_lines(axes, study, "train/grad_norm")
    plain_log_ticks(axes)
    limit = study.recipe.get("max_grad_norm")
    if isinstance(limit, int | float) and limit > 0:
        axes.axhline(limit, color="#555555", linestyle=":", linewidth=1.2)
        axes.annotate("clip", (1.005, limit), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        shares = {rate: [study.evidence[r.id].clipped for r in runs] for rate, runs in study.used.items()}
        clipped = {
            rate: np.mean([s for s in found if s is not None])
            for rate, found in shares.items()
            if any(s is not None for s in found)
        }
        if len(clipped) <= 4:  # more do not fit: the table has them
            axes.text(0, 1.015, "clipped steps:", transform=axes.transAxes, fontsize=8.5, va="bottom")
            for i, (rate, share) in enumerate(clipped.items()):
                x = 0.29 + 0.71 * i / max(len(clipped), 4)
                axes.text(
                    x, 1.015, "■", color=colours(study.rates)[rate], transform=axes.transAxes, fontsize=9, va="bottom"
                )
                axes.text(x + 0.045, 1.015, f"{share:.0%}", transform=axes.transAxes, fontsize=8.5, va="bottom")
    axes.set(xlabel="optimiser step", ylabel="‖g‖ before clipping")


def update_ratio(axes: Axes, study: Study) -> None:
    if not any(len(r["eval/update_ratio"]) for runs in study.used.values() for r in runs):
        return empty(axes, "no update ratio recorded")
    axes.set_yscale("log")
    draw_lines(axes, study, "eval/update_ratio", smooth=False)
    plain_log_ticks(axes)
    axes.set(xlabel="optimiser step", ylabel="‖ΔW‖ / ‖W‖")


def steps_to_targets(axes: Axes, study: Study) -> None:
    planned, rates = study.planned_steps, study.rates
    table = {q: [median_steps(study, rate, q) for rate in rates] for q in statistics.TARGETS}
    if not planned or any(steps is None for row in table.values() for steps in row):
        return empty(axes, "no rate improved on the untrained model")
    width = 0.84 / len(rates)
    for group, row in enumerate(table.values()):
        for i, (rate, steps) in enumerate(zip(rates, row, strict=True)):
            x, missed = group + (i - (len(rates) - 1) / 2) * width, math.isinf(steps)
            colour = colours(rates)[rate]
            face = {"facecolor": "white", "edgecolor": colour, "hatch": "////"} if missed else {"color": colour}
            axes.bar(x, planned if missed else steps, 0.9 * width, linewidth=1, **face)
            if len(rates) > 5:
                continue  # no room for numbers: the report's table has them
            words = f">{planned}" if missed else f"{steps:.0f}"
            axes.text(
                x,
                (planned if missed else steps) + 0.012 * planned,
                words,
                ha="center",
                va="bottom",
                fontsize=8,
                rotation=90 if len(rates) > 3 else 0,
            )
    axes.set_xticks(range(len(table)), [f"{q:.0%}" for q in table])
    axes.set_ylim(0, 1.17 * planned)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="share of the best gain l0 − l*", ylabel="optimiser steps (median of seeds)")


PANELS = (
    ("A  Train loss", train_loss),
    ("B  Eval loss and targets", eval_loss),
    ("C  Final eval loss by rate", final_loss),
    ("D  Gradient norm", gradient_norm),
    ("E  Size of the update", update_ratio),
    ("F  Steps to each target", steps_to_targets),
)


def legend(figure: Figure, study: Study) -> None:
    """One legend for all panels, above them: the rates, then what the line styles mean."""
    handles = [
        Line2D([], [], color=colour, linewidth=3, marker=MARKERS[i % len(MARKERS)], label=rate_label(rate))
        for i, (rate, colour) in enumerate(colours(study.rates).items())
    ]
    if any(len(runs) > 1 for runs in study.used.values()):
        handles.append(Line2D([], [], color="#444444", linewidth=2.4, label="mean of seeds"))
        handles.append(Line2D([], [], color="#444444", linewidth=0.9, label="one seed"))
    if study.infeasible:
        handles.append(Line2D([], [], color="#444444", linestyle="--", linewidth=1.4, label="diverged"))
        handles.append(Line2D([], [], color=DIVERGED, linestyle="", marker="X", markersize=8, label="first bad step"))
    fit = int(figure.get_figwidth() * 0.75)  # entries that a row has room for
    rows = math.ceil(len(handles) / fit)
    columns = math.ceil(len(handles) / rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=9.5, title="learning rate η")


def comparison_figure(study: Study) -> Figure:
    figure, grid = plt.subplots(2, 3, figsize=(12, 7.8))
    for axes, (title, draw) in zip(grid.ravel(), PANELS, strict=True):
        draw(axes, study)
        if axes.get_xlabel() == "optimiser step":
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(title, pad=20 if draw in (gradient_norm, final_loss) else 6)
    legend(figure, study)
    return figure


def paired_ratio_figure(study: Study) -> Figure:
    """rho_t of every rate against the lowest, same seed: the batches' noise cancels."""
    figure, axes = plt.subplots(figsize=(9, 4.6))
    lowest, drawn, heights = study.rates[0], False, []
    for rate, runs in study.used.items():
        ratios = []
        for run in runs:
            ratio = paired_ratio(run, study.evidence[run.id].reference)
            if ratio is None or not len(ratio):
                continue
            smooth = Series(ratio.step, ema(ratio.value, run.planned_steps or 0))
            style = "--" if study.diverged(run) else "-"
            colour = colours(study.rates)[rate]
            raw, smooth = thinned(ratio), thinned(smooth)
            axes.plot(raw.step, raw.value, color=colour, alpha=0.2, linewidth=0.6)
            axes.plot(smooth.step, smooth.value, style, color=colour, linewidth=0.9 if len(runs) > 1 else 1.8)
            ratios += [] if study.diverged(run) else [smooth]
            heights += ratio.value.tolist()
            drawn = True
        if len(ratios) > 1:
            middle = mean_over_seeds(ratios)
            axes.plot(middle.step, middle.value, color=colours(study.rates)[rate], linewidth=2.4)
    if not drawn:
        empty(axes, "no two rates share a seed and a finite lowest rate")
    else:
        axes.axhline(1, color="#555555", linestyle=":", linewidth=1.2)
        axes.set_ylim(max(0, min(heights) - 0.05), min(max(heights), 1.5) + 0.05)
        axes.set(xlabel="optimiser step", ylabel=f"train loss / train loss at {rate_label(lowest)}")
        legend(figure, study)
    axes.set_title("Paired train loss ratio: below 1 learns faster than the lowest rate")
    return figure


def best_so_far_figure(study: Study) -> Figure:
    """The pointwise lowest mean eval loss and the rate that has it: which rate wins for which number of steps."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5.6), sharex=True, height_ratios=[3, 1])
    curves = {rate: s for rate, runs in study.used.items() if (s := mean_of_finite(runs)) is not None and len(s) > 1}
    if not curves:
        empty(top, "no eval loss recorded")
        return figure
    shades = colours(study.rates)
    for rate, series in curves.items():
        top.plot(series.step, series.value, color=shades[rate], linewidth=1, alpha=0.6)
    steps = np.unique(np.concatenate([s.step for s in curves.values()]))
    steps = steps[steps > 0]
    table = np.full((len(curves), len(steps)), np.inf)
    for i, series in enumerate(curves.values()):
        table[i, np.isin(steps, series.step)] = series.value[series.step > 0]
    apart = (table.max(0) > table.min(0)) | (len(curves) == 1)  # not so after a first step at rate 0: nobody leads
    steps, table = steps[apart], table[:, apart]
    winners = [list(curves)[i] for i in table.argmin(0)]
    top.plot(steps, table.min(0), color="#444444", linewidth=1)
    for rate in dict.fromkeys(winners):
        here = np.array([w == rate for w in winners])
        marker = MARKERS[study.rates.index(rate) % len(MARKERS)]
        top.plot(steps[here], table.min(0)[here], marker, color=shades[rate], markersize=7)
        bottom.plot(steps[here], [study.rates.index(rate)] * here.sum(), marker, color=shades[rate], markersize=6)
    places = [study.rates.index(rate) for rate in winners]
    bottom.plot(steps, places, color="#444444", linewidth=1, drawstyle="steps-mid", zorder=1)
    small = 8.5 if len(study.rates) < 7 else 6.5
    bottom.set_yticks(range(len(study.rates)), [rate_label(r) for r in study.rates], fontsize=small)
    bottom.set_ylim(-0.6, len(study.rates) - 0.4)
    limits = loss_limits(study, "eval/loss")
    top.set_ylim(limits)
    mark_divergence(top, study, "eval/loss")
    top.set_title("Best rate so far: the lowest mean eval loss at each evaluation")
    top.set_ylabel("nats per token")
    bottom.set(xlabel="optimiser step", ylabel="best η")
    legend(figure, study)
    return figure


def mean_of_finite(runs: list[Run]) -> Series | None:
    """Mean eval loss at the steps where every run of the rate has a finite one."""
    series = [r["eval/loss"].finite for r in runs if len(r["eval/loss"].finite)]
    return mean_over_seeds(series) if series else None


FIGURES = {
    "lr_comparison.png": comparison_figure,
    "paired_loss_ratio.png": paired_ratio_figure,
    "best_rate_so_far.png": best_so_far_figure,
}


def draw(study: Study, directory: Path) -> list[str]:
    """Write the figures; identical bytes for identical data. Nothing to draw without a run at a known rate."""
    if not study.used:
        return []
    for name, figure_of in FIGURES.items():
        with plt.rc_context(STYLE):
            figure = figure_of(study)
            try:
                figure.savefig(directory / name, dpi=DPI, metadata={"Software": None})
            except OSError as error:
                raise InputError(f"cannot write {directory / name}: {error.strerror}") from None
            finally:
                plt.close(figure)
    return list(FIGURES)
