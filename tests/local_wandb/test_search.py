"""The next point: our grid against that of W&B's own package, our draws within their bounds, clear refusals."""

import contextlib
import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from local_wandb import search

scalars = st.one_of(
    st.integers(-9, 9), st.floats(-9, 9).map(lambda x: round(x, 3)), st.booleans(), st.sampled_from("abc")
)
# The package takes {"p": 0} and {"p": 0.0} for two points, and 0 and 0.0 for one: here all are one.
inner = scalars.filter(lambda v: not (isinstance(v, float) and v.is_integer()))
grid_leaves = st.one_of(
    scalars.map(lambda v: {"value": v}),
    scalars.map(lambda v: {"distribution": "constant", "value": v}),
    st.lists(scalars, min_size=1, max_size=3).map(lambda v: {"values": v}),
    st.lists(st.dictionaries(st.sampled_from("pq"), inner, min_size=1), min_size=1, max_size=2).map(
        lambda v: {"values": v}
    ),
    st.tuples(st.integers(-3, 3), st.integers(1, 2)).map(lambda t: {"min": t[0], "max": t[0] + t[1]}),
    st.tuples(st.integers(-3, 3), st.sampled_from([1, 0.5, 0.25])).map(
        lambda t: {"distribution": "q_uniform", "min": t[0], "max": t[0] + 1, "q": t[1]}
    ),
)
names = st.sampled_from(["lr", "seed", "opt", "z"])
parameters = st.dictionaries(
    names,
    st.one_of(
        grid_leaves, st.dictionaries(names, grid_leaves, min_size=1, max_size=2).map(lambda p: {"parameters": p})
    ),
    min_size=1,
    max_size=3,
)


def walk(config: dict, step, limit: int = 200) -> list[dict]:
    points: list[dict] = []
    while (point := step(config, points)) is not None:
        points.append(point)
        assert len(points) < limit
    return points


@settings(deadline=None)  # the first call imports scipy
@given(parameters)
def test_grid_is_that_of_the_sweeps_package(parameters):
    package = pytest.importorskip("sweeps")

    def reference(config, points):
        run = package.next_run(config, [package.SweepRun(config=point) for point in points])
        return run and run.config

    ordered = {"method": "grid", "parameters": sorted_keys(parameters)}  # the package sorts names, we keep their order
    assume(search.expected(ordered) <= 30)  # the package's time grows with the square
    ours = walk(ordered, lambda config, points: search.next_point(config, points, []))
    assert ours == walk(ordered, reference)
    assert len(ours) == search.expected(ordered)


def sorted_keys(parameters: dict) -> dict:
    return {
        name: {"parameters": sorted_keys(spec["parameters"])} if "parameters" in spec else spec
        for name, spec in sorted(parameters.items())
    }


def test_grid_keeps_the_order_of_the_file():
    config = {"method": "grid", "parameters": {"seed": {"values": [2, 1]}, "lr": {"values": [0.1, 0.01]}}}
    points = walk(config, lambda config, points: search.next_point(config, points, []))
    assert [(p["seed"]["value"], p["lr"]["value"]) for p in points] == [(2, 0.1), (2, 0.01), (1, 0.1), (1, 0.01)]


DRAWS = [  # distribution, where its draws lie, the middle of them
    ({"distribution": "uniform", "min": 1.0, "max": 3.0}, 1, 3, 2),
    ({"min": 1, "max": 3}, 1, 3, 2),
    ({"min": 1, "max": 1.5}, 1, 1.5, 1.25),
    ({"min": 1.5, "max": 3}, 1.5, 3, 2.25),
    ({"distribution": "q_uniform", "min": 0, "max": 10, "q": 5}, 0, 10, 5),
    ({"distribution": "log_uniform", "min": math.log(0.01), "max": 0}, 0.01, 1, 0.1),
    ({"distribution": "log_uniform_values", "min": 0.01, "max": 1}, 0.01, 1, 0.1),
    ({"distribution": "inv_log_uniform", "min": 0, "max": math.log(100)}, 0.01, 1, 0.1),
    ({"distribution": "inv_log_uniform_values", "min": 0.01, "max": 1}, 0.01, 1, 0.1),
    ({"distribution": "q_log_uniform_values", "min": 1, "max": 100, "q": 1}, 1, 100, 10),
    ({"distribution": "normal", "mu": 5, "sigma": 1}, -2, 12, 5),
    ({"distribution": "q_normal", "mu": 5, "sigma": 1, "q": 1}, -2, 12, 5),
    ({"distribution": "log_normal", "mu": 0, "sigma": 0.5}, 0, 30, 1),
    ({"distribution": "beta", "a": 2, "b": 2}, 0, 1, 0.5),
    ({"values": [1, 1, 9], "probabilities": [0.2, 0.2, 0.6]}, 1, 9, 9),
]


@pytest.mark.parametrize(("spec", "low", "high", "middle"), DRAWS, ids=lambda v: str(v)[:40])
def test_random_draws_lie_where_they_should(spec, low, high, middle):
    random.seed(0)
    config = {"method": "random", "parameters": {"outer": {"parameters": {"x": spec}}}}
    drawn = sorted(search.next_point(config, [], [])["outer"]["value"]["x"] for _ in range(2001))
    assert low <= drawn[0] and drawn[-1] <= high
    assert drawn[1000] == pytest.approx(middle, rel=0.15)


def test_parameters_nest_as_deep_as_they_are_written():
    deep = {"a": {"parameters": {"b": {"parameters": {"c": {"values": [1, 2]}, "d": {"value": 3}}}}}}
    points = walk({"method": "grid", "parameters": deep}, lambda config, points: search.next_point(config, points, []))
    assert points == [{"a": {"value": {"b": {"c": c, "d": 3}}}} for c in (1, 2)]


def test_a_grid_of_the_most_points_is_accepted(monkeypatch):
    monkeypatch.setattr(search, "GRID_POINTS", 4)
    for spec, allowed in (({"values": [1, 2, 3, 4]}, True), ({"values": [1, 2, 3, 4, 5]}, False)):
        with contextlib.nullcontext() if allowed else pytest.raises(ValueError, match="more than 4 points"):
            search.check(grid(**spec))


def test_run_cap_ends_any_sweep():
    config = {"method": "random", "run_cap": 2, "parameters": {"x": {"min": 0.0, "max": 1.0}}}
    assert len(walk(config, lambda config, points: search.next_point(config, points, []))) == 2


def grid(**x) -> dict:
    return {"method": "grid", "parameters": {"x": x}}


def rand(**x) -> dict:
    return {"method": "random", "parameters": {"x": x}}


WRONG = [
    ([], "mapping"),
    ({"method": "gird", "parameters": {"x": {"value": 1}}}, "'gird' is not one of grid, random, bayes"),
    ({"method": "grid", "parameters": {}}, "parameters must be"),
    ({"method": "grid", "parameters": {"x": [1, 2]}}, "parameter x must be a mapping"),
    ({"method": "grid", "parameters": {"a": {"parameters": {"x": {}}}}}, "parameter a.x needs value"),
    ({"method": "grid", "parameters": {"x": {"distribution": "unifrom", "min": 0, "max": 1}}}, "'unifrom'"),
    ({"method": "grid", "parameters": {"x": {"distribution": "uniform", "min": 0.0}}}, "lacks max"),
    ({"method": "grid", "parameters": {"x": {"min": 2, "max": 1}}}, "min 2 is not below max 1"),
    ({"method": "random", "parameters": {"x": {"min": "1e-5", "max": 1.0}}}, "'1e-5' is not a number"),
    ({"method": "grid", "parameters": {"x": {"min": 0.0, "max": 1.0}}}, r"grid cannot list x \(uniform\)"),
    ({"method": "bayes", "parameters": {"x": {"min": 0.0, "max": 1.0}}}, "bayes needs a metric"),
    ({"method": "grid", "early_terminate": {"type": "hyperband"}, "parameters": {"x": {"value": 1}}}, "needs a metric"),
    (grid(min=0, max=10**9), "more than 1,000,000 points"),
    (rand(values=[]), r"values must be a list that is not empty, not \[\]"),
    (grid(values="abc"), "values must be a list"),
    (rand(values=[1, 2], probabilities=[1]), "as long as values"),
    (rand(values=[1, 2], probabilities=[1, 1]), "add up to 1"),
    (rand(distribution="log_uniform_values", min=0, max=1), "above 0"),
    (rand(distribution="log_uniform", min=1, max=1e4), "exponents of e"),
    (rand(distribution="q_uniform", min=0, max=1, q=0), "q 0 is not above 0"),
    (rand(distribution="normal", mu="zero"), "mu 'zero' is not a number"),
    (rand(distribution="beta", a=-1), "a -1 is not above 0"),
    (rand(parameters=[1]), "parameter x: parameters must be a mapping"),
    (rand(value=1) | {"run_cap": "two"}, "run_cap 'two' is not a whole number"),
    (rand(value=1) | {"metric": {"goal": "down"}}, "metric.goal 'down'"),
    (rand(value=1) | {"metric": "loss"}, "metric 'loss' is not a mapping"),
    (rand(value=1) | {"method": "custom", "scheduler": {"engine": "tpe"}}, "scheduler.engine 'tpe'"),
    (grid(value=1) | {"scheduler": {"engine": "optuna"}}, "method 'grid' is not one of custom"),
    (rand(value=1) | {"scheduler": {"engine": "wandb"}, "early_terminate": {}}, "cannot be used with a scheduler"),
    (rand(min=1) | {"method": "custom", "scheduler": {"engine": "optuna"}}, "parameter x needs value"),
    (rand(value=1) | {"run_cap": 0}, "run_cap 0 is not a whole number above 0"),
    (rand(value=1) | {"run_cap": True}, "run_cap True is not"),
    (rand(value=1) | {"metric": {"name": 3}, "early_terminate": {}}, "early_terminate needs a metric with a name"),
    (grid(distribution="q_uniform", min=0, max=1.0, q=1e-9), "more than 1,000,000 points"),
    (grid(distribution="q_uniform", min=0, max=1e300, q=1e-300), "more than 1,000,000 points"),
    (rand(distribution="int_uniform", min=0, max=1.5), "min and max must be whole numbers"),
    (rand(distribution="uniform", min=0, max=math.inf), "x: max inf is not a finite number"),
    (rand(distribution="uniform", min=1.0, max=1.0), "min 1.0 is not below max 1.0"),
    (rand(distribution="log_uniform", min=-690.5, max=0), "exponents of e"),
    (rand(parameters={}), "parameters must be a mapping, not empty"),
    (rand(values=[1, 2], probabilities=[1.5, -0.5]), "must not be negative"),
    (rand(values=[1, 2], probabilities=0.5), "as long as values"),
    (rand(values=[1, 2], probabilities=[0.5, True]), "probability True is not a number"),
    *(
        (rand(distribution=f"q_{kind}", **{key: 0}), f"{key} 0 is not above 0")
        for kind, key in (("normal", "sigma"), ("beta", "a"), ("beta", "b"), ("normal", "q"))
    ),
    ({"method": "grid", "parameters": {"a": {"parameters": {"x": 1}}}}, "parameter a.x must be a mapping"),
    ({"method": "grid", "parameters": {"a": {"parameters": {"x": {"min": 0, "max": 1.5}}}}}, r"grid cannot list a\.x"),
]
RIGHT = [
    rand(value=1) | {"run_cap": 1},
    rand(distribution="uniform", min=-1e300, max=1e300),
    rand(distribution="log_uniform", min=-690, max=690),
    rand(values=[1, 2], probabilities=[1, 0]),
    rand(values=[1, 2], probabilities=[0.5, 0.5 + 1e-7]),
    rand(distribution="beta"),
    {"method": "bayes", "scheduler": {"engine": "wandb", "search_space": {"x": 1}}},
    {"method": "custom", "scheduler": {"engine": "ax"}, "parameters": {"x": {"value": 1}}},
]


@pytest.mark.parametrize("config", RIGHT, ids=str)
def test_what_lies_on_the_edge_of_what_is_allowed(config):
    search.check(config)


@pytest.mark.parametrize(
    ("config", "message"), WRONG, ids=lambda value: str(value) if isinstance(value, dict | list) else None
)
def test_a_wrong_configuration_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=f"Invalid sweep config: .*{message}"):
        search.check(config)


@pytest.mark.parametrize("error", [ZeroDivisionError, IndexError, TypeError, ValueError])
def test_a_point_that_cannot_be_drawn_is_refused_at_once(monkeypatch, error):
    def fail(*_):
        raise error("why")

    monkeypatch.setitem(search.NEXT, "random", fail)
    with pytest.raises(ValueError, match="Invalid sweep config: no point can be drawn from it: why"):
        search.check(rand(value=1))


def test_names_and_keys_may_be_numbers():
    search.check({"method": "grid", "parameters": {1: {"values": [{1: 2, "a": 3}, {"a": 3, 1: 2.0}]}}})
    for spec, words in (({}, "parameter 1 needs value"), ({"min": 0, "max": 1.5}, r"grid cannot list 1 \(uniform\)")):
        with pytest.raises(ValueError, match=words):
            search.check({"method": "grid", "parameters": {1: spec}})
    for inner, words in (
        ({2: 3}, "1.2 must be a mapping"),
        ({2: {"parameters": 3}}, "1.2: parameters must be a mapping"),
    ):
        with pytest.raises(ValueError, match=words):
            search.check({"method": "grid", "parameters": {1: {"parameters": inner}}})


def test_what_a_scheduler_draws_is_not_drawn_here():
    config = {"method": "custom", "scheduler": {"engine": "optuna"}, "parameters": {"x": {"value": 1}}}
    search.check(config)
    with pytest.raises(LookupError):
        search.next_point(config, [], [])


def test_another_way_to_end_early_is_refused_by_name():
    pytest.importorskip("sweeps")
    with pytest.raises(ValueError, match="'median' is not hyperband"):
        search.check(rand(value=1) | {"metric": {"name": "x"}, "early_terminate": {"type": "median"}})


def test_hyperband_counts_from_the_first_iterations_or_back_from_the_last():
    pytest.importorskip("sweeps")
    config = rand(value=1) | {"metric": {"name": "x"}}
    for known in ({"min_iter": 3}, {"max_iter": 27, "s": 2}):
        search.check(config | {"early_terminate": {"type": "hyperband", **known}})
    for unknown in ({"max_iter": 27}, {"s": 2}):
        with pytest.raises(ValueError, match="needs min_iter, or max_iter and s"):
            search.check(config | {"early_terminate": {"type": "hyperband", **unknown}})
    known = {"type": "hyperband", "min_iter": 1, "max_iter": 1, "s": 1, "eta": 1.5}
    search.check(config | {"early_terminate": known})
    for wrong in ({"min_iter": 0}, {"max_iter": 0}, {"s": 0}, {"eta": 1}, {"eta": 0.5}):
        ((key, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"early_terminate.{key} {value} is too low"):
            search.check(config | {"early_terminate": known | wrong})


def test_bayes_and_hyperband_are_asked_of_their_package():
    pytest.importorskip("sweeps")
    bayes = {"method": "bayes", "metric": {"name": "loss"}, "parameters": {"x": {"min": 0.0, "max": 1.0}}}
    runs = [
        {
            "name": f"r{i}",
            "state": "running",
            "config": {"x": {"value": i / 4}},
            "summaryMetrics": {"loss": loss},
            "history": [{"loss": loss}] * 3,
        }
        for i, loss in enumerate((1.0, 5.0))
    ]
    search.check(bayes)
    assert 0 <= search.next_point(bayes, [run["config"] for run in runs], runs)["x"]["value"] <= 1
    early = bayes | {"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 3}}
    assert search.to_stop(early, runs) == {"r1"}


def test_a_sweep_has_as_many_runs_as_its_grid_or_its_cap():
    three = grid(values=[1, 2, 3, 3.0])
    for config, runs in ((three, 3), (three | {"run_cap": 2}, 2), (three | {"run_cap": 9}, 3), (rand(value=1), None)):
        assert search.expected(config) == runs
    assert search.expected(rand(value=1) | {"run_cap": 9}) == 9


def test_one_point_is_not_tried_twice_however_it_is_written():
    used = [{"x": {"value": value}} for value in (1.0, {"b": 2.0, "a": 1}, "1")]
    config = grid(values=[1, True, {"a": 1.0, "b": 2}, "1", 1.5])
    left = walk(config, lambda config, points: search.next_point(config, [*used, *points], []))
    assert [point["x"]["value"] for point in left] == [True, 1.5]
    deep = {"method": "grid", "parameters": {"a": {"parameters": {"x": {"values": [1, 2]}}}}}
    for used in ({"a": {"value": {"x": 1}}}, {"a": {"value": 3}}, {}):
        first = 2 if used == {"a": {"value": {"x": 1}}} else 1
        assert search.next_point(deep, [used], []) == {"a": {"value": {"x": first}}}


junk = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.sampled_from(["", "1e-5"]), st.just([]))
leaves = st.dictionaries(
    st.sampled_from(["value", "values", "probabilities", "min", "max", "mu", "sigma", "q", "a", "b", "distribution"]),
    st.one_of(junk, st.lists(junk, max_size=2), st.sampled_from(sorted(search.DRAW))),
)


@given(st.sampled_from(["grid", "random"]), leaves)
def test_what_is_accepted_can_be_drawn(method, spec):
    config = {"method": method, "parameters": {"x": spec}}
    with contextlib.suppress(ValueError):
        search.check(config)
        for _ in range(20):
            try:
                search.next_point(config, [], [])
            except Exception as error:
                raise AssertionError(f"accepted, and then: {error!r}") from error


def test_bayes_without_its_package_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sweeps", None)
    config = {"method": "bayes", "metric": {"name": "loss"}, "parameters": {"x": {"min": 0.0, "max": 1.0}}}
    with pytest.raises(ValueError, match=r"bayes needs W&B's package sweeps .*: pip install .*sweeps=="):
        search.check(config)
