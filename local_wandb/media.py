"""What a run logged besides numbers, as HTML: images, tables, audio, HTML and the rest by name."""

import json
from collections.abc import Callable, Iterator
from html import escape

from local_wandb.runs import json_object
from local_wandb.store import Store

STEPS = 3  # the last so many of each key are shown
ROWS = 100  # of a table
LONGEST = 2**20  # bytes of a table or page that is shown; beyond, it is a file to fetch


def gallery(store: Store, run: dict, file_url: Callable[[dict, str], str]) -> str:
    """The latest media of each key; everything that a run wrote is text or sandboxed here, never part of the page."""
    files = {file["name"]: file for file in store.find("files", run=run["id"]) if file["blob"]}
    known = json.loads(run["historyKeys"] or "{}").get("keys", {})
    keys = [key for key, value in known.items() if isinstance(value.get("previousValue"), dict)]
    found: dict[str, list] = {}
    if keys:
        for line in reversed(store.history(run["id"])):
            row = json.loads(line)
            for key in keys:
                shown = found.setdefault(key, [])
                if key in row and len(shown) < STEPS:
                    shown.append((row.get("_step"), row[key]))
            if all(len(shown) == STEPS for shown in found.values()):
                break
    for key, value in json_object(run["summaryMetrics"] or "{}", "summary").items():
        if isinstance(value, dict) and "_type" in value and not found.get(key):
            found[key] = [(None, value)]
    parts = []
    for key, shown in sorted(found.items()):
        items = "".join(_figure(store, files, file_url, step, value) for step, value in shown)
        if items:
            parts.append(f'<h3>{escape(key)}</h3><div class="gallery">{items}</div>')
    return "<h2>Media</h2>" + "".join(parts) if parts else ""


def _figure(store: Store, files: dict, file_url, step: int | None, value: dict) -> str:
    shown = []
    for path, caption in _paths(value):
        file = files.get(path)
        if file is None:
            continue
        shown.append(_shown(store, file, file_url(file, "GET"), value["_type"], caption))
    where = "" if step is None else f"<figcaption>step {step}</figcaption>"
    return f"<figure>{where}{''.join(shown)}</figure>" if shown else ""


def _paths(value: dict) -> Iterator[tuple[str, str]]:
    """The files of one logged value, one or several ("images/separated"), with their captions."""
    captions = value.get("captions") or [value.get("caption")]
    captions = captions if isinstance(captions, list) else [captions]
    several = value.get("filenames")
    for number, path in enumerate(several if isinstance(several, list) else [value.get("path")]):
        if isinstance(path, str):
            yield path, str(captions[number]) if number < len(captions) and captions[number] else ""


def _shown(store: Store, file: dict, url: str, kind: str, caption: str) -> str:
    address, text = escape(url), escape(caption or file["name"].rpartition("/")[2])
    if kind.startswith("image"):
        return f'<img loading="lazy" src="{address}" alt="{text}" title="{text}">'
    if kind.startswith("audio"):
        return f'<audio controls preload="none" src="{address}" aria-label="{text}"></audio>'
    if kind.startswith("video"):
        return f'<video controls preload="none" src="{address}" aria-label="{text}"></video>'
    if file["sizeBytes"] <= LONGEST and kind == "html-file":
        page = escape(store.read(file).decode(errors="replace"))
        return f'<iframe sandbox="" srcdoc="{page}" title="{text}"></iframe>'  # its scripts do not run
    if file["sizeBytes"] <= LONGEST and kind.endswith("table-file") and file["name"].endswith(".json"):
        return table(json.loads(store.read(file)))
    return f'<a href="{address}">{text}</a>'


def table(content: dict) -> str:
    """A wandb.Table as HTML, its first ROWS rows."""
    rows = content.get("data") or []
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in content.get("columns") or [])
    body = "".join("<tr>" + "".join(f'<td class="words">{_cell(v)}</td>' for v in row) + "</tr>" for row in rows[:ROWS])
    rest = f"<p>{len(rows) - ROWS:,} more rows</p>" if len(rows) > ROWS else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{rest}'


def _cell(value) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value))
