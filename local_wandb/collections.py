"""Collections of artifacts: sequences, which runs write to, and portfolios, which versions are linked to."""

import contextlib
import json
import time

from graphql import GraphQLError

from local_wandb.filters import matches
from local_wandb.nodes import connection, existing, node_id, owner, proper_name
from local_wandb.projects import make_project
from local_wandb.projects import project as find_project
from local_wandb.store import Store

KINDS = ("ArtifactSequence", "ArtifactPortfolio")


def by_id(source, info, id) -> dict:
    for kind in KINDS:
        with contextlib.suppress(GraphQLError):
            return existing(info, "collections", kind, id)
    raise GraphQLError(f"artifact collection {id!r} does not exist")


def make_collection(store: Store, project: dict, name: str, type_name: str, kind: str) -> dict:
    """The collection of this name, made where there is none. Raises GraphQLError where it is of another type."""
    found = store.get("collections", project=project["id"], name=name)
    if found is None:
        now = time.time()
        return store.insert(
            "collections", project=project["id"], name=proper_name(name, "artifact"), type=type_name, kind=kind,
            createdAt=now, updatedAt=now,
        )  # fmt: skip
    if found["type"] != type_name:
        raise GraphQLError(f"artifact {name!r} already exists with type {found['type']!r}, not {type_name!r}")
    if found["kind"] != kind:
        ways = {"ArtifactSequence": "logged to", "ArtifactPortfolio": "linked to"}
        raise GraphQLError(f"{name!r} is a collection that versions are {ways[found['kind']]}, not {ways[kind]}")
    return found


# Aliases and tags


def alias(store: Store, collection: dict, artifact: dict, names: list[str]) -> None:
    """Gives the version these names in the collection; whichever had one of them loses it."""
    for name in names:
        known = store.get("aliases", collection=collection["id"], alias=name)
        if known is None:
            store.insert("aliases", collection=collection["id"], artifact=artifact["id"], alias=name)
        else:
            store.update("aliases", known["id"], artifact=artifact["id"])


def aliases_of(artifact, info) -> list[dict]:
    return info.context.store.find("aliases", artifact=artifact["id"])


def _named_collection(info, input) -> dict:
    project = find_project(None, info, input["projectName"], input["entityName"])
    name = input["artifactCollectionName"]
    found = project and info.context.store.get("collections", project=project["id"], name=name)
    if not found:
        raise GraphQLError(f"artifact collection {input['entityName']}/{input['projectName']}/{name} does not exist")
    return found


def add_aliases(source, info, input) -> dict:
    store = info.context.store
    with store.write():
        artifact = existing(info, "artifacts", "Artifact", input["artifactID"])
        for one in input["aliases"]:
            alias(store, _named_collection(info, one), artifact, [one["alias"]])
    return {"success": True}


def delete_aliases(source, info, input) -> dict:
    store = info.context.store
    with store.write():
        artifact = existing(info, "artifacts", "Artifact", input["artifactID"])
        for one in input["aliases"]:
            collection = _named_collection(info, one)
            known = store.get("aliases", collection=collection["id"], artifact=artifact["id"], alias=one["alias"])
            if known:
                store.delete("aliases", known["id"])
    return {"success": True}


def tags_of(row, info) -> list[str]:
    """The tags of a version or a collection."""
    return json.loads(row["tags"] or "[]")


def changed_tags(tags: list[str], add: list[dict] | None, remove: list[dict] | None) -> list[str]:
    """The tags with some more (inputs of W&B's type TagInput) and without others."""
    gone = {tag["tagName"] for tag in remove or []}
    return list(dict.fromkeys([tag for tag in tags if tag not in gone] + [tag["tagName"] for tag in add or []]))


def add_tags(source, info, input) -> dict:
    store = info.context.store
    with store.write():
        collection = _named_collection(info, input)
        tags = changed_tags(tags_of(collection, info), input["tags"], None)
        store.update("collections", collection["id"], tags=json.dumps(tags), updatedAt=time.time())
    return {"tags": [{"id": f"Tag:{tag}", "name": tag} for tag in tags]}


def delete_tags(source, info, input) -> dict:
    store = info.context.store
    with store.write():
        collection = _named_collection(info, input)
        tags = changed_tags(tags_of(collection, info), None, input["tags"])
        store.update("collections", collection["id"], tags=json.dumps(tags), updatedAt=time.time())
    return {"success": True}


# Changes


def _changed(info, kind: str, node: str, **changes) -> dict:
    collection = existing(info, "collections", kind, node)
    changes = {key: value for key, value in changes.items() if value is not None}
    if "name" in changes and changes["name"] != collection["name"]:
        proper_name(changes["name"], "artifact")
        if info.context.store.get("collections", project=collection["project"], name=changes["name"]):
            raise GraphQLError(f"artifact collection {changes['name']!r} already exists")
    changed = info.context.store.update("collections", collection["id"], updatedAt=time.time(), **changes)
    return {"artifactCollection": changed}


def update_sequence(source, info, input) -> dict:
    node = input["artifactSequenceID"]
    return _changed(info, "ArtifactSequence", node, name=input.get("name"), description=input.get("description"))


def update_portfolio(source, info, input) -> dict:
    node = input["artifactPortfolioID"]
    return _changed(info, "ArtifactPortfolio", node, name=input.get("name"), description=input.get("description"))


def move_sequence(source, info, input) -> dict:
    """Another type for the collection and so for all its versions."""
    name = proper_name(input["destinationArtifactTypeName"], "artifact type")
    return _changed(info, "ArtifactSequence", input["artifactSequenceID"], type=name)


def delete_sequence(source, info, input) -> dict:
    return _delete(info, existing(info, "collections", "ArtifactSequence", input["artifactSequenceID"]))


def delete_portfolio(source, info, input) -> dict:
    return _delete(info, existing(info, "collections", "ArtifactPortfolio", input["artifactPortfolioID"]))


def _delete(info, collection: dict) -> dict:
    info.context.store.delete("collections", collection["id"])
    return {"artifactCollection": collection | {"state": "DELETED"}}


def link(source, info, input) -> dict:
    """Makes a version a member of a portfolio, which is made where there is none."""
    store = info.context.store
    with store.write():
        artifact = _linkable(info, input)
        if input.get("artifactPortfolioID"):
            portfolio = existing(info, "collections", "ArtifactPortfolio", input["artifactPortfolioID"])
        else:
            project = make_project(info, input.get("projectName"), input.get("entityName"))
            kind = store.get("collections", id=artifact["collection"])["type"]
            name = input.get("artifactPortfolioName") or ""
            portfolio = make_collection(store, project, name, kind, "ArtifactPortfolio")
        member = store.get("links", collection=portfolio["id"], artifact=artifact["id"])
        if member is None:
            index = max((row["versionIndex"] + 1 for row in store.find("links", collection=portfolio["id"])), default=0)
            member = store.insert(
                "links", collection=portfolio["id"], artifact=artifact["id"], versionIndex=index, createdAt=time.time()
            )
        alias(store, portfolio, artifact, ["latest", *[one["alias"] for one in input.get("aliases") or []]])
    return {"versionIndex": member["versionIndex"], "artifactMembership": _member(portfolio, info, artifact)}


def _linkable(info, input) -> dict:
    if input.get("artifactID"):
        artifact = existing(info, "artifacts", "Artifact", input["artifactID"])
    else:
        artifact = info.context.store.get("artifacts", clientID=input.get("clientID"))
    if not artifact or artifact["state"] != "COMMITTED":
        raise GraphQLError("only an artifact that has been logged can be linked")
    return artifact


def unlink(source, info, input) -> dict:
    store = info.context.store
    with store.write():
        artifact = existing(info, "artifacts", "Artifact", input["artifactID"])
        portfolio = existing(info, "collections", "ArtifactPortfolio", input["artifactPortfolioID"])
        member = store.get("links", collection=portfolio["id"], artifact=artifact["id"])
        if member is None:
            raise GraphQLError(f"the artifact is not linked to {portfolio['name']!r}")
        store.delete("links", member["id"])
        gone = store.find("aliases", collection=portfolio["id"], artifact=artifact["id"])
        for one in gone:
            store.delete("aliases", one["id"])
        left = store.find("links", order="versionIndex", collection=portfolio["id"])
        if left and any(one["alias"] == "latest" for one in gone):
            alias(store, portfolio, {"id": left[-1]["artifact"]}, ["latest"])
    return {"success": True}


# Reading


def membership(collection, info, aliasName) -> dict | None:
    """The version that an alias, or v0, v1, ... names."""
    store = info.context.store
    known = store.get("aliases", collection=collection["id"], alias=aliasName)
    if known:
        artifact = store.get("artifacts", id=known["artifact"])
    elif aliasName[:1] == "v" and aliasName[1:].isdigit():
        artifact = _at(store, collection, int(aliasName[1:]))
    else:
        artifact = store.get("artifacts", collection=collection["id"], digest=aliasName, state="COMMITTED")
    return artifact and _member(collection, info, artifact)


def _at(store: Store, collection: dict, index: int) -> dict | None:
    if collection["kind"] == "ArtifactSequence":
        return store.get("artifacts", collection=collection["id"], versionIndex=index, state="COMMITTED")
    member = store.get("links", collection=collection["id"], versionIndex=index)
    return member and store.get("artifacts", id=member["artifact"])


def _member(collection, info, artifact: dict) -> dict:
    store, index, at = info.context.store, artifact["versionIndex"], artifact["createdAt"]
    if collection["kind"] == "ArtifactPortfolio":
        row = store.get("links", collection=collection["id"], artifact=artifact["id"])
        index, at = row["versionIndex"], row["createdAt"]
    return {
        "id": node_id("ArtifactCollectionMembership", artifact["id"]), "versionIndex": index, "createdAt": at,
        "aliases": store.find("aliases", artifact=artifact["id"], collection=collection["id"]),
        "artifactCollection": collection, "artifact": artifact,
    }  # fmt: skip


def memberships(artifact, info, after=None, first=None) -> dict:
    """A version in its own sequence and in every portfolio that it is linked to."""
    store = info.context.store
    where = [artifact["collection"], *[row["collection"] for row in store.find("links", artifact=artifact["id"])]]
    return connection([_member(store.get("collections", id=id), info, artifact) for id in where], first, after)


def named_membership(project, info, name) -> dict | None:
    collection_name, _, version = name.partition(":")
    if not version:
        raise GraphQLError(f"artifact {name!r} must be specified as 'collection:alias'")
    collection = named(project, info, collection_name)
    return collection and membership(collection, info, version)


def _named_version(project, info, name, enableTracking=None) -> dict | None:
    return (named_membership(project, info, name) or {}).get("artifact")


def named(project, info, name) -> dict | None:
    return info.context.store.get("collections", project=project["id"], name=name)


def _page(rows: list[dict], filters, order, first, after) -> dict:
    wanted = json.loads(filters or "{}")
    rows = [row for row in rows if matches(row, wanted)]
    key = (order or "").lstrip("+-")
    if key:
        column = {"created_at": "createdAt", "updated_at": "updatedAt"}.get(key, key)
        if rows and column not in rows[0]:
            raise ValueError(f"cannot sort by {key!r}")
        rows.sort(key=lambda row: (row[column] is None, row[column]), reverse=order.startswith("-"))
    return connection(rows, first, after)


def _collections(project, info, filters=None, after=None, first=None, order=None) -> dict:
    return _page(info.context.store.find("collections", project=project["id"]), filters, order, first, after)


def _collections_of_type(kind, info, filters=None, after=None, first=None, order=None) -> dict:
    rows = info.context.store.find("collections", project=kind["project"], type=kind["name"])
    return _page(rows, filters, order, first, after)


def _type(project, info, name) -> dict | None:
    kinds = [kind for kind in _types(project, info, first=10_000)["edges"] if kind["node"]["name"] == name]
    return kinds[0]["node"] if kinds else None


def _types(project, info, after=None, first=None) -> dict:
    kinds: dict[str, dict] = {}
    for collection in info.context.store.find("collections", project=project["id"]):
        kinds.setdefault(collection["type"], type_of(collection, info))
    return connection(list(kinds.values()), first, after)


def type_of(collection, info) -> dict:
    return {
        "id": node_id("ArtifactType", collection["id"]), "name": collection["type"],
        "createdAt": collection["createdAt"], "project": collection["project"],
    }  # fmt: skip


def _collection_of_type(kind, info, name) -> dict | None:
    return info.context.store.get("collections", project=kind["project"], name=name, type=kind["name"])


def _versions(collection, info, after=None, first=None, order=None, filters=None) -> dict:
    store = info.context.store
    if collection["kind"] == "ArtifactSequence":
        rows = store.find("artifacts", collection=collection["id"], state="COMMITTED")
        indices = {row["id"]: row["versionIndex"] for row in rows}
    else:
        indices = {row["artifact"]: row["versionIndex"] for row in store.find("links", collection=collection["id"])}
        rows = [store.get("artifacts", id=id) for id in indices]
    rows.sort(key=lambda row: indices[row["id"]], reverse=True)  # the newest first, where nothing else is asked
    page = _page(rows, filters, order, first, after)
    for edge in page["edges"]:
        edge["version"] = f"v{indices[edge['node']['id']]}"
    return page


def _latest(collection, info) -> dict | None:
    member = membership(collection, info, "latest")
    return member and member["artifact"]


COLLECTION = {
    "id": lambda collection, info: node_id(collection["kind"], collection["id"]),
    "project": owner("projects", "project"),
    "defaultArtifactType": type_of,
    "state": lambda collection, info: collection.get("state", "READY"),
    "tags": lambda collection, info: connection(
        [{"id": f"Tag:{tag}", "name": tag} for tag in tags_of(collection, info)], 1000
    ),
    "aliases": lambda collection, info, after=None, first=None: connection(
        info.context.store.find("aliases", collection=collection["id"]), first, after
    ),
    "artifacts": _versions,
    "artifactMembership": membership,
}
FIELDS = {
    "Project": {
        "artifact": _named_version,
        "artifactCollectionMembership": named_membership,
        "artifactCollection": named,
        "artifactCollections": _collections,
        "artifactType": _type,
        "artifactTypes": _types,
    },
    "ArtifactType": {
        "artifact": lambda kind, info, name: _named_version({"id": kind["project"]}, info, name),
        "artifactCollection": _collection_of_type,
        "artifactCollections": _collections_of_type,
    },
    "ArtifactSequence": COLLECTION | {"latestArtifact": _latest, "digestAlgorithm": lambda *_: "MANIFEST_MD5"},
    "ArtifactPortfolio": COLLECTION,
    "ArtifactAlias": {"artifactCollection": owner("collections", "collection")},
}
