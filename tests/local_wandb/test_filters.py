"""Which rows a filter means and in which order, beyond what the real client's queries in test_runs.py reach."""

import json

import pytest

from local_wandb import filters
from local_wandb.filters import like, matches, select


def row(name: str, config: dict | None = None, summary: dict | None = None) -> dict:
    wrapped = {key: {"value": value} for key, value in (config or {}).items()}
    times = {"createdAt": 86400.0, "heartbeatAt": None}
    return {"name": name, "config": json.dumps(wrapped), "summaryMetrics": json.dumps(summary), "tags": '["t"]'} | times


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("config.lr,-summary_metrics.loss", "ebcad"),
        ("-config.lr", "dacbe"),
        ("+summary_metrics.loss", "aecbd"),
        ("-summary_metrics.loss", "ceabd"),
    ],
)
def test_rows_without_the_key_come_last_and_words_after_numbers(order, expected):
    rows = [
        row("a", {"lr": 2}, {"loss": 1}),
        row("b", {"lr": 1}, {}),
        row("c", {"lr": 2}, {"loss": 3}),
        row("d", {"lr": "fast"}),
        row("e", {"lr": 1}, {"loss": 2}),
    ]
    assert "".join(found["name"] for found in select(rows, {}, order)) == expected


ONE = row("abc", {"a.b": {"c": 1}, "lr": 0.5}, {"x": {"y.z": "text"}, "list": [1, 2], "_wandb": {"runtime": 5}})


@pytest.mark.parametrize(
    "condition",
    [
        {"config.a.b.c": 1},  # keys may hold dots
        {"config.a.b.value.c": 1},
        {"config.a.b": {"c": 1}},  # no operator, so a value
        {"summary_metrics.x.y.z": "text"},
        {"summaryMetrics.list": 2},
        {"summary_metrics.list": {"$ne": 3}},
        {"tags.t": True},
        {"tags.other": False},
        {"user": "local"},
        {"config.lr": {"$gte": 0.5, "$lte": 0.5}},
        {"config.lr": {"$exists": True}},
        {"config.missing": {"$exists": False}},
        {"config.lr.missing": None},
        {"created_at": "1970-01-02T00:00:00.000000"},
        {"heartbeat_at": None},
        {"name": {"$regex": "b"}},
        {"username": "local"},
        {"duration": 5},
    ],
    ids=str,
)
def test_what_matches(condition):
    assert matches(ONE, condition)
    assert not matches(ONE, {"$nor": [condition]})


@pytest.mark.parametrize(
    "condition",
    [
        {"config.a": {"$exists": True}},
        {"config.lr": {"$gt": 0.5}},
        {"config.lr": {"$lt": 0.5}},
        {"config.lr": {"$lt": "a"}},  # nothing lies between a number and a word
        {"config.lr": {"$not": {"$gt": 0.4, "$lt": 0.6}}},
        {"config.missing": {"$lt": 1}},
        {"config.lr": {"$regex": "5"}},  # of texts alone
        {"summary_metrics.list": 3},
        {"tags": "other"},
        {"name": "abc", "config.lr": 0.4},
        {"$or": [{"name": "ab"}, {"name": {"$regex": "^b"}}]},
    ],
    ids=str,
)
def test_what_does_not_match(condition):
    assert not matches(ONE, condition)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"name": {"$regex": "("}}, r"\$regex '\(': missing"),
        ({"name": {"$near": 1}}, r"unknown filter operator '\$near'"),
        ({"$xor": []}, r"unknown filter operator '\$xor'"),
        ({"colour": 1}, "cannot filter or sort by 'colour'"),
        ({"state": 1}, "cannot filter or sort by 'state'"),  # of rows that have none, as a sweep's agents
    ],
)
def test_what_no_filter_means_is_refused_by_name(condition, words):
    with pytest.raises(ValueError, match=words):
        matches(ONE, condition)


def test_a_pattern_that_takes_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr(filters, "REGEX_TIME", 0.02)
    with pytest.raises(ValueError, match=r"\$regex '.*' takes longer than 0.02 s for one value"):
        matches(row("a" * 60 + "b"), {"name": {"$regex": "^(a|aa)+$"}})


def test_a_pattern_is_that_of_sql():
    assert like("a.b\nc", "a.%") and like("abc", "a_c") and like("a%", "a%")
    assert not like("abc", "a_") and not like("xabc", "a%") and not like("abc", "a.c")
