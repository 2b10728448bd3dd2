"""The table of operations: answers a request with the resolvers of schema.graphql's fields."""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from graphql import ExecutionResult, GraphQLError, build_schema, execute_sync, parse, validate

from local_wandb import agents, artifacts, projects, runs
from local_wandb.nodes import Context, node_id


def answer(context: Context, body: dict) -> ExecutionResult:
    """Runs one request body {query, variables, operationName}. Never raises for what a client sends."""
    try:
        document = _document(body["query"])
    except (GraphQLError, KeyError, TypeError) as error:
        return ExecutionResult(None, [error if isinstance(error, GraphQLError) else GraphQLError(f"no query: {error}")])
    if isinstance(document, list):
        return ExecutionResult(None, document)
    if not isinstance(body.get("variables") or {}, dict):
        return ExecutionResult(None, [GraphQLError("variables must be an object")])
    return execute_sync(
        SCHEMA,
        document,
        context_value=context,
        variable_values=body.get("variables"),
        operation_name=body.get("operationName") or None,  # the client sends "" for none
    )


@lru_cache(maxsize=512)
def _document(query: str):
    """The parsed query, or the list of its errors. The client sends the same few dozen again and again."""
    document = parse(query)
    return validate(SCHEMA, document) or document


RESOLVERS: dict[str, dict[str, Callable]] = {}
for module in (projects, runs, agents, artifacts):
    for type_name, fields in module.RESOLVERS.items():
        RESOLVERS.setdefault(type_name, {}).update(fields)


def _schema():
    schema = build_schema((Path(__file__).parent / "schema.graphql").read_text())
    for type_name, fields in RESOLVERS.items():
        for field, resolver in fields.items():
            schema.type_map[type_name].fields[field].resolve = resolver
    for type_name in ("Project", "Run", "File", "Sweep", "Agent", *artifacts.KINDS):
        schema.type_map[type_name].fields["id"].resolve = lambda row, info, kind=type_name: node_id(kind, row["id"])
    schema.type_map["DateTime"].coerce_output_value = lambda at: datetime.fromtimestamp(at, UTC).strftime(
        "%Y-%m-%dT%H:%M:%SZ"
    )
    schema.type_map["ArtifactCollection"].resolve_type = lambda *_: "ArtifactSequence"
    return schema


SCHEMA = _schema()
