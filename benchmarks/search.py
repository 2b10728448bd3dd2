"""How many runs does the best rate cost? experiment.py's search against others, on surfaces of known optimum:

    pip install --target /tmp/optuna optuna==5.0.0    # a peer, no requirement of the project
    PYTHONPATH=/tmp/optuna OMP_NUM_THREADS=1 python -m benchmarks.search

Draws docs/search.png and prints the tables of docs/search.md, which says what is what. With --tuning it uses the surfaces
on which the search was tuned, draws nothing, and needs no Optuna.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

import guides
from analysis.refinement import Decision, Point, next_round
from analysis.statistics import basin_width, wilson
from benchmarks.grid import ROOT, call
from benchmarks.surfaces import FILE, HELD_OUT, HIGH, LOW, TUNING, Surface, drawn, machine, recorded

START = (1e-5, 2e-4, 1e-3, 5e-3)  # sweep.yaml's grid: the search's first four runs
HALF_DECADES = [LOW * 10 ** (k / 2 + 0.05) for k in range(8)]
FULL = 3 * len(HALF_DECADES)  # runs of the full grid, three seeds
BUDGETS = [*range(4, 17), 20, 24]  # runs in all, the starting grid's included
SHOWN = [8, 10, 12, 24]
RUNGS = (1 / 9, 1 / 3, 1.0)  # shares of a run's steps after which Hyperband may stop it


def loss_of(surface: Surface, rate: float, seed: int = 0, share: float = 1.0) -> float:
    """What the search and its peers see: infinite if the run diverged or ended worse than untrained."""
    loss = surface.run(rate, seed, share)
    return loss if loss < surface.base else math.inf


def width(points: list[Point]) -> float:
    """ε as a report would have it of these runs: with the median of the rates' SDs over seeds, where they have some."""
    by_rate: dict[float, list[float]] = {}
    for rate, _, loss in points:
        by_rate.setdefault(rate, []).append(loss)
    means = [np.mean(losses) for losses in by_rate.values() if np.isfinite(losses).all()]
    sds = [np.std(losses, ddof=1) for losses in by_rate.values() if len(losses) > 1 and np.isfinite(losses).all()]
    return basin_width(float(min(means, default=1.0)), float(np.median(sds)) if sds else None)


def search(surface: Surface, budget: int) -> tuple[Decision, list[Point]]:
    """The decision of experiment.py --refine after the starting grid and the runs that it asked for."""
    points = [Point(rate, 0, loss_of(surface, rate)) for rate in START]
    while not isinstance(found := next_round(points, budget - len(points), width(points)), Decision):
        points += [Point(rate, seed, loss_of(surface, rate, seed)) for rate in found.rates for seed in found.seeds]
    return found, points


Trail = Iterator[tuple[float, float]]  # runs so far, and the rate that is best by them


def leader(trials: list[tuple[float, float]]) -> float:
    return min(trials, key=lambda trial: trial[1])[0]


def grid(surface: Surface, _: int) -> Trail:
    """Half-decade rates with one, two and three seeds."""
    total = np.zeros(len(HALF_DECADES))
    for seed in range(3):
        total += [loss_of(surface, rate, seed) for rate in HALF_DECADES]
        yield (seed + 1) * len(HALF_DECADES), HALF_DECADES[int(total.argmin())]


def at_random(surface: Surface, number: int) -> Trail:
    draw, trials = np.random.default_rng([number, 1]), []
    for count in range(1, FULL + 1):
        rate = LOW * (HIGH / LOW) ** draw.uniform()
        trials.append((rate, loss_of(surface, rate)))
        yield count, leader(trials)


def study_of(number: int, **more):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=number, n_startup_trials=len(START)), **more)


def tpe(surface: Surface, number: int) -> Trail:
    """Optuna's TPE after the same starting grid (its default, ten random trials first, is worse)."""
    study, trials = study_of(number), []
    for rate in START:
        study.enqueue_trial({"rate": rate})
    for count in range(1, FULL + 1):
        trial = study.ask()
        rate = trial.suggest_float("rate", LOW, HIGH, log=True)
        trials.append((rate, loss_of(surface, rate)))
        study.tell(trial, trials[-1][1])
        yield count, leader(trials)


def hyperband(surface: Surface, number: int) -> Trail:
    """Optuna's Hyperband with TPE: a run may be stopped after a ninth or a third of its steps, and costs no more."""
    import optuna

    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9, reduction_factor=3)
    study, cost, reached = study_of(number, pruner=pruner), 0.0, {share: [] for share in RUNGS}
    while cost < FULL:
        trial = study.ask()
        rate = trial.suggest_float("rate", LOW, HIGH, log=True)
        loss, before = math.inf, 0.0
        for share in RUNGS:
            loss, cost, before = loss_of(surface, rate, share=share), cost + share - before, share
            reached[share].append((rate, loss))
            trial.report(loss, round(9 * share))
            if share < 1 and (trial.should_prune() or math.isinf(loss)):
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, loss)
        yield cost, leader(next(reached[share] for share in reversed(RUNGS) if reached[share]))


def range_test(surface: Surface, _: int) -> Trail:
    """A tenth of the rate at which a short run's loss is lowest; for a ramp that spends a ninth of a run there."""
    rates = np.geomspace(LOW, HIGH, 100)
    losses = [loss_of(surface, float(rate), share=RUNGS[0]) for rate in rates]
    yield 1, float(rates[int(np.argmin(losses))]) / 10


PEERS = {"half-decade grid": grid, "random": at_random, "TPE": tpe, "Hyperband + TPE": hyperband,
         "LR range test": range_test}  # fmt: skip


def after(trail: Trail, budgets: list[int]) -> list[float]:
    """The leading rate once each budget is spent; NaN before the first."""
    cost, rates = zip(*trail, strict=True)
    places = np.searchsorted(np.array(cost) - 1e-9, budgets, side="right") - 1
    return [rates[place] if place >= 0 else math.nan for place in places]


def measure(surfaces: list[Surface], peers: dict, say=print) -> dict[str, np.ndarray]:
    """Regret of each peer and of the search, in nats: (surfaces, BUDGETS). "search" has further entries below."""
    found: dict[str, list] = {name: [] for name in ["search", *peers, "inside", "spent"]}
    told = time.monotonic()
    for number, surface in enumerate(surfaces):
        decisions = [search(surface, budget) for budget in BUDGETS]
        found["search"].append([surface.regret(decision.rate) for decision, _ in decisions])
        found["inside"].append([decision.low <= surface.best <= decision.high for decision, _ in decisions])
        found["spent"].append([len(points) for _, points in decisions])
        for name, peer in peers.items():
            rates = after(peer(surface, number), BUDGETS)
            found[name].append([surface.regret(rate) if rate == rate else math.nan for rate in rates])
        if time.monotonic() - told > 2:
            told = time.monotonic()
            say(f"  {number + 1} of {len(surfaces)} surfaces", end="\r", flush=True)
    return {name: np.array(rows) for name, rows in found.items()}


def share(regret: np.ndarray, epsilon: np.ndarray) -> str:
    """The share of surfaces whose regret is at most ε, with Wilson's interval."""
    count, n = int((regret <= epsilon).sum()), len(epsilon)
    low, high = wilson(count, n)
    return f"{100 * count / n:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"


def table(found: dict[str, np.ndarray], names: list[str], epsilon: np.ndarray) -> str:
    places = [BUDGETS.index(budget) for budget in SHOWN]
    head = [f"{budget} runs" for budget in SHOWN] + [f"regret after {SHOWN[2]}: median, 95 % below"]
    lines = ["| | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for name in names:
        regrets = found[name]
        cells = [share(regrets[:, i], epsilon) if np.isfinite(regrets[:, i]).any() else "" for i in places]
        middle, most = np.nanquantile(regrets[:, places[2]], [0.5, 0.95])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {middle:.4f}, {most:.3f} nats |")
    return "\n".join(lines)


def by_family(found: dict[str, np.ndarray], surfaces: list[Surface], epsilon: np.ndarray) -> str:
    """The search alone: how often it is right, its interval covers, and what it spends, by family."""
    families = [surface.name.split()[0] for surface in surfaces]
    lines = ["| | n | " + " | ".join(f"{budget} runs: right, covers, spent" for budget in SHOWN) + " |",
             "|" + "---|" * (len(SHOWN) + 2)]  # fmt: skip
    for family in [*dict.fromkeys(families), "all"]:
        rows = np.array([family in (name, "all") for name in families])
        cells = []
        for budget in SHOWN:
            i = BUDGETS.index(budget)
            right, inside = found["search"][rows, i] <= epsilon[rows], found["inside"][rows, i]
            cells.append(f"{100 * right.mean():.1f} %, {100 * inside.mean():.1f} %, {found['spent'][rows, i].mean():.1f}")
        lines.append(f"| {family} | {rows.sum()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", action="store_true", help="the surfaces on which the search was tuned")
    parser.add_argument("--count", type=int, default=200, help="surfaces of each family; default: %(default)s")
    options = parser.parse_args()
    surfaces = drawn(TUNING, options.count, 1) if options.tuning else drawn(HELD_OUT, options.count, 2)
    found = measure(surfaces, {} if options.tuning else PEERS)
    epsilon = np.array([surface.epsilon for surface in surfaces])
    names = ["search", *({} if options.tuning else PEERS)]
    print(table(found, names, epsilon), by_family(found, surfaces, epsilon), sep="\n\n")


if __name__ == "__main__":
    main()
