"""The next point of a sweep, from its configuration and the points that its runs already have.

Grid and random are ours; bayes and hyperband are those of W&B's package `sweeps`, imported only for them. It is no
requirement of the project, because it asks for numpy < 2, which others exclude; it works with numpy 2.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from statistics import NormalDist

Point = dict[str, dict]  # a run's args: {"learning_rate": {"value": 2e-4}}, nested parameters inside "value"


def check(config: dict) -> None:
    """Raises ValueError with one line, in W&B's words, that names what is wrong with a sweep configuration.

    What can fail while a point is drawn fails here: an agent would wait for ever for a point that cannot be drawn.
    """
    try:
        _check(config)
    except ValueError as error:
        raise ValueError(f"Invalid sweep config: {error}") from error


def _check(config: dict) -> None:
    if not isinstance(config, dict):
        raise ValueError("it must be a mapping with method and parameters")
    method, scheduler = config.get("method"), _mapping(config, "scheduler")
    methods = tuple(NEXT)
    if "scheduler" in config:
        methods = ENGINES[_one_of("scheduler.engine", scheduler.get("engine"), ENGINES)]
        if "early_terminate" in config:
            raise ValueError("early_terminate cannot be used with a scheduler, which ends runs itself")
    _one_of("method", method, methods)
    cap = config.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise ValueError(f"run_cap {cap!r} is not a whole number above 0")
    metric = _mapping(config, "metric")
    _one_of("metric.goal", metric.get("goal", "minimize"), ("minimize", "maximize"))
    if not (scheduler.get("search_space") and "parameters" not in config):
        if not isinstance(config.get("parameters"), dict) or not config["parameters"]:
            raise ValueError("parameters must be a mapping that is not empty")
        for path, spec in _leaves(config["parameters"]):
            _distribution(path, spec)
    if method == "grid" and math.prod(len(values) for _, values in _grid_axes(config["parameters"])) > GRID_POINTS:
        raise ValueError(f"the grid has more than {GRID_POINTS:,} points")
    for feature in ("bayes", "early_terminate"):
        if "scheduler" not in config and (feature == method or feature in config):
            if not isinstance(metric.get("name"), str):
                raise ValueError(f"{feature} needs a metric with a name")
            _sweeps_package(feature)
    if "early_terminate" in config:
        _check_hyperband(_mapping(config, "early_terminate"))
    if "scheduler" not in config:
        try:
            next_point(config, [], [])
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"no point can be drawn from it: {error}") from error


def _one_of(what: str, value, allowed) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(allowed)}")
    return value


def _mapping(config: dict, key: str) -> dict:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} {value!r} is not a mapping")
    return value


def _check_hyperband(early: dict) -> None:
    if early.get("type") != "hyperband":
        raise ValueError(f"early_terminate.type {early.get('type')!r} is not hyperband")
    if not ("min_iter" in early or {"max_iter", "s"} <= early.keys()):
        raise ValueError("early_terminate needs min_iter, or max_iter and s")
    for key, low in (("min_iter", 1), ("max_iter", 1), ("s", 1), ("eta", 1)):
        value = _number(f"early_terminate.{key}", early.get(key, 2))
        if value < low or (key == "eta" and value == low):
            raise ValueError(f"early_terminate.{key} {value} is too low")


def next_point(config: dict, used: list[Point], runs: list[dict]) -> Point | None:
    """The point to try now, None when a grid has no more. `used`: points taken; `runs`: what bayes learns from."""
    cap = config.get("run_cap")
    if cap is not None and len(used) >= cap:
        return None
    return NEXT[config["method"]](config["parameters"], used, config, runs)


def expected(config: dict) -> int | None:
    """How many runs the sweep will have; None where it has no end of its own."""
    caps = [config["run_cap"]] if "run_cap" in config else []
    if config["method"] == "grid":
        caps.append(math.prod(len(values) for _, values in _grid_axes(config["parameters"])))
    return min(caps, default=None)


def _grid(parameters: dict, used: list[Point], config: dict, runs: list[dict]) -> Point | None:
    axes = _grid_axes(parameters)
    taken = {tuple(_key(_at(point, path)) for path, _ in axes) for point in used}
    for values in itertools.product(*(values for _, values in axes)):
        if tuple(map(_key, values)) not in taken:
            return _point(zip((path for path, _ in axes), values, strict=True))
    return None


def _random(parameters: dict, used: list[Point], config: dict, runs: list[dict]) -> Point:
    return _point((path, _draw(path, spec)) for path, spec in _leaves(parameters))


def _bayes(parameters: dict, used: list[Point], config: dict, runs: list[dict]) -> Point:
    package = _sweeps_package("bayes")
    return package.next_run(config, [package.SweepRun(**run) for run in runs]).config


NEXT = {"grid": _grid, "random": _random, "bayes": _bayes}
# Who draws the points of a sweep with a `scheduler:` block is `wandb sweep-scheduler`; engine -> methods, as in W&B.
ENGINES = {"wandb": tuple(NEXT), "optuna": ("custom",), "ax": ("custom",)}
GRID_POINTS = 1_000_000


def to_stop(config: dict, runs: list[dict]) -> set[str]:
    """Names of the running runs that the sweep's early_terminate ends now."""
    package = _sweeps_package("early_terminate")
    return {run.name for run in package.stop_runs(config, [package.SweepRun(**run) for run in runs])}


def _sweeps_package(feature: str):
    try:
        import sweeps
    except ImportError as error:
        needed = "jsonref jsonschema scikit-learn scipy pydantic && pip install --no-deps sweeps==0.3.0"
        raise ValueError(f"{feature} needs W&B's package sweeps ({error}): pip install {needed}") from error
    return sweeps


def _leaves(parameters: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    for name, spec in parameters.items():
        if not isinstance(spec, dict):
            raise ValueError(
                f"parameter {'.'.join(map(str, (*path, name)))} must be a mapping such as {{values: [...]}}"
            )
        if "parameters" in spec:
            if not isinstance(spec["parameters"], dict) or not spec["parameters"]:
                raise ValueError(
                    f"parameter {'.'.join(map(str, (*path, name)))}: parameters must be a mapping, not empty"
                )
            yield from _leaves(spec["parameters"], (*path, name))
        else:
            yield (*path, name), spec


def _point(values) -> Point:
    point: Point = {}
    for (first, *rest), value in values:
        if not rest:
            point[first] = {"value": value}
            continue
        level = point.setdefault(first, {"value": {}})["value"]
        for name in rest[:-1]:
            level = level.setdefault(name, {})
        level[rest[-1]] = value
    return point


def _at(point: Point, path: tuple[str, ...]):
    value = point.get(path[0], {}).get("value")
    for name in path[1:]:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _key(value) -> str:
    """Equal for values that a grid must not try twice: 1 and 1.0 are one point, 1 and True are two."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_key(v)}" for k, v in sorted(value.items(), key=repr)) + "}"
    return repr(value)


def _grid_axes(parameters: dict) -> list[tuple[tuple[str, ...], Sequence]]:
    axes = []
    for path, spec in _leaves(parameters):
        kind = _distribution(path, spec)
        if kind not in GRID:
            raise ValueError(f"grid cannot list {'.'.join(map(str, path))} ({kind}); it takes {', '.join(GRID)}")
        axes.append((path, GRID[kind](spec)))
    return axes


GRID = {
    "constant": lambda spec: [spec["value"]],
    "categorical": lambda spec: list({_key(v): v for v in spec["values"]}.values()),
    "int_uniform": lambda spec: range(spec["min"], spec["max"] + 1),
    "q_uniform": lambda spec: _arange(spec["min"], spec["max"], spec.get("q", 1.0)),
}


def _arange(low: float, high: float, step: float) -> list[float]:
    count = (high - low) / step
    if count > GRID_POINTS:  # it may be infinite
        raise ValueError(f"the grid has more than {GRID_POINTS:,} points")
    return [low + i * step for i in range(math.ceil(count))]


def _distribution(path: tuple[str, ...], spec: dict) -> str:
    where = f"parameter {'.'.join(map(str, path))}"
    if "distribution" in spec:
        kind = spec["distribution"]
    elif "value" in spec:
        kind = "constant"
    elif "values" in spec:
        kind = "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    elif "min" in spec and "max" in spec:
        kind = "int_uniform" if isinstance(spec["min"], int) and isinstance(spec["max"], int) else "uniform"
    else:
        raise ValueError(f"{where} needs value, values, min and max, or a distribution")
    if not isinstance(kind, str) or kind not in DRAW:
        raise ValueError(f"{where} has an unknown distribution {kind!r}")
    missing = [key for key in REQUIRED.get(kind, ()) if key not in spec]
    if missing:
        raise ValueError(f"{where} ({kind}) lacks {', '.join(missing)}")
    if "categorical" in kind:
        _check_values(where, kind, spec)
        return kind
    numbers = {key: _number(f"{where}: {key}", spec[key]) for key in NUMBERS if key in spec}
    for key in ("q", "sigma", "a", "b"):
        if numbers.get(key, 1) <= 0:
            raise ValueError(f"{where}: {key} {numbers[key]} is not above 0")
    if kind in REQUIRED and "uniform" in kind:
        low, high = numbers["min"], numbers["max"]
        if low >= high:
            raise ValueError(f"{where}: min {low} is not below max {high}")
        if kind == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
            raise ValueError(f"{where} (int_uniform): min and max must be whole numbers")
        if kind.endswith("log_uniform_values") and low <= 0:
            raise ValueError(f"{where} ({kind}): min {low} is not above 0; a logarithm needs that")
        if kind.endswith("log_uniform") and max(abs(low), abs(high)) > EXPONENT:
            raise ValueError(
                f"{where} ({kind}): min and max are exponents of e; {kind}_values takes the bounds as such"
            )
    return kind


def _number(what: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} {value!r} is not a number; YAML wants 1.0e-5, not 1e-5")
    if not abs(value) <= 1e300:
        raise ValueError(f"{what} {value} is not a finite number")
    return value


def _check_values(where: str, kind: str, spec: dict) -> None:
    if not isinstance(spec["values"], list) or not spec["values"]:
        raise ValueError(f"{where}: values must be a list that is not empty, not {spec['values']!r}")
    if kind == "categorical_w_probabilities":
        chances = spec["probabilities"]
        if not isinstance(chances, list) or len(chances) != len(spec["values"]):
            raise ValueError(f"{where}: probabilities must be a list as long as values ({len(spec['values'])})")
        if min(_number(f"{where}: probability", p) for p in chances) < 0 or abs(sum(chances) - 1) > 1e-6:
            raise ValueError(f"{where}: probabilities must not be negative and must add up to 1")


def _draw(path: tuple[str, ...], spec: dict):
    return DRAW[_distribution(path, spec)](spec)


def _uniform(spec):
    return random.uniform(spec["min"], spec["max"])


def _log_uniform(spec):
    return math.exp(_uniform(spec))


def _log_uniform_values(spec):
    return math.exp(random.uniform(math.log(spec["min"]), math.log(spec["max"])))


def _normal(spec):
    return NormalDist(spec.get("mu", 0), spec.get("sigma", 1)).inv_cdf(random.uniform(1e-16, 1 - 1e-16))


def _log_normal(spec):
    return math.exp(_normal(spec))


def _beta(spec):
    return random.betavariate(spec.get("a", 1), spec.get("b", 1))


def _quantised(draw):
    def quantised(spec):
        q = spec.get("q", 1.0)
        value = round(draw(spec) / q) * q
        return int(value) if isinstance(q, int) else value

    return quantised


DRAW = {
    "constant": lambda spec: spec["value"],
    "categorical": lambda spec: random.choice(spec["values"]),
    "categorical_w_probabilities": lambda spec: random.choices(spec["values"], spec["probabilities"])[0],
    "int_uniform": lambda spec: random.randint(spec["min"], spec["max"]),
    "uniform": _uniform,
    "q_uniform": _quantised(_uniform),
    "log_uniform": _log_uniform,
    "q_log_uniform": _quantised(_log_uniform),
    "inv_log_uniform": lambda spec: 1 / _log_uniform(spec),  # min and max bound log(1/x)
    "log_uniform_values": _log_uniform_values,
    "q_log_uniform_values": _quantised(_log_uniform_values),
    "inv_log_uniform_values": _log_uniform_values,  # the inverse of a log-uniform value is log-uniform
    "normal": _normal,
    "q_normal": _quantised(_normal),
    "log_normal": _log_normal,
    "q_log_normal": _quantised(_log_normal),
    "beta": _beta,
    "q_beta": _quantised(_beta),
}
NUMBERS = ("min", "max", "mu", "sigma", "q", "a", "b")
EXPONENT = 690  # of e: beyond, a float overflows
REQUIRED = {kind: ("min", "max") for kind in DRAW if "uniform" in kind} | {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
}
