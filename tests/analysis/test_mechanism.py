"""The first steps' sizes against the formulas of the docstring, and which of the measured ones is taken."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from analysis import rates
from analysis.mechanism import mechanism, predicted_and_measured, shapes
from analysis.runs import Series
from tests.analysis import simulate


def run(logged, measured, planned=200):
    """A run with these learning rates from step 1 on, and the update ratios at these steps."""
    found, steps = simulate.run("good", planned), np.array(list(measured))
    found.history["train/learning_rate"] = Series(np.arange(1, len(logged) + 1), np.array(logged))
    found.history["eval/update_ratio"] = Series(steps, np.array(list(measured.values()), float))
    return found


@pytest.mark.parametrize(
    ("logged", "measured", "planned", "found"),
    [
        ([1.0, 2.0, 3.0], {0: 0.0, 2: 5.0, 4: 9.0}, 200, (2, 6.0, 5.0, False)),
        ([0.0, 2.0, 3.0], {0: 0.0, 1: 0.0, 2: 5.0}, 200, (2, 4.0, 5.0, True)),  # a warm-up's first rate is 0
        ([1.0, 2.0], {1: 5.0, 2: 6.0}, 200, (1, 2.0, 5.0, True)),
        ([1.0] * 30, {20: 5.0}, 200, (20, 40.0, 5.0, False)),
        ([1.0] * 30, {21: 5.0}, 200, None),  # later than a tenth
        ([1.0] * 3, {2: 5.0}, 10, (2, 4.0, 5.0, False)),
        ([1.0] * 3, {3: 5.0}, 10, None),
        ([1.0] * 3, {0: 5.0}, 200, None),
        ([0.0] * 3, {2: 5.0}, 200, None),
        ([1.0] * 3, {2: 0.0}, 200, None),
    ],
)
def test_the_first_measured_size_within_a_tenth_of_the_steps_is_taken(logged, measured, planned, found):
    assert predicted_and_measured(run(logged, measured, planned), 2.0) == found


def test_sizes_and_time_scales_are_those_of_the_formulas():
    one = run([1e-3, 2e-3], {2: 0.03})
    one.config |= {
        "adapted_modules": {
            "wide": {"count": 2, "d_in": 300, "d_out": 100, "weight_std": 0.02},
            "small": {"count": 1, "d_in": 12, "d_out": 50, "weight_std": 0.1},
        }
    }
    known = {one.id: SimpleNamespace(behaviour="slow", clipped=None)}
    row = rates.rate(2e-3, [one], known, known, None, {}, None, 32, {one.id: []})
    found = mechanism([row], 8, 32)
    update = math.sqrt(2 * 16 * 100 * 8 / 3 + 16 * 50 * 8 / 3)
    weight = math.sqrt(2 * 300 * 100 * 0.02**2 + 12 * 50 * 0.1**2)
    (told,) = found.pop("rows")
    assert found == {"rank": 8, "alpha": 32, "widths": [12, 300], "matrices": 3}
    assert told["full_step"] == pytest.approx(2e-3 * update / weight)
    assert told["predicted"] == pytest.approx(3e-3 * update / weight)
    assert told["ratio"] == pytest.approx(0.03 / told["predicted"])
    assert (told["step"], told["first_move"], told["measured"], told["end"]) == (2, False, 0.03, 0.03)
    assert told["entry_steps"] == pytest.approx([1 / (math.sqrt(3 * d) * 2e-3) for d in (300, 12)])
    assert told["direction_steps"] == pytest.approx([1 / (math.sqrt(3) * d * 2e-3) for d in (300, 12)])
    assert mechanism([row], None, 32) is mechanism([row], 8, None) is None
    one.config["adapted_modules"]["small"]["d_in"] = 0
    assert shapes(one) == [] and mechanism([row], 8, 32) is None
