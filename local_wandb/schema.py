"""The table of operations, and the answer to a request: schema.graphql's types with their resolvers."""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from graphql import ExecutionResult, FieldNode, GraphQLError, build_schema, execute_sync, parse, validate

from local_wandb import artifacts, collections, projects, runs, sweeps
from local_wandb.limits import Budget, TooMuch
from local_wandb.nodes import Context, node_id


def answer(context: Context, body: dict) -> ExecutionResult:
    """Runs one request body {query, variables, operationName}. Never raises for what a client sends."""
    try:
        document = _document(body["query"])
    except (GraphQLError, KeyError, TypeError) as error:
        return ExecutionResult(None, [error if isinstance(error, GraphQLError) else GraphQLError(f"no query: {error}")])
    if isinstance(document, list):
        return ExecutionResult(None, _absent(document) or document)
    if not isinstance(body.get("variables") or {}, dict):
        return ExecutionResult(None, [GraphQLError("variables must be an object")])
    try:
        return execute_sync(
            SCHEMA,
            document,
            context_value=context,
            variable_values=body.get("variables"),
            operation_name=body.get("operationName") or None,  # the client sends "" for none
            middleware=[Budget()],
        )
    except TooMuch as error:
        return ExecutionResult(None, [GraphQLError(str(error))])


QUERY, KEPT = 2**18, 2**14  # characters of the longest query that is answered, and of the longest that is kept parsed
TOKENS = 2000  # of a query: its check takes their square, here 0.5 s; the client's longest has 250


def _document(query: str):
    """The parsed query, or the list of its errors."""
    if len(query) > QUERY:
        raise GraphQLError(f"a query of {len(query):,} characters; at most {QUERY:,} are answered")
    return _kept(query) if len(query) <= KEPT else _parsed(query)


def _parsed(query: str):
    document = parse(query, max_tokens=TOKENS)
    return validate(SCHEMA, document) or document


_kept = lru_cache(maxsize=128)(_parsed)  # the client sends the same few dozen again and again


# What W&B has and this server has not: field -> what it belongs to. One key for one group of people is the design.
ABSENT = {
    "organization": "organizations", "organizations": "organizations", "users": "users", "createUser": "users",
    "deleteApiKey": "users", "generateApiKey": "users", "photoUrl": "teams", "createTeam": "teams",
    "createInvite": "teams", "deleteInvite": "teams", "createServiceAccount": "teams", "members": "teams",
    "teamMembers": "teams", "createProjectMembers": "teams", "deleteProjectMembers": "teams",
    "updateProjectMember": "teams", "updateProjectTeamMember": "teams", "allViews": "reports", "upsertView": "reports",
    "triggers": "automations", "createFilterTrigger": "automations", "updateFilterTrigger": "automations",
    "deleteTrigger": "automations", "integrations": "integrations",
    "createGenericWebhookIntegration": "integrations", "allowAllArtifactTypesInRegistry": "the registry",
    "renameProject": "the registry", "runQueue": "launch", "runQueues": "launch", "createRunQueue": "launch",
    "upsertRunQueue": "launch", "createDefaultResourceConfig": "launch", "createCustomChart": "custom charts",
}  # fmt: skip


def _absent(errors: list[GraphQLError]) -> list[GraphQLError]:
    """One line in the place of a list of schema errors, where the query asks for what is not here."""
    for error in errors:
        for node in error.nodes or ():
            field = node.name.value if isinstance(node, FieldNode) else None
            if field in ABSENT:
                return [GraphQLError(f"{ABSENT[field]}: not part of local_wandb")]
    return []


# Every operation that the server answers, and the function that does.
OPERATIONS: dict[str, dict[str, Callable]] = {
    "Query": {
        "viewer": projects.user,
        "serverInfo": projects.server_info,
        "entity": projects.entity,
        "models": projects.projects,
        "model": projects.project,
        "project": projects.project,
        "artifact": artifacts.by_id,
        "artifactCollection": collections.by_id,
        "clientIDMapping": artifacts.by_client,
    },
    "Mutation": {
        "upsertModel": projects.upsert_model,
        # runs
        "upsertBucket": runs.upsert_bucket,
        "deleteRun": runs.delete_run,
        "updateRunState": runs.update_state,
        "stopRun": runs.stop_run,
        "rewindRun": runs.rewind,
        "createRunFiles": runs.create_run_files,
        "markRunFilesUploaded": runs.mark_files_uploaded,
        "deleteFiles": runs.delete_files,
        "notifyScriptableRunAlert": runs.alert,
        # sweeps
        "upsertSweep": sweeps.upsert_sweep,
        "enqueueSweepRun": sweeps.enqueue,
        "createAgent": sweeps.create_agent,
        "agentHeartbeat": sweeps.agent_heartbeat,
        # artifacts
        "createArtifact": artifacts.create,
        "createArtifactManifest": artifacts.create_manifest,
        "updateArtifactManifest": artifacts.update_manifest,
        "createArtifactFiles": artifacts.create_files,
        "commitArtifact": artifacts.commit,
        "updateArtifact": artifacts.update,
        "deleteArtifact": artifacts.delete,
        "useArtifact": artifacts.use,
        # collections of artifacts
        "addAliases": collections.add_aliases,
        "deleteAliases": collections.delete_aliases,
        "createArtifactCollectionTagAssignments": collections.add_tags,
        "deleteArtifactCollectionTagAssignments": collections.delete_tags,
        "updateArtifactSequence": collections.update_sequence,
        "moveArtifactSequence": collections.move_sequence,
        "deleteArtifactSequence": collections.delete_sequence,
        "updateArtifactPortfolio": collections.update_portfolio,
        "deleteArtifactPortfolio": collections.delete_portfolio,
        "linkArtifact": collections.link,
        "unlinkArtifact": collections.unlink,
    },
}


def _schema():
    schema = build_schema((Path(__file__).parent / "schema.graphql").read_text())
    types: dict = schema.type_map  # each name below is of the kind that has what is set
    for table in (OPERATIONS, projects.FIELDS, runs.FIELDS, sweeps.FIELDS, artifacts.FIELDS, collections.FIELDS):
        for type_name, fields in table.items():
            for field, resolver in fields.items():
                types[type_name].fields[field].resolve = resolver
    for type_name, operations in OPERATIONS.items():
        assert set(operations) == set(types[type_name].fields), f"schema.graphql and {type_name} differ"
    for type_name in ("Project", "Run", "File", "Sweep", "Agent", "Artifact", "ArtifactAlias"):
        types[type_name].fields["id"].resolve = lambda row, info, kind=type_name: node_id(kind, row["id"])
    types["DateTime"].coerce_output_value = lambda at: datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    types["ArtifactCollection"].resolve_type = lambda collection, *_: collection["kind"]
    return schema


SCHEMA = _schema()
