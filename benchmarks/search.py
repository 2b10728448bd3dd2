"""How many runs does the best rate cost? experiment.py's search against others, on surfaces of known optimum:

    pip install --target /tmp/optuna optuna==5.0.0    # a peer, no requirement of the project
    PYTHONPATH=/tmp/optuna OMP_NUM_THREADS=1 python -m benchmarks.search

Draws docs/search.png and prints the tables of docs/search.md, which says what is what. With --tuning it uses the
surfaces on which the search was tuned, draws nothing, and needs no Optuna.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import guides
from analysis.figures import DPI, QUIET, STYLE
from analysis.refinement import Decision, Point, next_round
from analysis.statistics import basin_width, wilson
from benchmarks.surfaces import HELD_OUT, HIGH, LOW, ROOT, TUNING, Surface, circumstances, drawn, recorded

START = (1e-5, 2e-4, 1e-3, 5e-3)  # sweep.yaml's grid: the search's first four runs
HALF_DECADES = [LOW * 10 ** (k / 2 + 0.05) for k in range(8)]
FULL = 3 * len(HALF_DECADES)  # runs of the full grid, three seeds
BUDGETS = [4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24]  # runs in all, the starting grid's included
HALF = FULL // 2
SHOWN = [8, 10, HALF, FULL]
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
    sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=len(START))
    # Hyperband deals trials to its brackets by a hash of the study's name, which is random by default.
    return optuna.create_study(sampler=sampler, study_name=f"surface {number}", **more)


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


def measure(surfaces: list[Surface], peers: dict) -> dict[str, np.ndarray]:
    """Of the search and each peer the regret in nats (surfaces, BUDGETS).

    Beside them, of the search: "inside", whether its interval covers the best rate, and "spent", the runs it made.
    """
    found: dict[str, list] = {name: [] for name in ["search", *peers, "inside", "spent"]}
    start, tenth = time.monotonic(), math.ceil(len(surfaces) / 10)
    for number, surface in enumerate(surfaces):
        decisions = [search(surface, budget) for budget in BUDGETS]
        untrained = surface.base - float(surface.truth.min())  # what remains where no rate ended
        rates = [decision.rate for decision, _ in decisions]
        found["search"].append([untrained if math.isnan(rate) else surface.regret(rate) for rate in rates])
        found["inside"].append([decision.low <= surface.best <= decision.high for decision, _ in decisions])
        found["spent"].append([len(points) for _, points in decisions])
        for name, peer in peers.items():
            rates = after(peer(surface, number), BUDGETS)
            found[name].append([math.nan if math.isnan(rate) else surface.regret(rate) for rate in rates])
        if (number + 1) % tenth == 0:
            seconds = time.monotonic() - start
            print(f"{number + 1} of {len(surfaces)} surfaces, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {name: np.array(rows) for name, rows in found.items()}


def share(regret: np.ndarray, epsilon: np.ndarray) -> str:
    """The share of surfaces whose regret is at most ε, with Wilson's interval."""
    count, n = int((regret <= epsilon).sum()), len(epsilon)
    low, high = wilson(count, n)
    return f"{100 * count / n:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"


def table(found: dict[str, np.ndarray], names: list[str], epsilon: np.ndarray) -> str:
    """Every peer at the budgets SHOWN."""
    places = [BUDGETS.index(budget) for budget in SHOWN]
    head = [f"{budget} runs" for budget in SHOWN] + [f"regret after {HALF}: median, 95 % below"]
    lines = ["| | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for name in names:
        regrets = found[name]
        cells = [share(regrets[:, i], epsilon) if np.isfinite(regrets[:, i]).any() else "" for i in places]
        middle, most = np.nanquantile(regrets[:, BUDGETS.index(HALF)], [0.5, 0.95])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {middle:.4f}, {most:.3f} |")
    return "\n".join(lines)


def parts(surfaces: list[Surface]) -> dict[str, np.ndarray]:
    """Which surfaces belong to each family, and which are hard for other reasons."""
    families = np.array([surface.name for surface in surfaces])
    found = {family: families == family for family in dict.fromkeys(families)}
    noisy = np.array([surface.sd(np.array([surface.best]))[0] > 0.015 for surface in surfaces])
    near = np.array([surface.edge_sd > 0 and surface.edge < surface.best * 10**0.5 for surface in surfaces])
    return found | {"SD over seeds above 0.015": noisy, "edge of each seed's own, within half a decade": near,
                    "all": np.ones(len(surfaces), bool)}  # fmt: skip


def by_part(found: dict[str, np.ndarray], surfaces: list[Surface], epsilon: np.ndarray) -> str:
    """The search alone: how often its regret is at most ε, its interval covers the best rate, and what it runs."""
    lines = ["| | n | " + " | ".join(f"{budget} runs: right, covers, run" for budget in SHOWN) + " |",
             "|" + "---|" * (len(SHOWN) + 2)]  # fmt: skip
    for part, rows in parts(surfaces).items():
        if not rows.any():
            continue
        cells = []
        for i in map(BUDGETS.index, SHOWN):
            right, inside = found["search"][rows, i] <= epsilon[rows], found["inside"][rows, i]
            spent = found["spent"][rows, i].mean()
            cells.append(f"{100 * right.mean():.1f} %, {100 * inside.mean():.1f} %, {spent:.1f}")
        lines.append(f"| {part} | {rows.sum()} | " + " | ".join(cells) + " |")
    low, high = wilson(int(inside.sum()), len(inside))
    return "\n".join(lines) + f"\n\n95 % interval of the last coverage: [{100 * low:.1f}, {100 * high:.1f}] %"


def tinker(surfaces: list[Surface]) -> str:
    """The regret of Tinker's formula on recorded surfaces: without a model there is no formula."""
    entry = guides.entry("tinker")
    sizes = {"flagship": 768}  # of the hidden layers; all others are the starter's
    lines = []
    for name in dict.fromkeys(surface.name for surface in surfaces):
        surface = next(one for one in surfaces if one.name == name)
        rate = entry["learning_rate"] * (guides.HIDDEN_SIZE / sizes.get(name, 192)) ** entry["exponent"]["llama"]
        lines.append(
            f"| {name} | {rate:.2g} | {surface.best:.2g} | {surface.regret(rate):.3f} | {surface.epsilon:.3f} |"
        )
    return "\n".join(["| | Tinker's formula | best rate | regret | ε |", "|" + "---|" * 5, *lines])


COLOURS = {
    "search": "#0072B2",
    "half-decade grid": "#000000",
    "random": "#767676",
    "TPE": "#D55E00",
    "Hyperband + TPE": "#009E73",
    "LR range test": "#AA4499",
}  # Okabe and Ito's, and Tol's for the last one
MARKERS = dict(zip(COLOURS, "oDsv^X", strict=True))


def draw(found: dict[str, np.ndarray], names: list[str], epsilon: np.ndarray, path: Path) -> None:
    """The share within ε, and the regret that 95 % stay below, against the number of runs."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
        labels = {}
        for axes, value in (
            (left, lambda regret: 100 * (regret <= epsilon).mean()),
            (right, lambda regret: np.quantile(regret, 0.95)),
        ):
            ends = {}
            for name in names:
                known = [i for i in range(len(BUDGETS)) if np.isfinite(found[name][:, i]).any()]
                at, values = [BUDGETS[i] for i in known], [value(found[name][:, i]) for i in known]
                if name == "half-decade grid":
                    at, values = zip(*[(x, y) for x, y in zip(at, values, strict=True) if x % 8 == 0], strict=True)
                if name == "LR range test":
                    at, values = [1], values[:1]
                style = {"linewidth": 2.6, "markersize": 6, "zorder": 3} if name == "search" else {"linewidth": 1.4}
                line = "-" if len(at) > 3 else "--"
                axes.plot(at, values, line, marker=MARKERS[name], color=COLOURS[name], **style)
                ends[name] = (at[-1], values[-1])
            axes.set(xlabel="runs, the starting grid's included", xlim=(0, 32), xticks=range(0, 25, 4))
            labels[axes] = ends
            axes.axvline(HALF, color=QUIET, linestyle=":", linewidth=1.2)
        bands = [wilson(int((regret <= epsilon).sum()), len(epsilon)) for regret in found["search"].T]
        left.fill_between(BUDGETS, *(100 * np.array(bands).T), color=COLOURS["search"], alpha=0.15, linewidth=0)
        left.plot([0, FULL], [95, 95], color=QUIET, linestyle=":", linewidth=1.2)
        left.annotate("goal: 95 %", (0.2, 95.4), fontsize=8, color=QUIET)
        left.annotate("half of the full grid's runs", (HALF + 0.2, left.get_ylim()[0] + 1), fontsize=8, color=QUIET)
        left.set_title("A  Surfaces on which the regret is at most ε (%)")
        right.set_title("B  Regret that 95 % of the surfaces stay below (nats)")
        right.set_yscale("log")
        ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
        right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        right.minorticks_off()
        figure.draw_without_rendering()
        for axes, ends in labels.items():
            label(axes, ends)
        figure.savefig(path, dpi=DPI)


def label(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Each line's name right of its end, at least 11 points above the one below; that of a single point above it."""
    points = 72 / axes.figure.dpi
    last = max(x for x, _ in ends.values())
    heights = {name: points * axes.transData.transform(end)[1] for name, end in ends.items()}
    below = -math.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        alone = ends[name][0] < last
        shift = (-3, 15) if alone else (8, max(0.0, below + 11 - height))
        below = below if alone else height + shift[1]
        text = name.replace(" test", "\ntest")
        axes.annotate(text, ends[name], xytext=shift, textcoords="offset points", va="center", color=COLOURS[name],
                      fontsize=9, weight="bold" if name == "search" else "normal")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", action="store_true", help="the surfaces on which the search was tuned")
    parser.add_argument("--count", type=int, default=200, help="surfaces of each family; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="of each recorded surface; default: %(default)s")
    options = parser.parse_args()
    peers = {} if options.tuning else PEERS
    packages = ["numpy", "scipy"] + ([] if options.tuning else ["optuna"])
    print(json.dumps(circumstances("python -m benchmarks.search", *packages)), flush=True)
    families = drawn(TUNING, options.count, 1) if options.tuning else drawn(HELD_OUT, options.count, 4)
    for title, surfaces in (("families", families), ("recorded", recorded(not options.tuning, options.repeats))):
        found = measure(surfaces, peers)
        epsilon = np.array([surface.epsilon for surface in surfaces])
        names = ["search", *peers]
        print(f"\n{title}\n", table(found, names, epsilon), "", by_part(found, surfaces, epsilon), sep="\n", flush=True)
        if title == "recorded":
            print("", tinker(surfaces), sep="\n")
        elif not options.tuning:
            draw(found, names, epsilon, ROOT / "docs/search.png")


if __name__ == "__main__":
    main()
