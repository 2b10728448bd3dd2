"""The search for the best rate as sweeps: the rounds that were run, what each asked and cost, and what comes next.

A round is a sweep named round-1, round-2, ...; its description is what it asks. So the runs alone tell the story.
"""

import re

from analysis import refinement, statistics
from analysis.refinement import Decision, Point, Round
from analysis.runs import Run
from analysis.study import Study, device_seconds

NAME = re.compile(r"round-(\d+)")


def number_of(sweep: dict) -> int | None:
    """Which round a sweep is; None for another sweep."""
    config = sweep.get("config")
    found = NAME.fullmatch(str(config.get("name"))) if isinstance(config, dict) else None
    return int(found[1]) if found else None


def made(study: Study) -> list[dict]:
    """The sweeps that are rounds, in their order."""
    return sorted((sweep for sweep in study.sweeps if number_of(sweep)), key=number_of)


def runs_of(study: Study, sweeps: list[dict]) -> list[Run]:
    ids = {sweep["id"] for sweep in sweeps}
    return [run for run in study.runs if run.sweep in ids]


def budget_left(study: Study, budget: int | None) -> int:
    """How many more runs may be spent of `budget`; of as many as the rounds did not make if that is None.

    A run that was interrupted and begun anew counts once.
    """
    points = {(run.sweep, run.learning_rate, run.seed) for run in study.runs if run.learning_rate is not None}
    ids = {sweep["id"] for sweep in made(study)}
    spent = sum(sweep in ids for sweep, *_ in points)
    return (len(points) - spent if budget is None else budget) - spent


def following(study: Study, left: int | None = None) -> Round | Decision | None:
    """What to run next with at most `left` runs (None: however many), or the decision; None if nothing is known yet."""
    if not study.points:
        return None
    return refinement.next_round(study.points, 10**9 if left is None else left, width(study))


def width(study: Study) -> float:
    return statistics.BASIN_NATS if study.basin_width is None else study.basin_width


def story(study: Study) -> dict | None:
    """The grid and each round: what was asked, what it cost, what was known then; and why it stops, or what is open."""
    asked = made(study)
    if not asked:
        return None
    grid = [sweep for sweep in study.sweeps if sweep not in asked]
    known, rows = [], []
    for name, sweeps in [("grid", grid), *((sweep["config"]["name"], [sweep]) for sweep in asked)]:
        runs = runs_of(study, sweeps)
        known += runs
        rows.append(
            {
                "name": name,
                "asked": sweeps[0]["config"].get("description") if name != "grid" else None,
                "rates": sorted({run.learning_rate for run in runs if run.learning_rate is not None}),
                "seeds": sorted({run.seed for run in runs if run.seed is not None}),
                "runs": len(runs),
                "device_seconds": device_seconds(runs),
                **then(study, known),
            }
        )
    found = following(study)
    stop = found if isinstance(found, Decision) else None
    return {
        "rounds": rows,
        "rate": rows[-1]["rate"],
        "runs": sum(row["runs"] for row in rows[1:]),
        "why": stop.why if stop else None,
        "next": found.asked if isinstance(found, Round) else None,
    }


def then(study: Study, runs: list[Run]) -> dict:
    """The rate to use and the interval of the best one, as these runs tell it."""
    known = {(run.learning_rate, run.seed or 0) for run in runs if run.id not in study.excluded}
    points: list[Point] = [point for point in study.points if point[:2] in known]
    found = refinement.place(points, width(study))
    return {"rate": chosen(study, points), "interval": None if found is None else [found.low, found.high]}


def chosen(study: Study, points: list[Point]) -> float | None:
    """The rate that the search would use; None if none ended."""
    losses = refinement.feasible_of(refinement.by_rate(points))
    return refinement.choice(losses, width(study)) if losses else None
