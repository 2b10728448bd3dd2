"""The server as an attacker would try it, and how it starts and ends."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import httpx
import pytest
import uvicorn
from conftest import ROOT, start
from starlette.testclient import TestClient

from local_wandb import app, limits
from local_wandb.store import Store, Unavailable

pytestmark = pytest.mark.slow

CREATE = """mutation ($run: String!, $project: String!) {
  upsertBucket(input: {name: $run, modelName: $project}) { inserted } }"""
FILES = """mutation ($names: [String!]!) {
  createRunFiles(input: {entityName: "local", projectName: "safety", runName: "run", files: $names}) {
    files { id name uploadUrl directUrl } } }"""


@pytest.fixture
def http(server):
    """A client that has the key; project safety has a run `run`."""
    with httpx.Client(base_url=server.url, auth=("api", server.key)) as http:
        create = 'mutation { upsertBucket(input: {name: "run", modelName: "safety"}) { inserted } }'
        assert http.post("/graphql", json={"query": create}).json()["data"]
        yield http


def make_file(http, name: str) -> dict:
    answer = http.post("/graphql", json={"query": FILES, "variables": {"names": [name]}}).json()
    assert "errors" not in answer, answer
    return answer["data"]["createRunFiles"]["files"][0]


# Without the key


CLOSED = [
    ("POST", "/graphql"),
    ("POST", "/files/local/safety/run/file_stream"),
    ("GET", "/"),
    ("GET", "/local"),
    ("GET", "/local/safety"),
    ("POST", "/local/safety/runs/compare"),
    ("GET", "/local/safety/artifacts/dataset/data/v0"),
    ("GET", "/local/safety/runs/run"),
    ("POST", "/local/safety/runs/run/data"),
    ("GET", "/artifactsV2/default/local/p/c/QXJ0aWZhY3Q6MQ==/00/x"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize("auth", [None, ("api", ""), ("api", "wrong"), ("api", "é")], ids=str)
def test_nothing_is_answered_without_the_key(server, http, method, path, auth):
    answer = httpx.request(method, server.url + path, auth=auth, content=b"{}")
    assert answer.status_code == 401 and server.key not in answer.text + str(answer.headers)


@pytest.mark.parametrize("header", ["Bearer {key}", "Basic {key}", "Basic %%%", "{key}", "Basic " + "A" * 9999])
def test_other_ways_to_bring_a_key_are_not_taken(server, header):
    headers = {"Authorization": header.format(key=server.key)}
    assert httpx.post(f"{server.url}/graphql", headers=headers, json={}).status_code == 401


def test_a_wrong_key_is_in_the_log_and_none_is_not(server):
    for path, auth in [("/without", None), ("/wrong", ("api", "wrong")), ("/signed?token=wrong", None)]:
        assert httpx.get(f"{server.url}/local/asked/runs{path}", auth=auth).status_code == 401
    found = re.findall(r"GET /local/asked/runs/(\w+): 401", (server.data / "server.log").read_text())
    assert found == ["wrong", "signed"]


def test_the_page_opens_by_its_signed_address_only(server):
    assert httpx.get(server.page[:-1] + ("0" if server.page[-1] != "0" else "1")).status_code == 401
    with httpx.Client() as browser:
        first = browser.get(server.page)
        cookie = first.headers["set-cookie"]
        assert first.status_code == 303 and "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert server.key not in server.page + cookie
        assert browser.get(server.url).status_code == 200
        assert browser.post(f"{server.url}/graphql", json={}).status_code == 401  # reading the page is not the key


def test_strangers_get_no_cors_and_no_framing(server, http):
    for method, path in [("OPTIONS", "/graphql"), ("POST", "/graphql"), ("GET", "/"), ("GET", "/assets/page.js")]:
        answer = http.request(method, path, headers={"Origin": "https://evil.example"}, content=b"{}")
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "frame-ancestors 'none'" in http.get("/").headers["content-security-policy"]


# Files


NAMES = ["../up.txt", "a/../../up.txt", "/etc/up.txt", "a//b", "", ".", "nul\0.txt", "..\\up.txt", "a/..", "x" * 2000]


@pytest.mark.parametrize("name", NAMES, ids=[repr(name)[:20] for name in NAMES])
def test_a_file_name_that_would_leave_its_folder_is_refused(http, name):
    answer = http.post("/graphql", json={"query": FILES, "variables": {"names": [name]}}).json()
    assert "is not a relative path inside the run" in answer["errors"][0]["message"]


def test_uploads_land_among_the_blobs_and_never_write_through_a_link(server, http, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    monkeypatch.setattr(Store, "new_blob", lambda self: tmp_path / "link")
    (tmp_path / "link").symlink_to(outside)
    store = Store(tmp_path / "data")
    project = store.insert("projects", entityName="local", name="p", createdAt=0.0)
    run = store.insert("runs", project=project["id"], name="r", state="running", createdAt=0.0, heartbeatAt=0.0)
    file = store.insert("files", run=run["id"], name="a/b.txt", updatedAt=0.0)
    key, expires = "k" * 40, int(time.time()) + 60
    signature = app._sign(key, "PUT", file["id"], expires)
    with TestClient(app.application(store, key), raise_server_exceptions=False) as client:
        answer = client.put(f"/storage/{file['id']}/b.txt?expires={expires}&PUT={signature}", content=b"overwritten")
    assert answer.status_code >= 400 and outside.read_text() == "untouched"

    before = {p for p in server.data.rglob("*") if p.parent.name != "blobs"}
    file = make_file(http, "deep/er/%2e%2e/name.txt")
    assert httpx.put(file["uploadUrl"], content=b"text").status_code == 200
    assert httpx.get(file["directUrl"]).text == "text"
    after = {p for p in server.data.rglob("*") if p.parent.name != "blobs"}
    assert {p.name for p in after - before} <= {"local_wandb.sqlite-wal", "local_wandb.sqlite-shm"}


def test_a_file_address_is_good_for_one_file_one_method_and_one_day(http):
    one, two = make_file(http, "one.txt"), make_file(http, "two.txt")
    assert httpx.put(one["uploadUrl"], content=b"1").status_code == 200
    number = re.search(r"/storage/(\d+)/", one["directUrl"]).group(1)
    other = re.search(r"/storage/(\d+)/", two["directUrl"]).group(1)
    bad = [
        one["directUrl"].replace(f"/storage/{number}/", f"/storage/{other}/"),
        one["directUrl"].partition("?")[0],
        re.sub("GET=.", "GET=x", one["directUrl"]),
        re.sub(r"expires=\d+", "expires=99999999999", one["directUrl"]),
        one["uploadUrl"],
    ]
    assert [httpx.get(address).status_code for address in bad] == [403] * 5
    assert httpx.put(one["directUrl"], content=b"2").status_code == 403
    assert httpx.get(one["directUrl"]).text == "1"


def test_an_expired_address_is_refused(server, http, monkeypatch):
    file = make_file(http, "old.txt")
    number = int(re.search(r"/storage/(\d+)/", file["directUrl"]).group(1))
    signature = app._sign(server.key, "GET", number, 1)
    answer = httpx.get(f"{server.url}/storage/{number}/old.txt?expires=1&GET={signature}")
    assert answer.status_code == 403 and "expired" in answer.text


def test_an_uploaded_page_is_a_download_not_a_page(http):
    file = make_file(http, "evil.html")
    httpx.put(file["uploadUrl"], content=b"<script>alert(1)</script>")
    headers = httpx.get(file["directUrl"]).headers
    assert (headers["content-disposition"], headers["x-content-type-options"]) == ("attachment", "nosniff")


def test_half_an_upload_is_no_file(server, http):
    file = make_file(http, "half.txt")
    blobs = set((server.data / "blobs").iterdir())
    raw(
        server,
        f"PUT {httpx.URL(file['uploadUrl']).raw_path.decode()}",
        b"Content-Length: 100\r\n\r\nhalf",
        answer=False,
    )
    deadline = time.time() + 60
    while set((server.data / "blobs").iterdir()) != blobs and time.time() < deadline:
        time.sleep(0.05)
    assert set((server.data / "blobs").iterdir()) == blobs
    assert httpx.get(file["directUrl"]).status_code == 404


# Sizes and shapes


def raw(server, head: str, body: bytes, answer: bool = True) -> str:
    """One request in our own words; answers the status line, or hangs up without waiting for it."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as wire:
        credentials = httpx.BasicAuth("api", server.key)._auth_header
        wire.sendall(f"{head} HTTP/1.1\r\nHost: {host}\r\nAuthorization: {credentials}\r\n".encode() + body)
        if not answer:
            time.sleep(0.2)  # for the server to have begun
            return ""
        return wire.recv(200).split(b"\r\n")[0].decode()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, http):
    assert "413" in raw(server, "POST /graphql", b"Content-Length: 99999999999\r\n\r\n")
    address = httpx.URL(make_file(http, "big.bin")["uploadUrl"]).raw_path.decode()
    assert "413" in raw(server, f"PUT {address}", b"Content-Length: 99999999999\r\n\r\n")


def test_a_body_without_a_declared_length_is_counted(server):
    def endless():
        for _ in range(80):
            yield b" " * 2**20

    answer = httpx.post(f"{server.url}/graphql", auth=("api", server.key), content=endless(), timeout=120)
    assert answer.status_code == 413


BROKEN = [
    b"", b"[]", b"{", b"null", b'{"query": 1}', b'{"query": "{"}', b'{"query": "{ nothing }"}', b"\xff\xfe",
    b'{"query": "{ viewer { id } }", "variables": 3}', b'{"query": "query a { viewer { id } } query b { __typename }"}',
    b'{"query": "' + b"{a" * 5000 + b'"}', b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("body", BROKEN, ids=[repr(body)[:25] for body in BROKEN])
def test_a_broken_query_is_an_error_never_a_5xx(http, body):
    answer = http.post("/graphql", content=body)
    assert answer.status_code in (200, 400) and answer.json()["errors"][0]["message"]


STREAMS = [
    {"files": 3}, {"files": {"wandb-history.jsonl": []}}, {"files": {"wandb-history.jsonl": {"content": ["{"]}}},
    {"files": {"wandb-history.jsonl": {"content": ['{"_step": 1e400}']}}},
    {"files": {"wandb-history.jsonl": {"content": [f'{{"_step": {2**70}}}']}}},
    {"files": {"output.log": {"offset": "x", "content": ["y"]}}}, {"exitcode": "x", "complete": True},
]  # fmt: skip


@pytest.mark.parametrize("body", STREAMS, ids=[json.dumps(body)[10:] for body in STREAMS])
def test_a_broken_file_stream_is_a_400_and_changes_nothing(http, body):
    answer = http.post("/files/local/safety/run/file_stream", json=body)
    assert answer.status_code == 400 and answer.json()["errors"][0]["message"]
    count = 'query { project(name: "safety") { run(name: "run") { historyLineCount logLineCount state } } }'
    run = http.post("/graphql", json={"query": count}).json()["data"]["project"]["run"]
    assert run == {"historyLineCount": 0, "logLineCount": 0, "state": "running"}


def test_what_is_unknown_is_named_to_the_client_and_in_the_log(server, http):
    asked = {"query": "mutation { frobnicate(input: {}) { ok } }"}
    assert "frobnicate" in http.post("/graphql", json=asked).json()["errors"][0]["message"]
    answer = http.get("/no/such/path/at/all")
    assert answer.status_code == 404 and "GET /no/such/path/at/all" in answer.json()["errors"][0]["message"]
    log = (server.data / "server.log").read_text()
    assert "frobnicate" in log and "GET /no/such/path/at/all" in log
    assert server.key not in log and "Traceback" not in log


@pytest.mark.parametrize("name", ["a/b", "..", "a?b", "x" * 200, "", "new\nline"])
def test_a_project_name_that_would_break_an_address_is_refused(http, name):
    create = 'mutation ($p: String) { upsertBucket(input: {name: "r", modelName: $p, entityName: $p}) { inserted } }'
    answer = http.post("/graphql", json={"query": create, "variables": {"p": name}}).json()
    assert ("is not a name" in answer["errors"][0]["message"]) if name else answer["data"]  # "" is the default project


def test_what_a_client_writes_is_checked_before_it_is_kept(http):
    write = 'mutation ($s: JSONString) { upsertBucket(input: {name: "run", modelName: "safety", %s: $s}) { inserted } }'
    for field in ("summaryMetrics", "config"):
        for text in ("{", "[]", "3", '"x"'):
            answer = http.post("/graphql", json={"query": write % field, "variables": {"s": text}}).json()
            assert "is not" in answer["errors"][0]["message"], (field, text)
    summary = {"files": {"wandb-summary.json": {"offset": 0, "content": ["{"]}}}
    assert http.post("/files/local/safety/run/file_stream", json=summary).status_code == 400


def test_a_regex_that_would_take_years_is_given_up(http):
    create = 'mutation { upsertBucket(input: {name: "aaa", modelName: "safety", displayName: "%s!"}) { inserted } }'
    http.post("/graphql", json={"query": create % ("a" * 60)})
    query = 'query ($f: JSONString) { project(name: "safety") { runCount(filters: $f) } }'
    began = time.time()
    for pattern, message in (("^(a|aa)+$", "takes longer than"), ("(", "$regex '(': missing )")):
        variables = {"f": json.dumps({"display_name": {"$regex": pattern}})}
        answer = http.post("/graphql", json={"query": query, "variables": variables}).json()
        assert message in answer["errors"][0]["message"]
    assert time.time() - began < 5


def test_a_query_of_any_length_is_refused_and_forgotten(http):
    answer = http.post("/graphql", json={"query": "{ viewer { id } }" + " " * 2**20}).json()
    assert "at most 262,144" in answer["errors"][0]["message"]


def nested(inner: str, levels: int) -> str:
    return 'query { project(name: "p") {' + "runs { edges { node { project {" * levels + inner + "}}}}" * levels + "} }"


WIDE = "runs { edges { node { " + " ".join(f"{name}: config" for name in "abcdefgh") + " } } }"
SAMPLES = """query ($s: [JSONString!]!) { project(name: "p") { run(name: "r0") { sampledHistory(specs: $s) } } }"""
COSTLY = {  # what asks for much with little: query, a limit made small, what the answer says of it
    "deep": (nested("name", 4), ("FIELDS", 2_000), "more than 2,000 fields"),
    "wide": (nested(WIDE, 1), ("CHARACTERS", 50_000), "more than 50,000 characters"),
    "slow": (nested("runCount", 2), ("SECONDS", 0.0), "more than 0 s"),
    "many words": ("{ viewer { " + "id " * 3_000 + "} }", None, "more than 2000 tokens"),
    "many samples": (SAMPLES, None, "at most 20 are answered"),
}


@pytest.mark.parametrize(("query", "limit", "message"), COSTLY.values(), ids=COSTLY)
def test_an_answer_without_bounds_is_not_given(tmp_path, monkeypatch, query, limit, message):
    store, key = Store(tmp_path), "k" * 40
    project = store.insert("projects", entityName="local", name="p", createdAt=0.0)
    for i in range(10):
        store.insert(
            "runs", project=project["id"], name=f"r{i}", state="finished", createdAt=0.0, heartbeatAt=0.0,
            config=json.dumps({"lr": {"value": "x" * 100}}),
        )  # fmt: skip
    if limit:
        monkeypatch.setattr(limits, *limit)
    with TestClient(app.application(store, key)) as client:
        body = {"query": query, "variables": {"s": ["{}"] * 21}}
        answer = client.post("/graphql", auth=("api", key), json=body)
    assert answer.status_code == 200
    assert [message in error["message"] for error in answer.json()["errors"]] == [True]


# Without end


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A server in this process with room for five connections; a head must come within 0.5 s."""
    monkeypatch.setattr(limits, "CONNECTIONS", 5)
    monkeypatch.setattr(limits, "HEAD", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app.application(Store(tmp_path), "k" * 40), http=limits.Protocol, log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()


def test_connections_that_wait_keep_nobody_out(small):
    idle = [socket.create_connection(small) for _ in range(20)]
    for one in idle[10:15]:
        one.sendall(b"POST /graphql HTTP/1.1\r\nHost: x\r\n")
    with httpx.Client(base_url=f"http://{small[0]}:{small[1]}", auth=("api", "k" * 40), timeout=60) as http:
        for _ in range(3):
            assert http.post("/graphql", json={"query": "{ __typename }"}).status_code == 200
        time.sleep(1)  # longer than HEAD: a connection that has had its answer is kept, those without a head are not
        assert http.post("/graphql", json={"query": "{ __typename }"}).status_code == 200
    for one in idle:
        one.settimeout(5)
        with one, contextlib.suppress(ConnectionResetError):
            assert one.recv(1) == b""


def test_the_log_takes_no_orders_and_has_an_end(monkeypatch):
    handler, lines = limits.Handler(), io.StringIO()
    handler.setStream(lines)
    for number in range(5 * limits.LINES):
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 0, "%s", (f"\x1b[2J\r\n{number}",), None))
    assert lines.getvalue().count("\n") == limits.LINES
    assert lines.getvalue().startswith("local_wandb: \\x1b[2J\\r\\n0\n")
    monkeypatch.setattr(limits, "PERIOD", 0)
    handler.emit(logging.LogRecord("x", logging.WARNING, "", 0, "later", (), None))
    assert lines.getvalue().endswith("400 more lines in 0 s\nlocal_wandb: later\n")


# Start and end


def run(*options: str, env: dict | None = None) -> subprocess.CompletedProcess:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | (env or {})
    command = [sys.executable, "-m", "local_wandb", *options]
    return subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=120)


def test_it_listens_on_loopback_only(server):
    assert server.url.startswith("http://127.0.0.1:")
    port = int(server.url.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells this machine's own address
        own = probe.getsockname()[0]
    with pytest.raises(OSError):
        socket.create_connection((own, port), timeout=2).close()


def test_host_demands_a_key_of_ones_own(tmp_path):
    refused = run("--host", "0.0.0.0", "--data", str(tmp_path))
    assert refused.returncode == 2 and "set WANDB_API_KEY" in refused.stderr and not refused.stdout
    short = run("--data", str(tmp_path), env={"WANDB_API_KEY": "secret"})
    assert short.returncode == 2 and "40 or more" in short.stderr and "secret" not in short.stderr


def test_a_port_that_is_taken_is_named(server, tmp_path):
    port = server.url.rpartition(":")[2]
    refused = run("--port", port, "--data", str(tmp_path))
    assert refused.returncode == 2 and f"127.0.0.1:{port}" in refused.stderr


def test_the_directory_keeps_the_key_for_its_owner_and_refuses_a_second_server(tmp_path):
    first = start(tmp_path / "data")
    key = tmp_path / "data" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and key.read_text() == first.key
    assert stat.S_IMODE((tmp_path / "data" / "local_wandb.sqlite").stat().st_mode) & 0o077 == 0
    second = run("--data", str(tmp_path / "data"))
    assert second.returncode == 2
    assert f"{tmp_path / 'data'} is already served by process {first.process.pid}" in second.stderr
    first.process.send_signal(signal.SIGINT)  # Ctrl-C
    assert first.process.wait(60) == 0
    assert (tmp_path / "data" / "server.log").read_text() == ""
    again = start(tmp_path / "data")
    assert (again.key, again.url) == (first.key, first.url)
    again.stop()
    own = start(tmp_path / "data", env={"WANDB_API_KEY": "own-" + "k" * 40})
    assert own.key == "own-" + "k" * 40 and key.read_text() == first.key
    own.stop()


def test_a_start_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "local_wandb.sqlite").write_text("not a database at all, but long enough")
    wrong = {"--port 99999": "99999 is not a port", "--data file": "file is a file", "--data text": "not a database"}
    for options, message in wrong.items():
        option, value = options.split()
        given = (
            [option, str(tmp_path / value)] if option == "--data" else [option, value, "--data", str(tmp_path / "d")]
        )
        done = run(*given)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_stopped_server_leaves_one_whole_file(tmp_path):
    server = start(tmp_path / "data")
    with httpx.Client(base_url=server.url, auth=("api", server.key)) as http:
        http.post("/graphql", json={"query": CREATE, "variables": {"run": "run", "project": "safety"}})
    server.stop()
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "data" / "local_wandb.sqlite", tmp_path / "alone")
    assert [row["name"] for row in Store(tmp_path / "alone").find("runs")] == ["run"]


def test_the_directory_can_be_copied(tmp_path):
    address = "/files/local/safety/run/file_stream"
    read = """query { project(name: "safety") { run(name: "run") {
        historyLineCount files { edges { node { directUrl } } } } } }"""
    source = start(tmp_path / "source")
    with httpx.Client(base_url=source.url, auth=("api", source.key)) as http:
        http.post("/graphql", json={"query": CREATE, "variables": {"run": "run", "project": "safety"}})
        http.post(address, json={"files": {"wandb-history.jsonl": {"content": ['{"_step": 0}', '{"_step": 1}']}}})
        httpx.put(make_file(http, "copied.txt")["uploadUrl"], content=b"text")
    (tmp_path / "source" / "blobs" / "torn").write_text("an upload that a kill -9 cut off")
    source.stop()
    shutil.copytree(tmp_path / "source", tmp_path / "copy")
    shutil.rmtree(tmp_path / "source")
    copy = start(tmp_path / "copy")
    with httpx.Client(base_url=copy.url, auth=("api", source.key)) as http:
        run = http.post("/graphql", json={"query": read}).json()["data"]["project"]["run"]
        assert run["historyLineCount"] == 2
        assert httpx.get(run["files"]["edges"][0]["node"]["directUrl"]).text == "text"
    assert not (tmp_path / "copy" / "blobs" / "torn").exists()
    copy.stop()


def test_a_full_disk_makes_the_client_try_again(tmp_path, monkeypatch):
    def full(*_, **__):
        raise Unavailable("database or disk is full")

    store, key = Store(tmp_path), "k" * 40
    project = store.insert("projects", entityName="local", name="p", createdAt=0.0)
    store.insert("runs", project=project["id"], name="r", state="running", createdAt=0.0, heartbeatAt=0.0)
    monkeypatch.setattr(Store, "append_history", full)
    monkeypatch.setattr(Store, "insert", full)
    with TestClient(app.application(store, key), raise_server_exceptions=False) as client:
        create = {"query": CREATE, "variables": {"run": "new", "project": "p"}}
        answer = client.post("/graphql", auth=("api", key), json=create)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        body = {"files": {"wandb-history.jsonl": {"content": ['{"_step": 0}']}}}
        answer = client.post("/files/local/p/r/file_stream", auth=("api", key), json=body)
    assert answer.status_code == 503 and "disk is full" in answer.text
