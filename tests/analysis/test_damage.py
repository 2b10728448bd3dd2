"""Never a traceback: whole studies with damaged configs, histories, files and sweeps still give a report."""

import copy
import json
import random

import pytest

from analysis import report
from analysis.files import to_json
from analysis.results import results
from analysis.runs import read_run
from analysis.study import build
from tests.analysis import simulate

ODD = [
    None,
    "NaN",
    "Infinity",
    float("nan"),
    float("inf"),
    0,
    -1,
    1e300,
    -1e300,
    "x",
    [],
    {},
    True,
    1e-300,
    3.7,
    10**30,
]
COLUMNS = ["train/loss", "eval/loss", "train/grad_norm", "train/global_step", "_runtime", "eval/update_ratio"]


def damage(value, rng):
    """One fault somewhere inside: a value lost or odd; rows cut, doubled or shuffled; a column lost or odd."""
    if isinstance(value, dict) and value:
        key, how = rng.choice(list(value)), rng.random()
        if how < 0.25:
            del value[key]
        else:
            value[key] = rng.choice(ODD) if how < 0.5 else damage(value[key], rng)
        return value
    if isinstance(value, list) and value:
        at, column, odd = rng.randrange(len(value)), rng.choice(COLUMNS), rng.choice(ODD)
        rows = [row for row in value if isinstance(row, dict) and column in row]
        how = rng.randrange(6)
        if how == 0:
            return value[:at]
        if how == 1:
            return value + value[at:]
        if how == 2:
            rng.shuffle(value)
        if how == 3:
            for row in rows:
                row[column] = odd
        if how == 4:
            for row in rows:
                del row[column]
        if how == 5:
            value[at] = damage(value[at], rng)
        return value
    return rng.choice(ODD)


@pytest.fixture(scope="module")
def pristine():
    return {kind: [simulate.record(kind, 2e-4, seed, 60, examples=6) for seed in (0, 1)] for kind in simulate.KINDS}


@pytest.mark.parametrize("seed", range(8))
def test_damaged_studies_give_a_report(pristine, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(10):
        records = []
        for rate in rng.sample([1e-5, 2e-4, 1e-3, 5e-3, "1e-4"], rng.randint(1, 4)):
            for number in range(rng.randint(1, 2)):
                one = copy.deepcopy(pristine[rng.choice(simulate.KINDS)][number])
                one["config"]["learning_rate"] = rate
                for _ in range(rng.choice([0, 1, 1, 2, 5])):
                    one = damage(one, rng)
                records.append(one | {"id": f"{rate} {number}"})
        sweep = damage(simulate.sweep_of([1e-5, 2e-4], [0]), rng) | {"id": "sw1"}
        found = json.loads(to_json(results(build([sweep], [read_run(record) for record in records]))))
        page = report.render(found, tmp_path, [])
        assert all(f"| {record['id']} |" in page for record in records)  # and never a silent drop
