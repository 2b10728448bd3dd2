"""Pull whole sweeps from W&B, cloud or local, into `lr_*/run_data.json`. The only reader of W&B's API.

Every run in every state and every row of its history, unsampled and unfiltered; after this no network is needed.
"""

import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import wandb
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from analysis.files import InputError, number, save, strict, to_json
from analysis.folder import of_sweeps
from analysis.runs import OUT_OF_MEMORY, learning_rate, rate_directory

FILES = ("eval_nll.json", "generations.json")  # files of a run that the analysis reads
BEHAVIOR = "behavior"  # summary key under which the analysis itself writes each run's class
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # addresses that mean nothing elsewhere, or after a restart
LIVE = ("running", "pending", "preempting")
ENDED = ("finished", "failed", "killed")  # for good: one that crashed or was preempted may go on
BEST = "best"  # alias of the adapter that the report names
REFUSED = (wandb.errors.Error, WandbApiFailedError, OSError)  # by the server, or by the way to it
REACH_SECONDS = 5  # how long an unreachable server may keep the user waiting before one line says so


def connect() -> wandb.Api:
    """W&B's public API. Raises InputError if the server cannot be reached or no key is configured."""
    server = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(server, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # any HTTP answer is an answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"cannot reach the W&B server {server} ({reason}): start it, or set WANDB_BASE_URL") from None
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        return wandb.Api(timeout=30)
    except wandb.errors.Error as error:
        raise InputError(f"no access to {server}: {first_line(error)} (wandb login, or set WANDB_API_KEY)") from None


def states(api: wandb.Api, sweep: str) -> list[dict] | None:
    """How each run of ENTITY/PROJECT/SWEEP stands: see the keys below; None if there is no answer now."""
    entity, project, sweep_id = sweep.split("/")
    api.flush()  # it would answer from its cache
    try:
        runs = list(api.runs(f"{entity}/{project}", {"sweep": sweep_id}, per_page=200, lazy=False))
    except (*REFUSED, ValueError):
        return None
    return [
        {
            "id": run.id,
            "name": run.name,
            "state": OUT_OF_MEMORY if run.state == "failed" and run.summary.get("out_of_memory") else run.state,
            "config": run.config,
            "step": number(run.summary.get("train/global_step")),
            "steps": number(run.config.get("max_steps")),
            "loss": number(run.summary.get("train/loss")),
            "diverged": number(run.summary.get("diverged_at_step")),
        }
        for run in runs
    ]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sweep_path(text: str) -> str:
    """ENTITY/PROJECT/SWEEP from itself or from the address of a sweep's page."""
    return re.sub(r"^https?://[^/]+/(?:wandb/)?([^/]+)/([^/]+)/sweeps/([^/?#]+).*$", r"\1/\2/\3", text.strip())


def find(api: wandb.Api, path: str) -> "wandb.apis.public.Sweep":
    """The sweep of this path. Raises InputError if there is none."""
    try:
        return api.sweep(path)
    except (*REFUSED, ValueError) as error:
        server, wanted = api.settings["base_url"], "give ENTITY/PROJECT/SWEEP, or an existing output directory"
        raise InputError(f"no sweep {path} on {server} ({first_line(error)}): {wanted}") from None


def pull(paths: list[str], output: Path | None) -> tuple[Path, list]:
    """Write the runs of these sweeps to lr_*/run_data.json in `output`; return that folder and W&B's run objects.

    Without an `output` the folder is outputs/NAME-ID. Everything is read before anything is written. Run data of other
    sweeps that the folder holds are moved to its previous/. Raises InputError for an unknown sweep or a folder that
    cannot be written.
    """
    api = connect()
    found = {path: find(api, path) for path in dict.fromkeys(map(sweep_path, paths))}
    output = output or of_sweeps(next(iter(found.values())).name, *(sweep.id for sweep in found.values()))
    save(probe := output / ".probe", "")  # a folder that cannot be written shows before a long pull
    probe.unlink()
    sweeps, handles = [], []
    texts: dict = {}
    for path, sweep in found.items():
        sweeps.append(
            {
                "id": sweep.id,
                "entity": sweep.entity,
                "project": sweep.project,
                "name": sweep.name,
                "state": sweep.state,
                "url": None if urlsplit(sweep.url).hostname in LOOPBACK else sweep.url,
                "config": sweep.config,
            }
        )
        try:
            runs = list(api.runs(f"{sweep.entity}/{sweep.project}", {"sweep": sweep.id}, per_page=200, lazy=False))
            for count, run in enumerate(runs, 1):
                if sys.stdout.isatty():
                    print(f"\r{path}: run {count} of {len(runs)}", end="", flush=True)
                texts.setdefault(rate_directory(learning_rate(run.config)), []).append(record(run, sweep.id))
        except REFUSED as error:
            raise InputError(f"{path} could not be read to its end ({first_line(error)}): try again") from None
        print(f"{chr(13) if sys.stdout.isatty() else ''}{path}: {len(runs)} runs read")
        handles += runs
    if not handles:
        raise InputError(f"no runs yet in {' '.join(paths)}: start some with wandb agent {paths[0]}")
    header = to_json(sweeps, lines=1).strip()
    set_aside(output, {sweep["id"] for sweep in sweeps}, set(texts))
    for directory, records in texts.items():
        body = ",\n".join(records)
        save(output / directory / "run_data.json", f'{{"sweeps": {header},\n"runs": [\n{body}\n]}}\n')
    return output, handles


def set_aside(output: Path, sweeps: set[str], directories: set[str]) -> None:
    """Move what `output` holds of other sweeps to previous/SWEEP/lr_*.

    What it holds of these alone, under a rate that they do not have (now), is superseded: a run that has just begun has
    no configuration yet.
    """
    for path in sorted(output.glob("lr_*/run_data.json")):
        try:
            held = sorted(sweep["id"] for sweep in json.loads(path.read_text(encoding="utf-8"))["sweeps"])
        except (ValueError, KeyError, TypeError):
            held = ["unreadable"]
        if not sweeps.isdisjoint(held) and path.parent.name in directories:
            continue
        if held and sweeps.issuperset(held):
            path.unlink()
            continue
        kept = output / "previous" / "-".join(held) / path.parent.name / path.name
        save(kept, path.read_text(encoding="utf-8", errors="replace"))
        path.unlink()
        print(f"{path} holds another sweep, {', '.join(held)}: moved to {kept.parent}")


def record(run: "wandb.apis.public.Run", sweep: str) -> str:
    """One run as JSON text, one line for each row of its history: text takes a tenth of the memory of the rows."""
    about = {
        "id": run.id,
        "sweep": sweep,
        "name": run.name,
        "state": run.state,
        "created_at": run.created_at,
        "commit": run.commit,
        "config": {key: value for key, value in run.config.items() if not key.startswith("_")},
        "summary": {key: value for key, value in (run.summary_metrics or {}).items() if key != BEHAVIOR},
        "files": read_files(run),
    }
    head = ",\n".join(f"{json.dumps(key)}: {compact(strict(value))}" for key, value in about.items())
    rows = ",\n".join(line(row) for row in run.scan_history(use_cache=False))
    return f'{{{head},\n"history": [\n{rows}\n]}}'


def line(row: dict) -> str:
    """A history row as strict JSON; almost all rows are plain, so only the others take the slow way."""
    try:
        return compact(row)
    except (ValueError, TypeError):
        return compact(strict(row))


def compact(value) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def read_files(run: "wandb.apis.public.Run") -> dict:
    """The run's own JSON files that the analysis reads; one that is not whole is named and left out."""
    found = {}
    for file in run.files(list(FILES)):
        if file.md5 == "0":  # W&B lists a file that was asked for by name and is not there
            continue
        with TemporaryDirectory() as folder:
            try:
                with file.download(folder, replace=True) as text:
                    found[file.name] = json.load(text)
            except (*REFUSED, ValueError) as error:
                print(f"\n{run.name}: {file.name} left out ({first_line(error)})")
    return found


def write_back(handles: list, behaviours: dict[str, str]) -> None:
    """Write each run's behaviour class to its W&B summary under BEHAVIOR; a refusal is one warning, not an error.

    W&B takes a summary as a whole: what a run has added since it was read would be lost, so that of a run that may go
    on is left alone.
    """
    for run in handles:
        try:
            if run.state in ENDED and run.summary_metrics.get(BEHAVIOR) != behaviours[run.id]:
                run.summary.update({BEHAVIOR: behaviours[run.id]})
        except (*REFUSED, ValueError, TypeError) as error:
            print(f"the behaviour classes stay out of W&B's summaries: {first_line(error)}")
            return


def mark_best(handles: list, best: str) -> None:
    """Give the newest adapter of the run `best` the alias BEST, and take it from the other runs' once all are over.

    A refusal is one warning, not an error. Runs that logged no adapter have none to mark.
    """
    if any(run.state in LIVE for run in handles):
        return
    try:
        api = wandb.Api(timeout=30)  # which asks the server at once
        for run in handles:
            name = f"{run.entity}/{run.project}/model-{run.id}"
            alias = "latest" if run.id == best else BEST
            if not api.artifact_exists(f"{name}:{alias}", type="model"):
                continue
            artifact = api.artifact(f"{name}:{alias}", type="model")
            if run.id != best:
                artifact.aliases.remove(BEST)
            elif BEST not in artifact.aliases:
                artifact.aliases.append(BEST)
            else:
                continue
            artifact.save()
    except (*REFUSED, ValueError, TypeError) as error:
        print(f"the alias {BEST!r} stays off the best adapter in W&B: {first_line(error)}")
