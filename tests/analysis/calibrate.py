"""How often simulated runs get the right class; writes docs/behaviour.md: python -m tests.analysis.calibrate."""

import sys
from collections import Counter

from analysis import behaviour
from analysis.behaviour import Evidence
from tests.analysis import simulate

STEPS, NOISE, RUNS = (100, 200, 500), (0.03, 0.08, 0.15), 300
BASIN = 0.027  # 1 % of the best loss


def classify(kind: str, planned: int, noise: float, seed: int, paired: bool = True) -> str:
    run = simulate.run(kind, planned, noise, seed)
    reference = simulate.run("slow", planned, noise, seed) if paired else None
    loss = run.final_eval_loss
    near = loss is not None and loss - simulate.FLOOR < BASIN
    return behaviour.classify(Evidence(run, reference, simulate.BASE, simulate.FLOOR, near)).behaviour


def confusion(runs: int, paired: bool = True, cells: tuple | None = None) -> dict[tuple, Counter]:
    """(kind, planned, noise) -> how often each class was given."""
    cells = cells or [(planned, noise) for planned in STEPS for noise in NOISE]
    return {
        (kind, planned, noise): Counter(classify(kind, planned, noise, seed, paired) for seed in range(runs))
        for kind in simulate.KINDS
        for planned, noise in cells
    }


if __name__ == "__main__":
    n = int(sys.argv[1])
    for paired in (True, False):
        m = confusion(n, paired)
        print("paired", paired)
        for kind in simulate.KINDS:
            print(
                f"{kind:12}",
                " ".join(f"{m[kind, p, q][simulate.CLASS[kind]] / n:5.2f}" for p in STEPS for q in NOISE),
                dict(sum((m[kind, p, q] for p in STEPS for q in NOISE), Counter())),
            )
