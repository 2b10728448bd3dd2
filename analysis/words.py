"""Numbers and run-given text in the words of the report: escaping, rounding, lists."""

import math
import re
from html import escape as escape_html
from typing import Any

from analysis.files import number

# What markdown or HTML could act on; underscores inside words are plain text in GitHub's markdown.
SPECIAL = re.compile(r"[\\`*|<&~$@\n]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|://|\bwww\.")

WHOLE = r"(?:(?<![\w.-])\d(?:\.\d+)?e-\d+\b|\[[+-]?[\d.]+, [+-]?[\d.]+\])"  # 3.2e-4 or [0.004, 0.062]


def escape(value: Any) -> Any:
    """`value` with every string made inert as markdown and HTML, and on one line; numbers and structure stay."""
    if isinstance(value, str):
        text = "\n".join(value.strip().splitlines())
        return SPECIAL.sub(lambda match: "".join(f"&#{ord(c)};" for c in match.group()), text)
    if isinstance(value, dict):
        return {escape(key): escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape(item) for item in value]
    return value


def rate_label(rate: float | None, digits: int = 3) -> str:
    """A rate as people write it: 1e-5, 2e-4, 3.2e-4."""
    if rate is None or not math.isfinite(rate):
        return "unknown"
    mantissa, exponent = f"{rate:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def listed(words: list[str], last: str = "and") -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""


def some(words: list[str], shown: int = 3) -> str:
    """a, b, c and 7 more."""
    return listed([*words[:shown], f"{len(words) - shown} more"] if len(words) > shown + 1 else words)


def labels(rates: list[float], last: str = "and") -> str:
    """1e-5, 2e-4 and 1e-3."""
    return listed([rate_label(rate) for rate in rates], last)


def in_words(count: int) -> str:
    """A small number as a word."""
    names = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    return names[count] if count < len(names) else str(count)


def settings(values: dict) -> str:
    """lora_r = 8 and adapter_dtype = bfloat16."""
    return some([f"{key} = {value}" for key, value in values.items()])


def html(text: str) -> str:
    """The little markdown of the report as HTML, each number kept on one line; `escape` has made values inert."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<!\*)\*([^*]+)\*(?!\*)", r"<em>\1</em>", text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"(?<=\d) (?=[%×])|(?<=±) (?=\d)|(?<=\d) (?=±)", "\u00a0", text).replace("\n   - ", "<br>• ")
    return re.sub(rf"{WHOLE}(?![^<]*>)", r'<span class="whole">\g<0></span>', text)


def code(fenced: str) -> str:
    """A code block of `fence` as HTML."""
    commands = "\n".join(fenced.splitlines()[1:-1])
    return f"<pre>{escape_html(commands)}</pre>"


def decimals(value: object, form: str = ".3f") -> str:
    value = number(value)
    return "—" if value is None else format(value, form) if math.isfinite(value) else "not finite"


def small(value: object) -> str:
    """A quantity to three digits, a small one as rates are written: 0.0556, 7.23e-6."""
    value = number(value)
    return "—" if value is None else rate_label(value) if 0 < value < 1e-2 else f"{value:.3g}"


def bounds(pair: list | tuple | None, form: str = ".3f") -> str:
    return "no interval" if pair is None else f"95 % [{decimals(pair[0], form)}, {decimals(pair[1], form)}]"


def rate_bounds(pair: list | tuple) -> str:
    """[1.6e-4, 3.3e-4]; a side beyond the rates that were run is open."""
    low, high = (rate_label(end, 2) if end and math.isfinite(end) else "open" for end in map(number, pair))
    return f"[{low}, {high}]"


def percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.0f} %"


def steps(value: object, planned: int | None) -> str:
    """Steps to a target; a miss is "> T"."""
    value = number(value)
    return "—" if value is None else f"> {planned}" if math.isinf(value) else f"{value:.0f}"


def shortened(text: object, limit: int = 300) -> str:
    """Escaped text cut at a length, never inside an entity."""
    if not isinstance(text, str) or not text.strip():
        return "(empty)"
    return text if len(text) <= limit else re.sub(r"&[^;]*$", "", text[:limit]) + " …"


def fence(commands: list[str], language: str = "bash") -> str:
    """A code block that no value can close: neither line ends nor backticks survive in it."""
    return f"```{language}\n" + "\n".join(re.sub(r"[`\r\n]", "?", command) for command in commands) + "\n```"
