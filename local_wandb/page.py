"""The page: projects, sweeps, runs compared, artifacts. Plain HTML here; static/page.js draws the runs of a sweep,
static/compare.js those of a project.
"""

import json
import math
from html import escape
from pathlib import Path
from urllib.parse import quote

import plotly
import yaml

from local_wandb import media, search
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
MOST = 12  # charts of runs that log other numbers than these
MANY = 4000  # rows of one run in one answer; beyond, every k-th row and all that hold an evaluation

STATIC = Path(__file__).parent / "static"
ASSETS = {
    "page.css": (STATIC / "page.css", "text/css"),
    "page.js": (STATIC / "page.js", "text/javascript"),
    "compare.js": (STATIC / "compare.js", "text/javascript"),
    "plotly.min.js": (Path(plotly.__file__).parent / "package_data" / "plotly.min.js", "text/javascript"),
}
# Nothing but this server's own scripts runs, nothing is loaded from or sent to elsewhere.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def projects(store: Store, **where) -> str:
    """The start page, or the projects of one entity."""
    rows = [
        [
            _link(f"{p['entityName']}/{p['name']}", p["entityName"], p["name"]),
            store.count("sweeps", project=p["id"]),
            store.count("runs", project=p["id"]),
        ]
        for p in store.find("projects", **where)
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
    kinds: dict[str, list] = {}
    for collection in store.find("collections", order="name", project=project["id"]):
        kinds.setdefault(collection["type"], []).append(_link(collection["name"], *artifact_path(project, collection)))
    found = [[escape(kind), ", ".join(links)] for kind, links in kinds.items() if not kind.startswith("wandb-")]
    return _document(
        "/".join(where),
        [],
        _table("Sweeps", ["Sweep", "State", "Runs", "Running"], sweeps, "No sweep yet.")
        + COMPARE
        + _table("Artifacts", ["Type", "Artifacts"], found, "None."),
    )


COMPARE = """<h2 id="compare">Runs</h2>
<form id="filters" aria-label="Which runs">
  <label>Search <input id="search" type="search" placeholder="name or id"></label>
  <label>Filter <input id="filter" size="36" spellcheck="false"
    placeholder='as in api.runs: {"config.lr": {"$gt": 1e-4}}'></label>
  <label>Group by <select id="group"><option value="">nothing</option></select></label>
  <label>Chart <select id="metric"><option value="">nothing</option></select></label>
  <label>over <select id="x"><option value="_step">step</option></select></label>
  <label><input id="logx" type="checkbox"> log x</label>
  <label><input id="logy" type="checkbox"> log y</label>
</form>
<p id="status" role="status" aria-live="polite">Loading …</p>
<details id="columns"><summary>Columns</summary><div class="boxes"></div></details>
<div id="chart" class="plot" role="img" hidden></div>
<div class="scroll" role="region" aria-label="Runs" tabindex="0"><table id="runs"></table></div>
<p id="pages"></p>
<noscript>The runs need JavaScript; it comes from this server only.</noscript>
<script src="/assets/plotly.min.js" defer></script><script src="/assets/compare.js" defer></script>"""


def artifact_path(project: dict, collection: dict, version: str | None = None) -> list[str]:
    """The parts of the address that W&B's client prints for an artifact."""
    path = [project["entityName"], project["name"], "artifacts", collection["type"], collection["name"]]
    return [*path, version] if version else path


def artifact(store: Store, project: dict, collection: dict, version: dict, files: list[dict], file_url) -> str:
    """One version of an artifact: what it is, its files, where it came from and went to."""
    name = f"{collection['name']}:v{version['versionIndex']}"
    named = store.find("aliases", artifact=version["id"], collection=collection["id"])
    aliases = [row["alias"] for row in named]
    about = [
        ["Type", escape(collection["type"])],
        ["Aliases", escape(", ".join(aliases))],
        ["Tags", escape(", ".join(json.loads(version["tags"] or "[]")))],
        ["Description", escape(version["description"] or "")],
        ["Metadata", f"<code>{escape(version['metadata'] or '{}')}</code>"],
        ["Digest", f"<code>{escape(version['digest'])}</code>"],
    ]
    content = [
        [
            escape(f["name"]) if "ref" in f else f'<a href="{escape(file_url(f, "GET"))}">{escape(f["name"])}</a>',
            f"{f['sizeBytes']:,}",
            escape(f.get("ref", "")),
        ]
        for f in files
    ]
    lineage = [["made by", _run_link(store, store.row("runs", row["run"]))] for row in _of(store, "outputs", version)]
    lineage += [["used by", _run_link(store, store.row("runs", row["run"]))] for row in _of(store, "uses", version)]
    for row in _of(store, "links", version):
        portfolio = store.row("collections", row["collection"])
        at = store.row("projects", portfolio["project"])
        label = f"{portfolio['name']}:v{row['versionIndex']}"
        lineage.append(["linked to", _link(label, *artifact_path(at, portfolio, f"v{row['versionIndex']}"))])
    versions = [
        [_link(f"v{row['versionIndex']}", *artifact_path(project, collection, f"v{row['versionIndex']}"))]
        for row in reversed(store.find("artifacts", collection=collection["id"], state="COMMITTED"))
    ]
    where = (project["entityName"], project["name"])
    return _document(
        f"Artifact {name}",
        [("/".join(where), "/" + "/".join(map(quote, where)))],
        _table("What it is", ["What", "Value"], [row for row in about if row[1]], "")
        + _table("Files", ["File", "Bytes", "Refers to"], content, "None.")
        + _table("Lineage", ["How", "Run or collection"], lineage, "None.")
        + _table("Versions", ["Version"], versions, "None."),
    )


def _of(store: Store, table: str, version: dict) -> list[dict]:
    return store.find(table, artifact=version["id"])


def _run_link(store: Store, run: dict) -> str:
    at = store.row("projects", run["project"])
    return _link(run["displayName"] or run["name"], at["entityName"], at["name"], "runs", run["name"])


def sweep_title(sweep: dict) -> str:
    """The name it was given, with its id."""
    name = sweep["displayName"] or yaml.safe_load(sweep["config"]).get("name")
    return f"{name} ({sweep['name']})" if name else sweep["name"]


def metric_of(sweep: dict) -> str:
    """What the sweep compares its runs by."""
    return (yaml.safe_load(sweep["config"]).get("metric") or {}).get("name") or FINAL


def total_of(sweep: dict) -> int | None:
    """How many runs it will have; None where nobody knows."""
    return search.expected(yaml.safe_load(sweep["config"]))


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
    artifacts = []
    for table, how in (("outputs", "made"), ("uses", "used")):
        for row in store.find(table, run=run["id"]):
            version = store.row("artifacts", row["artifact"])
            if version["versionIndex"] is not None and version["state"] == "COMMITTED":
                collection = store.row("collections", version["collection"])
                at, label = store.row("projects", collection["project"]), f"v{version['versionIndex']}"
                link = _link(f"{collection['name']}:{label}", *artifact_path(at, collection, label))
                artifacts.append([how, link, escape(collection["type"])])
    count = store.line_count(run["id"], "output.log")
    console = "\n".join(escape(line) for _, line in store.lines(run["id"], "output.log", max(0, count - CONSOLE)))
    return (
        _table("Configuration", ["Key", "Value"], rows, "None.")
        + media.gallery(store, run, file_url)
        + _table("Artifacts", ["How", "Artifact", "Type"], artifacts, "None.")
        + _table("Files", ["File", "Bytes"], files, "None.")
        + f'<h2>Console</h2><pre class="scroll" tabindex="0">{console}</pre>'
    )


def comparison(title: str, project: dict, more: str = "") -> str:
    """The page of one sweep or one run; page.js fills it from `data` below this address."""
    where = (project["entityName"], project["name"])
    controls = """
<p id="status" role="status" aria-live="polite">Loading …</p>
<p id="left"></p>
<form id="controls" aria-label="Charts">
  <label>Smoothing <input id="smoothing" type="range" min="0" max="0.99" step="0.01" value="0">
    <output for="smoothing">0</output></label>
  <label><input id="logx" type="checkbox"> log x</label>
  <label><input id="logy" type="checkbox"> log y</label>
  <span id="rates" role="group" aria-label="Show or hide the runs of a learning rate"></span>
</form>
<div id="charts"></div>
<section id="parameters" hidden><h2>Parameters</h2><div id="parallel" class="plot" role="img"></div>
<div class="scroll"><table id="importance"></table></div></section>
<div class="scroll" role="region" aria-label="Runs" tabindex="0"><table id="runs"></table></div>
<section id="alerts" hidden><h2>Alerts</h2><ul></ul></section>
<noscript>The charts and the table need JavaScript; it comes from this server only.</noscript>
<script src="/assets/plotly.min.js" defer></script><script src="/assets/page.js" defer></script>"""
    return _document(title, [("/".join(where), "/" + "/".join(map(quote, where)))], controls + more)


def data(store: Store, runs: list[dict], after: dict[str, int], state: str, total: int | None, metric: str) -> dict:
    """What page.js draws: every run, with its points after the _step that the page already has; `total` will come."""
    alerts = [
        {"run": run["displayName"] or run["name"], "title": alert["title"], "text": alert["text"]}
        for run in runs
        for alert in store.find("alerts", run=run["id"])
    ]
    x, charts = _charts(runs)
    points = [json.loads(run["args"] or "{}") for run in runs]
    names = sorted({name for point in points for name in point})
    varied = [n for n in names if len({json.dumps(point.get(n)) for point in points}) > 1]
    return {
        "x": x,
        "charts": charts,
        "final": FINAL,
        "metric": metric,
        "parameters": varied if len(varied) > 1 else [],
        "state": state,
        "total": total,
        "live": state in ("RUNNING", "PENDING") or any(run["state"] in LIVE for run in runs),
        "runs": [_run(store, run, after.get(run["name"], -1), x, charts, metric) for run in runs],
        "alerts": alerts,
    }


def _charts(runs: list[dict]) -> tuple[str, list]:
    """The x axis and the charts: those of a fine-tuning run, else every number that the runs log, over their steps."""
    known: dict[str, object] = {}
    for run in runs:
        for key, value in json.loads(run["historyKeys"] or "{}").get("keys", {}).items():
            known[key] = value["previousValue"]
    if X in known or not known:
        return X, CHARTS
    numbers = [key for key, value in known.items() if isinstance(value, int | float) and not key.startswith("_")]
    return "_step", [(key, key, False) for key in sorted(numbers)[:MOST]]


def _run(store: Store, run: dict, after: int, x: str, charts: list, metric: str) -> dict:
    config = {
        key: value.get("value") if isinstance(value, dict) else value
        for key, value in json.loads(run["config"] or "{}").items()
    }
    summary = json.loads(run["summaryMetrics"] or "{}")
    keys = json.loads(run["historyKeys"] or "{}")
    rows = [json.loads(line) for line in store.history(run["id"], after + 1)]
    stride = math.ceil(len(rows) / MANY)
    points: dict[str, list] = {column: [] for column, *_ in charts}
    for number, row in enumerate(rows):
        if x in row and (number % stride == 0 or FINAL in row):
            for column in points:
                if column in row:
                    points[column].append([row[x], _finite(row[column])])
    return {
        "id": run["name"],
        "name": run["displayName"] or run["name"],
        "rate": _finite(config.get("learning_rate")),
        "seed": config.get("seed"),
        "state": run["state"],
        "steps": config.get("max_steps"),
        "step": keys.get("keys", {}).get(x, {}).get("previousValue"),
        "behavior": summary.get("behavior"),
        "diverged": summary.get("diverged_at_step"),
        "point": {key: value["value"] for key, value in json.loads(run["args"] or "{}").items()},
        "value": _finite(summary.get(metric)),
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
