"""A Hugging Face Hub on loopback: as much of its HTTP interface as downloading models and data sets takes.

Repositories with commits, branches and tags; `resolve` with ETags, ranges and LFS redirects; the listings that
`datasets` asks for; and the Hub's own answers for what is missing, gated, or has been renamed.
"""

import hashlib
import socket
import threading
import time
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

LARGE = 100_000  # bytes from which a file is kept in LFS, as Git's large files are


@dataclass
class Repository:
    """Commits, newest last, each a table of path and content; `references` names some of them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    gated: int = 0  # the status that whoever asks gets: 401 without a token, 403 with one that has no access
    renamed: str = ""  # its new name

    def commit(self, files: dict[str, bytes], *references: str) -> str:
        """Add a commit, name it by `references`, and return its hash."""
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.references |= dict.fromkeys((*references, "main"), commit)
        return commit


class Hub:
    """The server, in a thread. It can go away, and it can cut a download in the middle; `requests` has its log."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}  # by kind ("models", "datasets") and name
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.cut = 0  # how many of the next LFS downloads break off half-way
        routes = []
        for kind, prefix in (("models", ""), ("datasets", "/datasets")):
            place = f"/api/{kind}/{{name:path}}"
            routes += [
                Route(f"{place}/tree/{{revision}}/{{path:path}}", self.answer(kind, self.tree)),
                Route(f"{place}/tree/{{revision}}", self.answer(kind, self.tree)),
                Route(f"{place}/paths-info/{{revision}}", self.answer(kind, self.paths), methods=["POST"]),
                Route(f"{place}/revision/{{revision}}", self.answer(kind, self.info)),
                Route(place, self.answer(kind, self.info)),
                Route(f"{prefix}/{{name:path}}/resolve/{{revision}}/{{path:path}}", self.answer(kind, self.resolve)),
            ]
        routes.sort(key=lambda route: not route.path.startswith(("/api", "/datasets")))
        self.app = Starlette(routes=[Route("/lfs/{digest}", self.lfs), *routes])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another host than the Hub, as its LFS storage is

    def start(self) -> None:
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=self.port, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the hub did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def repository(self, kind: str, name: str) -> Repository:
        return self.repositories.setdefault((kind, name), Repository())

    def answer(self, kind: str, view):
        """A route's endpoint: finds the repository and the commit for `view`, or answers as the Hub does."""

        async def endpoint(request: Request) -> Response:
            self.requests.append((request.method, request.url.path, request.headers.get("range", "")))
            name = request.path_params["name"]
            repository = self.repositories.get((kind, name))
            if repository is None:
                return refusal(401, "RepoNotFound", "Invalid username or password.")
            if repository.renamed:
                return RedirectResponse(request.url.path.replace(name, repository.renamed, 1), 307)
            if repository.gated:
                message = f"Access to {kind[:-1]} {name} is restricted."
                return refusal(repository.gated, "GatedRepo", message)
            revision = request.path_params.get("revision", "main")
            commit = repository.references.get(revision, revision)
            if commit not in repository.commits:
                return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return await view(request, name, commit, repository.commits[commit])

        return endpoint

    async def info(self, request: Request, name: str, commit: str, files: dict[str, bytes]) -> Response:
        return JSONResponse({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

    async def tree(self, request: Request, name: str, commit: str, files: dict[str, bytes]) -> Response:
        folder = request.path_params.get("path", "")
        inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            return refusal(404, "EntryNotFound", f"{folder} does not exist")
        return JSONResponse([entry(path, content) for path, content in inside.items()])

    async def paths(self, request: Request, name: str, commit: str, files: dict[str, bytes]) -> Response:
        form = await (request.form() if "form" in request.headers.get("content-type", "") else request.json())
        asked = form.getlist("paths") if hasattr(form, "getlist") else form["paths"]
        return JSONResponse([entry(path, files[path]) for path in asked if path in files])

    async def resolve(self, request: Request, name: str, commit: str, files: dict[str, bytes]) -> Response:
        headers = {"X-Repo-Commit": commit}
        content = files.get(request.path_params["path"])
        if content is None:
            return refusal(404, "EntryNotFound", "Entry not found", headers)
        if len(content) >= LARGE:
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return RedirectResponse(f"{self.storage}/lfs/{digest}", 302, headers)
        return part(request, content, headers)

    async def lfs(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path, request.headers.get("range", "")))
        contents = (content for repository in self.repositories.values() for content in by_digest(repository))
        content = next(content for digest, content in contents if digest == request.path_params["digest"])
        response = part(request, content, {})
        if self.cut and request.method == "GET":
            self.cut -= 1

            async def half():
                yield response.body[: len(response.body) // 2]
                raise ConnectionAbortedError("the download breaks off here")

            return StreamingResponse(half(), response.status_code, dict(response.headers))
        return response


def by_digest(repository: Repository):
    for files in repository.commits.values():
        for content in files.values():
            yield hashlib.sha256(content).hexdigest(), content


def blob(content: bytes) -> str:
    """Git's own name of a file's content, the ETag of what is not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"type": "file", "path": path, "size": len(content), "oid": blob(content)} | (
        {"lfs": large} if len(content) >= LARGE else {}
    )


def part(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The content, or the range of it that is asked for ("bytes=START-")."""
    headers |= {"ETag": f'"{blob(content)}"', "Accept-Ranges": "bytes"}
    if asked := request.headers.get("range"):
        start = int(asked.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return Response(content[start:], 206, headers)
    return Response(content, 200, headers)


def refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    headers = {"X-Error-Code": code, "X-Error-Message": message} | (headers or {})
    return JSONResponse({"error": message}, status, headers)
