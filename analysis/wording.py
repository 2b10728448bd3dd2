"""Numbers and run-given text in the words of the report: escaping, rounding, tables."""

import math
import re

from analysis.files import number

# What markdown or HTML could act on; underscores inside words are plain text in GitHub's markdown.
SPECIAL = re.compile(r"[\\`*|<&~$@\n]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|://|\bwww\.")


def escape(value: object) -> object:
    """`value` with every string made inert as markdown and HTML, and on one line; numbers and structure stay."""
    if isinstance(value, str):
        text = "\n".join(value.strip().splitlines())
        return SPECIAL.sub(lambda match: "".join(f"&#{ord(c)};" for c in match.group()), text)
    if isinstance(value, dict):
        return {escape(key): escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape(item) for item in value]
    return value


def rate_label(rate: float | None) -> str:
    """A rate as people write it: 1e-5, 2e-4, 3.2e-4."""
    if rate is None or not math.isfinite(rate):
        return "unknown"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def labels(rates: list[float]) -> str:
    """1e-5, 2e-4 and 1e-3."""
    words = [rate_label(rate) for rate in rates]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def decimals(value: object, form: str = ".3f") -> str:
    value = number(value)
    return "—" if value is None else format(value, form) if math.isfinite(value) else "not finite"


def bounds(pair: list | tuple | None, form: str = ".3f") -> str:
    return "no interval" if pair is None else f"95 % [{decimals(pair[0], form)}, {decimals(pair[1], form)}]"


def percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.0f} %"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def steps(value: object, planned: int | None) -> str:
    """Steps to a target; a miss is "> T"."""
    value = number(value)
    return "—" if value is None else f"> {planned}" if math.isinf(value) else f"{value:.0f}"


def median(values: list[float], form: str) -> str:
    """The median with misses (∞) in place; of two middle values the mean, ∞ if either is a miss."""
    values = sorted(values)
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return "∞" if math.isinf(high) else format((low + high) / 2, form)


def shortened(text: object, limit: int = 300) -> str:
    """Escaped text cut at a length, never inside an entity."""
    if not isinstance(text, str) or not text.strip():
        return "(empty)"
    return text if len(text) <= limit else re.sub(r"&[^;]*$", "", text[:limit]) + " …"


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table; escaped line ends are spaces in its cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines).replace("&#10;", " ")


def fence(commands: list[str]) -> str:
    """A code block that no value can close: neither line ends nor backticks survive in it."""
    return "```bash\n" + "\n".join(re.sub(r"[`\r\n]", "?", command) for command in commands) + "\n```"
