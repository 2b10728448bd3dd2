"""How often simulated runs get the right class; writes docs/behaviour.md: python -m tests.analysis.calibrate [RUNS]."""

import inspect
import re
import sys
from collections import Counter
from pathlib import Path

from analysis import behaviour
from analysis.behaviour import BEHAVIOURS, Evidence
from analysis.wording import grid
from tests.analysis import simulate

STEPS, NOISE, RUNS = (100, 200, 500), (0.03, 0.08, 0.15), 300
SIZES = (1.1, 1.2, 1.3, 1.5, 1.8, 2.2)  # factors on the train loss
BASIN = 0.027  # nats per token: 1 % of the best loss
PAGE = Path(__file__).resolve().parents[2] / "docs" / "behaviour.md"

KINDS = {
    "good": "exponential descent to the best loss",
    "suboptimal": "the same to 93–97 % of the gain",
    "slow": "a time constant of 0.8–2 T",
    "plateaued": "descent to 40–80 % of the gain, then flat",
    "overfitting": "eval loss rises by 0.05–0.5 nats while train loss falls",
    "spike": "train loss × 1.8–2.5 for 5–9 steps",
    "bump": "train loss × 1.9–2.2 over about 12–20 % of the run",
    "rebound": "train loss rises to × 1.22–1.32, eval loss to × 1.1–1.3",
    "nan": "one step with a NaN loss",
    "rising": "train loss rises to × 1.8–2.4",
    "exploding": "train and eval loss jump above the uniform guess",
    "harmed": "train and eval loss above the untrained model's from step 4",
    "stopped": "an infinite loss, after which training stops",
    "cut": "a finite run that ends at 35–60 % of its steps",
}


def classify(kind: str, planned: int, noise: float, seed: int, paired: bool = True, size: float | None = None) -> str:
    run = simulate.run(kind, planned, noise, seed, size)
    reference = simulate.run("slow", planned, noise, seed) if paired else None
    loss = run.final_eval_loss
    near = loss is not None and loss - simulate.FLOOR < BASIN
    return behaviour.classify(Evidence(run, reference, simulate.BASE, simulate.FLOOR, near)).behaviour


def confusion(runs: int, paired: bool = True, kinds: tuple = simulate.KINDS) -> dict[tuple, Counter]:
    """(kind, planned, noise) -> how often each class was given."""
    return {
        (kind, planned, noise): Counter(classify(kind, planned, noise, seed, paired) for seed in range(runs))
        for kind in kinds
        for planned in STEPS
        for noise in NOISE
    }


def thresholds() -> list[list[str]]:
    """The constants of analysis/behaviour.py with the reason that stands behind each."""
    lines = re.findall(r"^([A-Z_]+) = (.+?)  # (.+)$", inspect.getsource(behaviour), re.M)
    return [[f"`{name}`", value, reason] for name, value, reason in lines]


def page(runs: int) -> str:
    paired, alone = confusion(runs), confusion(runs, paired=False)
    cells = [(planned, noise) for planned in STEPS for noise in NOISE]

    def right(matrix: dict, kind: str, *cell: float) -> float:
        return matrix[kind, *cell][simulate.CLASS[kind]] / runs

    totals = []
    for kind in simulate.KINDS:
        given = sum((paired[kind, *cell] for cell in cells), Counter())
        row = [f"{100 * given[name] / (runs * len(cells)):.1f}" if given[name] else "·" for name in BEHAVIOURS]
        row[BEHAVIOURS.index(simulate.CLASS[kind])] = f"**{row[BEHAVIOURS.index(simulate.CLASS[kind])]}**"
        totals.append([kind, *row])
    worst = []
    for kind in simulate.KINDS:
        shares = [f"{100 * right(paired, kind, *cell):.1f}" for cell in cells]
        worst.append([kind, *shares, f"{100 * min(right(alone, kind, *cell) for cell in cells):.1f}"])
    lowest = min(right(paired, kind, *cell) for kind in simulate.KINDS for cell in cells)
    quiet = [kind for kind in simulate.KINDS if simulate.CLASS[kind] in BEHAVIOURS[4:]]
    false = sum(paired[kind, *cell][name] for kind in quiet for cell in cells for name in ("diverged", "unstable"))
    total = runs * len(cells)
    power = []
    for kind in ("spike", "bump"):
        for noise in NOISE:
            seen = [
                sum(classify(kind, 200, noise, seed, size=size) in ("unstable", "diverged") for seed in range(runs))
                for size in SIZES
            ]
            power.append([f"{kind}, {100 * noise:.0f} %", *(f"{100 * count / runs:.0f}" for count in seen)])
    return f"""# How a run's behaviour is decided

Written by `python -m tests.analysis.calibrate`; do not edit by hand.

A run gets the first class whose test fires, in this order: {", ".join(BEHAVIOURS)}.
The tests are the rows of `DYNAMICS` and `OUTCOMES` in `analysis/behaviour.py`; each verdict names the step and the
number that decided it. Symbols: l train loss, e eval loss, E its last value, l0 its value before training, l* the best
rate's mean E, G = (l0 − E)/(l0 − l*).

1. **incomplete**: fewer than 95 % of the planned steps, all values finite; or nothing to judge the end by.
2. **diverged**: a loss, gradient norm or eval loss that is not finite and stays so; or E ≥ l0; or the train loss ends
   above 1.5 × its smoothed minimum; or above 0.9 ln(vocabulary). Early if the first bad step is within the warm-up or
   the first 10 % of the steps.
3. **unstable**: three consecutive steps far above the causal median (of the loss, or of its ratio to the lowest rate's
   loss on the same batches); or a bump of the smoothed loss; or a NaN that it recovered from; or the eval loss rebounds
   and the train loss too.
4. **overfitting**: the eval loss rebounds while the train loss is at its minimum.
5. **slow**: G < 0.90 and the eval loss still falls.
6. **plateaued**: G < 0.90 and it does not.
7. **stable, suboptimal**: G ≥ 0.90, the rate's mean loss outside the basin.
8. **stable, good**: inside it. This uses the point estimate; the rate's own basin test (in, out, undecided) carries the
   uncertainty.

Three tests are stricter than their textbook form, because that form misfired on simulated runs:

- A rise counts only if it also undoes 10 % of the fall before it: a ratio alone fires on losses near zero.
- A bump must exceed {behaviour.BUMP_NOISE:g} standard errors of the rolling median: at 6, 25 % of quiet runs with
  15 % batch noise and 200 steps were "unstable".
- A rebound must show in every evaluation of the last 10 % of the steps and exceed
  {behaviour.REBOUND_ROUGHNESS:g} standard deviations of the eval curve about its own course, and the train loss is
  compared with its minimum before those steps: otherwise noise, or a train loss that still falls, looked like an
  instability.

## Thresholds

{grid(["Constant", "Value", "Unit and reason"], thresholds())}

## Confusion matrix

Simulated runs: exponential descent from {simulate.BASE} to {simulate.FLOOR} nats with multiplicative batch noise
(Student t, 4 degrees of freedom, on the log scale) of 3, 8 and 15 %, T = 100, 200 and 500 steps, {runs} runs a cell.
Four fifths of the noise belong to the batches and are shared with the lowest rate's run. Eval losses have 0.03–0.2 %
noise. In per cent of {total} runs of each kind (rows) by the class given (columns):

{grid(["Simulated", *BEHAVIOURS], totals)}

False alarms: {false} of {total * len(quiet)} quiet runs ({", ".join(quiet)}) were called diverged or unstable,
{100 * false / (total * len(quiet)):.2f} %. The worst cell of the next table is {100 * lowest:.1f} % right.

Right, in per cent, by T and noise, with the paired ratio; the last column is the worst of the nine without a run to
pair with:

{grid(["Simulated", *(f"{planned}, {100 * noise:.0f} %" for planned, noise in cells), "unpaired, worst"], worst)}

How small an instability is still seen: per cent called unstable or diverged, T = 200, by the factor on the train loss
(a spike lasts 5–9 steps, a bump 12–20 % of the run):

{grid(["Instability, noise", *(f"× {size:g}" for size in SIZES)], power)}

What was simulated:

{grid(["Kind", "Curve"], [[kind, words] for kind, words in KINDS.items()])}
"""


if __name__ == "__main__":
    PAGE.write_text(page(int(sys.argv[1]) if len(sys.argv) > 1 else RUNS), encoding="utf-8")
    print(PAGE)
