"""Which runs a query means, and in which order: the Mongo-style filters and order keys of W&B's public API."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime

import regex

from local_wandb.nodes import ENTITY

COLUMNS = {
    "created_at": "createdAt", "heartbeat_at": "heartbeatAt", "display_name": "displayName", "sweep": "sweepName",
    "job_type": "jobType", "group": "group", "name": "name", "state": "state", "notes": "notes",
    "description": "description", "host": "host", "createdAt": "createdAt", "heartbeatAt": "heartbeatAt",
    "displayName": "displayName", "jobType": "jobType", "tags": "tags", "updatedAt": "updatedAt",
    "exitcode": "exitcode", "entity": "entityName", "updated_at": "updatedAt",
}  # fmt: skip


def select(rows: list[dict], condition: dict, order: str) -> list[dict]:
    """The rows that match, sorted by `order`: [+-]key, several keys with commas; rows without the key come last."""
    rows = [row for row in rows if matches(row, condition)]
    for key in reversed(order.split(",")):
        path = key.lstrip("+-")
        found = [(value(row, path), row) for row in rows]
        known = [pair for pair in found if isinstance(pair[0], int | float | str)]
        known.sort(key=lambda pair: (isinstance(pair[0], str), pair[0]), reverse=key.startswith("-"))
        chosen = {id(row) for _, row in known}
        rows = [row for _, row in known] + [row for row in rows if id(row) not in chosen]
    return rows


def matches(row: dict, condition: dict) -> bool:
    """Whether the row meets the filter. An unknown operator is a ValueError that names it."""
    return all(GROUPS[key](row, test) if key in GROUPS else _field(row, key, test) for key, test in condition.items())


GROUPS: dict[str, Callable[[dict, list], bool]] = {
    "$and": lambda row, tests: all(matches(row, test) for test in tests),
    "$or": lambda row, tests: any(matches(row, test) for test in tests),
    "$nor": lambda row, tests: not any(matches(row, test) for test in tests),
}


def _field(row: dict, path: str, test) -> bool:
    if path.startswith("$"):
        raise ValueError(f"unknown filter operator {path!r}")
    found = value(row, path)
    if not (isinstance(test, dict) and any(key.startswith("$") for key in test)):
        test = {"$eq": test}
    for operator in test:
        if operator not in OPERATORS:
            raise ValueError(f"unknown filter operator {operator!r}")
    return all(OPERATORS[operator](found, wanted) for operator, wanted in test.items())


def _equal(found, wanted) -> bool:
    return found == wanted or (isinstance(found, list) and wanted in found)


def _compare(test: Callable) -> Callable:
    def compare(found, wanted) -> bool:
        try:
            return found is not None and test(found, wanted)
        except TypeError:
            return False

    return compare


REGEX_TIME = 0.2  # s for one value: ^(a|aa)+$ would take years


def _search(pattern: str, text: str) -> bool:
    try:
        return regex.search(pattern, text, timeout=REGEX_TIME, concurrent=True) is not None
    except regex.error as error:
        raise ValueError(f"$regex {pattern!r}: {error}") from error
    except TimeoutError as error:
        raise ValueError(f"$regex {pattern!r} takes longer than {REGEX_TIME} s for one value") from error


OPERATORS: dict[str, Callable] = {
    "$eq": _equal,
    "$ne": lambda found, wanted: not _equal(found, wanted),
    "$in": lambda found, wanted: any(_equal(found, one) for one in wanted),
    "$nin": lambda found, wanted: not any(_equal(found, one) for one in wanted),
    "$lt": _compare(lambda found, wanted: found < wanted),
    "$lte": _compare(lambda found, wanted: found <= wanted),
    "$gt": _compare(lambda found, wanted: found > wanted),
    "$gte": _compare(lambda found, wanted: found >= wanted),
    "$regex": lambda found, wanted: isinstance(found, str) and _search(wanted, found),
    "$exists": lambda found, wanted: (found is not None) == bool(wanted),
    "$not": lambda found, test: not all(OPERATORS[o](found, w) for o, w in test.items()),
}


def value(row: dict, path: str):
    """What a filter's path means in a row; None where it has no such thing."""
    head, _, rest = path.partition(".")
    if head == "config":
        return _inside(json.loads(row["config"] or "{}"), rest, wrapped=True)
    if head in ("summary_metrics", "summaryMetrics"):
        return _inside(json.loads(row["summaryMetrics"] or "{}"), rest)
    if head == "tags":
        return json.loads(row["tags"] or "[]") if not rest else rest in json.loads(row["tags"] or "[]")
    if head in ("username", "user"):
        return ENTITY  # one key for one group of people: whatever there is, is theirs
    if head == "duration":
        return duration(row)
    if head not in COLUMNS or COLUMNS[head] not in row:
        raise ValueError(f"cannot filter or sort by {path!r}")
    found = row[COLUMNS[head]]
    if COLUMNS[head] in ("createdAt", "heartbeatAt", "updatedAt"):
        return found and datetime.fromtimestamp(found, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    return found


def duration(run: dict) -> float:
    """Seconds that the run took: by its own count, which a later upload keeps, else until it was last heard of."""
    own = json.loads(run["summaryMetrics"] or "{}").get("_wandb")
    runtime = own.get("runtime") if isinstance(own, dict) else None
    return runtime if isinstance(runtime, int | float) else run["heartbeatAt"] - run["createdAt"]


def _inside(values: dict, path: str, wrapped: bool = False):
    """Keys may themselves hold dots, so the longest known key wins. Config values are {"value": ...}."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        key = ".".join(parts[:cut])
        if isinstance(values, dict) and key in values:
            found = values[key]
            if wrapped:
                found = found.get("value") if isinstance(found, dict) else found
                parts = [*parts[:cut], *[p for p in parts[cut:] if p != "value"]]
            return found if cut == len(parts) else _inside(found, ".".join(parts[cut:]))
    return None


def like(text: str, pattern: str) -> bool:
    """SQL's LIKE: % is anything, _ is one character."""
    parts = [{"%": ".*", "_": "."}.get(c, re.escape(c)) for c in pattern]
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None
