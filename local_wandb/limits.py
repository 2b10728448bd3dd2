"""What a stranger may cost: connections that wait, and lines of the log."""

import asyncio
import logging
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 400  # at once; a process may open 1,024 files, and each request that is answered opens some
HEAD = 10.0  # s from a connection, or from the first byte of a further request, until its head has come whole
LINES, PERIOD = 100, 10.0  # log lines in so many s; beyond, they are counted


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
