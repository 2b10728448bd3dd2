"""Response surfaces for benchmarks.search: final eval loss against learning rate, drawn from families or recorded."""

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr

from analysis.runs import load
from analysis.statistics import basin_width
from analysis.study import build

ROOT = Path(__file__).parent.parent
LOW, HIGH = 5e-6, 2e-2  # the range of rates that a user would consider, and in which the peers search
OPTIMA = (1e-5, 1.5e-2)  # where the best rate may lie: a seventh of this, in decades, is above the starting grid
FINE = np.geomspace(2e-6, 5e-2, 1760)  # where the best rate is looked for: steps of 0.6 %


@dataclass(frozen=True)
class Surface:
    """The mean final loss of each rate, in nats per token, and how runs scatter about it."""

    name: str
    number: int  # of the random numbers
    base: float  # the untrained loss: what a diverged run counts as
    mean: Callable[[np.ndarray, float], np.ndarray]  # rates, share of the steps -> loss of runs that do not diverge
    sd: Callable[[np.ndarray], np.ndarray]  # rates -> standard deviation over seeds
    shared: float  # share of that variance that a seed brings to all rates alike
    edge: float  # rate above which a seed's runs diverge, in the middle
    edge_sd: float  # decades, over seeds
    truth: np.ndarray = field(init=False)  # at FINE
    epsilon: float = field(init=False)  # the project's, with the seeds' true SD at the best rate

    def __post_init__(self):
        truth = self.expected(FINE)
        best = int(truth.argmin())
        object.__setattr__(self, "truth", truth)
        object.__setattr__(self, "epsilon", basin_width(float(truth[best]), float(self.sd(FINE[best : best + 1])[0])))

    def expected(self, rates: np.ndarray) -> np.ndarray:
        """The mean loss over seeds, a diverged run counting as untrained."""
        fails = ndtr((np.log10(rates) - math.log10(self.edge)) / max(self.edge_sd, 1e-6))
        return fails * self.base + (1 - fails) * self.mean(rates, 1.0)

    @property
    def best(self) -> float:
        return float(FINE[self.truth.argmin()])

    def regret(self, rate: float) -> float:
        return max(0.0, float(self.expected(np.array([rate]))[0] - self.truth.min()))

    def run(self, rate: float, seed: int, share: float = 1.0) -> float:
        """The eval loss of one run after this share of its steps; infinite if it diverged."""
        own = np.random.default_rng([self.number, seed])
        common, edge = own.normal(size=2)
        if math.log10(rate) > math.log10(self.edge) + self.edge_sd * edge:
            return math.inf
        alone = np.random.default_rng([self.number, seed, round(1e4 * math.log10(rate)) + 10**6]).normal()
        noise = math.sqrt(self.shared) * common + math.sqrt(1 - self.shared) * alone
        at = np.array([rate])
        return float(self.mean(at, share)[0] + self.sd(at)[0] * noise)


# Each family: the excess over the best loss, by decades above the best rate. `reach` is what an untrained model lacks.
def wells(draw: np.random.Generator, reach: float):
    """A power of the rate on either side: slow below, steep above."""
    p, q = draw.uniform(0.8, 2.0), draw.uniform(1.2, 4.0)
    bend = reach * 10 ** draw.uniform(-2.2, -0.7)  # how sharp the minimum is, in nats
    return lambda u: bend * ((10 ** (-p * u) - 1) / p + (10 ** (q * u) - 1) / q)


def basins(draw: np.random.Generator, reach: float):
    """A floor that is nearly flat over up to a decade, between walls of other steepness."""
    left, right = draw.uniform(0.05, 0.6, 2)
    a, b = reach * draw.uniform(0.3, 1.5), reach * draw.uniform(0.5, 6.0)
    p, q = draw.uniform(1.3, 2.5, 2)
    tilt = 0.004 / max(left, right) ** 2
    return lambda u: a * np.maximum(0, -u - left) ** p + b * np.maximum(0, u - right) ** q + tilt * np.minimum(u**2, 1)


def learned(draw: np.random.Generator, reach: float):
    """The share of the task that is not yet learned falls as a stretched exponential; above, a soft wall rises."""
    p, knee, width = draw.uniform(0.5, 1.1), draw.uniform(0.3, 1.2), draw.uniform(0.06, 0.25)
    pace, height = 10 ** draw.uniform(0.1, 0.6), reach * draw.uniform(0.3, 3.0)

    def excess(u):
        return reach * np.exp(-pace * 10 ** (p * u)) + height * width * np.logaddexp(0, (u - knee) / width)

    grid = np.linspace(-4, 4, 16001)
    losses = excess(grid)
    return lambda u: excess(u + grid[losses.argmin()]) - losses.min()


def crooked(draw: np.random.Generator, reach: float):
    """Straight walls of two slopes each, rounded a little, with a ripple: no parabola, and not quite one minimum."""
    near = reach * 10 ** draw.uniform(-1.8, -0.6, 2)
    far = near + reach * draw.uniform([0.3, 0.5], [1.2, 4.0])
    turn = draw.uniform(0.2, 0.8, 2)
    ripple, phase, waves = 0.004 * draw.uniform(0, 1), draw.uniform(0, 2 * math.pi), draw.uniform(1, 3)

    def excess(u):
        sides = [near[i] * np.hypot(v, 0.1) + far[i] * np.maximum(0, v - turn[i])
                 for i, v in enumerate((np.maximum(0, -u), np.maximum(0, u)))]  # fmt: skip
        return sides[0] + sides[1] + ripple * np.sin(2 * math.pi * waves * u + phase)

    grid = np.linspace(-4, 4, 16001)
    losses = excess(grid)
    return lambda u: excess(u + grid[losses.argmin()]) - losses.min()


TUNING, HELD_OUT = {"wells": wells, "basins": basins}, {"learned": learned, "crooked": crooked}


def drawn(families: dict, count: int, seed: int) -> list[Surface]:
    """`count` surfaces of each family."""
    return [
        draw_surface(name, family, [seed, place, i]) for place, (name, family) in enumerate(families.items())
        for i in range(count)
    ]  # fmt: skip


def draw_surface(name: str, family: Callable, number: list[int]) -> Surface:
    """Level, reach, noise and edge are drawn alike for all families.

    Noise at the best rate: 0.002 to 0.03 nats (outputs/flagship: 0.005), more where the upper wall rises (there a tenth
    to a third of the excess). Two thirds of the surfaces have an edge above which runs diverge, 0.15 to 1.2 decades
    above the best rate; for half of those it differs from seed to seed by 0.03 to 0.2 decades.
    A shorter run has its optimum at a higher rate, by a power of 0.3 to 0.8 (outputs/flagship: 0.6), and a higher loss.
    """
    draw = np.random.default_rng(number)
    at = math.log10(OPTIMA[0]) + draw.uniform() * math.log10(OPTIMA[1] / OPTIMA[0])
    level, reach = draw.uniform(0.8, 3.5), draw.uniform(0.3, 2.0)
    noise, growth, shared = 10 ** draw.uniform(-2.7, -1.5), draw.uniform(0.1, 0.3), draw.uniform(0, 0.9)
    excess = family(draw, reach)
    has_edge, moves = draw.uniform() < 2 / 3, draw.uniform() < 1 / 2
    edge = at + draw.uniform(0.15, 1.2) if has_edge else 9.0
    edge_sd = draw.uniform(0.03, 0.2) if moves else 0.0
    power, slow = draw.uniform(0.3, 0.8), draw.uniform(0.05, 0.2)

    def mean(rates, share):
        u = np.log10(rates) - at
        rise, lag = excess(u + power * math.log10(share)), reach * slow * (share**-0.5 - 1)
        return level + lag + np.where(u < 0, reach * -np.expm1(-rise / reach), np.minimum(rise, 3 * reach))

    def sd(rates):
        u = np.log10(rates) - at
        return noise + growth * np.where(u > 0, np.minimum(excess(u), 2 * reach), 0)

    key = sum(10**power * part for power, part in zip((8, 6, 0), number, strict=True))
    return Surface(name, key, level + reach, mean, sd, shared, 10**edge, edge_sd)


FILE = Path(__file__).with_name("surfaces.json")


def recorded(held_out: bool, repeats: int) -> list[Surface]:
    """The rows of surfaces.json as surfaces, `repeats` of each with other noise; every second one is held out.

    The mean over seeds, between rates by PCHIP in log rate, is taken for the truth. Held out is outputs/flagship, too.
    """
    found = ([flagship()] if held_out else []) + json.loads(FILE.read_text())["surfaces"][held_out::2]
    return [of_rows(surface, 10**9 + 1000 * place + i) for place, surface in enumerate(found) for i in range(repeats)]


def flagship() -> dict:
    """Eight rates and three seeds of the reference experiment, as a surface of surfaces.json."""
    steps = [0, 18, 63, 180]
    used = build(*load(ROOT / "outputs/flagship")).used
    runs = [
        {"learning_rate": rate, "loss": [float(run["eval/loss"].between(step, step).value[0]) for step in steps]}
        for rate, runs in used.items()
        for run in runs
    ]
    return {"name": "flagship", "steps": steps, "runs": runs}


def of_rows(surface: dict, number: int) -> Surface:
    """A rate at which a seed diverged is beyond the edge, which lies midway to the next lower one."""
    by_rate: dict[float, list[list[float]]] = {}
    for run in surface["runs"]:
        by_rate.setdefault(run["learning_rate"], []).append([math.inf if v is None else v for v in run["loss"]])
    table = np.array([by_rate[rate] for rate in sorted(by_rate)])  # (rates, seeds, evaluations)
    x, base = np.log10(sorted(by_rate)), float(table[0, 0, 0])
    table = np.where(np.isfinite(table), table, np.nan)
    finite = np.isfinite(table).all(axis=(1, 2))
    steps = np.array(surface["steps"][1:]) / surface["steps"][-1]
    table = np.minimum(table, 3 * base)
    curves = [PchipInterpolator(x[finite], table[finite].mean(axis=1)[:, i + 1]) for i in range(len(steps))]
    # Of three seeds, a rate's SD alone is a poor guess: the middle of three neighbours.
    variances = table[finite, :, -1].var(axis=1, ddof=1)
    smooth = [math.sqrt(np.median(variances[max(0, i - 1) : i + 2])) for i in range(len(variances))]
    spread = PchipInterpolator(x[finite], smooth)
    centred = table[finite, :, -1] - table[finite, :, -1].mean(axis=1, keepdims=True)
    near = np.abs(x[finite] - x[finite][table[finite, :, -1].mean(axis=1).argmin()]) < 0.75
    shared = float(np.clip(centred[near].mean(axis=0).var(ddof=1) / centred[near].var(axis=1, ddof=1).mean(), 0, 0.95))
    edge = 9.0 if finite.all() else (x[~finite][0] + x[finite][x[finite] < x[~finite][0]][-1]) / 2

    def clip(rates):
        return np.clip(np.log10(rates), x[finite][0], x[finite][-1])

    def mean(rates, share):
        return curves[int(np.abs(steps - share).argmin())](clip(rates))

    return Surface(surface["name"], number, base, mean, lambda rates: np.maximum(spread(clip(rates)), 1e-4),
                   shared, 10**edge, 0.0)  # fmt: skip


def circumstances(command: str, *packages: str) -> dict:
    """What a figure needs beside it: command, date, commit, versions, machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "machine": f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores",
    }
