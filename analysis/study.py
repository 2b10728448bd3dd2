"""The study: which runs are compared, each run's verdict, the comparison of the rates, and what follows from it.

A Study is of one group of runs that share a recipe. `build` returns that of the main grid; the other groups (controls,
or what cannot be compared) are studies of their own in `beside`, and never enter its statistics. So are the runs that
follow a guide, one study for each guide; without a main grid the lowest guide's takes its place.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from analysis import behaviour, budget, rates, statistics
from analysis.behaviour import Evidence, Verdict
from analysis.files import number
from analysis.hypotheses import hypotheses
from analysis.mechanism import mechanism
from analysis.rates import Comparison, Rate, mean_curve
from analysis.refinement import Point, choice, place
from analysis.runs import Run, Series
from analysis.statistics import Estimate
from analysis.sweep import SHOWN, Group, declared, groups, guide_of, guided


@dataclass(frozen=True)
class Fault:
    """Members of one gang that became non-finite in the same step: the instrument's doing, not their rates'."""

    gang: str
    step: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Repeat:
    """Two runs of one recipe, rate and seed; what they differ by is the noise floor."""

    learning_rate: float
    seed: int | None
    runs: tuple[str, str]
    difference: float  # final eval loss of the second − of the first
    solo: bool  # one of them was trained by train.py alone, the other in a gang
    diverged: bool  # at least one of them; what they differ by is chaos then, not noise
    differs: dict  # their group's settings that are not the main grid's


@dataclass(frozen=True)
class Advice:
    """What to use: the rate, those that do as well, and when to stop. Losses are means over seeds."""

    rate: float
    tied: tuple[float, ...]  # other rates that are inside the basin, or whose mean is and nothing tells otherwise
    end: float
    end_step: int
    low: float  # lowest point of the mean eval curve
    low_step: int
    low_passes: float | None  # passes over the data at low_step
    rise: Estimate | None  # of each seed from low_step to its end
    stop: bool  # whether that rise is told from 0 and matters
    falling: tuple[
        float, ...
    ]  # what the loss still fell over the last quarter of the steps: of rate, then of each tied


@dataclass(frozen=True)
class Study:
    """Everything that the report's numbers derive from. Losses in nats per token; rates ascending."""

    sweeps: list[dict]
    runs: list[Run]
    recipe: dict  # what the runs have in common, as far as a report shows it
    differs: dict  # settings in which these runs differ from the main grid's
    used: dict[float, list[Run]]  # rate -> its runs that count, one for each seed
    excluded: dict[str, str]  # run id -> why it does not enter the statistics
    faults: list[Fault]
    repeats: list[Repeat]
    base_loss: float | None  # l0
    evidence: dict[str, Evidence]
    verdicts: dict[str, Verdict]
    flags: dict[str, list[str]]
    feasible: dict[float, list[Run]]
    comparison: Comparison | None
    rows: list[Rate]
    points: list[Point]
    optimum: dict | None
    budget: list[dict]
    budget_law: dict
    hypotheses: list[dict]
    mechanism: dict | None
    advice: Advice | None
    guide: str | None = None  # that these runs follow
    beside: tuple["Study", ...] = ()
    undeclared: tuple[str, ...] = ()  # settings that differ between groups and that no sweep file sets
    sizes_differ: bool = True  # whether the main grid has more rates than every group beside it

    @property
    def rates(self) -> list[float]:
        return list(self.used)

    @property
    def counted(self) -> list[Run]:
        """The runs that enter the statistics."""
        return [run for runs in self.used.values() for run in runs]

    @property
    def compared(self) -> list[Run]:
        """The runs that enter a comparison: those that count, of the main grid and of the guides."""
        own = [] if self.guide else self.counted
        return [*own, *(run for part in self.guides for run in part.counted)]

    @property
    def everything(self) -> list[Run]:
        """The runs of all groups."""
        return [*self.runs, *(run for other in self.beside for run in other.runs)]

    @property
    def groups(self) -> list["Study"]:
        """The studies that are no guide's; the first is this one."""
        return [self, *(part for part in self.beside if part.guide is None)]

    @property
    def guides(self) -> list["Study"]:
        return [part for part in (self, *self.beside) if part.guide is not None]

    @property
    def planned_steps(self) -> int | None:
        return next((run.planned_steps for run in self.counted if run.planned_steps), None)

    @property
    def best_rate(self) -> float | None:
        return None if self.comparison is None else self.comparison.rates[self.comparison.best]

    @property
    def best_loss(self) -> float | None:
        """l*: the best rate's mean final eval loss."""
        return None if self.comparison is None else float(self.comparison.loss.min())

    @property
    def basin_width(self) -> float | None:
        """ε."""
        return None if self.comparison is None else self.comparison.width

    @property
    def seeds(self) -> int:
        """Seeds of each compared rate, the fewest."""
        return 0 if self.comparison is None else self.comparison.seeds

    @property
    def steps_per_pass(self) -> float | None:
        return next((run.steps_per_pass for run in self.counted if run.steps_per_pass), None)

    @property
    def infeasible(self) -> list[float]:
        """Rates of which at least one run diverged."""
        return [rate for rate, runs in self.used.items() if any(self.diverged(run) for run in runs)]

    @property
    def noise_floor(self) -> float | None:
        """Root mean square difference of two runs of one recipe, rate and seed, in nats; None without repeats."""
        squares = [repeat.difference**2 for repeat in self.repeats if not repeat.solo and not repeat.diverged]
        return math.sqrt(sum(squares) / len(squares)) if squares else None

    @property
    def device_seconds(self) -> float | None:
        """Wall seconds inside training steps, summed over devices: each gang once, each run alone by itself."""
        return device_seconds(self.runs)

    def diverged(self, run: Run) -> bool:
        return self.verdicts[run.id].behaviour == "diverged"

    def at(self, rate: float) -> list[Run]:
        """The runs that count at this rate, up to rounding; [] if it was not swept."""
        return next((runs for swept, runs in self.used.items() if math.isclose(swept, rate, rel_tol=1e-6)), [])


def build(sweeps: list[dict], runs: list[Run]) -> Study:
    """The study of the main grid, the other groups beside it."""
    faults = find_faults(runs)
    cut = {run.id: fault.step for fault in faults for run in fault.runs}
    runs = [run.before(cut[run.id]) if run.id in cut else run for run in runs]
    parts = groups([run for run in runs if not guide_of(run)])
    advised = guided(runs, parts[0] if parts else None)
    if not parts:
        parts, advised = advised[:1] or [Group({})], advised[1:]
    first, *others = [study_of(sweeps, part, faults) for part in parts]
    lowest = math.inf if first.best_loss is None else first.best_loss
    guides = [study_of(sweeps, part, faults, lowest) for part in advised]
    if not others:
        return replace(first, beside=tuple(guides))
    on_purpose = {key for sweep in sweeps for key in declared(sweep)}
    undeclared = {key for other in others for key in other.differs if key not in on_purpose}
    return replace(
        first,
        beside=(*others, *guides),
        undeclared=tuple(key for part in parts for key in part.differs if key in undeclared),
        sizes_differ=parts[0].size[0] > parts[1].size[0],
    )


def device_seconds(runs: Iterable[Run]) -> float | None:
    """Wall seconds inside training steps, summed over devices: each gang once, each run alone by itself."""
    gangs: dict[object, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        seconds = next((s for key in ("train_seconds", "train_runtime") if (s := number(run.summary.get(key)))), None)
        if seconds is not None and 0 < seconds < 1e10:
            size = number(run.config.get("gang_size")) or 1.0
            gangs[gang_of(run) or run.id].append((seconds, size))
    if not gangs:
        return None
    return sum(
        max(s for s, _ in found) * math.ceil(len(found) / max(size for _, size in found)) for found in gangs.values()
    )


def gang_of(run: Run) -> str | None:
    """The gang that trained a run: its first member's id; of older records, which lack it, the sweep."""
    if run.config.get("gang") is not None:
        return str(run.config["gang"])
    return run.sweep if (number(run.config.get("gang_size")) or 1) > 1 else None


def find_faults(runs: Iterable[Run]) -> list[Fault]:
    """Steps at which two or more members of one gang first became non-finite together."""
    lost = defaultdict(list)
    for run in runs:
        if gang_of(run) is not None and run.not_finite_step is not None:
            lost[gang_of(run), run.not_finite_step].append(run)
    return [Fault(gang, step, tuple(found)) for (gang, step), found in lost.items() if len(found) > 1]


def study_of(sweeps: list[dict], group: Group, faults: list[Fault], lowest: float = math.inf) -> Study:
    """Choose the runs that are compared, judge each run, compare the rates.

    lowest: the best loss of another group, where this one is judged by it too.
    """
    runs = group.runs
    first = grid_first(runs)
    used, excluded = choose(first)
    counted = [run for found in used.values() for run in found]
    bases = [run.base_loss for run in counted if run.base_loss is not None]
    base_loss = float(np.mean(bases)) if bases else None
    evidence = {run.id: Evidence(run, reference(run, used), base_loss) for run in runs}
    early = {run.id: behaviour.dynamics(evidence[run.id]) for run in runs}
    feasible = {
        rate: valued
        for rate, found in used.items()
        if not any(early[run.id] and early[run.id].behaviour == "diverged" for run in found)
        and (valued := [run for run in found if run.end is not None])
    }
    comparison = rates.compare(feasible)
    verdicts = {}
    for run in runs:
        known = evidence[run.id]
        if comparison is not None:
            known.best_loss = min(lowest, float(comparison.loss.min()))
            if run.learning_rate in comparison.rates:
                place = comparison.rates.index(run.learning_rate)
                known.near_best = bool(comparison.loss[place] - known.best_loss < comparison.width)
        verdicts[run.id] = early[run.id] or behaviour.outcome(known)
    flags = {run.id: run_flags(run, used, evidence, comparison) for run in runs}
    config = {key: run.config[key] for run in reversed(counted or runs) for key in SHOWN if key in run.config}
    recipe = {key: config[key] for key in SHOWN if key in config}
    alpha, rank = number(recipe.get("lora_alpha")), number(recipe.get("lora_r"))
    rows = [
        rates.rate(rate, found, evidence, verdicts, comparison, feasible, base_loss, alpha, flags)
        for rate, found in used.items()
    ]
    ended = points(used, verdicts)
    planned = next((run.planned_steps for run in counted if run.planned_steps), None)
    width = None if comparison is None else comparison.width
    # A run that crashed would end its rate's mean curve, and so its lead.
    whole = {rate: [run for run in found if behaviour.tells(run, verdicts[run.id])] for rate, found in used.items()}
    whole = {rate: found for rate, found in whole.items() if found}
    curves = {rate: curve for rate, found in whole.items() if len(curve := mean_curve(found))}
    by_budget = statistics.best_by_budget(curves, width or statistics.BASIN_NATS)
    schedule = str(recipe.get("lr_scheduler_type", ""))
    pass_steps = next((run.steps_per_pass for run in counted if run.steps_per_pass), None)
    return Study(
        sweeps=sweeps,
        runs=runs,
        recipe=recipe,
        differs=group.differs,
        used=used,
        excluded=excluded,
        faults=[fault for fault in faults if any(run.id in evidence for run in fault.runs)],
        repeats=find_repeats(first, verdicts, group.differs),
        base_loss=base_loss,
        evidence=evidence,
        verdicts=verdicts,
        flags=flags,
        feasible=feasible,
        comparison=comparison,
        rows=rows,
        points=ended,
        optimum=None if comparison is None else find_optimum(comparison, ended),
        guide=guide_of(runs[0]) if runs else None,
        budget=by_budget,
        budget_law=budget.law(by_budget, seeds_by_budget(whole, width), planned, schedule, pass_steps),
        hypotheses=hypotheses(rows, planned, width),
        mechanism=mechanism(rows, rank, alpha),
        advice=None if comparison is None else advise(comparison, feasible),
    )


def grid_first(runs: list[Run]) -> list[Run]:
    """The runs, the largest sweep's first: a control that repeats a point of the grid does not stand for it."""
    size = Counter(run.sweep for run in runs)
    return sorted(runs, key=lambda run: -size[run.sweep])  # stable: else by rate, seed and age


def choose(runs: list[Run]) -> tuple[dict[float, list[Run]], dict[str, str]]:
    """The run that counts for each (rate, seed), and why each other run does not.

    Of repeats the first that reached its end (or diverged) counts, so a later control changes nothing; else the last.
    """
    slots: dict[float, dict] = {}
    excluded = {}
    for run in runs:
        if run.learning_rate is None:
            excluded[run.id] = "no learning rate in its config"
            continue
        slot = slots.setdefault(run.learning_rate, {})
        before = slot.get(run.seed)
        if before is None:
            slot[run.seed] = run
        elif behaviour.incomplete(Evidence(before)) is None:
            excluded[run.id] = f"a repeat of run {before.id}"
        else:
            slot[run.seed] = run
            excluded[before.id] = f"repeated by run {run.id}"
    used = {rate: sorted(slot.values(), key=lambda run: (run.seed is None, run.seed)) for rate, slot in slots.items()}
    return dict(sorted(used.items())), excluded


def find_repeats(runs: list[Run], verdicts: dict[str, Verdict], differs: dict) -> list[Repeat]:
    """Each run that reached its end, against the first one of its rate and seed."""
    first: dict[tuple, Run] = {}
    found = []
    for run in runs:
        if run.learning_rate is None or run.end is None:
            continue
        before = first.setdefault((run.learning_rate, run.seed), run)
        if before is not run:
            solo = (gang_of(before) is None) != (gang_of(run) is None)
            gap = run.end.loss - before.end.loss
            diverged = any(verdicts[one.id].behaviour == "diverged" for one in (before, run))
            found.append(Repeat(run.learning_rate, run.seed, (before.id, run.id), gap, solo, diverged, differs))
    return found


def reference(run: Run, used: dict[float, list[Run]]) -> Run | None:
    """The lowest rate's run of the same seed, if it is whole and finite: the yardstick of equal batches."""
    if not used or run.seed is None:
        return None
    lowest = next((other for other in used[min(used)] if other.seed == run.seed), None)
    whole = lowest is not None and lowest.complete and np.isfinite(lowest["train/loss"].value).all()
    return lowest if whole else None


def seeds_by_budget(whole: dict[float, list[Run]], width: float | None) -> list[list[dict]]:
    """best_by_budget for each seed that every rate has."""
    curves = [{run.seed: run["eval/loss"].finite for run in runs} for runs in whole.values()]
    common = [seed for seed in curves[0] if all(seed in found for found in curves)] if curves else []
    return [
        statistics.best_by_budget(
            {rate: found[seed] for rate, found in zip(whole, curves, strict=True)}, width or statistics.BASIN_NATS
        )
        for seed in common
    ]


def points(used: dict[float, list[Run]], verdicts: dict[str, Verdict]) -> list[Point]:
    """The counted runs that ended or diverged, as the search for the best rate takes them."""
    lost = {run.id: verdicts[run.id].behaviour == "diverged" for runs in used.values() for run in runs}
    return [
        Point(rate, run.seed or 0, math.inf if lost[run.id] else run.end.loss)
        for rate, runs in used.items()
        for run in runs
        if lost[run.id] or run.end is not None
    ]


def find_optimum(comparison: Comparison, ended: list[Point]) -> dict:
    """Where the best rate lies, as the search for it says; not where a neighbouring rate is missing or too far.

    left, right: the best rate's neighbours; wall: the right one, if it diverged; reason: why the place is not known.
    """
    rates, best = comparison.rates, comparison.rates[comparison.best]
    left = max((rate for rate in rates if rate < best), default=None)
    right = min((point.rate for point in ended if point.rate > best), default=None)
    found = {"identified": False, "reason": None, "tested": len(rates), "left": left, "right": right}
    found["wall"] = None if right in rates else right
    if left is None or right is None:
        return found | {"reason": "edge"}
    if max(best / left, right / best) > statistics.COARSE:
        return found | {"reason": "coarse"}
    rate, low, high, _ = place(ended, comparison.width)
    return found | {"identified": True, "learning_rate": rate, "n": len(rates), "interval": [low, high]}


def advise(comparison: Comparison, feasible: dict[float, list[Run]]) -> Advice | None:
    """The rate to use, what its own curve says about when to stop, and which rates are not told from the lowest."""
    best = choice(dict(zip(comparison.rates, comparison.loss.tolist(), strict=True)), comparison.width)
    runs = feasible[best]
    curve = mean_curve(runs)
    later = curve.between(1, np.inf)
    if not len(later):
        return None
    low = int(later.value.argmin())
    step, end_step = int(later.step[low]), int(later.step[-1])
    ends = rates.by_seed(runs, "end")
    lows = {seed: run.at(step) for seed, run in zip(ends, (run for run in runs if run.end is not None), strict=True)}
    rise = None
    if step < end_step and all(lows.values()):
        rise = statistics.difference(ends, lows, *rates.example_set(runs))
    told = rise is not None and (rise.interval[0] > 0 if rise.interval else rise.mean > comparison.width)
    per_pass = next((run.steps_per_pass for run in runs if run.steps_per_pass), None)
    others = [i for i, rate in enumerate(comparison.rates) if rate != best]
    tied = tuple(comparison.rates[i] for i in others if comparison.near(i) and comparison.verdict(i) != "out")
    return Advice(
        rate=best,
        tied=tied,
        end=float(later.value[-1]),
        end_step=end_step,
        low=float(later.value[low]),
        low_step=step,
        low_passes=step / per_pass if per_pass else None,
        rise=rise,
        stop=bool(told and rise.mean >= behaviour.REBOUND_NATS),
        falling=tuple(fell(mean_curve(feasible[rate])) for rate in (best, *tied)),
    )


def fell(curve: Series) -> float:
    """What a curve still fell over the last quarter of its steps; 0 if it has nothing before that."""
    earlier = curve.between(0, (1 - behaviour.FALLING_SHARE) * (curve.step[-1] if len(curve) else 0))
    return float(earlier.value[-1] - curve.value[-1]) if len(earlier) else 0.0


def run_flags(
    run: Run, used: dict[float, list[Run]], evidence: dict[str, Evidence], comparison: Comparison | None
) -> list[str]:
    """Remarks that are not classes: fast start, crossed, best rate at the edge of the feasible range."""
    peers = [other for found in used.values() for other in found if other.seed == run.seed]
    if not any(run is other for other in peers):
        return []
    flags, planned = [], run.planned_steps or 0

    def start(one: Run) -> float:
        first, last = (share * planned for share in behaviour.FAST_START)
        part = one["train/loss"].between(first, last).value
        return float(part.mean()) if len(part) and np.isfinite(part).all() else math.inf

    if len(peers) > 1 and math.isfinite(start(run)) and start(run) == min(map(start, peers)):
        flags.append("fast start")
    if len(peers) > 1 and led_early(run, peers) and not evidence[run.id].near_best:
        flags.append("crossed")
    if comparison is not None and len(comparison.rates) > 1:
        ends = (comparison.rates[0], comparison.rates[-1])
        best = comparison.rates[comparison.best]
        flags += ["edge of the feasible range"] if run.learning_rate == best and best in ends else []
    return flags


def led_early(run: Run, peers: list[Run]) -> bool:
    """Whether the run had the lowest eval loss of its seed at some evaluation in the first half."""
    mine = run["eval/loss"].between(1, (run.planned_steps or 0) / 2).finite
    for step, value in zip(mine.step, mine.value, strict=True):
        others = [p["eval/loss"].between(step, step).finite.value for p in peers if p is not run]
        if others and all(not len(v) or value < v[0] for v in others) and any(len(v) for v in others):
            return True
    return False
