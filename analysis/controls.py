"""Controls: groups of runs that differ from the main grid in a setting or two, beside it, rate by rate."""

import math
from dataclasses import dataclass

import numpy as np

from analysis import rates, statistics
from analysis.behaviour import captured_gain
from analysis.curves import first_crossing
from analysis.runs import Run, Series
from analysis.statistics import Estimate, Spread, spread
from analysis.study import Study


@dataclass(frozen=True)
class Point:
    """One rate of a control against the same rate of the main grid."""

    learning_rate: float
    runs: int
    diverged: int
    final_eval: Spread
    main_final_eval: Spread
    difference: Estimate | None  # control − main, by seed, at the end
    by_seed: list[float]  # the same of each seed that both have
    best_difference: Estimate | None  # at each run's best checkpoint
    gain: float | None  # G of both, by the main grid's l0 and l*
    main_gain: float | None
    update_ratio: Spread
    main_update_ratio: Spread
    main_at_its_size: float | None  # the main grid's eval loss when its update was as large as the control's at its end
    stable_rank: Spread
    main_stable_rank: Spread
    behaviours: dict[str, int]


def control(main: Study, other: Study) -> list[Point]:
    """The rates of a group beside the main grid; differences where the main grid has the rate too."""
    return [point(main, other, rate, runs) for rate, runs in other.used.items()]


def point(main: Study, other: Study, rate: float, runs: list[Run]) -> Point:
    twins = main.at(rate)
    examples = rates.example_set([*runs, *twins])
    ends, main_ends = rates.by_seed(runs, "end"), rates.by_seed(twins, "end")
    bests, main_bests = rates.by_seed(runs, "best"), rates.by_seed(twins, "best")
    losses, main_losses = spread([end.loss for end in ends.values()]), spread([end.loss for end in main_ends.values()])
    return Point(
        learning_rate=rate,
        runs=len(runs),
        diverged=sum(other.diverged(run) for run in runs),
        final_eval=losses,
        main_final_eval=main_losses,
        difference=statistics.difference(ends, main_ends, *examples),
        by_seed=[ends[seed].loss - main_ends[seed].loss for seed in ends if seed in main_ends],
        best_difference=statistics.difference(bests, main_bests, *examples),
        gain=captured_gain(losses.mean, main.base_loss, main.best_loss),
        main_gain=captured_gain(main_losses.mean, main.base_loss, main.best_loss),
        update_ratio=last(runs, "eval/update_ratio"),
        main_update_ratio=last(twins, "eval/update_ratio"),
        main_at_its_size=at_the_size(twins, runs),
        stable_rank=last(runs, "eval/stable_rank"),
        main_stable_rank=last(twins, "eval/stable_rank"),
        behaviours=rates.count([other.verdicts[run.id].behaviour for run in runs]),
    )


def at_the_size(twins: list[Run], runs: list[Run]) -> float | None:
    """Mean eval loss of the main grid's runs where each was first as large as the other run of its seed at its end."""
    found = []
    for run, twin in ((run, twin) for run in runs for twin in twins if run.seed == twin.seed):
        size, loss = (twin[column].finite for column in ("eval/update_ratio", "eval/loss"))
        own = run["eval/update_ratio"].finite
        if not len(own) or not len(size) or not len(loss):
            return None
        step = first_crossing(Series(size.step, -size.value), -float(own.value[-1]))
        if math.isinf(step):
            return None
        found.append(float(np.interp(step, loss.step, loss.value)))
    return float(np.mean(found)) if found else None


def last(runs: list[Run], column: str) -> Spread:
    series = [run[column].finite for run in runs]
    return spread([float(one.value[-1]) for one in series if len(one)])
