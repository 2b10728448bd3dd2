"""`report.html`: the report in one file, with curves to hover over and to switch on and off. No network, no server.

Sentences and tables are those of README.md (`report.context`); the curves are the study's, thinned. plotly.js is packed
into the page and unpacked by the browser.
"""

import base64
import gzip
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly

from analysis import report
from analysis.curves import ema
from analysis.figures import colour
from analysis.rates import mean_series
from analysis.results import rounded
from analysis.runs import Run, Series
from analysis.study import Study
from analysis.words import rate_label

VALUES = 60_000  # numbers of curves in a page, about 1 MB; more runs are thinned more
DIGITS = 5
STILL = "lr_comparison.png"  # what is printed, and what is shown where no script runs


@dataclass(frozen=True)
class Chart:
    """One chart of the page. draw: the function of report.html.jinja that draws it."""

    title: str
    draw: str
    column: str | None = None  # of the history, for curves over steps
    log: bool = False
    smooth: bool = False


CHARTS = (
    Chart("Eval loss", "overSteps", "eval/loss"),
    Chart("Cost against the best rate", "cost"),
    Chart("Best rate by budget", "budget"),
    Chart("Train loss, smoothed", "overSteps", "train/loss", smooth=True),
    Chart("Gradient norm, smoothed", "overSteps", "train/grad_norm", log=True, smooth=True),
    Chart("Size of the update, ‖ΔW‖/‖W‖", "overSteps", "eval/update_ratio", log=True),
)


def render(study: Study, results: dict, directory: Path, pictures: list[str]) -> str:
    """The whole report.html of an output directory, in which the figures have been drawn."""
    still = base64.b64encode((directory / STILL).read_bytes()).decode() if STILL in pictures else None
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    packed = base64.b64encode(gzip.compress(script.read_bytes(), 9, mtime=0)).decode()
    values = report.context(results, directory, pictures)
    return report.fill(
        "report.html.jinja",
        values
        | {"still": still, "plotly": packed, "curves": script_safe(curves(study, results)) if study.used else None},
    )


def script_safe(value: object) -> str:
    """JSON that no value can close the surrounding script with."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def curves(study: Study, results: dict) -> dict:
    """Everything that the page draws: colours by rate, curves by chart, costs, budgets, ends of passes."""
    points = max(50, VALUES // (2 * max(1, len(study.counted)) * len(CHARTS)))
    passes = []
    if study.steps_per_pass and study.planned_steps:
        count = min(5, int(study.planned_steps / study.steps_per_pass))
        passes = [study.steps_per_pass * (i + 1) for i in range(count)]
    compared = study.comparison is not None and len(study.rates) > 1
    return {
        "rates": [{"rate": rounded(rate), "label": rate_label(rate), "colour": colour(rate)} for rate in study.rates],
        "base": study.base_loss,
        "margin": study.basin_width,
        "passes": passes,
        "charts": [chart(study, about, points) for about in CHARTS if about.column or compared],
        "costs": costs(results),
        "budget": results["budget"],
    }


def chart(study: Study, about: Chart, points: int) -> dict:
    """One chart: for each rate its runs and, of several that did not diverge, their mean."""
    lines = []
    for rate, runs in study.used.items() if about.column else ():
        whole = []
        for run in runs:
            series = line(run, about)
            if len(series):
                lines.append(drawn(rate, run, thinned(series, points)) | {"diverged": study.diverged(run)})
                whole += [] if study.diverged(run) else [series]
        if len(whole) > 1:
            lines.append(drawn(rate, None, thinned(mean_series(whole), points)) | {"diverged": False})
    return {"title": about.title, "draw": about.draw, "log": about.log, "column": about.column, "lines": lines}


def line(run: Run, about: Chart) -> Series:
    series = run[about.column]
    if about.log:
        series = Series(series.step[series.value > 0], series.value[series.value > 0])
    return Series(series.step, ema(series.value, run.planned_steps or 0)) if about.smooth else series


def thinned(series: Series, points: int) -> Series:
    """At most `points` of a series, evenly, with its last one."""
    if len(series) <= points:
        return series
    keep = np.unique(np.linspace(0, len(series) - 1, points).astype(int))
    return Series(series.step[keep], series.value[keep])


def drawn(rate: float, run: Run | None, series: Series) -> dict:
    seed = None if run is None else run.seed
    values = [short(value) for value in series.value.tolist()]
    return {"rate": rounded(rate), "mean": run is None, "seed": seed, "x": series.step.tolist(), "y": values}


def short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def costs(results: dict) -> list[dict]:
    """Each rate's cost at the end and at its best checkpoints; of diverged ones that of the last finite loss."""
    found = []
    for row in results["rates"]:
        best = row["learning_rate"] == results["best_rate"]
        end, checkpoint = row["difference"]["end"], row["difference"]["best"]
        lost = None
        if row["diverged"] and None not in (row["last_eval"]["mean"], results["best_loss"]):
            lost = row["last_eval"]["mean"] - results["best_loss"]
        found.append(
            {
                "rate": row["learning_rate"],
                "best": best,
                "end": None if end is None or row["basin"]["excess"] is None else end["mean"],
                "interval": None if end is None else end["interval"],
                "checkpoint": None if checkpoint is None else checkpoint["mean"],
                "diverged": row["diverged"] > 0,
                "lost": lost,
                "ended": row["final_eval"]["n"] == row["n"],
            }
        )
    return found
