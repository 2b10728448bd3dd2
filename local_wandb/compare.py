"""The runs of a project beside each other: what static/compare.js asks for, a page of runs or groups at a time."""

import json
import math
import statistics

from local_wandb.filters import select, value
from local_wandb.runs import LIVE, strict
from local_wandb.store import Store

PAGE = 50  # runs or groups of one answer
POINTS = 1000  # of one curve, evenly spread over the run
CURVES = 20


def answer(store: Store, project: dict, wanted: dict) -> dict:
    """One page of the runs that `wanted` asks for.

    wanted: {search, filter, order, from, group, columns, chart: {metric, x, runs}}, every key optional; `filter` and
    `order` are those of api.runs. Raises ValueError where a key or value of the filter is unknown.
    """
    runs = [run | {"entityName": project["entityName"]} for run in store.find("runs", project=project["id"])]
    total = len(runs)
    text = str(wanted.get("search") or "").casefold()
    if text:
        runs = [run for run in runs if text in f"{run['displayName'] or ''} {run['name']}".casefold()]
    condition = wanted.get("filter") or {}
    if not isinstance(condition, dict):
        raise ValueError("the filter must be a JSON object, as in api.runs")
    runs = select(runs, condition, str(wanted.get("order") or "-created_at"))
    begin = int(wanted.get("from") or 0)
    columns = [str(column) for column in wanted.get("columns") or []]
    shown = runs[begin : begin + PAGE]
    result = {
        "total": total,
        "found": len(runs),
        "from": begin,
        "page": PAGE,
        "live": any(run["state"] in LIVE for run in runs),
        "keys": _keys(shown),
        "metrics": _metrics(shown),
        "runs": [_run(run) for run in shown],
    }
    if wanted.get("group"):
        groups = _groups(runs, str(wanted["group"]), columns)
        result |= {"groups": groups[begin : begin + PAGE], "found": len(groups)}
    chart = wanted.get("chart") or {}
    if chart.get("metric"):
        result["curves"] = _curves(store, project, chart)
    return result


def _scalars(run: dict) -> dict[str, object]:
    """What a run can be compared by: config.… and summary_metrics.…, by the names that a filter has for them."""
    config = {
        key: value.get("value") if isinstance(value, dict) else value
        for key, value in json.loads(run["config"] or "{}").items()
    }
    found: dict[str, object] = {}
    for prefix, values in (("config", config), ("summary_metrics", json.loads(run["summaryMetrics"] or "{}"))):
        for key, scalar in values.items():
            if not key.startswith("_") and isinstance(scalar, int | float | str):
                found[f"{prefix}.{key}"] = scalar
    return found


def _keys(runs: list[dict]) -> list[str]:
    return sorted({key for run in runs for key in _scalars(run)})


def _metrics(runs: list[dict]) -> list[str]:
    names = {
        key
        for run in runs
        for key, known in json.loads(run["historyKeys"] or "{}").get("keys", {}).items()
        if isinstance(known["previousValue"], int | float) and (key == "_runtime" or not key.startswith("_"))
    }
    return sorted(names)


def _run(run: dict) -> dict:
    values = {key: strict(value) for key, value in _scalars(run).items()}
    return {
        "id": run["name"], "name": run["displayName"] or run["name"], "state": run["state"], "sweep": run["sweepName"],
        "group": run["group"], "tags": json.loads(run["tags"] or "[]"), "created": run["createdAt"], "values": values,
    }  # fmt: skip


def _groups(runs: list[dict], by: str, columns: list[str]) -> list[dict]:
    """Per value of the column `by`: how many runs, and of each numeric column n, mean and standard deviation."""
    members: dict[str, list[dict]] = {}
    for run in runs:
        found = value(run, by)
        members.setdefault("" if found is None else str(found), []).append(run)
    groups = []
    for name, group in members.items():
        numbers = {}
        for column in columns:
            found = [v for v in (value(run, column) for run in group) if type(v) in (int, float) and math.isfinite(v)]
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else None
                numbers[column] = {"n": len(found), "mean": statistics.fmean(found), "sd": spread}
        groups.append({"value": name, "runs": len(group), "numbers": numbers})
    return groups


def _curves(store: Store, project: dict, chart: dict) -> list[dict]:
    curves, x = [], chart.get("x") or "_step"
    for name in [str(name) for name in chart.get("runs") or []][:CURVES]:
        run = store.get("runs", project=project["id"], name=name)
        if run is None:
            continue
        points = [
            [row[x], row[chart["metric"]]]
            for row in map(json.loads, store.history(run["id"]))
            if chart["metric"] in row and x in row
        ]
        points = [p for p in points if all(type(v) in (int, float) and math.isfinite(v) for v in p)]
        stride = math.ceil(len(points) / POINTS) or 1
        curves.append({"id": name, "name": run["displayName"] or name, "points": points[::stride]})
    return curves
