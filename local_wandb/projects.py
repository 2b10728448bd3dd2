"""Who asks, and the projects."""

import time

from graphql import GraphQLError

from local_wandb.nodes import ENTITY, connection, node_id, proper_name


def user(source, info) -> dict:
    return {
        "id": node_id("User", 1), "name": ENTITY, "username": ENTITY, "email": "", "admin": True, "flags": "{}",
        "entity": ENTITY, "apiKeys": {"edges": []}, "teams": {"edges": []},
    }  # fmt: skip


def entity(source, info, name: str | None = None) -> dict:
    name = name or ENTITY
    return {"id": node_id("Entity", 1), "name": name, "available": False, "readOnly": False, "isTeam": False}


CLIENT = "0.31.0"  # the wandb whose protocol this is
FEATURES = (
    "MARK_RUN_FILES_UPLOADED", "UPDATE_RUN_STATE", "TOTAL_COUNT_IN_FILE_CONNECTION", "SWEEPS_QUERY_FILTERING",
    "SWEEPS_LOCAL_SCHEDULER", "LARGE_FILENAMES", "ARTIFACT_TAGS", "ARTIFACT_COLLECTIONS_FILTERING_SORTING",
    "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE",
)  # fmt: skip


def project(source, info, name=None, entityName=None) -> dict | None:
    return info.context.store.get("projects", entityName=entityName or ENTITY, name=name or "uncategorized")


def named_run(info, input: dict) -> dict:
    """The run that an input names. Raises GraphQLError where there is none."""
    found = project(None, info, input["projectName"], input["entityName"])
    run = found and info.context.store.get("runs", project=found["id"], name=input["runName"])
    if not run:
        raise GraphQLError(f"run {input['entityName']}/{input['projectName']}/{input['runName']} does not exist")
    return run


def make_project(info, name: str | None, entity: str | None) -> dict:
    store = info.context.store
    with store.write():
        return project(None, info, name, entity) or store.insert(
            "projects",
            entityName=proper_name(entity or ENTITY, "entity"),
            name=proper_name(name or "uncategorized", "project"),
            createdAt=time.time(),
        )


def server_info(source, info) -> dict:
    return {
        "features": [{"name": name, "isEnabled": True} for name in FEATURES],
        "cliVersionInfo": {"min_cli_version": CLIENT, "max_cli_version": CLIENT},
    }


def projects(source, info, entityName=None, after=None, first=None) -> dict:
    return connection(info.context.store.find("projects", entityName=entityName or ENTITY), first, after)


def upsert_model(source, info, input) -> dict:
    store = info.context.store
    known = project(None, info, input.get("name"), input.get("entityName"))
    made = make_project(info, input.get("name"), input.get("entityName"))
    if "description" in input:
        made = store.update("projects", made["id"], description=input["description"])
    return {"project": made, "model": made, "inserted": known is None}


FIELDS = {
    "Project": {
        "internalId": lambda project, info: project["id"],
        "entity": lambda project, info: entity(project, info, project["entityName"]),
        "access": lambda project, info: "PRIVATE",
        "isBenchmark": lambda project, info: False,
        "readOnly": lambda project, info: False,
        "user": user,
    },
}
