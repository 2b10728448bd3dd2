"""What one may cost: a stranger, connections that wait and lines of the log; a client, the answer to one query."""

import asyncio
import logging
import time

from graphql import get_named_type, is_leaf_type
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 400  # at once; a process may open 1,024 files, and each request that is answered opens some
HEAD = 10.0  # s from a connection, or from the first byte of a further request, until its head has come whole
LINES, PERIOD = 100, 10.0  # log lines in so many s; beyond, they are counted
FIELDS, CHARACTERS, SECONDS = 500_000, 2**28, 60.0  # of one answer; a page of 1,000 runs is about 40,000 fields


class TooMuch(BaseException):
    """An answer that is too long. No Exception, which GraphQL would note for one field and go on with the next."""


class Budget:
    """Counts what one answer holds, as GraphQL middleware: its fields, their text, and its time. Raises TooMuch."""

    def __init__(self):
        self._fields, self._characters, self._until = FIELDS, CHARACTERS, time.monotonic() + SECONDS

    def resolve(self, resolver, source, info, /, **arguments):
        """The field's value, as long as there is room for it."""
        value = resolver(source, info, **arguments)
        self._fields -= 1
        if isinstance(value, str):
            self._characters -= len(value)
        elif isinstance(value, list | dict) and is_leaf_type(get_named_type(info.return_type)):
            self._characters -= _length(value)
        if self._fields < 0 or self._characters < 0 or time.monotonic() > self._until:
            raise TooMuch(f"the answer takes more than {self._passed()}: ask for less of it at a time, in pages")
        return value

    def _passed(self) -> str:
        if self._fields < 0:
            return f"{FIELDS:,} fields"
        return f"{CHARACTERS:,} characters" if self._characters < 0 else f"{SECONDS:.0f} s"


def _length(value) -> int:
    """About how many characters of the answer a value becomes."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return _length(list(value)) + _length(list(value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 8


class Protocol(H11Protocol):
    """HTTP as uvicorn speaks it; a connection without a whole request goes after HEAD, or when room is needed."""

    connections: set["Protocol"]  # type: ignore[assignment]  # of this protocol alone
    _head: asyncio.TimerHandle | None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.born = time.monotonic()
        self._head = None
        self._wait_for_head()
        if len(self.connections) > CONNECTIONS:
            waiting = [one for one in self.connections if one.idle and one is not self]
            min(waiting, key=lambda one: one.born, default=self).transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._stop_waiting()
        elif self.conn.trailing_data[0]:  # part of a head
            self._wait_for_head()

    def connection_lost(self, error) -> None:
        self._stop_waiting()
        super().connection_lost(error)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class Handler(logging.StreamHandler):
    """Writes to stderr: no more than LINES in PERIOD, and of a message only what cannot steer a terminal."""

    def __init__(self):
        super().__init__()
        self.setFormatter(logging.Formatter("local_wandb: %(message)s"))
        self._began, self._written = time.monotonic(), 0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - self._began > PERIOD:
            if self._written > LINES:
                left_out = f"{self._written - LINES:,} more lines in {PERIOD:.0f} s"
                super().emit(logging.LogRecord(record.name, logging.WARNING, "", 0, left_out, (), None))
            self._began, self._written = now, 0
        self._written += 1
        if self._written <= LINES:
            record.msg, record.args = plain(record.getMessage()), ()
            super().emit(record)


def plain(text: str) -> str:
    """The text with every character that is not to be seen as its escape: newlines, colours, cursor movements."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
