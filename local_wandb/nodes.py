"""What every resolver needs: the context, opaque ids, pages of a list, names."""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass

from graphql import GraphQLError

from local_wandb.store import Store

ENTITY = "local"  # where a request names none
PAGE = 50


@dataclass(frozen=True)
class Context:
    """What a resolver may use: the data, and how to sign a file's address."""

    store: Store
    file_url: Callable[[dict, str], str]  # (file row, "GET" or "PUT") -> absolute URL


def node_id(kind: str, row: int) -> str:
    """The opaque id of a row, as W&B shapes them."""
    return base64.b64encode(f"{kind}:{row}".encode()).decode()


def row_id(kind: str, node: str) -> int:
    """The row of an opaque id. An id of another kind is an error."""
    try:
        found, _, number = base64.b64decode(node, validate=True).decode().partition(":")
        if found == kind:
            return int(number)
    except (binascii.Error, UnicodeDecodeError, ValueError):
        pass
    raise GraphQLError(f"{node!r} is not the id of a {kind}")


def existing(info, table: str, kind: str, node: str) -> dict:
    """The row that an opaque id means. Raises GraphQLError where there is none."""
    row = info.context.store.get(table, id=row_id(kind, node))
    if row is None:
        raise GraphQLError(f"{kind} {node!r} does not exist")
    return row


def connection(items: list, first: int | None = None, after: str | None = None) -> dict:
    """A page of a list, in the shape of a GraphQL connection; the cursor is the place in the list."""
    start = int(after) if after else 0
    page = items[start : start + (PAGE if first is None else first)]
    return {
        "totalCount": len(items),
        "edges": [{"node": item, "cursor": str(start + i)} for i, item in enumerate(page, 1)],
        "pageInfo": {"endCursor": str(start + len(page)), "hasNextPage": start + len(page) < len(items)},
    }


def proper_name(text: str, what: str) -> str:
    """A name that can stand in a URL: the client builds paths from them."""
    if not text or len(text) > 128 or any(c in "/\\#?%:" or ord(c) < 32 for c in text) or text in (".", ".."):
        raise GraphQLError(f"{what} {text!r} is not a name: 1 to 128 characters, none of / \\ # ? % :")
    return text


def proper_path(path: str) -> str:
    """A file's name that stays inside the folder it is downloaded to, whoever downloads it."""
    parts = path.replace("\\", "/").split("/")
    if not path or len(path) > 1024 or any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 for c in path):
        raise GraphQLError(f"file name {path!r} is not a relative path inside the run")
    return path


def owner(table: str, column: str):
    """A resolver: the row that this column points to."""
    return lambda source, info: info.context.store.get(table, id=source[column])


def children(table: str, column: str):
    """A resolver: the rows whose column points here."""

    def rows_of(source, info, after=None, before=None, first=None, last=None, order=None) -> dict:
        rows = info.context.store.find(table, **{column: source["id"]})
        return connection(rows, len(rows) if first is None else first, after)

    return rows_of
