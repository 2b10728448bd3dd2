"""Numbers and lists as the report writes them, and JSON as the files hold it."""

import math
from pathlib import Path

import numpy as np
import pytest

from analysis import words
from analysis.files import InputError, number, save, strict, to_json


def test_lists_in_words():
    assert [words.listed(list("abcde"[:n])) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert words.listed(["a", "b"], "or") == "a or b" and words.labels([1e-5, 2e-4], "or") == "1e-5 or 2e-4"
    assert words.some(list("abcd")) == "a, b, c and d" and words.some(list("abcde")) == "a, b, c and 2 more"
    assert words.settings({"lora_r": 8, "dtype": "x"}) == "lora_r = 8 and dtype = x"
    assert [words.in_words(n) for n in (0, 1, 12, 13)] == ["no", "one", "twelve", "13"]
    assert [words.plural(n, "run") for n in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]


def test_numbers_in_words():
    assert [words.rate_label(x) for x in (1e-5, 3.16e-4, 0.001, None, math.inf)] == [
        "1e-5", "3.16e-4", "1e-3", "unknown", "unknown",
    ]  # fmt: skip
    assert words.rate_label(3.16e-4, 2) == "3.2e-4"
    assert [words.decimals(x) for x in (1, "NaN", None, "2.5")] == ["1.000", "not finite", "—", "2.500"]
    assert [words.small(x) for x in (None, 0, 7.234e-6, 0.00999, 0.01, 1276)] == [
        "—", "0", "7.23e-6", "9.99e-3", "0.01", "1.28e+03",
    ]  # fmt: skip
    assert words.bounds(None) == "no interval" and words.bounds([0.1, 0.25], ".2f") == "95 % [0.10, 0.25]"
    assert words.rate_bounds([1.6e-4, "Infinity"]) == "[1.6e-4, open]" and words.rate_bounds([0.0, 3e-4])[:5] == "[open"
    assert [words.percent(x) for x in (None, 0.126)] == ["—", "13 %"]
    assert [words.steps(x, 100) for x in (None, "Infinity", 12.6)] == ["—", "> 100", "13"]


def test_texts_are_cut_and_fenced():
    assert [words.shortened(x) for x in (None, 3, " \n", "a" * 300)] == ["(empty)"] * 3 + ["a" * 300]
    assert words.shortened("a" * 301) == "a" * 300 + " …"
    assert words.shortened("ab&#60;cd", 5) == "ab …"
    assert words.fence(["a`b", "c\nd"]) == "```bash\na?b\nc?d\n```" and words.fence([], "python") == "```python\n\n```"
    assert words.code(words.fence(["a <b", "c"])) == "<pre>a &lt;b\nc</pre>"
    assert words.html("**a** *b* `c` [d](e)\n   - 95 % × 2 ± 1") == (
        '<strong>a</strong> <em>b</em> <code>c</code> <a href="e">d</a><br>• 95\u00a0% × 2\u00a0±\u00a01'
    )
    assert words.html("[0.1, 0.2] of 3.2e-4, no-1e-5") == (
        '<span class="whole">[0.1, 0.2]</span> of <span class="whole">3.2e-4</span>, no-1e-5'
    )


def test_values_are_strict_json():
    values = [None, True, 3, "t", 1.5, np.float32(0.5), np.int64(7), math.nan, math.inf, -math.inf, (1, np.arange(2))]
    plain = [None, True, 3, "t", 1.5, 0.5, 7, "NaN", "Infinity", "-Infinity", [1, [0, 1]]]
    found = strict([*values, Path("a/b"), {1: {"x": math.inf}}])
    assert found == [*plain, "a/b", {"1": {"x": "Infinity"}}] and list(map(type, found[:9])) == list(
        map(type, plain[:9])
    )
    assert [number(x) for x in (None, True, False, "1e-5", "Infinity", "text", [1], 3, 10**400)] == [
        None, None, None, 1e-5, math.inf, None, None, 3.0, None,
    ]  # fmt: skip


def test_json_is_spread_over_so_many_levels_of_lines():
    value = {"a": [1, {"é": [2]}], "b": {}, "c": []}
    assert to_json(value, 0) == '{"a": [1, {"é": [2]}], "b": {}, "c": []}\n'
    assert to_json(value, 1) == '{\n "a": [1, {"é": [2]}],\n "b": {},\n "c": []\n}\n'
    assert to_json(value) == '{\n "a": [\n  1,\n  {"é": [2]}\n ],\n "b": {},\n "c": []\n}\n'


def test_a_file_is_written_whole_or_its_place_is_named(tmp_path):
    save(tmp_path / "new" / "file", "é")
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == ["é".encode()]
    with pytest.raises(InputError, match=r"cannot write .*: File exists; give a writable directory with --output"):
        save(tmp_path / "new" / "file" / "below", "")
