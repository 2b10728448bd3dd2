"""python -m local_wandb [--port PORT] [--data DIR] [--host HOST]
python -m local_wandb import ENTITY/PROJECT | export ENTITY/PROJECT   (see migrate.py)

Serves W&B's protocol from one directory and prints the two variables to export. The key is WANDB_API_KEY where that is
set, else one that is made once and kept in the directory. Ctrl-C ends it.
"""

import argparse
import contextlib
import logging
import os
import re
import secrets
import socket
import sys
from pathlib import Path

import uvicorn

from local_wandb.app import application, page_address
from local_wandb.limits import Handler, Protocol
from local_wandb.projects import CLIENT
from local_wandb.store import Store, locked

LOOPBACK = "127.0.0.1"


def main() -> None:
    """Starts the server, or ends with one line and status 2."""
    if sys.argv[1:2] in (["import"], ["export"]):
        _move(sys.argv[1:])
        return
    name = Path(sys.argv[0]).name.replace("__main__.py", "python -m local_wandb")  # or that of the script, local-wandb
    parser = argparse.ArgumentParser(
        prog=name,
        description="A W&B-protocol server for one machine. `import` and `export` move a project: see import --help.",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("outputs/local_wandb"), help="directory (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, help="default: the one used last with this directory, else a free one")
    parser.add_argument("--host", help="address to listen on; not loopback: WANDB_API_KEY must be set")
    options = parser.parse_args()
    try:
        serve(options.data, options.port, options.host)
    except (ValueError, OSError) as error:
        print(f"local_wandb: {error}", file=sys.stderr)
        sys.exit(2)


def _move(arguments: list[str]) -> None:
    try:
        from local_wandb import migrate  # W&B's client takes a second to import; the server does not need it
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        print(f"local_wandb: {arguments[0]} needs W&B's client: pip install wandb=={CLIENT}", file=sys.stderr)
        sys.exit(2)
    try:
        migrate.main(arguments)
    except (ValueError, OSError, migrate.wandb.Error) as error:
        print(f"local_wandb: {error}", file=sys.stderr)
        sys.exit(2)


def serve(data: Path, port: int | None, host: str | None) -> None:
    """Serves until interrupted. Raises ValueError or OSError where it cannot start."""
    environment_key = os.environ.get("WANDB_API_KEY")
    if host is not None and not environment_key:
        raise ValueError(f"--host {host} opens the server to others: set WANDB_API_KEY to a key of your own first")
    os.umask(0o077)  # what is written here is for its owner: the database, the files, the key
    if data.exists() and not data.is_dir():
        raise ValueError(f"--data {data} is a file; it must be a directory")
    if port is not None and not 0 <= port < 2**16:
        raise ValueError(f"--port {port} is not a port: 0 to 65535")
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(data):
        key = environment_key or _kept_key(data)
        if not re.fullmatch(r"[\w-]{40,}", key):
            raise ValueError("WANDB_API_KEY must be 40 or more letters, digits, _ or -")
        store = Store(data)
        store.tidy()
        app = application(store, key)
        listener = _listen(data, port, host or LOOPBACK)
        # The listener takes requests from here on; they wait for the loop that answers them.
        base = f"http://{_address(host)}:{listener.getsockname()[1]}"
        print(f"export WANDB_BASE_URL={base}")
        print(f"export WANDB_API_KEY={key}")
        print(f"# compare runs: {page_address(base, key)}", flush=True)
        logging.basicConfig(handlers=[Handler()], level=logging.WARNING)
        # Keep-alive longer than the client's pause between two requests: a closed connection costs it a retry.
        config = uvicorn.Config(app, log_config=None, http=Protocol, ws="none", timeout_keep_alive=90)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _kept_key(data: Path) -> str:
    path = data / "key"
    with (
        contextlib.suppress(FileExistsError),
        open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f,
    ):
        f.write(f"local-{secrets.token_hex(20)}")
    return path.read_text()


def _listen(data: Path, port: int | None, host: str) -> socket.socket:
    """Listens on the wanted port, else on the last one, so that clients find a restarted server again."""
    memory = data / "port"
    kept = memory.read_text() if port is None and memory.exists() else ""
    last = int(kept) if kept.isdigit() and int(kept) < 2**16 else 0  # no more than a convenience
    for candidate in [port] if port is not None else [last, 0]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
        except OSError as error:
            listener.close()
            if candidate == last and port is None:
                continue
            raise OSError(f"cannot listen on {host}:{candidate}: {error.strerror}") from error
        listener.listen(128)
        memory.write_text(str(listener.getsockname()[1]))
        return listener
    raise OSError(f"no free port on {host}")


def _address(host: str | None) -> str:
    host = socket.gethostname() if host in ("0.0.0.0", "::") else host or LOOPBACK
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    main()
