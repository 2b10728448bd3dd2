"""The page: projects, sweeps, and the runs of one sweep compared. Plain HTML here, the charts in static/page.js."""

import json
import math
from html import escape
from pathlib import Path
from urllib.parse import quote

import plotly
import yaml

from local_wandb.runs import LIVE
from local_wandb.store import Store

X = "train/global_step"
CHARTS = [  # column, title, whether the axis leaves out what a diverged run does to it
    ("train/loss", "Train loss", True),
    ("eval/loss", "Eval loss", True),
    ("train/grad_norm", "Gradient norm", True),
    ("eval/update_ratio", "‖ΔW‖/‖W‖", False),
]
FINAL = "eval/loss"  # what the table and the chart over the rates compare
CONSOLE = 200  # lines of a run's console, the last ones
MANY = 4000  # rows of one run in one answer; beyond, every k-th row and all that hold an evaluation

STATIC = Path(__file__).parent / "static"
ASSETS = {
    "page.css": (STATIC / "page.css", "text/css"),
    "page.js": (STATIC / "page.js", "text/javascript"),
    "plotly.min.js": (Path(plotly.__file__).parent / "package_data" / "plotly.min.js", "text/javascript"),
}
# Nothing but this server's own scripts runs, nothing is loaded from or sent to elsewhere.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def projects(store: Store) -> str:
    """The start page."""
    rows = [
        [
            _link(f"{p['entityName']}/{p['name']}", p["entityName"], p["name"]),
            store.count("sweeps", project=p["id"]),
            store.count("runs", project=p["id"]),
        ]
        for p in store.find("projects")
    ]
    return _document("Projects", [], _table("Projects", ["Project", "Sweeps", "Runs"], rows, "No project yet."))


def project(store: Store, project: dict) -> str:
    """The sweeps of a project, then its runs outside any sweep."""
    where = (project["entityName"], project["name"])
    sweeps = []
    for sweep in reversed(store.find("sweeps", project=project["id"])):
        runs = store.find("runs", sweep=sweep["id"])
        live = sum(run["state"] in LIVE for run in runs)
        sweeps.append(
            [_link(sweep_title(sweep), *where, "sweeps", sweep["name"]), escape(sweep["state"]), len(runs), live]
        )
    alone = [
        [_link(run["displayName"] or run["name"], *where, "runs", run["name"]), escape(run["state"])]
        for run in reversed(store.find("runs", project=project["id"], sweep=None))
    ]
    return _document(
        "/".join(where),
        [],
        _table("Sweeps", ["Sweep", "State", "Runs", "Running"], sweeps, "No sweep yet.")
        + _table("Runs outside a sweep", ["Run", "State"], alone, "None."),
    )


def sweep_title(sweep: dict) -> str:
    """The name it was given, with its id."""
    name = sweep["displayName"] or yaml.safe_load(sweep["config"]).get("name")
    return f"{name} ({sweep['name']})" if name else sweep["name"]


def details(store: Store, run: dict, file_url) -> str:
    """What one run has besides curves: its configuration, files and the end of its console."""
    config = json.loads(run["config"] or "{}")
    rows = [
        [escape(key), f"<code>{escape(json.dumps(value.get('value') if isinstance(value, dict) else value))}</code>"]
        for key, value in sorted(config.items())
        if key != "_wandb"
    ]
    files = [
        [f'<a href="{escape(file_url(file, "GET"))}">{escape(file["name"])}</a>', f"{file['sizeBytes']:,}"]
        for file in store.find("files", order="name", run=run["id"])
        if file["blob"]
    ]
    count = store.line_count(run["id"], "output.log")
    console = "\n".join(escape(line) for _, line in store.lines(run["id"], "output.log", max(0, count - CONSOLE)))
    return (
        _table("Configuration", ["Key", "Value"], rows, "None.")
        + _table("Files", ["File", "Bytes"], files, "None.")
        + f'<h2>Console</h2><pre class="scroll" tabindex="0">{console}</pre>'
    )


def comparison(title: str, project: dict, more: str = "") -> str:
    """The page of one sweep or one run; page.js fills it from `data` below this address."""
    where = (project["entityName"], project["name"])
    controls = """
<p id="status" role="status" aria-live="polite">Loading …</p>
<form id="controls" aria-label="Charts">
  <label>Smoothing <input id="smoothing" type="range" min="0" max="0.99" step="0.01" value="0">
    <output for="smoothing">0</output></label>
  <label><input id="logx" type="checkbox"> log x</label>
  <label><input id="logy" type="checkbox"> log y</label>
  <span id="rates" role="group" aria-label="Show or hide the runs of a learning rate"></span>
</form>
<div id="charts"></div>
<div class="scroll" role="region" aria-label="Runs" tabindex="0"><table id="runs"></table></div>
<section id="alerts" hidden><h2>Alerts</h2><ul></ul></section>
<noscript>The charts and the table need JavaScript; it comes from this server only.</noscript>
<script src="/assets/plotly.min.js" defer></script><script src="/assets/page.js" defer></script>"""
    return _document(title, [("/".join(where), "/" + "/".join(map(quote, where)))], controls + more)


def data(store: Store, runs: list[dict], after: dict[str, int], state: str) -> dict:
    """What page.js draws: every run, with its points after the _step that the page already has."""
    alerts = [
        {"run": run["displayName"] or run["name"], "title": alert["title"], "text": alert["text"]}
        for run in runs
        for alert in store.find("alerts", run=run["id"])
    ]
    return {
        "x": X,
        "charts": CHARTS,
        "final": FINAL,
        "state": state,
        "live": state in ("RUNNING", "PENDING") or any(run["state"] in LIVE for run in runs),
        "runs": [_run(store, run, after.get(run["name"], -1)) for run in runs],
        "alerts": alerts,
    }


def _run(store: Store, run: dict, after: int) -> dict:
    config = {
        key: value.get("value") if isinstance(value, dict) else value
        for key, value in json.loads(run["config"] or "{}").items()
    }
    summary = json.loads(run["summaryMetrics"] or "{}")
    keys = json.loads(run["historyKeys"] or "{}")
    rows = [json.loads(line) for line in store.history(run["id"], after + 1)]
    stride = math.ceil(len(rows) / MANY)
    points: dict[str, list] = {column: [] for column, *_ in CHARTS}
    for number, row in enumerate(rows):
        if X in row and (number % stride == 0 or FINAL in row):
            for column in points:
                if column in row:
                    points[column].append([row[X], _finite(row[column])])
    return {
        "id": run["name"],
        "name": run["displayName"] or run["name"],
        "rate": _finite(config.get("learning_rate")),
        "seed": config.get("seed"),
        "state": run["state"],
        "steps": config.get("max_steps"),
        "step": keys.get("keys", {}).get(X, {}).get("previousValue"),
        "behavior": summary.get("behavior"),
        "diverged": summary.get("diverged_at_step"),
        "points": points,
        "last": keys.get("lastStep", -1),
    }


def _finite(value):
    """A number, or None: strict JSON has no NaN, and a chart has a gap there."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _link(text: str, *path: str) -> str:
    return f'<a href="/{"/".join(quote(part, safe="") for part in path)}">{escape(text)}</a>'


def _table(title: str, columns: list[str], rows: list[list], empty: str) -> str:
    if not rows:
        return f"<h2>{escape(title)}</h2><p>{escape(empty)}</p>"
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _document(title: str, trail: list[tuple[str, str]], body: str) -> str:
    links = "".join(f'<a href="{escape(href)}">{escape(text)}</a> › ' for text, href in [("Projects", "/"), *trail])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f'<title>{escape(title)}</title><link rel="stylesheet" href="/assets/page.css"></head>'
        f'<body><header><nav aria-label="Where">{links}</nav><h1>{escape(title)}</h1></header>'
        f"<main>{body}</main></body></html>"
    )
