"""What a client was told is stored stays stored: servers killed under load, every row compared."""

import json
import random
import subprocess
import threading
import time

import httpx
import pytest
from conftest import Server, start

pytestmark = pytest.mark.slow

CHUNK = 50  # rows of a request
RUNS = 4
CREATE = 'mutation ($run: String!) { upsertBucket(input: {name: $run, modelName: "killed"}) { inserted } }'
RUN = 'query ($run: String!) { project(name: "killed") { run(name: $run) { state %s } } }'
HISTORY = RUN % "historyLineCount history"
FILES = RUN % "files { edges { node { name directUrl } } }"


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


def query(server: Server, text: str, **variables) -> dict:
    answer = httpx.post(f"{server.url}/graphql", auth=("api", server.key), json={"query": text, "variables": variables})
    return answer.json()["data"]


def history(server: Server, run: str) -> list[dict]:
    run = query(server, HISTORY, run=run)["project"]["run"]
    rows = [json.loads(line) for line in run["history"]]
    assert run["historyLineCount"] == len(rows)
    return rows


class Writer(threading.Thread):
    """Sends the chunks of one run in order until it is stopped; a chunk counts as sent when it was acknowledged."""

    def __init__(self, url: str, key: str, run: str, stop: threading.Event, first: int):
        super().__init__()
        self.url, self.key, self.run_name, self.stop_now, self.sent = url, key, run, stop, first

    def run(self) -> None:
        address = f"{self.url}/files/local/killed/{self.run_name}/file_stream"
        with httpx.Client(auth=("api", self.key)) as http:
            while not self.stop_now.is_set():
                content = [row(self.run_name, step) for step in range(self.sent * CHUNK, (self.sent + 1) * CHUNK)]
                body = {"files": {"wandb-history.jsonl": {"offset": self.sent * CHUNK, "content": content}}}
                try:
                    answer = http.post(address, json=body)
                except httpx.HTTPError:
                    return
                assert answer.status_code == 200, answer.text
                self.sent += 1


def row(run: str, step: int) -> str:
    return json.dumps({"_step": step, "loss": f"{run} {step}"})


def test_acknowledged_rows_survive_kill_9_at_any_moment(tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    moment = random.Random(seed)
    runs = [f"run{i}" for i in range(RUNS)]
    sent = dict.fromkeys(runs, 0)
    server = start(tmp_path)
    for run in runs:
        query(
            server, 'mutation ($n: String) { upsertBucket(input: {name: $n, modelName: "killed"}) { inserted } }', n=run
        )
    for _ in range(8):
        stop = threading.Event()
        writers = [Writer(server.url, server.key, run, stop, sent[run]) for run in runs]
        for writer in writers:
            writer.start()
        time.sleep(moment.uniform(0.02, 0.6))
        kill(server)
        stop.set()
        for writer in writers:
            writer.join()
            sent[writer.run_name] = writer.sent
        url = server.url
        server = start(tmp_path)
        assert server.url == url  # the clients would find it again
        for run in runs:
            rows = history(server, run)
            # All that was acknowledged; perhaps the chunk whose answer got lost, and then the whole of it.
            assert len(rows) in (sent[run] * CHUNK, (sent[run] + 1) * CHUNK)
            assert rows == [json.loads(row(run, step)) for step in range(len(rows))]
    server.stop()
    assert sum(sent.values()) > 8 * RUNS


SCRIPT = """
import os, time, wandb
with wandb.init(id=os.environ["NAME"], resume="allow") as run:
    for step in range(400):
        run.log({"x": step, "who": os.environ["NAME"]})
        time.sleep(0.02)
    with open("result.txt", "w") as file:
        file.write(os.environ["NAME"])
    run.save("result.txt")
"""


def test_an_outage_in_mid_run_loses_nothing(tmp_path):
    """Three clients log for 8 s; the server is killed twice and away for some seconds each time."""
    server = start(tmp_path)
    env = server.env | {"WANDB_PROJECT": "killed", "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5"}
    clients = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        folder = {"NAME": name, "WANDB_DIR": str(tmp_path / name)}
        clients.append(subprocess.Popen(["python", "-c", SCRIPT], cwd=tmp_path / name, env=env | folder))
    for away in (1, 3):
        time.sleep(2.5)
        kill(server)
        time.sleep(away)
        server = start(tmp_path)
    assert [client.wait(300) for client in clients] == [0, 0, 0]
    for name in ("a", "b", "c"):
        assert [(r["x"], r["who"]) for r in history(server, name)] == [(step, name) for step in range(400)]
        run = query(server, FILES, run=name)["project"]["run"]
        assert run["state"] == "finished"
        (address,) = [e["node"]["directUrl"] for e in run["files"]["edges"] if e["node"]["name"] == "result.txt"]
        assert httpx.get(address).text == name
    server.stop()
