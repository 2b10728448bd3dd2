"""Who asks, and the projects."""

import time

from local_wandb.nodes import ENTITY, connection, node_id, proper_name


def user(info) -> dict:
    return {
        "id": node_id("User", 1), "name": ENTITY, "username": ENTITY, "email": "", "admin": True, "flags": "{}",
        "entity": ENTITY, "apiKeys": {"edges": []}, "teams": {"edges": []},
    }  # fmt: skip


def entity(name: str) -> dict:
    return {"id": node_id("Entity", 1), "name": name, "available": False, "readOnly": False, "isTeam": False}


CLIENT = "0.31.0"  # the wandb whose protocol this is
FEATURES = ("MARK_RUN_FILES_UPLOADED", "TOTAL_COUNT_IN_FILE_CONNECTION", "SWEEPS_QUERY_FILTERING")


def project(source, info, name=None, entityName=None) -> dict | None:
    return info.context.store.get("projects", entityName=entityName or ENTITY, name=name or "uncategorized")


def make_project(info, name: str | None, entity: str | None) -> dict:
    store = info.context.store
    with store.write():
        return project(None, info, name, entity) or store.insert(
            "projects",
            entityName=proper_name(entity or ENTITY, "entity"),
            name=proper_name(name or "uncategorized", "project"),
            createdAt=time.time(),
        )


def _upsert_model(source, info, input) -> dict:
    store = info.context.store
    known = project(None, info, input.get("name"), input.get("entityName"))
    made = make_project(info, input.get("name"), input.get("entityName"))
    if "description" in input:
        made = store.update("projects", made["id"], description=input["description"])
    return {"project": made, "model": made, "inserted": known is None}


RESOLVERS = {
    "Query": {
        "viewer": lambda source, info: user(info),
        "serverInfo": lambda source, info: {
            "features": [{"name": name, "isEnabled": True} for name in FEATURES],
            "cliVersionInfo": {"min_cli_version": CLIENT, "max_cli_version": CLIENT},
        },
        "entity": lambda source, info, name=None: entity(name or ENTITY),
        "models": lambda source, info, entityName=None, after=None, first=None: connection(
            info.context.store.find("projects", entityName=entityName or ENTITY), first, after
        ),
        "model": project,
        "project": project,
    },
    "Mutation": {"upsertModel": _upsert_model},
    "Project": {
        "internalId": lambda project, info: project["id"],
        "entity": lambda project, info: entity(project["entityName"]),
        "access": lambda project, info: "PRIVATE",
        "isBenchmark": lambda project, info: False,
        "readOnly": lambda project, info: False,
        "user": lambda project, info: user(info),
    },
}
