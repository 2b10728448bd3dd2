"""local_server.py: one local_wandb for an experiment, whoever started it and whatever becomes of it."""

import os
import signal
import time
import urllib.error
import urllib.request
from base64 import b64encode
from urllib.parse import urlsplit

import conftest
import pytest

from analysis.files import InputError
from local_server import Server

pytestmark = pytest.mark.slow

KEY = "somebodys-own-key-0123456789012345678901234567890"


@pytest.fixture(autouse=True)
def no_server_known(monkeypatch):
    monkeypatch.chdir(conftest.ROOT)
    for name in ("WANDB_BASE_URL", "WANDB_API_KEY", "WANDB_ERROR_REPORTING", "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL"):
        monkeypatch.setenv(name, "")  # so that what a Server sets is taken back
        monkeypatch.delenv(name)


def answers() -> bool:
    """Whether the server of the environment answers to the key of the environment."""
    basic = b64encode(f"api:{os.environ['WANDB_API_KEY']}".encode()).decode()
    request = urllib.request.Request(os.environ["WANDB_BASE_URL"], headers={"Authorization": f"Basic {basic}"})
    try:
        return urllib.request.urlopen(request, timeout=60).status == 200
    except OSError:
        return False


def pid(data) -> int:
    return int((data / "lock").read_text())


def test_its_own_server_is_revived_on_its_port_and_ends_with_it(tmp_path):
    with Server(tmp_path, None) as server:
        server.ready()
        before = os.environ["WANDB_BASE_URL"], os.environ["WANDB_API_KEY"]
        assert answers()
        os.kill(pid(tmp_path), signal.SIGKILL)
        server.process.wait(60)
        assert not server.serves()
        assert server.revive() == "it serves again"
        assert (os.environ["WANDB_BASE_URL"], os.environ["WANDB_API_KEY"]) == before and answers()
    assert not server.serves()


def test_the_address_of_a_page_opens_that_page_without_the_key(tmp_path):
    with Server(tmp_path, None) as server:
        server.ready()
        for page, status in (("/", 200), ("/local/project/sweeps/none", 404)):
            address = server.page(os.environ["WANDB_BASE_URL"] + page)
            assert os.environ["WANDB_API_KEY"] not in address
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            try:
                answer = opener.open(address, timeout=60)
            except urllib.error.HTTPError as error:  # there is no such sweep; without the signature it would be 401
                answer = error
            assert (answer.status, urlsplit(answer.url).path) == (status, page)


def test_the_server_outlives_its_experiment_until_the_last_agent(tmp_path):
    server = Server(tmp_path, None)
    with server:
        server.ready()
        agent = os.dup(server.line)
        os.close(server.line)  # as when experiment.py is killed
        time.sleep(0.5)
        assert answers()
        os.close(agent)
        server.process.wait(60)
        assert not server.serves()
        server.line = os.dup(server.read)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_server_that_runs_already_is_used_and_left_running(key, tmp_path):
    running = conftest.start(tmp_path, env={"WANDB_API_KEY": key} if key else {})
    try:
        with Server(tmp_path, key) as server:
            server.ready()
            assert server.process is None
            assert (os.environ["WANDB_BASE_URL"], os.environ["WANDB_API_KEY"]) == (running.url, running.key)
            assert server.page(running.url + "/") == running.page
        assert answers()
    finally:
        running.stop()


def test_a_server_with_an_unknown_key_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("local_server.START_SECONDS", 1)
    running = conftest.start(tmp_path, env={"WANDB_API_KEY": KEY})
    try:
        with Server(tmp_path, None) as server, pytest.raises(InputError, match="a key of its own"):
            server.ready()
    finally:
        running.stop()


def test_a_server_that_cannot_start_says_why(tmp_path):
    (tmp_path / "local_wandb.sqlite").mkdir()
    with Server(tmp_path, None) as server, pytest.raises(InputError, match=r"local_wandb did not start: .*open"):
        server.ready()
