"""The routes: GraphQL, file streams, files, and the page. All ask for the key or a signature made with it."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import mimetypes
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

from graphql import GraphQLError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from local_wandb import compare, page, schema
from local_wandb.artifacts import entries, entry_file, remove_outlived
from local_wandb.collections import membership
from local_wandb.nodes import Context
from local_wandb.runs import mark_lost, stream
from local_wandb.store import Store, Unavailable
from local_wandb.sweeps import SweepGone

MAX_BODY = 64 * 2**20  # bytes of one JSON request; the client's own limit for a file-stream chunk is 10 MB
MAX_FILE = 8 * 2**30  # bytes of one uploaded file
WATCH = 10  # s between two looks for runs that have gone silent
URL_LIFE = 24 * 3600  # s that a file's address stays valid: longer than any retry of the client

log = logging.getLogger("local_wandb")


def application(store: Store, key: str) -> Starlette:
    """The ASGI application over a data directory, for clients that hold this key."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                await asyncio.sleep(WATCH)
                await run_in_threadpool(mark_lost, store)
                await run_in_threadpool(remove_outlived, store)

        watching = asyncio.create_task(watch())
        yield
        watching.cancel()
        await run_in_threadpool(store.checkpoint)

    handlers: dict = {
        HTTPException: _http_error,
        ValueError: _bad_request,
        RecursionError: _bad_request,
        ClientDisconnect: _bad_request,
        Unavailable: _unavailable,
        OSError: _unavailable,
        Exception: _bug,
    }
    app = Starlette(lifespan=lifespan, routes=ROUTES, exception_handlers=handlers)
    app.state.store, app.state.key = store, key
    return app


def _authenticate(request: Request) -> None:
    """HTTP Basic, any user, the key as password; compared in constant time."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    try:
        _, _, password = base64.b64decode(credentials if scheme.lower() == "basic" else "").partition(b":")
    except ValueError:
        password = b""
    if not hmac.compare_digest(password, request.app.state.key.encode()):
        detail = "wrong or missing API key; the page opens by the address that the server printed"
        # A stranger's connection is not kept.
        raise HTTPException(401, detail, {"WWW-Authenticate": 'Basic realm="local_wandb"', "Connection": "close"})


def _sign(key: str, *parts: object) -> str:
    return hmac.new(key.encode(), "\n".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()


def _context(request: Request) -> Context:
    key, base = request.app.state.key, str(request.base_url).rstrip("/")

    def file_url(file: dict, method: str) -> str:
        expires = int(time.time()) + URL_LIFE
        name = quote(Path(file["name"]).name)
        return (
            f"{base}/storage/{file['id']}/{name}?expires={expires}&{method}={_sign(key, method, file['id'], expires)}"
        )

    return Context(request.app.state.store, file_url)


async def _chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The request's body; 413 before more than `limit` bytes are taken."""
    declared, taken = request.headers.get("content-length", "0"), 0
    if not declared.isdigit() or int(declared) > limit:
        raise HTTPException(413, f"{declared} bytes are more than the {limit} this server takes at once")
    async for chunk in request.stream():
        taken += len(chunk)
        if taken > limit:
            raise HTTPException(413, f"more than the {limit} bytes this server takes at once")
        yield chunk


async def _json(request: Request) -> dict:
    body = json.loads(b"".join([chunk async for chunk in _chunks(request, MAX_BODY)]) or b"{}")
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return body


async def _graphql(request: Request) -> Response:
    _authenticate(request)
    body = await _json(request)
    result = await run_in_threadpool(schema.answer, _context(request), body)
    for error in result.errors or ():
        expected = error.original_error is None or isinstance(error.original_error, GraphQLError | ValueError)
        log.warning("graphql: %s", error.message, exc_info=None if expected else error.original_error)
        if isinstance(error.original_error, Unavailable | OSError):
            raise error.original_error  # 503: a client that read 200 would not send it again
    gone = any(isinstance(error.original_error, SweepGone) for error in result.errors or ())
    # Not 5xx, and not 400 either: the client repeats the one for minutes and hides the message of the other.
    return JSONResponse(result.formatted, 404 if gone else 200)


async def _file_stream(request: Request) -> Response:
    _authenticate(request)
    body, where, store = await _json(request), request.path_params, request.app.state.store

    def write() -> dict:
        project = store.get("projects", entityName=where["entity"], name=where["project"])
        run = project and store.get("runs", project=project["id"], name=where["run"])
        if not run:
            raise HTTPException(404, f"run {where['entity']}/{where['project']}/{where['run']} does not exist")
        try:
            return stream(_context(request), run, body)
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise HTTPException(400, f"not a file-stream request: {error}") from error

    return JSONResponse(await run_in_threadpool(write))


def _signed_file(request: Request, method: str) -> dict:
    """The file row of a signed address, for this method only."""
    number, expires = request.path_params["file"], request.query_params.get("expires", "")
    signature = request.query_params.get(method, "")
    if not hmac.compare_digest(signature.encode(), _sign(request.app.state.key, method, number, expires).encode()):
        raise HTTPException(403, "this address is not signed for that")
    if int(expires) < time.time():
        raise HTTPException(403, "this address has expired")
    file = request.app.state.store.get("files", id=number)
    if file is None:
        raise HTTPException(404, f"file {request.path_params['name']} does not exist")
    return file


async def _upload(request: Request) -> Response:
    file, store = _signed_file(request, "PUT"), request.app.state.store
    blob, digest = store.new_blob(), hashlib.md5(usedforsecurity=False)
    # O_EXCL: nobody's file or link is ever written through.
    with os.fdopen(os.open(blob, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        try:
            async for chunk in _chunks(request, MAX_FILE):
                digest.update(chunk)
                out.write(chunk)
        except BaseException:
            blob.unlink()
            raise
    md5 = base64.b64encode(digest.digest()).decode()
    if file["artifact"] and file["md5"] not in (None, md5):
        blob.unlink()
        raise HTTPException(422, f"{file['name']} was announced with another MD5")
    await run_in_threadpool(store.keep, file["id"], blob, md5)
    return Response(status_code=200, headers={"ETag": f'"{digest.hexdigest()}"'})


async def _download(request: Request) -> Response:
    return _content(request, _signed_file(request, "GET"))


async def _artifact_file(request: Request) -> Response:
    """The address that the client makes up itself for one entry of an artifact."""
    _authenticate(request)
    where = request.path_params
    digest = base64.b64encode(bytes.fromhex(where["digest"])).decode()
    file = entry_file(request.app.state.store, where["birth"], digest)
    if file is None:
        raise HTTPException(404, f"no artifact file {where['name']}")
    return _content(request, file)


def _content(request: Request, file: dict) -> Response:
    if not file["blob"]:
        raise HTTPException(404, f"{file['name']} has not been uploaded")
    kind = mimetypes.guess_type(file["name"])[0] or "application/octet-stream"
    # An uploaded HTML file must not run as a page of this server: it is always a download.
    headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
    return FileResponse(request.app.state.store.blobs / file["blob"], media_type=kind, headers=headers)


# The page


def _page_token(key: str) -> str:
    return _sign(key, "page")


def page_address(base: str, key: str) -> str:
    """The address that opens the page in a browser: it carries a signature, not the key."""
    return f"{base}/?token={_page_token(key)}"


def _page(answer):
    """A route of the page. A browser proves itself once, by the signed address or by Basic, then by a cookie."""

    async def route(request: Request) -> Response:
        token, cookie = _page_token(request.app.state.key), f"local_wandb_{request.url.port or 80}"
        if hmac.compare_digest(request.query_params.get("token", "").encode(), token.encode()):
            response: Response = RedirectResponse(request.url.path, 303)
            response.set_cookie(cookie, token, httponly=True, samesite="strict")
            return response
        if not hmac.compare_digest(request.cookies.get(cookie, "").encode(), token.encode()):
            _authenticate(request)
        after = await _json(request) if request.method == "POST" else {}
        return await run_in_threadpool(answer, request, after)

    return route


def _html(text: str) -> Response:
    return HTMLResponse(text, headers=page.HEADERS)


def _found(request: Request, table: str, **where) -> dict:
    row = request.app.state.store.get(table, **where)
    if row is None:
        raise HTTPException(404, f"{request.url.path} does not exist")
    return row


def _asked_project(request: Request) -> dict:
    where = request.path_params
    return _found(request, "projects", entityName=where["entity"], name=where["project"])


def _home_page(request: Request, after: dict) -> Response:
    return _html(page.projects(request.app.state.store))


def _entity_page(request: Request, after: dict) -> Response:
    entity = request.path_params["entity"]
    _found(request, "projects", entityName=entity)
    return _html(page.projects(request.app.state.store, entityName=entity))


def _artifact_page(request: Request, after: dict) -> Response:
    project, where, store = _asked_project(request), request.path_params, request.app.state.store
    collection = _found(request, "collections", project=project["id"], name=where["name"], type=where["type"])
    info = SimpleNamespace(context=_context(request))
    member = membership(collection, info, where.get("version", "latest"))
    if member is None:
        raise HTTPException(404, f"{request.url.path} does not exist")
    version = member["artifact"]
    files = entries(store, version)
    return _html(page.artifact(store, project, collection, version, files, info.context.file_url))


def _project_page(request: Request, after: dict) -> Response:
    return _html(page.project(request.app.state.store, _asked_project(request)))


def _compare(request: Request, wanted: dict) -> Response:
    return JSONResponse(compare.answer(request.app.state.store, _asked_project(request), wanted))


def _sweep_page(request: Request, after: dict) -> Response:
    project = _asked_project(request)
    sweep = _found(request, "sweeps", project=project["id"], name=request.path_params["sweep"])
    if request.method == "GET":
        return _html(page.comparison(f"Sweep {page.sweep_title(sweep)}", project))
    runs = request.app.state.store.find("runs", sweep=sweep["id"])
    total, metric = page.total_of(sweep), page.metric_of(sweep)
    return JSONResponse(page.data(request.app.state.store, runs, after, sweep["state"], total, metric))


def _run_page(request: Request, after: dict) -> Response:
    project = _asked_project(request)
    run = _found(request, "runs", project=project["id"], name=request.path_params["run"])
    if request.method == "GET":
        more = page.details(request.app.state.store, run, _context(request).file_url)
        return _html(page.comparison(f"Run {run['displayName'] or run['name']}", project, more))
    return JSONResponse(page.data(request.app.state.store, [run], after, run["state"], 1, page.FINAL))


async def _asset(request: Request) -> Response:
    asset = page.ASSETS.get(request.path_params["name"])
    if asset is None:
        raise HTTPException(404, f"no asset {request.path_params['name']}")
    return FileResponse(asset[0], media_type=asset[1], headers=page.HEADERS | {"Cache-Control": "no-cache"})


async def _http_error(request: Request, error: HTTPException) -> Response:
    detail = error.detail
    if error.status_code in (404, 405) and detail in ("Not Found", "Method Not Allowed"):
        detail = f"local_wandb does not know {request.method} {request.url.path}"
    # Without any key a client only asks whether one is wanted, as W&B's does; that is no news.
    if error.status_code != 401 or "authorization" in request.headers or request.query_params:
        log.warning("%s %s: %s %s", request.method, request.url.path, error.status_code, detail)
    return JSONResponse({"errors": [{"message": detail}]}, error.status_code, error.headers)


async def _bad_request(request: Request, error: Exception) -> Response:
    return await _http_error(request, HTTPException(400, f"{type(error).__name__}: {error}"))


async def _unavailable(request: Request, error: Exception) -> Response:
    # Here the client shall repeat: what it sent is not stored, and the disk may have room again.
    return await _http_error(request, HTTPException(503, f"cannot store: {error}", {"Retry-After": "10"}))


async def _bug(request: Request, error: Exception) -> Response:
    # 501 and not 500: the client would repeat a 500 for many minutes. The traceback is in the log.
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return JSONResponse({"errors": [{"message": f"local_wandb failed: {type(error).__name__}: {error}"}]}, 501)


# The tabs of W&B's own pages, whose addresses people and the client write down: here each is part of one page.
PROJECT_TABS = ("", "/workspace", "/table", "/overview", "/runs", "/sweeps", "/artifacts")
RUN_TABS = ("", "/workspace", "/overview", "/logs", "/files", "/artifacts", "/system")

ROUTES = [
    Route("/graphql", _graphql, methods=["POST"]),
    Route("/files/{entity}/{project}/{run}/file_stream", _file_stream, methods=["POST"]),
    Route("/storage/{file:int}/{name}", _upload, methods=["PUT"]),
    Route("/storage/{file:int}/{name}", _download, methods=["GET"]),
    Route("/artifactsV2/{region}/{entity}/{project}/{collection}/{birth}/{digest}/{name}", _artifact_file),
    Route("/", _page(_home_page)),
    Route("/assets/{name}", _asset),
    Route("/{entity}", _page(_entity_page)),
    *[Route(f"/{{entity}}/{{project}}{tab}", _page(_project_page)) for tab in PROJECT_TABS],
    Route("/{entity}/{project}/artifacts/{type}/{name}", _page(_artifact_page)),
    Route("/{entity}/{project}/artifacts/{type}/{name}/{version}", _page(_artifact_page)),
    Route("/{entity}/{project}/runs/compare", _page(_compare), methods=["POST"]),
    Route("/{entity}/{project}/sweeps/{sweep}", _page(_sweep_page)),
    Route("/{entity}/{project}/sweeps/{sweep}/data", _page(_sweep_page), methods=["POST"]),
    *[Route(f"/{{entity}}/{{project}}/runs/{{run}}{tab}", _page(_run_page)) for tab in RUN_TABS],
    Route("/{entity}/{project}/runs/{run}/data", _page(_run_page), methods=["POST"]),
]
