"""Artifacts: versions of a collection of files, each with a manifest, aliases, a maker and users."""

import json
import time

from graphql import GraphQLError

from local_wandb.nodes import connection, existing, node_id, owner, proper_name, proper_path, row_id
from local_wandb.projects import make_project
from local_wandb.runs import named_run
from local_wandb.store import Store

KINDS = ("Artifact", "ArtifactSequence", "ArtifactAlias")
MANIFEST = "wandb_manifest.json"


def create(source, info, input) -> dict:
    store, now = info.context.store, time.time()
    name = (input.get("artifactCollectionNames") or [input.get("artifactCollectionName") or ""])[0]
    with store.write():
        project = make_project(info, input["projectName"], input["entityName"])
        collection = store.get("collections", project=project["id"], name=name)
        if collection is None:
            collection = store.insert(
                "collections", project=project["id"], name=proper_name(name, "artifact"),
                type=input["artifactTypeName"], createdAt=now, updatedAt=now,
            )  # fmt: skip
        if collection["type"] != input["artifactTypeName"]:
            raise GraphQLError(
                f"artifact {name!r} already exists with type {collection['type']!r}, not {input['artifactTypeName']!r}"
            )
        wanted = [alias["alias"] for alias in input.get("aliases") or []]
        if input.get("enableDigestDeduplication"):
            for same in store.find("artifacts", collection=collection["id"], digest=input["digest"], state="COMMITTED"):
                _alias(store, same, ["latest", *wanted])
                return {"artifact": same}
        run = named_run(info, input) if input.get("runName") else None
        return {
            "artifact": store.insert(
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
                createdAt=now,
                updatedAt=now,
            )
        }


def by_id(source, info, id) -> dict:
    return _artifact(info, id)


def collection_by_id(source, info, id) -> dict:
    return existing(info, "collections", "ArtifactSequence", id)


def _artifact(info, node: str) -> dict:
    return existing(info, "artifacts", "Artifact", node)


def create_manifest(source, info, input) -> dict:
    return {"artifactManifest": _manifest(_artifact(info, input["artifactID"]), info)}


def update_manifest(source, info, input) -> dict:
    return {"artifactManifest": _manifest(_artifact(info, input["artifactManifestID"]), info)}


def _manifest(artifact, info) -> dict:
    """The manifest is a file of the artifact, so it has the artifact's id."""
    return {"id": node_id("Artifact", artifact["id"]), "file": _file(info.context.store, artifact["id"], MANIFEST)}


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
        | {"storagePath": spec["name"], "name": spec["name"]}
        for spec in input["artifactFiles"]
    ]
    return {"files": connection(files, len(files))}


def commit(source, info, input) -> dict:
    store = info.context.store
    with store.write():
        artifact = _artifact(info, input["artifactID"])
        if artifact["state"] == "PENDING":
            lacking = [entry for entry in _entries(store, artifact) if not (entry["blob"] or "ref" in entry)]
            if lacking:
                raise GraphQLError(f"artifact lacks {lacking[0]['name']!r} and {len(lacking) - 1} more: not uploaded")
            taken = [a["versionIndex"] for a in store.find("artifacts", collection=artifact["collection"])]
            index = max((i + 1 for i in taken if i is not None), default=0)
            artifact = store.update(
                "artifacts", artifact["id"], state="COMMITTED", versionIndex=index, updatedAt=time.time()
            )
            _alias(store, artifact, ["latest", *json.loads(artifact["wanted"])])
    return {"artifact": artifact}


def _alias(store: Store, artifact: dict, names: list[str]) -> None:
    for name in names:
        alias = store.get("aliases", collection=artifact["collection"], alias=name)
        if alias is None:
            store.insert("aliases", collection=artifact["collection"], artifact=artifact["id"], alias=name)
        else:
            store.update("aliases", alias["id"], artifact=artifact["id"])


def _entries(store: Store, artifact: dict) -> list[dict]:
    """The file rows of an artifact, each under its own name. A reference has no file but an address of its own."""
    manifest = store.get("files", artifact=artifact["id"], name=MANIFEST)
    if not (manifest and manifest["blob"]):
        return []
    contents = json.loads((store.blobs / manifest["blob"]).read_bytes())["contents"]
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
        entries.append(file | {"name": name, "storagePath": name})
    return entries


def _files(membership, info, names=None, after=None, first=None) -> dict:
    entries = _entries(info.context.store, membership["artifact"])
    return connection([entry for entry in entries if not names or entry["name"] in names], first, after)


def update(source, info, input) -> dict:
    store = info.context.store
    artifact = _artifact(info, input["artifactID"])
    changes = {key: input[key] for key in ("description", "metadata") if input.get(key) is not None}
    with store.write():
        artifact = store.update("artifacts", artifact["id"], updatedAt=time.time(), **changes)
        if input.get("aliases") is not None:
            wanted = [alias["alias"] for alias in input["aliases"]]
            for alias in store.find("aliases", artifact=artifact["id"]):
                if alias["alias"] not in wanted:
                    store.delete("aliases", alias["id"])
            _alias(store, artifact, wanted)
    return {"artifact": artifact}


def delete(source, info, input) -> dict:
    store = info.context.store
    artifact = _artifact(info, input["artifactID"])
    with store.write():
        aliases = store.find("aliases", artifact=artifact["id"])
        if any(a["alias"] != "latest" for a in aliases) and not input.get("deleteAliases"):
            raise GraphQLError("the artifact has aliases; delete_aliases=True deletes them with it")
        for alias in aliases:
            store.delete("aliases", alias["id"])
        store.update("artifacts", artifact["id"], state="DELETED")
        others = [a for a in store.find("artifacts", collection=artifact["collection"]) if a["state"] == "COMMITTED"]
        if any(a["alias"] == "latest" for a in aliases) and others:
            _alias(store, max(others, key=lambda a: a["versionIndex"]), ["latest"])
        kept = {entry["id"] for other in others for entry in _entries(store, other)}  # a later version may share a file
        for file in store.find("files", artifact=artifact["id"]):
            if file["id"] not in kept:
                store.delete("files", file["id"])
    return {"artifact": artifact}


def use(source, info, input) -> dict:
    store, artifact, run = info.context.store, _artifact(info, input["artifactID"]), named_run(info, input)
    with store.write():
        if not store.get("uses", artifact=artifact["id"], run=run["id"]):
            store.insert("uses", artifact=artifact["id"], run=run["id"])
    return {"artifact": artifact}


def add_aliases(source, info, input) -> dict:
    with info.context.store.write():
        _alias(info.context.store, _artifact(info, input["artifactID"]), [a["alias"] for a in input["aliases"]])
    return {"success": True}


def delete_aliases(source, info, input) -> dict:
    store, artifact = info.context.store, _artifact(info, input["artifactID"])
    for wanted in input["aliases"]:
        alias = store.get("aliases", artifact=artifact["id"], alias=wanted["alias"])
        if alias:
            store.delete("aliases", alias["id"])
    return {"success": True}


def update_collection(source, info, input) -> dict:
    collection = existing(info, "collections", "ArtifactSequence", input["artifactSequenceID"])
    changes = {key: input[key] for key in ("name", "description") if input.get(key) is not None}
    changed = info.context.store.update("collections", collection["id"], updatedAt=time.time(), **changes)
    return {"artifactCollection": changed}


def delete_collection(source, info, input) -> dict:
    collection = existing(info, "collections", "ArtifactSequence", input["artifactSequenceID"])
    info.context.store.delete("collections", collection["id"])
    return {"artifactCollection": collection | {"state": "DELETED"}}


# Reading


def _membership(collection, info, aliasName) -> dict | None:
    """The version that an alias, or v0, v1, ... names."""
    store = info.context.store
    alias = store.get("aliases", collection=collection["id"], alias=aliasName)
    if alias:
        artifact = store.get("artifacts", id=alias["artifact"])
    elif aliasName[:1] == "v" and aliasName[1:].isdigit():
        artifact = store.get(
            "artifacts", collection=collection["id"], versionIndex=int(aliasName[1:]), state="COMMITTED"
        )
    else:
        artifact = store.get("artifacts", collection=collection["id"], digest=aliasName, state="COMMITTED")
    return artifact and _member(collection, info, artifact)


def _member(collection, info, artifact: dict) -> dict:
    return {
        "id": node_id("ArtifactCollectionMembership", artifact["id"]), "versionIndex": artifact["versionIndex"],
        "createdAt": artifact["createdAt"], "aliases": _aliases(artifact, info), "artifactCollection": collection,
        "artifact": artifact,
    }  # fmt: skip


def _aliases(artifact, info) -> list[dict]:
    return info.context.store.find("aliases", artifact=artifact["id"])


def _named_membership(project, info, name) -> dict | None:
    collection_name, _, alias = name.partition(":")
    collection = _collection(project, info, collection_name)
    return collection and _membership(collection, info, alias or "latest")


def _collection(project, info, name) -> dict | None:
    return info.context.store.get("collections", project=project["id"], name=name)


def _collections(project, info, filters=None, after=None, first=None, order=None) -> dict:
    return connection(info.context.store.find("collections", project=project["id"]), first, after)


def _type(project, info, name) -> dict | None:
    kinds = [kind for kind in _types(project, info)["edges"] if kind["node"]["name"] == name]
    return kinds[0]["node"] if kinds else None


def _types(project, info, after=None, first=None) -> dict:
    kinds = {}
    for collection in info.context.store.find("collections", project=project["id"]):
        kinds.setdefault(collection["type"], _type_of(collection, info))
    return connection(list(kinds.values()), first, after)


def _type_of(collection, info) -> dict:
    return {
        "id": node_id("ArtifactType", collection["id"]), "name": collection["type"],
        "createdAt": collection["createdAt"], "project": collection["project"],
    }  # fmt: skip


def _collection_of_type(kind, info, name) -> dict | None:
    return info.context.store.get("collections", project=kind["project"], name=name, type=kind["name"])


def _collections_of_type(kind, info, filters=None, after=None, first=None, order=None) -> dict:
    rows = info.context.store.find("collections", project=kind["project"], type=kind["name"])
    return connection(rows, first, after)


def _versions(collection, info, after=None, first=None, order=None, filters=None) -> dict:
    rows = info.context.store.find("artifacts", collection=collection["id"], state="COMMITTED")
    rows.sort(key=lambda row: row["versionIndex"], reverse=not (order or "").startswith("+"))
    page = connection(rows, first, after)
    for edge in page["edges"]:
        edge["version"] = f"v{edge['node']['versionIndex']}"
    return page


def _latest(collection, info) -> dict | None:
    member = _membership(collection, info, "latest")
    return member and member["artifact"]


def _outputs(run, info, after=None, first=None) -> dict:
    return connection(info.context.store.find("artifacts", run=run["id"], state="COMMITTED"), first, after)


def _inputs(run, info, after=None, first=None) -> dict:
    store = info.context.store
    return connection(
        [store.get("artifacts", id=use["artifact"]) for use in store.find("uses", run=run["id"])], first, after
    )


def _used_by(artifact, info) -> dict:
    store = info.context.store
    return connection([store.get("runs", id=use["run"]) for use in store.find("uses", artifact=artifact["id"])])


def by_client(source, info, clientID) -> dict | None:
    artifact = info.context.store.get("artifacts", clientID=clientID)
    return artifact and {"serverID": node_id("Artifact", artifact["id"])}


def entry_file(store: Store, birth: str, digest: str) -> dict | None:
    """The file with this MD5 (base64) that the artifact of this opaque id brought."""
    return store.get("files", artifact=row_id("Artifact", birth), name=f"content/{digest}")


FIELDS = {
    "Project": {
        "artifact": lambda project, info, name: (_named_membership(project, info, name) or {}).get("artifact"),
        "artifactCollectionMembership": _named_membership,
        "artifactCollection": _collection,
        "artifactCollections": _collections,
        "artifactType": _type,
        "artifactTypes": _types,
    },
    "Run": {"outputArtifacts": _outputs, "inputArtifacts": _inputs},
    "File": {"artifact": owner("artifacts", "artifact")},
    "ArtifactType": {"artifactCollection": _collection_of_type, "artifactCollections": _collections_of_type},
    "ArtifactSequence": {
        "project": owner("projects", "project"),
        "defaultArtifactType": _type_of,
        "state": lambda collection, info: collection.get("state", "READY"),
        "tags": lambda collection, info: {"edges": []},
        "aliases": lambda collection, info, after=None, first=None: connection(
            info.context.store.find("aliases", collection=collection["id"]), first, after
        ),
        "artifacts": _versions,
        "artifactMembership": _membership,
        "latestArtifact": _latest,
        "digestAlgorithm": lambda collection, info: "MANIFEST_MD5",
    },
    "ArtifactCollectionMembership": {"files": _files},
    "ArtifactAlias": {"artifactCollection": owner("collections", "collection")},
    "Artifact": {
        "artifactSequence": owner("collections", "collection"),
        "artifactType": lambda artifact, info: _type_of(owner("collections", "collection")(artifact, info), info),
        "size": lambda artifact, info: sum(entry["sizeBytes"] for entry in _entries(info.context.store, artifact)),
        "fileCount": lambda artifact, info: len(_entries(info.context.store, artifact)),
        "digestAlgorithm": lambda artifact, info: "MANIFEST_MD5",
        "tags": lambda artifact, info: [],
        "ttlDurationSeconds": lambda artifact, info: -1,  # kept for ever
        "ttlIsInherited": lambda artifact, info: True,
        "aliases": _aliases,
        "artifactMemberships": lambda artifact, info: connection(
            [_member(owner("collections", "collection")(artifact, info), info, artifact)]
        ),
        "currentManifest": _manifest,
        "createdBy": owner("runs", "run"),
        "usedBy": _used_by,
    },
}
