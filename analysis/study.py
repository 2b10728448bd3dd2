"""The study: which runs are compared, each run's verdict, and the comparison of the rates."""

import json
import math
from dataclasses import dataclass, field

import numpy as np

from analysis import behaviour, statistics
from analysis.behaviour import Evidence, Verdict
from analysis.curves import first_crossing
from analysis.runs import RECIPE_KEYS, Run


@dataclass
class Study:
    """Everything that the report's numbers derive from. Losses in nats per token; rates ascending."""

    sweeps: list[dict]
    runs: list[Run]
    recipe: dict  # what the compared runs have in common
    differing: dict[str, list]  # recipe keys with more than one value over all runs
    used: dict[float, list[Run]]  # rate -> its runs that count, one for each seed
    excluded: dict[str, str]  # run id -> why it does not enter the statistics
    base_loss: float | None  # l0
    evidence: dict[str, Evidence]
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    feasible: dict[float, list[Run]] = field(default_factory=dict)
    comparison: statistics.Comparison | None = None
    basin_width: float | None = None  # ε

    @property
    def rates(self) -> list[float]:
        return sorted(self.used)

    @property
    def planned_steps(self) -> int | None:
        return next((r.planned_steps for runs in self.used.values() for r in runs if r.planned_steps), None)

    @property
    def best(self) -> int | None:
        """Index of the best rate in the comparison."""
        return None if self.comparison is None else int(self.comparison.loss.argmin())

    @property
    def best_rate(self) -> float | None:
        return None if self.best is None else self.comparison.rates[self.best]

    @property
    def best_loss(self) -> float | None:
        """l*: the best rate's mean final eval loss."""
        return None if self.best is None else float(self.comparison.loss[self.best])

    @property
    def infeasible(self) -> list[float]:
        """Rates of which at least one run diverged."""
        return [rate for rate, runs in self.used.items() if any(self.diverged(r) for r in runs)]

    @property
    def seeds(self) -> int:
        """Seeds of each compared rate."""
        return 0 if self.comparison is None else self.comparison.n

    def diverged(self, run: Run) -> bool:
        return run.id in self.verdicts and self.verdicts[run.id].behaviour == "diverged"

    def at(self, rate: float) -> list[Run]:
        """The runs that count at this rate, up to rounding; [] if it was not swept."""
        return next((runs for swept, runs in self.used.items() if math.isclose(swept, rate, rel_tol=1e-6)), [])

    def index(self, rate: float) -> int | None:
        """The rate's place in the comparison; None if it was not swept or is not feasible."""
        rates = [] if self.comparison is None else self.comparison.rates
        return next((i for i, swept in enumerate(rates) if math.isclose(swept, rate, rel_tol=1e-6)), None)


def build(sweeps: list[dict], runs: list[Run]) -> Study:
    """Choose the runs that are compared, judge each run, compare the rates."""
    swept = {key for sweep in sweeps for key in parameters(sweep)}
    keys = [*RECIPE_KEYS, *sorted(swept - set(RECIPE_KEYS) - {"learning_rate", "seed"})]
    recipe, differing = common_recipe(runs, keys)
    used, excluded = choose(runs, recipe)
    chosen = [r for group in used.values() for r in group]
    bases = [r.base_loss for r in chosen if r.base_loss is not None]
    base_loss = float(np.mean(bases)) if bases else None
    evidence = {run.id: Evidence(run, reference(run, used), base_loss) for run in runs}
    study = Study(sweeps, runs, recipe, differing, used, excluded, base_loss, evidence)
    early = {run.id: behaviour.dynamics(evidence[run.id]) for run in runs}
    study.feasible = {
        rate: valued
        for rate, group in used.items()
        if not any(early[r.id] and early[r.id].behaviour == "diverged" for r in group)
        and (valued := [r for r in group if r.complete and r.final_eval_loss is not None])
    }
    study.comparison = statistics.compare(study.feasible)
    if study.comparison is not None:
        study.basin_width = statistics.basin_width(study.best_loss, statistics.seed_sd(study.feasible))
    for run in runs:
        place = None if run.learning_rate is None else study.index(run.learning_rate)
        evidence[run.id].best_loss = study.best_loss
        if place is not None:
            loss = study.comparison.loss
            evidence[run.id].near_best = bool(loss[place] - loss.min() < study.basin_width)
        study.verdicts[run.id] = early[run.id] or behaviour.outcome(evidence[run.id])
    return study


def parameters(sweep: dict) -> dict:
    """The `parameters` of a sweep's configuration; {} if it has none."""
    config = sweep.get("config")
    found = config.get("parameters") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def values(parameter: object) -> list:
    """The values of one parameter of a grid, whether given as {"values": [...]}, {"value": ...} or alone."""
    found = parameter if isinstance(parameter, dict) else {"value": parameter}
    found = found.get("values", [found.get("value")])
    return [value for value in found if value is not None] if isinstance(found, list) else []


def common_recipe(runs: list[Run], keys: list[str]) -> tuple[dict, dict[str, list]]:
    """The recipe of most runs, and the keys in which runs differ with their values."""

    def signature(run: Run) -> str:
        return json.dumps([run.config.get(key) for key in keys], default=str)

    with_config = [run for run in runs if run.learning_rate is not None] or runs
    signatures = [signature(run) for run in with_config]
    most = max(signatures, key=signatures.count, default=None)
    main = with_config[signatures.index(most)] if most is not None else None
    recipe = {key: main.config[key] for key in keys if key in main.config} if main else {}
    values = {key: {json.dumps(r.config[key], default=str) for r in runs if key in r.config} for key in keys}
    differing = {key: [json.loads(v) for v in sorted(found)] for key, found in values.items() if len(found) > 1}
    return recipe, differing


def choose(runs: list[Run], recipe: dict) -> tuple[dict[float, list[Run]], dict[str, str]]:
    """The run that counts for each (rate, seed), and why each other run does not.

    Of repeats the last one that reached its end (or diverged) counts, else the last.
    """
    used: dict[float, dict] = {}
    excluded = {}
    for run in runs:
        differs = [key for key, value in recipe.items() if key in run.config and run.config[key] != value]
        if run.learning_rate is None:
            excluded[run.id] = "no learning rate in its config"
        elif differs:
            excluded[run.id] = "another recipe: " + ", ".join(f"{key} = {run.config[key]}" for key in differs)
        else:
            slot = used.setdefault(run.learning_rate, {})
            before = slot.get(run.seed)
            ended = [behaviour.incomplete(Evidence(r)) is None for r in (before, run) if r]
            if before is None or ended[1] >= ended[0]:
                slot[run.seed], loser, winner = run, before, run
            else:
                loser, winner = run, before
            if loser is not None:
                excluded[loser.id] = f"repeated by run {winner.id}"
    return {rate: list(slot.values()) for rate, slot in sorted(used.items())}, excluded


def reference(run: Run, used: dict[float, list[Run]]) -> Run | None:
    """The lowest rate's run of the same seed, if it is whole and finite: the yardstick of the paired ratio."""
    if not used or run.seed is None:
        return None
    lowest = next((r for r in used[min(used)] if r.seed == run.seed), None)
    whole = lowest is not None and lowest.complete and np.isfinite(lowest["train/loss"].value).all()
    return lowest if whole else None


def median_steps(study: Study, rate: float, q: float) -> float | None:
    """Median over seeds of the steps to l0 − q(l0 − l*); a miss is infinite and stays in; None if not defined."""
    runs = study.at(rate)
    if not runs or None in (study.base_loss, study.best_loss) or study.base_loss <= study.best_loss:
        return None
    target = study.base_loss - q * (study.base_loss - study.best_loss)
    steps = sorted(first_crossing(run["eval/loss"], target) for run in runs)
    low, high = steps[(len(steps) - 1) // 2], steps[len(steps) // 2]
    return math.inf if math.isinf(high) else (low + high) / 2


def gain_interval(study: Study, place: int) -> tuple[float, float] | None:
    """The 95 % interval of G of one rate, l0 and the best rate's loss resampled along."""
    c = study.comparison
    if c is None or c.replicates is None or c.base_replicates is None:
        return None
    reach = c.base_replicates - c.replicates.min(axis=1)
    if (reach <= 0).any():
        return None
    return statistics.interval((c.base_replicates - c.replicates[:, place]) / reach)
