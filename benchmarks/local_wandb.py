"""python benchmarks/local_wandb.py

How fast the local server is: 16 clients x 10,000 rows x 12 columns at once, a history of 100,000 rows read back by
scan_history, 1,000 runs listed. Every time is also given as a multiple of an empty query on the same machine.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

CLIENTS, ROWS, COLUMNS, CHUNK = 16, 10_000, 12, 200  # CHUNK: rows of a request; a trainer's 2 s hold fewer
LONG, MANY = 100_000, 1_000
PROJECT = "benchmark"
CREATE = 'mutation ($run: String!) { upsertBucket(input: {name: $run, modelName: "benchmark"}) { inserted } }'


def chunks(rows: int) -> list[bytes]:
    """The file-stream bodies of a run of so many rows."""
    names = [f"train/metric_{i}" for i in range(COLUMNS - 2)]
    lines = [
        json.dumps({name: random.random() for name in names} | {"_step": step, "_timestamp": 1.7e9 + step})
        for step in range(rows)
    ]
    return [
        json.dumps({"files": {"wandb-history.jsonl": {"offset": at, "content": lines[at : at + CHUNK]}}}).encode()
        for at in range(0, rows, CHUNK)
    ]


def send(http: httpx.Client, run: str, bodies: list[bytes]) -> list[float]:
    """Creates the run and streams the bodies; the seconds that each took."""
    assert http.post("/graphql", json={"query": CREATE, "variables": {"run": run}}).json()["data"]
    return [
        timed(lambda body=body: http.post(f"/files/local/{PROJECT}/{run}/file_stream", content=body)) for body in bodies
    ]


def timed(act) -> float:
    """Seconds that a successful request took."""
    begin = time.perf_counter()
    act().raise_for_status()
    return time.perf_counter() - begin


def percentile(times: list[float], share: float) -> float:
    """The time below which this share of the requests stayed."""
    return sorted(times)[min(int(len(times) * share), len(times) - 1)]


def measure(url: str, key: str, data: Path) -> None:
    """Prints one line per figure."""
    with httpx.Client(base_url=url, auth=("api", key), timeout=60) as http:
        empty = statistics.median(
            timed(lambda: http.post("/graphql", content=b'{"query": "{ __typename }"}')) for _ in range(500)
        )

        def tell(what: str, seconds: float, more: str = "") -> None:
            print(f"{what:<58} {seconds * 1e3:>10.2f} ms {seconds / empty:>10.1f} x empty {more}", flush=True)

        tell("empty query, median of 500", empty)

        bodies, times = chunks(ROWS), []

        def client(number: int) -> None:
            with httpx.Client(base_url=url, auth=("api", key), timeout=60) as own:
                times.extend(send(own, f"client{number}", bodies))

        clients = [threading.Thread(target=client, args=[i]) for i in range(CLIENTS)]
        begin = time.perf_counter()
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        seconds = time.perf_counter() - begin
        assert len(times) == CLIENTS * len(bodies)
        rate = f"{CLIENTS * ROWS / seconds:,.0f} rows/s"
        tell(f"{CLIENTS} clients x {ROWS:,} rows x {COLUMNS} columns, all of it", seconds, rate)
        tell(f"  file-stream request of {CHUNK} rows, p50", percentile(times, 0.5))
        tell(f"  file-stream request of {CHUNK} rows, p99", percentile(times, 0.99))
        size = sum(file.stat().st_size for file in data.glob("local_wandb.sqlite*"))
        sent = CLIENTS * sum(map(len, bodies))
        print(f"  database {size / 2**20:.0f} MiB for {sent / 2**20:.0f} MiB sent ({size / sent:.2f} x)")

        times = send(http, "alone", bodies)
        tell(f"one client: file-stream request of {CHUNK} rows, p50", percentile(times, 0.5))
        tell(f"one client: file-stream request of {CHUNK} rows, p99", percentile(times, 0.99))
        send(http, "long", chunks(LONG))
        for i in range(MANY):
            http.post("/graphql", json={"query": CREATE, "variables": {"run": f"many{i}"}}).raise_for_status()

    os.environ |= {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": key,
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
    }
    os.environ["WANDB_CACHE_DIR"] = os.environ["WANDB_DIR"] = str(data)
    import wandb

    api = wandb.Api(timeout=60)
    begin = time.perf_counter()
    assert sum(1 for _ in api.run(f"local/{PROJECT}/long").scan_history()) == LONG
    seconds = time.perf_counter() - begin
    tell(f"scan_history of {LONG:,} rows x {COLUMNS} columns", seconds, f"{LONG / seconds:,.0f} rows/s")
    for lazy in (True, False):
        begin = time.perf_counter()
        assert len(list(api.runs(f"local/{PROJECT}", per_page=200, lazy=lazy))) == MANY + CLIENTS + 2
        tell(
            f"{MANY + CLIENTS + 2:,} runs listed, {'names' if lazy else 'with config and summary'}",
            time.perf_counter() - begin,
        )


def main() -> None:
    """Starts a server of its own and measures it."""
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, "-m", "local_wandb", "--data", folder], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        try:
            url, key = (server.stdout.readline().strip().partition("=")[2] for _ in range(2))
            measure(url, key, Path(folder))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
