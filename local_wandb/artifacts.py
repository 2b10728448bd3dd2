"""Artifacts: versions of a collection of files, each with a manifest, a maker and users."""

import hashlib
import json
import time

from graphql import GraphQLError

from local_wandb.collections import alias, aliases_of, changed_tags, make_collection, memberships, tags_of, type_of
from local_wandb.nodes import connection, existing, node_id, owner, proper_path, row_id
from local_wandb.projects import make_project, named_run
from local_wandb.store import Store

MANIFEST = "wandb_manifest.json"
PATCH = "wandb_manifest.patch"  # one writer's part of a distributed artifact; each is a file of its own
INHERIT, DISABLED = -1, -2  # the client's words for "no time to live of its own" and "kept for ever"


def by_id(source, info, id) -> dict:
    return _artifact(info, id)


def _artifact(info, node: str) -> dict:
    return existing(info, "artifacts", "Artifact", node)


def by_client(source, info, clientID) -> dict | None:
    artifact = info.context.store.get("artifacts", clientID=clientID)
    return artifact and {"serverID": node_id("Artifact", artifact["id"])}


def create(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    if input.get("storageRegion") not in (None, "", "default"):
        raise GraphQLError(
            f"storage region {input['storageRegion']!r} is not part of local_wandb: it has one, 'default'"
        )
    name = (input.get("artifactCollectionNames") or [input.get("artifactCollectionName") or ""])[0]
    with store.write():
        project = make_project(info, input["projectName"], input["entityName"])
        collection = make_collection(store, project, name, input["artifactTypeName"], "ArtifactSequence")
        run = named_run(info, input) if input.get("runName") else None
        wanted = [one["alias"] for one in input.get("aliases") or []]
        same = _same(store, collection, input)
        if same is None:
            same = store.insert(
                "artifacts",
                collection=collection["id"],
                run=run and run["id"],
                state="PENDING",
                digest=input["digest"],
                description=input.get("description"),
                metadata=input.get("metadata"),
                clientID=input.get("clientID"),
                wanted=json.dumps(wanted),
                historyStep=input.get("historyStep"),
                tags=json.dumps(changed_tags([], input.get("tags"), None)),
                ttlDurationSeconds=_ttl(input),
                distributedID=input.get("distributedID"),
                createdAt=now,
                updatedAt=now,
            )
        elif same["state"] == "COMMITTED":
            alias(store, collection, same, ["latest", *wanted])
            same = store.update(
                "artifacts", same["id"], tags=json.dumps(changed_tags(tags_of(same, info), input.get("tags"), None))
            )
        if run:
            _join(store, "outputs", same, run)
        return {"artifact": same}


def _same(store: Store, collection: dict, input) -> dict | None:
    """The version that this one is: the same distributed one, or one of the same content."""
    if input.get("distributedID"):
        return store.get("artifacts", collection=collection["id"], distributedID=input["distributedID"])
    versions = store.find("artifacts", collection=collection["id"], state="COMMITTED")
    # An increment's digest says nothing about what the version holds, and only its manifest says that it is one.
    if not input.get("enableDigestDeduplication") or any(version["base"] for version in versions):
        return None
    return next((version for version in versions if version["digest"] == input["digest"]), None)


def _join(store: Store, table: str, artifact: dict, run: dict) -> None:
    if not store.get(table, artifact=artifact["id"], run=run["id"]):
        store.insert(table, artifact=artifact["id"], run=run["id"])


def _ttl(input) -> int | None:
    seconds = input.get("ttlDurationSeconds")
    return None if seconds in (None, 0, INHERIT, DISABLED) else int(seconds)


# Manifests. A client writes a FULL one, an INCREMENT to a version, or its PATCH of a distributed artifact; what is
# read is always a full one, put together when the version is committed.


def create_manifest(source, info, input) -> dict:
    store = info.context.store
    with store.write():
        artifact = _artifact(info, input["artifactID"])
        kind = input.get("type") or "FULL"
        if kind == "INCREMENTAL":
            base = input.get("baseArtifactID")
            store.update("artifacts", artifact["id"], base=_artifact(info, base)["id"] if base else artifact["id"])
        name = MANIFEST
        if kind == "PATCH":
            name = f"{PATCH}.{len(store.find('files', artifact=artifact['id']))}.json"
        return {"artifactManifest": _manifest(_file(store, artifact["id"], name))}


def update_manifest(source, info, input) -> dict:
    file = existing(info, "files", "ArtifactManifest", input["artifactManifestID"])
    return {"artifactManifest": _manifest(file)}


def _manifest(file: dict) -> dict:
    return {"id": node_id("ArtifactManifest", file["id"]), "file": file}


def _file(store: Store, artifact: int, name: str, md5: str | None = None) -> dict:
    with store.write():
        file = store.get("files", artifact=artifact, name=name)
        if file is None:
            file = store.insert("files", artifact=artifact, name=name, md5=md5, updatedAt=time.time())
        return file


def create_files(source, info, input) -> dict:
    # A file is named by its content, so the same content under two names of a version is stored once.
    files = [
        _file(info.context.store, _artifact(info, spec["artifactID"])["id"], f"content/{spec['md5']}", spec["md5"])
        | {"name": spec["name"]}
        for spec in input["artifactFiles"]
    ]
    return {"files": connection(files, len(files))}


def commit(source, info, input) -> dict:
    store = info.context.store
    with store.write():
        artifact = _artifact(info, input["artifactID"])
        if artifact["state"] == "PENDING":
            artifact = _put_together(store, artifact)
            lacking = [entry for entry in entries(store, artifact) if not (entry["blob"] or "ref" in entry)]
            if lacking:
                raise GraphQLError(f"artifact lacks {lacking[0]['name']!r} and {len(lacking) - 1} more: not uploaded")
            taken = [a["versionIndex"] for a in store.find("artifacts", collection=artifact["collection"])]
            index = max((i + 1 for i in taken if i is not None), default=0)
            artifact = store.update(
                "artifacts", artifact["id"], state="COMMITTED", versionIndex=index, updatedAt=time.time()
            )
            collection = store.get("collections", id=artifact["collection"])
            alias(store, collection, artifact, ["latest", *json.loads(artifact["wanted"])])
    return {"artifact": artifact}


def _put_together(store: Store, artifact: dict) -> dict:
    """Writes the full manifest of an increment, or of several writers; the artifact with the digest of that."""
    parts = [f for f in store.find("files", artifact=artifact["id"]) if f["name"].startswith(PATCH) and f["blob"]]
    base = artifact["base"] and artifact["base"] != artifact["id"] and store.get("artifacts", id=artifact["base"])
    if not parts and not base:
        return artifact
    own = _file(store, artifact["id"], MANIFEST)
    contents: dict[str, dict] = {}
    manifest: dict = {}
    if base:
        born = {"birthArtifactID": node_id("Artifact", base["id"])}
        (inherited,) = store.find("files", artifact=base["id"], name=MANIFEST)
        contents = {name: born | entry for name, entry in json.loads(store.read(inherited))["contents"].items()}
        parts = [own]
    for part in parts:
        manifest = json.loads(store.read(part))
        contents |= manifest["contents"]
    store.write_file(own["id"], json.dumps(manifest | {"contents": contents}).encode())
    return store.update("artifacts", artifact["id"], digest=manifest_digest(contents))


def manifest_digest(contents: dict[str, dict]) -> str:
    """The digest of a version with these entries, as the client forms it."""
    lines = "".join(f"{name}:{contents[name]['digest']}\n" for name in sorted(contents))
    return hashlib.md5(b"wandb-artifact-manifest-v1\n" + lines.encode(), usedforsecurity=False).hexdigest()


def entries(store: Store, artifact: dict) -> list[dict]:
    """The file rows of an artifact, each under its own name. A reference has no file but an address of its own."""
    manifest = store.get("files", artifact=artifact["id"], name=MANIFEST)
    if not (manifest and manifest["blob"]):
        return []
    contents = json.loads(store.read(manifest))["contents"]
    entries = []
    for name, entry in sorted(contents.items()):
        proper_path(name)
        file = {"id": 0, "blob": None, "sizeBytes": entry.get("size") or 0, "md5": entry["digest"], "updatedAt": None}
        if "ref" in entry:
            file["ref"] = entry["ref"]
        else:
            birth = entry.get("birthArtifactID")
            holder = row_id("Artifact", birth) if birth else artifact["id"]
            file = store.get("files", artifact=holder, name=f"content/{entry['digest']}") or file
        entries.append(file | {"name": name, "storagePath": f"wandb_artifacts/{artifact['id']}/{name}"})
    return entries


def entry_file(store: Store, birth: str, digest: str) -> dict | None:
    """The file with this MD5 (base64) that the artifact of this opaque id brought."""
    return store.get("files", artifact=row_id("Artifact", birth), name=f"content/{digest}")


# Changes


def update(source, info, input) -> dict:
    store = info.context.store
    artifact = _artifact(info, input["artifactID"])
    changes = {key: input[key] for key in ("description", "metadata") if input.get(key) is not None}
    if input.get("ttlDurationSeconds") is not None:
        changes["ttlDurationSeconds"] = _ttl(input)
    tags = changed_tags(tags_of(artifact, info), input.get("tagsToAdd"), input.get("tagsToDelete"))
    with store.write():
        artifact = store.update("artifacts", artifact["id"], updatedAt=time.time(), tags=json.dumps(tags), **changes)
        if input.get("aliases") is not None:
            wanted = [one["alias"] for one in input["aliases"]]
            for known in store.find("aliases", artifact=artifact["id"], collection=artifact["collection"]):
                if known["alias"] not in wanted:
                    store.delete("aliases", known["id"])
            alias(store, store.row("collections", artifact["collection"]), artifact, wanted)
    return {"artifact": artifact}


def delete(source, info, input) -> dict:
    artifact = _artifact(info, input["artifactID"])
    with info.context.store.write():
        if artifact["state"] == "DELETED":
            raise GraphQLError(f"artifact {input['artifactID']!r} has been deleted")
        named = [a["alias"] for a in aliases_of(artifact, info) if a["alias"] != "latest"]
        if named and not input.get("deleteAliases"):
            raise GraphQLError(f"artifact has aliases {', '.join(named)}; delete_aliases=True deletes them with it")
        return {"artifact": remove(info.context.store, artifact)}


def remove(store: Store, artifact: dict) -> dict:
    """Deletes a version, its aliases and links; `latest` goes to the newest that is left."""
    known = store.find("aliases", artifact=artifact["id"])
    for one in known + store.find("links", artifact=artifact["id"]):
        store.delete("aliases" if "alias" in one else "links", one["id"])
    deleted = store.update("artifacts", artifact["id"], state="DELETED")
    others = [a for a in store.find("artifacts", collection=artifact["collection"]) if a["state"] == "COMMITTED"]
    if any(a["alias"] == "latest" for a in known) and others:
        newest = max(others, key=lambda a: a["versionIndex"])
        alias(store, store.row("collections", artifact["collection"]), newest, ["latest"])
    kept = {entry["id"] for other in others for entry in entries(store, other)}  # a later version may share a file
    for file in store.find("files", artifact=artifact["id"]):
        if file["id"] not in kept:
            store.delete("files", file["id"])
    return deleted


def remove_outlived(store: Store) -> None:
    """Deletes the versions whose time to live is over; not those that are linked to another collection, as W&B does."""
    now = time.time()
    for artifact in store.find_where("artifacts", "state = 'COMMITTED' AND createdAt + ttlDurationSeconds < ?", now):
        if not store.find("links", artifact=artifact["id"]):
            with store.write():
                remove(store, artifact)


def use(source, info, input) -> dict:
    store, artifact, run = info.context.store, _artifact(info, input["artifactID"]), named_run(info, input)
    with store.write():
        _join(store, "uses", artifact, run)
    return {"artifact": artifact}


# Reading


def _files(artifact, info, names=None, after=None, first=None) -> dict:
    files = [e for e in entries(info.context.store, artifact) if not names or e["name"] in names]
    return connection(files, first, after)


def _of_run(table: str):
    def artifacts_of(run, info, after=None, first=None) -> dict:
        store = info.context.store
        found = [store.get("artifacts", id=row["artifact"]) for row in store.find(table, run=run["id"])]
        return connection([a for a in found if a["state"] == "COMMITTED"], first, after)

    return artifacts_of


def _used_by(artifact, info) -> dict:
    store = info.context.store
    return connection([store.get("runs", id=use["run"]) for use in store.find("uses", artifact=artifact["id"])])


def _current_manifest(artifact, info) -> dict | None:
    file = info.context.store.get("files", artifact=artifact["id"], name=MANIFEST)
    return file and _manifest(file)


def _commit_hash(artifact, info) -> str | None:
    """Names a version by its content and those before it, as a commit does."""
    if artifact["versionIndex"] is None:
        return None
    rows = info.context.store.find("artifacts", order="versionIndex", collection=artifact["collection"])
    chain = [
        a["digest"] for a in rows if a["versionIndex"] is not None and a["versionIndex"] <= artifact["versionIndex"]
    ]
    return hashlib.sha256(f"{artifact['collection']} {chain}".encode()).hexdigest()[:20]


FIELDS = {
    "Run": {"outputArtifacts": _of_run("outputs"), "inputArtifacts": _of_run("uses")},
    "File": {"artifact": owner("artifacts", "artifact")},
    "ArtifactCollectionMembership": {
        "files": lambda membership, info, **which: _files(membership["artifact"], info, **which)
    },
    "Artifact": {
        "files": _files,
        "artifactSequence": owner("collections", "collection"),
        "artifactType": lambda artifact, info: type_of(owner("collections", "collection")(artifact, info), info),
        "size": lambda artifact, info: sum(entry["sizeBytes"] for entry in entries(info.context.store, artifact)),
        "fileCount": lambda artifact, info: len(entries(info.context.store, artifact)),
        "digestAlgorithm": lambda artifact, info: "MANIFEST_MD5",
        "commitHash": _commit_hash,
        "tags": lambda artifact, info: [{"id": f"Tag:{tag}", "name": tag} for tag in tags_of(artifact, info)],
        "ttlDurationSeconds": lambda artifact, info: artifact["ttlDurationSeconds"] or INHERIT,
        "ttlIsInherited": lambda artifact, info: artifact["ttlDurationSeconds"] is None,
        "aliases": aliases_of,
        "artifactMemberships": memberships,
        "currentManifest": _current_manifest,
        "createdBy": owner("runs", "run"),
        "usedBy": _used_by,
    },
}  # fmt: skip
