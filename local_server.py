"""The local_wandb that an experiment logs to: attached to where one runs already, else started, and revived."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from urllib.parse import urlsplit

from analysis.files import InputError

START_SECONDS, END_SECONDS = 30, 10
# The server lives as long as somebody holds the other end of its standard input: experiment.py and its agents. So it
# outlives an experiment.py that is killed until the agents' last upload, and no longer. (setpriv: nor this shell.)
COMMAND = """
exec 3<&0
setpriv --pdeathsig TERM "$@" </dev/null 3<&- & server=$!
cat <&3 >/dev/null &
wait -n
kill $server $! 2>/dev/null
wait $server
"""


class Server:
    """local_wandb on the folder `data`. As a context it starts, or attaches to, the server and ends its own at exit.

    `key` is the one that a running server of the user's may have been given, as WANDB_API_KEY. `line` is the file
    descriptor that agents must inherit to keep the server alive.
    """

    def __init__(self, data: Path, key: str | None):
        self.data, self.key = data, key
        self.read, self.line = os.pipe()
        self.process: subprocess.Popen | None = None  # None while it is attached
        self.token = ""

    def __enter__(self) -> "Server":
        if not self.serves():
            self.launch()
        return self

    def __exit__(self, *_) -> None:
        os.close(self.line)
        if self.process:
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)  # the server with it; what it had answered is on the disk
                self.process.wait()

    def serves(self) -> bool:
        """Whether a process serves the folder."""
        with contextlib.suppress(FileNotFoundError), open(self.data / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def launch(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        port = ["--port", str(urlsplit(os.environ["WANDB_BASE_URL"]).port)] if "WANDB_BASE_URL" in os.environ else []
        command = [sys.executable, "-m", "local_wandb", "--data", str(self.data), *port]
        with open(self.data / "server.log", "a") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", COMMAND, "bash", *command],
                stdin=self.read,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def ready(self) -> None:
        """Wait for the server and put its address and key into the environment."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process is None and self.attach():
                break
            if self.process and (lines := [self.process.stdout.readline().strip() for _ in range(3)])[2]:
                os.environ.update(line.removeprefix("export ").split("=", 1) for line in lines[:2])
                self.token = lines[2].rpartition("?")[2]
                break
            if self.process and not self.serves():
                said = (self.data / "server.log").read_text().strip().splitlines()
                raise InputError(f"local_wandb did not start: {said[-1] if said else 'it said nothing'}")
            time.sleep(0.2)  # another process took the folder, or leaves it, at this moment
            self.process = None
            if not self.serves():
                self.launch()
        else:
            raise InputError(f"{self.data} is served by a process that does not answer or has a key of its own; end it")
        # Rows every 2 seconds instead of 15, so that a killed run loses little; nothing is sent to W&B.
        os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "2"}

    def attach(self) -> bool:
        """Use the server that runs, if it answers to a key that is known here."""
        try:
            address = f"http://127.0.0.1:{int((self.data / 'port').read_text())}"
        except FileNotFoundError:
            return False
        kept = self.data / "key"
        for key in dict.fromkeys(filter(None, [kept.read_text() if kept.exists() else None, self.key])):
            basic = b64encode(f"api:{key}".encode()).decode()
            request = urllib.request.Request(address, headers={"Authorization": f"Basic {basic}"})
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=5).close()
                from local_wandb.app import page_address  # only here: it takes half a second

                self.token = page_address(address, key).rpartition("?")[2]
                os.environ |= {"WANDB_BASE_URL": address, "WANDB_API_KEY": key}
                return True
        return False

    def revive(self) -> str:
        """Start it again, on the same port and with the same key; returns what came of it."""
        try:
            self.launch()
            self.ready()
        except InputError as error:
            return f"{error}; another try follows"
        return "it serves again"

    def page(self, url: str) -> str:
        """The address that opens a page of the server in a browser; it carries a signature, not the key."""
        return f"{url}?{self.token}"
