"""python -m local_wandb import ENTITY/PROJECT [--data DIR]
python -m local_wandb export ENTITY/PROJECT [--data DIR] [--output FOLDER]

import takes a project of W&B's cloud, or of any server that WANDB_BASE_URL and WANDB_API_KEY name, over into a data
directory: sweeps, runs with every row, console and file, artifacts with their lineage. What is there already stays.
export writes a project as offline runs; `sh FOLDER/sync.sh` sends them, one `wandb sync` after the other, to the cloud
or another server. Each sweep's configuration lies beside them. What an offline run cannot say is not in it: system
metrics, which artifacts a run used, links, and whether a failed run had crashed or been killed.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import wandb  # noqa: TID251  W&B's own client reads and writes what moves between its servers and this one
import yaml
from wandb.sdk.artifacts._internal_artifact import InternalArtifact  # noqa: TID251  the only way to make a run_table

from local_wandb.artifacts import MANIFEST, entries, manifest_digest
from local_wandb.collections import alias, make_collection
from local_wandb.nodes import node_id
from local_wandb.store import Store, locked

ROWS = 1000  # history rows of one transaction
HISTORY = "wandb-history"  # the type of the artifacts in which the cloud keeps the rows; those come by themselves


def main(arguments: list[str]) -> None:
    """Moves one project. Raises ValueError or OSError with one line where it cannot."""
    parser = argparse.ArgumentParser(prog="python -m local_wandb", description=__doc__, formatter_class=_AsWritten)
    parser.add_argument("command", choices=["import", "export"])
    parser.add_argument("project", help="ENTITY/PROJECT")
    parser.add_argument("--data", type=Path, default=Path("outputs/local_wandb"), help="directory of the server")
    parser.add_argument("--output", type=Path, help="export: a new folder (default: PROJECT)")
    options = parser.parse_args(arguments)
    entity, _, name = options.project.partition("/")
    if not entity or not name or "/" in name:
        raise ValueError(f"{options.project!r} is not ENTITY/PROJECT")
    if options.command == "import":
        options.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(options.data):
            take_over(Store(options.data), wandb.Api(), entity, name)
    else:
        if not (options.data / "local_wandb.sqlite").is_file():
            raise ValueError(f"{options.data} holds no database of local_wandb")
        write_offline(Store(options.data), entity, name, options.output or Path(name))


class _AsWritten(argparse.RawDescriptionHelpFormatter):
    pass


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# From a server into a data directory


def take_over(store: Store, api: wandb.Api, entity: str, name: str) -> None:
    """Copies a project into the store. Runs, sweeps and versions that the store has are left as they are."""
    source = api.project(name, entity)
    try:
        created = _at(source.created_at)
    except AttributeError:  # the client's way to say that it found none
        raise ValueError(f"there is no project {entity}/{name} at {api.settings['base_url']}") from None
    known = store.get("projects", entityName=entity, name=name)
    project = known or store.insert("projects", entityName=entity, name=name, createdAt=created)
    for sweep in source.sweeps():
        if not store.get("sweeps", project=project["id"], name=sweep.id):
            times = dict.fromkeys(("createdAt", "updatedAt"), datetime.now(UTC).timestamp())
            store.insert(
                "sweeps", project=project["id"], name=sweep.id, displayName=sweep._attrs.get("displayName"),
                config=yaml.dump(sweep.config, sort_keys=False), state=sweep.state.upper(), **times,
            )  # fmt: skip
            _say(f"sweep {sweep.id}")
    for run in api.runs(f"{entity}/{name}", order="+created_at", per_page=100, lazy=False):
        if not store.get("runs", project=project["id"], name=run.id):
            _take_run(store, project, run)
            _say(f"run {run.id}: {run.state}")
    kinds = [kind for kind in api.artifact_types(f"{entity}/{name}") if kind.name != HISTORY]
    collections = [collection for kind in kinds for collection in kind.collections()]
    for collection in sorted(collections, key=lambda one: not one.is_sequence()):  # what is linked comes after
        for version in reversed(list(collection.artifacts())):
            _take_version(store, project, collection, version)
            _say(f"artifact {collection.name}:{version.version}")


def _at(text: str | None) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() if text else datetime.now(UTC).timestamp()


def _take_run(store: Store, project: dict, run) -> None:
    sweep = store.get("sweeps", project=project["id"], name=run.sweep_name) if run.sweep_name else None
    config = {key: {"value": value} for key, value in run.rawconfig.items()}
    with tempfile.TemporaryDirectory() as folder, store.write():
        row = store.insert(
            "runs", project=project["id"], name=run.id, displayName=run.name, notes=run.notes, group=run.group,
            jobType=run.job_type, tags=json.dumps(run.tags), commit=run.commit, config=json.dumps(config),
            summaryMetrics=json.dumps(run.summary_metrics), systemMetrics=json.dumps(run.system_metrics),
            state=run.state, sweep=sweep and sweep["id"], sweepName=run.sweep_name, createdAt=_at(run.created_at),
            heartbeatAt=_at(run.heartbeatAt), updatedAt=_at(run.heartbeatAt),
            args=json.dumps({k: config[k] for k in _parameters(sweep) if k in config}) if sweep else None,
        )  # fmt: skip
        lines: list[str] = []
        for found in run.scan_history(page_size=ROWS, use_cache=False):
            lines.append(json.dumps(found))
            if len(lines) == ROWS:
                store.append_history(row, 0, lines)
                lines = []
        store.append_history(row, 0, lines)
        events = run.history(samples=10**6, stream="system", pandas=False)
        store.append_lines(row, "wandb-events.jsonl", 0, [json.dumps(event) for event in events])
        store.append_lines(row, "output.log", 0, [_console_line(line) for line in run.console_logs()])
        for file in run.files(per_page=200):
            with file.download(root=folder, replace=True) as got:
                path = Path(got.name)
            _put(store, path, run=row["id"], name=file.name)


def _parameters(sweep: dict) -> list[str]:
    return list(yaml.safe_load(sweep["config"]).get("parameters") or {})


def _console_line(line) -> str:
    stamp = line.timestamp.strftime("%Y-%m-%dT%H:%M:%S.%f ") if line.timestamp else ""
    return f"{'ERROR ' if line.level == 'error' else ''}{stamp}{line.content}"


def _put(store: Store, path: Path, **where) -> None:
    blob = store.new_blob()
    shutil.copyfile(path, blob)
    file = store.insert("files", updatedAt=datetime.now(UTC).timestamp(), **where)
    store.keep(file["id"], blob, where.get("md5") or _md5(path))


def _md5(path: Path) -> str:
    from wandb.sdk.lib.hashutil import md5_file_b64  # noqa: TID251

    return md5_file_b64(str(path))


def _take_version(store: Store, project: dict, collection, version) -> None:
    with tempfile.TemporaryDirectory() as folder, store.write():
        kind = "ArtifactSequence" if collection.is_sequence() else "ArtifactPortfolio"
        into = make_collection(store, project, collection.name, collection.type, kind)
        store.update("collections", into["id"], description=collection.description, tags=json.dumps(collection.tags))
        index = int(version.version[1:])
        if kind == "ArtifactPortfolio":
            artifact = _linked(store, version)
            if artifact is None:  # the source is in another project, which has not been taken over
                _say(f"artifact {collection.name}:{version.version}: {version.source_qualified_name} is not here")
                return
            if not store.get("links", collection=into["id"], artifact=artifact["id"]):
                at = _at(version.created_at)
                store.insert("links", collection=into["id"], artifact=artifact["id"], versionIndex=index, createdAt=at)
        else:
            artifact = store.get("artifacts", collection=into["id"], versionIndex=index)
            if artifact is None:
                artifact = _new_version(store, project, into, version, index, Path(folder))
        alias(store, into, artifact, version.aliases)


def _linked(store: Store, version) -> dict | None:
    project = store.get("projects", entityName=version.source_entity, name=version.source_project)
    name, _, index = version.source_name.rpartition(":v")
    collection = project and store.get("collections", project=project["id"], name=name)
    return collection and store.get("artifacts", collection=collection["id"], versionIndex=int(index))


def _new_version(store: Store, project: dict, collection: dict, version, index: int, folder: Path) -> dict:
    maker = version.logged_by()
    run = maker and store.get("runs", project=project["id"], name=maker.id)
    artifact = store.insert(
        "artifacts", collection=collection["id"], run=run and run["id"], state="COMMITTED", versionIndex=index,
        digest=version.digest, description=version.description, metadata=json.dumps(version.metadata), wanted="[]",
        historyStep=version.history_step, tags=json.dumps(version.tags), createdAt=_at(version.created_at),
        updatedAt=_at(version.updated_at or version.created_at),
        ttlDurationSeconds=version.ttl and int(version.ttl.total_seconds()),
    )  # fmt: skip
    manifest = version.manifest.to_manifest_json()
    for path, entry in manifest["contents"].items():
        if "ref" in entry:
            continue
        got = Path(version.get_entry(path).download(str(folder)))
        # Here every version brings its files itself, and they are named by their MD5; W&B may name them by XXH128.
        entry |= {"birthArtifactID": node_id("Artifact", artifact["id"]), "digest": _md5(got)}
        entry.get("extra", {}).pop("alg", None)
        name = f"content/{entry['digest']}"
        if not store.get("files", artifact=artifact["id"], name=name):
            _put(store, got, artifact=artifact["id"], name=name, md5=entry["digest"])
    store.update("artifacts", artifact["id"], digest=manifest_digest(manifest["contents"]))
    file = store.insert("files", artifact=artifact["id"], name=MANIFEST, updatedAt=artifact["updatedAt"])
    store.write_file(file["id"], json.dumps(manifest).encode())
    for table, runs in (("outputs", [maker] if maker else []), ("uses", version.used_by())):
        for one in runs:
            row = store.get("runs", project=project["id"], name=one.id)
            if row:
                store.insert(table, artifact=artifact["id"], run=row["id"])
    return artifact


# From a data directory into offline runs

OWN = ("config.yaml", "wandb-summary.json", "output.log", "wandb-metadata.json", "requirements.txt")  # the client's


def write_offline(store: Store, entity: str, name: str, output: Path) -> None:
    """Writes every run of a project as an offline run of W&B's client below `output`."""
    project = store.get("projects", entityName=entity, name=name)
    if project is None:
        raise ValueError(f"there is no project {entity}/{name} in {store.directory}")
    if output.exists():
        raise ValueError(f"{output} exists; export writes a new folder")
    output.mkdir(parents=True)
    for sweep in store.find("sweeps", project=project["id"]):
        (output / f"sweep-{sweep['name']}.yaml").write_text(sweep["config"])
    # Artifacts are copied below the output too: the data directory may be gone when they are sent.
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DATA_DIR": str(output.resolve())}
    commands = []
    for run in store.find("runs", project=project["id"]):
        folder = _write_run(store, project, run, output.resolve())
        commands.append(f"wandb sync {shlex.quote(str(folder.relative_to(output.resolve())))}")
        _say(f"run {run['name']}: {run['state']}")
    # One after the other, and in this order: versions of artifacts are counted as they come.
    (output / "sync.sh").write_text("\n".join(['set -e; cd "$(dirname "$0")"', *commands, ""]))
    _say(f"sh {output / 'sync.sh'}   sends it to where WANDB_BASE_URL and WANDB_API_KEY say")


def _write_run(store: Store, project: dict, row: dict, output: Path) -> Path:
    settings = wandb.Settings(
        mode="offline", root_dir=str(output), console="off", sweep_id=row["sweepName"], disable_git=True,
        save_code=False, x_disable_stats=True, x_disable_meta=True, silent=True,
    )  # fmt: skip
    config = {k: v.get("value") for k, v in json.loads(row["config"] or "{}").items() if k != "_wandb"}
    run = wandb.init(
        entity=project["entityName"], project=project["name"], id=row["name"], name=row["displayName"], config=config,
        notes=row["notes"], tags=json.loads(row["tags"] or "[]"), group=row["group"], job_type=row["jobType"],
        settings=settings, reinit="create_new",
    )  # fmt: skip
    for line in store.history(row["id"]):
        values = json.loads(line)
        step = values.pop("_step", None)
        run.log(values, step=step)
    summary = json.loads(row["summaryMetrics"] or "{}")
    run.summary.update({key: value for key, value in summary.items() if not key.startswith("_")})
    for _, line in store.lines(row["id"], "output.log"):
        stamp, _, text = line.removeprefix("ERROR ").partition(" ")
        run.write_logs(text if stamp[:4].isdigit() else line)
    for file in store.find("files", run=row["id"]):
        if file["blob"] and file["name"] not in OWN:
            path = Path(run.dir) / file["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.blobs / file["blob"], path)
            run.save(str(path), base_path=run.dir, policy="now")
    for artifact in store.find("artifacts", run=row["id"], state="COMMITTED"):
        _write_version(store, run, artifact)
    run.finish(exit_code=0 if row["state"] == "finished" else row["exitcode"] or 1)
    return Path(run.dir).parent


def _write_version(store: Store, run, row: dict) -> None:
    collection = store.row("collections", row["collection"])
    metadata = json.loads(row["metadata"] or "{}")
    artifact = InternalArtifact(collection["name"], collection["type"], row["description"], metadata)
    for entry in entries(store, row):
        if "ref" in entry:
            artifact.add_reference(entry["ref"], name=entry["name"], checksum=False)
        else:
            artifact.add_file(str(store.blobs / entry["blob"]), name=entry["name"], skip_cache=True)
    named = [one["alias"] for one in store.find("aliases", artifact=row["id"], collection=collection["id"])]
    tags = json.loads(row["tags"] or "[]")
    run.log_artifact(artifact, aliases=[name for name in named if name != "latest"], tags=tags)
