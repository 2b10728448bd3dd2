"""Guides: runs that follow the settings that others recommend, ranked and set against the best rate known.

Groups of differing recipes are never ranked against each other, with this exception. A guide is a setting as a whole:
what is compared is what following it costs here, not the effect of its rank or its α alone. And only what it stands for
may differ (sweep.GUIDED); a guide whose runs differ from the others in anything else is not compared, and says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis import rates, statistics
from analysis.curves import first_crossing
from analysis.files import number
from analysis.rates import mean_curve
from analysis.runs import Checkpoint, Run
from analysis.statistics import Estimate, Spread, spread
from analysis.study import Study
from analysis.sweep import GUIDED, asked_guides

FEWEST = 3  # guides between the rates of the grid, to say how far they lie from its curve
# On what guides of other ranks and α may lie as the grid's rates do.
AXES: dict[str, Callable[[float, float], float]] = {
    "η": lambda rate, alpha: rate,
    "α·η": lambda rate, alpha: alpha * rate,
}


@dataclass(frozen=True, eq=False)  # each is itself; runs hold arrays, which do not compare
class Setting:
    """A rate with its rank and α: of a guide, or the best known. Losses in nats per token."""

    name: str | None  # of the guide; None for a rate of the main grid
    learning_rate: float | None
    lora_r: float | None
    lora_alpha: float | None
    runs: tuple[Run, ...]
    diverged: int

    @property
    def ends(self) -> dict[object, Checkpoint]:
        return {} if self.diverged else rates.by_seed(list(self.runs), "end")

    def same_runs(self, other: "Setting") -> bool:
        return [run.id for run in self.runs] == [run.id for run in other.runs]

    def on(self, axis: str) -> float | None:
        known = (self.learning_rate, self.lora_alpha)
        return None if None in known else AXES[axis](*known)


def setting(part: Study, rate: float | None) -> Setting:
    """A study's runs at one rate."""
    runs = part.used.get(rate, [])
    config = runs[0].config if runs else {}
    r, alpha = number(config.get("lora_r")), number(config.get("lora_alpha"))
    return Setting(part.guide, rate, r, alpha, tuple(runs), sum(map(part.diverged, runs)))


def guides(study: Study) -> dict | None:
    """The guides' table, best first, what they are set against, and on which axis they lie; None without guides."""
    if not study.guides:
        return None
    found = [(part, setting(part, next(iter(part.used), None))) for part in study.guides]
    compared = [one for part, one in found if one.ends and not other_than_guided(study, part)]
    best = setting(study, study.best_rate)
    candidates = compared if study.guide else [*([best] if best.ends else []), *compared]
    width, excesses = study.basin_width, bounds(candidates)
    rows = [
        row(study, part, one, best, excesses[candidates.index(one)] if one in candidates else None)
        for part, one in found
    ]
    rows.sort(
        key=lambda x: math.inf if x["final_eval"]["mean"] is None or not x["compared"] else x["final_eval"]["mean"]
    )
    regrets = {x["name"]: x["regret"]["mean"] for x in rows if x["regret"]}
    inside = [] if study.guide else within(study, [(one, regrets[one.name]) for one in compared if one.name in regrets])
    missing = [name for name in asked_guides(study.sweeps) if name not in {x["name"] for x in rows}]
    return {
        "best": place(best) | {"name": best.name, "loss": study.best_loss},
        "width": width,
        "rows": rows,
        "missing": missing,
        "ranks": across_ranks(rows),
        "between": len(inside),
        "distance": {axis: distance(axis, study, inside) for axis in AXES} if len(inside) >= FEWEST else {},
    }


def place(one: Setting) -> dict:
    return {key: getattr(one, key) for key in GUIDED} | {"axes": {axis: one.on(axis) for axis in AXES}}


def other_than_guided(study: Study, part: Study) -> dict:
    """The settings, beside those that a guide stands for, in which it differs from the main grid."""
    return {key: value for key, value in part.differs.items() if key not in GUIDED} if part is not study else {}


def bounds(candidates: list[Setting]) -> list[tuple[float, float] | None]:
    """For each setting the interval of its loss above the lowest, whichever that is (statistics.excess)."""
    examples = rates.example_set([run for one in candidates for run in one.runs])
    pairs = {
        (i, j): statistics.difference(a.ends, b.ends, *examples)
        for i, a in enumerate(candidates)
        for j, b in enumerate(candidates)
        if i != j
    }
    return [statistics.excess(i, pairs, len(candidates)) for i in range(len(candidates))]


def row(study: Study, part: Study, one: Setting, best: Setting, excess: tuple[float, float] | None) -> dict:
    """One guide. regret: its loss − the best known's, by seed; steps lost: how much sooner the best known is there."""
    runs = list(one.runs)
    regret = None
    if one.ends and best.ends and not one.same_runs(best):
        regret = statistics.difference(one.ends, best.ends, *rates.example_set([*runs, *best.runs]))
    differs, source = other_than_guided(study, part), runs[0].config.get("guide_source") if runs else None
    source = source if isinstance(source, dict) else {}
    ends: Spread = spread([end.loss for end in one.ends.values()])
    return {
        "name": one.name,
        "source": {key: value for key, value in source.items() if isinstance(value, str)},
        **place(one),
        "n": len(runs),
        "diverged": one.diverged,
        "compared": bool(one.ends) and not differs,
        "differs": differs,
        "final_eval": {"mean": ends.mean, "sd": ends.sd, "n": ends.n},
        "regret": None
        if regret is None or differs
        else {"mean": regret.mean, "interval": regret.interval, "covers": regret.covers},
        "steps_lost": None if regret is None or differs else steps_lost(study, best, regret),
        "verdict": statistics.basin_verdict(excess, study.basin_width) if excess and study.basin_width else "undecided",
        "behaviours": rates.count([part.verdicts[run.id].behaviour for run in runs]),
    }


def steps_lost(study: Study, best: Setting, regret: Estimate) -> dict | None:
    """Of the planned steps, those that were left when the best known's mean curve passed the guide's final loss."""
    curve = mean_curve(list(best.runs)).between(1, np.inf)
    if not len(curve):
        return None

    def lost(above: float) -> float:
        return max(0.0, float(curve.step[-1]) - first_crossing(curve, float(curve.value[-1]) + max(0.0, above)))

    interval = None if regret.interval is None else [lost(bound) for bound in regret.interval]
    return {"mean": lost(regret.mean), "interval": interval}


def across_ranks(rows: list[dict]) -> dict | None:
    """The most guides that differ in nothing but their rank: its values, and the range of their final losses."""
    alike: dict[tuple, list[dict]] = {}
    for x in rows:
        if x["compared"]:
            alike.setdefault((x["learning_rate"], x["lora_alpha"]), []).append(x)
    most = max(alike.values(), key=len, default=[])
    if len({x["lora_r"] for x in most}) < 2:
        return None
    losses = [x["final_eval"]["mean"] for x in most]
    return {
        "lora_r": sorted({x["lora_r"] for x in most}),
        "learning_rate": most[0]["learning_rate"],
        "lora_alpha": most[0]["lora_alpha"],
        "range": max(losses) - min(losses),
    }


def distance(axis: str, study: Study, inside: list[tuple[Setting, float]]) -> float:
    """Root mean square, in nats, of the guides' regret − the grid's cost at the same place of an axis.

    The grid's cost between its rates is interpolated in the axis's logarithm.
    """
    x, cost = curve(axis, study)
    gaps = [regret - np.interp(math.log(one.on(axis)), x, cost) for one, regret in inside]
    return float(np.sqrt(np.mean(np.square(gaps))))


def curve(axis: str, study: Study) -> tuple[np.ndarray, np.ndarray]:
    """The grid's rates (m,), as logarithms of their place on an axis, and what each costs (m,)."""
    grid = [(setting(study, row.learning_rate).on(axis), row.excess) for row in study.rows if row.excess is not None]
    x, cost = np.array([point for point in grid if point[0] is not None], float).reshape(-1, 2).T
    return np.log(x), cost


def within(study: Study, compared: list[tuple[Setting, float]]) -> list[tuple[Setting, float]]:
    """The guides, with their regret, that lie between rates of the grid half a decade or less apart, on every axis."""

    def lies(one: Setting, axis: str) -> bool:
        (x, _), at = curve(axis, study), one.on(axis)
        if at is None or np.isclose(x, math.log(at), rtol=0, atol=1e-6).any():
            return at is not None
        right = int(np.searchsorted(x, math.log(at)))
        return 0 < right < len(x) and bool(x[right] - x[right - 1] <= math.log(statistics.COARSE))

    return [(one, regret) for one, regret in compared if all(lies(one, axis) for axis in AXES)]
