"""For N steps use η: the best rate against the budget, as a line through the budgets that were run, or why none.

Every prefix of a run at a constant rate is a run of that length, so a grid's curves say which rate is best after each
evaluation (`statistics.best_by_budget`). Where a parabola places that rate, it falls about as a power of the budget:
log10 η = a + b·log10 N, fitted by least squares.
"""

import math

import numpy as np

from analysis.statistics import COARSE, over_seeds, with_interval

APART = 2**0.5  # factor between the budgets of the line: closer ones share most of their steps
FEWEST = 4  # of those: a line always fits through two
FIRST_SHARE = 0.1  # of the steps, below which a budget is all warm-up
REACH = 2.0  # times the longest run: no further is anything said
WITHIN = 1.5  # factor to either side within which a rate must be known, else it is not


def law(
    rows: list[dict], by_seed: list[list[dict]], planned: int | None, schedule: str, one_pass: float | None
) -> dict:
    """The line, and what it says for each budget that was run and for one beyond; or the reason for none.

    rows: of best_by_budget for the mean curves, by_seed: for those of each seed that every rate has. one_pass: steps.
    "for": {"steps", "rate", "interval" (None without), "run" (whether so many steps were run)}; "check": what the
    budgets up to half would have said of the longest, beside the parabola there.
    """
    found: dict = {"reason": None, "power": None, "budgets": [], "for": [], "check": None, "seeds": len(by_seed)}
    if not schedule.startswith("constant") or not planned:
        return found | {"reason": "schedule"}
    points = placed(rows, planned)
    if len(points) < FEWEST:
        return found | {"reason": "coarse", "budgets": [step for step, _ in points]}
    seeds = [line for each in by_seed if len(line := placed(each, planned)) >= FEWEST]
    first, last = points[0][0], points[-1][0]
    found |= {"budgets": [step for step, _ in points], "power": fit(points)[0], "check": check(points)}
    steps = [row["step"] for row in rows if first <= row["step"] <= last]
    told = [said(points, seeds, step) | {"run": True} for step in steps]
    beyond = REACH * last if one_pass is None or last > one_pass else min(REACH * last, one_pass)
    if found["check"] and apart(found["check"]) <= WITHIN and beyond > 1.1 * last:
        told.append(said(points, seeds, math.floor(beyond)) | {"run": False})
    known = [x for x in told if x["interval"] and x["interval"][1] / x["rate"] <= WITHIN]
    return found | ({"for": known} if known and first < last else {"reason": "wide"})


def placed(rows: list[dict], planned: int) -> list[tuple[int, float]]:
    """Budgets APART from each other, the longest first chosen, at which a parabola places the best rate; and that rate.

    It does with a rate on each side of the best, half a decade away or less.
    """
    found: list[tuple[int, float]] = []
    for row in reversed(rows):
        near = row["between"] is not None and row["gap"] <= COARSE and row["step"] >= FIRST_SHARE * planned
        if near and (not found or row["step"] * APART <= found[-1][0] * (1 + 1e-9)):
            found.append((row["step"], row["between"]))
    return found[::-1]


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """b and a of log10 η = a + b·log10 N."""
    x, y = np.log10(np.array(points, float)).T
    b, a = np.polyfit(x, y, 1)
    return float(b), float(a)


def said(points: list[tuple[int, float]], seeds: list[list[tuple[int, float]]], steps: int) -> dict:
    """The line's rate for a budget, with the interval of a new budget's (from the line and, if several, the seeds)."""
    x, y = np.log10(np.array(points, float)).T
    b, a = fit(points)
    at = math.log10(steps)
    freedom = len(x) - 2
    residual = float(((y - a - b * x) ** 2).sum()) / freedom
    leverage = 1 + 1 / len(x) + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    spread = over_seeds(np.array([fit(each)[1] + fit(each)[0] * at for each in seeds]))
    middle = a + b * at
    interval = with_interval(
        middle, [(residual * leverage, freedom), *spread], seeds=1, examples=0, clusters=0
    ).interval
    return {"steps": steps, "rate": 10**middle, "interval": None if interval is None else [10**end for end in interval]}


def check(points: list[tuple[int, float]]) -> dict | None:
    """What the budgets up to half the longest would have said of that; None if they are too few for a line."""
    last, true = points[-1]
    early = [point for point in points if point[0] * 2 <= last]
    if len(early) < 3:
        return None
    b, a = fit(early)
    return {"from": early[-1][0], "steps": last, "said": 10 ** (a + b * math.log10(last)), "is": true}


def apart(check: dict) -> float:
    return max(check["said"] / check["is"], check["is"] / check["said"])
