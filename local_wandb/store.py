"""Everything the server remembers: one SQLite database and a folder of blobs. The only module that speaks SQL."""

import fcntl
import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

# Columns carry the names of the GraphQL fields, so a row answers a query without mapping.
# Ids are never used twice (AUTOINCREMENT): they stand in signed URLs.
SCHEMA = """
CREATE TABLE projects (
  id INTEGER PRIMARY KEY AUTOINCREMENT, entityName TEXT NOT NULL, name TEXT NOT NULL, description TEXT,
  createdAt REAL NOT NULL, UNIQUE (entityName, name));
CREATE TABLE sweeps (
  id INTEGER PRIMARY KEY AUTOINCREMENT, project INTEGER NOT NULL REFERENCES projects ON DELETE CASCADE,
  name TEXT NOT NULL, displayName TEXT, description TEXT, config TEXT NOT NULL, state TEXT NOT NULL,
  controller TEXT, scheduler TEXT, createdAt REAL NOT NULL, updatedAt REAL NOT NULL, heartbeatAt REAL,
  UNIQUE (project, name));
CREATE TABLE agents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, sweep INTEGER NOT NULL REFERENCES sweeps ON DELETE CASCADE,
  name TEXT NOT NULL, host TEXT NOT NULL, createdAt REAL NOT NULL, heartbeatAt REAL NOT NULL);
CREATE TABLE runs (
  id INTEGER PRIMARY KEY AUTOINCREMENT, project INTEGER NOT NULL REFERENCES projects ON DELETE CASCADE,
  name TEXT NOT NULL, displayName TEXT, description TEXT, notes TEXT, "group" TEXT, jobType TEXT, tags TEXT,
  host TEXT, program TEXT, repo TEXT, "commit" TEXT, config TEXT, summaryMetrics TEXT, systemMetrics TEXT,
  state TEXT NOT NULL, exitcode INTEGER, shouldStop INTEGER NOT NULL DEFAULT 0,
  sweep INTEGER REFERENCES sweeps ON DELETE SET NULL, sweepName TEXT,
  agent INTEGER REFERENCES agents ON DELETE SET NULL, args TEXT, seen INTEGER NOT NULL DEFAULT 0,
  historyKeys TEXT, historyLineCount INTEGER NOT NULL DEFAULT 0,
  createdAt REAL NOT NULL, heartbeatAt REAL NOT NULL, UNIQUE (project, name));
CREATE INDEX runs_of_a_sweep ON runs (sweep);
CREATE TABLE history (
  run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE, step INTEGER NOT NULL, line TEXT NOT NULL,
  PRIMARY KEY (run, step)) WITHOUT ROWID;
CREATE TABLE lines (
  run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE, stream TEXT NOT NULL, number INTEGER NOT NULL,
  line TEXT NOT NULL, PRIMARY KEY (run, stream, number)) WITHOUT ROWID;
CREATE TABLE collections (
  id INTEGER PRIMARY KEY AUTOINCREMENT, project INTEGER NOT NULL REFERENCES projects ON DELETE CASCADE,
  name TEXT NOT NULL, type TEXT NOT NULL, description TEXT, createdAt REAL NOT NULL, updatedAt REAL NOT NULL,
  UNIQUE (project, name));
CREATE TABLE artifacts (
  id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
  run INTEGER REFERENCES runs ON DELETE SET NULL, state TEXT NOT NULL, versionIndex INTEGER, digest TEXT NOT NULL,
  description TEXT, metadata TEXT, clientID TEXT, wanted TEXT NOT NULL, historyStep INTEGER,
  createdAt REAL NOT NULL, updatedAt REAL NOT NULL);
CREATE TABLE aliases (
  id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
  artifact INTEGER NOT NULL REFERENCES artifacts ON DELETE CASCADE, alias TEXT NOT NULL, UNIQUE (collection, alias));
CREATE TABLE uses (
  id INTEGER PRIMARY KEY AUTOINCREMENT, artifact INTEGER NOT NULL REFERENCES artifacts ON DELETE CASCADE,
  run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE, UNIQUE (artifact, run));
CREATE TABLE files (
  id INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER REFERENCES runs ON DELETE CASCADE,
  artifact INTEGER REFERENCES artifacts ON DELETE CASCADE, name TEXT NOT NULL, blob TEXT,
  sizeBytes INTEGER NOT NULL DEFAULT 0, md5 TEXT, updatedAt REAL NOT NULL, UNIQUE (run, name), UNIQUE (artifact, name));
CREATE TABLE alerts (
  id INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE,
  title TEXT NOT NULL, text TEXT NOT NULL, severity TEXT NOT NULL, createdAt REAL NOT NULL);
"""
# What each version changed; a directory of an older version is brought up to date when it is opened.
CHANGES = [
    SCHEMA,
    """
ALTER TABLE runs ADD COLUMN updatedAt REAL;
UPDATE runs SET updatedAt = heartbeatAt;
ALTER TABLE sweeps ADD COLUMN controllerRunName TEXT;
ALTER TABLE collections ADD COLUMN kind TEXT NOT NULL DEFAULT 'ArtifactSequence';
ALTER TABLE collections ADD COLUMN tags TEXT;
ALTER TABLE artifacts ADD COLUMN tags TEXT;
ALTER TABLE artifacts ADD COLUMN ttlDurationSeconds INTEGER;
ALTER TABLE artifacts ADD COLUMN distributedID TEXT;
ALTER TABLE artifacts ADD COLUMN base INTEGER;
CREATE TABLE links (
  id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
  artifact INTEGER NOT NULL REFERENCES artifacts ON DELETE CASCADE, versionIndex INTEGER NOT NULL,
  createdAt REAL NOT NULL, UNIQUE (collection, artifact));
CREATE TABLE outputs (
  id INTEGER PRIMARY KEY AUTOINCREMENT, artifact INTEGER NOT NULL REFERENCES artifacts ON DELETE CASCADE,
  run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE, UNIQUE (artifact, run));
INSERT INTO outputs (artifact, run) SELECT id, run FROM artifacts WHERE run IS NOT NULL;
""",
]
VERSION = len(CHANGES)
Unavailable = sqlite3.OperationalError  # the database is locked or the disk full: worth repeating
OWNED_FILES = {  # table -> the files that go with a row of it
    "files": "id = ?",
    "runs": "run = ?",
    "collections": "artifact IN (SELECT id FROM artifacts WHERE collection = ?)",
}


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The directory for this process alone. Raises ValueError where another has it."""
    with open(directory / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(f"{directory} is already served by process {lock.read()}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


class Store:
    """The data directory. Reads run in parallel, writes one after the other; every write is a transaction.

    A commit is a write() to the WAL, so it outlives a killed process (synchronous=NORMAL); after a power cut the last
    moments may be missing, the database is whole.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.blobs = directory / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        self._writing = threading.RLock()
        self._local = threading.local()
        try:
            self._refuse_damage()
            self._open()
        except sqlite3.Error as error:
            raise ValueError(f"{self.path}: {error}") from error

    @property
    def path(self) -> Path:
        """The database file."""
        return self.directory / "local_wandb.sqlite"

    def _refuse_damage(self) -> None:
        """Raises ValueError, and leaves the file as it is, where that is no whole database of this program's."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size == 0 and any(self.blobs.iterdir()):
            raise ValueError(f"{self.path} is missing or empty, but there are files in {self.blobs}: restore it")
        if size:
            with open(self.path, "rb") as file:
                head = file.read(32)
            if not head.startswith(b"SQLite format 3\0"):
                raise ValueError(f"{self.path} is not a database of local_wandb")
            log = self.path.with_name(f"{self.path.name}-wal")
            page = int.from_bytes(head[16:18], "big")
            whole = (65536 if page == 1 else page) * int.from_bytes(head[28:32], "big")
            # With a log the file may be shorter than it says, where a checkpoint was cut off: the log has the rest.
            if size < whole and not (log.is_file() and log.stat().st_size):
                raise ValueError(f"{self.path} is truncated: {size:,} of {whole:,} bytes")
            with closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)) as db:
                tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                (version,) = db.execute("PRAGMA user_version").fetchone()
            if tables and "runs" not in tables:
                raise ValueError(f"{self.path} is not a database of local_wandb")
            if version > VERSION:
                raise ValueError(f"{self.path} was written by a newer version ({version}; this one writes {VERSION})")

    def _open(self) -> None:
        self.checkpoint()
        with self.write() as db:
            version = db.execute("PRAGMA user_version").fetchone()["user_version"]
            for statement in "".join(CHANGES[version:]).split(";\n"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")

    @property
    def _db(self) -> sqlite3.Connection:
        if not hasattr(self._local, "db"):
            db = sqlite3.connect(self.path, isolation_level=None, timeout=60)
            db.row_factory = lambda cursor, row: dict(zip([c[0] for c in cursor.description], row, strict=True))
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
                db.execute(f"PRAGMA {pragma}")
            self._local.db = db
        return self._local.db

    def checkpoint(self) -> None:
        """Moves what the write-ahead log holds into the database file."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction; nested calls join the outer one. An exception undoes all of it."""
        db = self._db
        with self._writing:
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    # Rows by column values. Table and column names come from this package's code, never from a request.

    def find(self, table: str, order: str = "id", **where) -> list[dict]:
        """The rows whose columns have these values, oldest first."""
        condition = " AND ".join(f'"{column}" IS ?' for column in where) or "1"
        return self._db.execute(
            f'SELECT * FROM {table} WHERE {condition} ORDER BY "{order}"', list(where.values())
        ).fetchall()

    def find_where(self, table: str, condition: str, *values) -> list[dict]:
        """The rows that meet an SQL condition of this package's code."""
        return self._db.execute(f"SELECT * FROM {table} WHERE {condition}", values).fetchall()

    def get(self, table: str, **where) -> dict | None:
        """The one row, or None."""
        rows = self.find(table, **where)
        return rows[0] if rows else None

    def row(self, table: str, id: int) -> dict:
        """The row that another one refers to. Raises IndexError where it is gone."""
        return self.find(table, id=id)[0]

    def count(self, table: str, **where) -> int:
        """How many rows."""
        condition = " AND ".join(f'"{column}" IS ?' for column in where) or "1"
        return self._db.execute(
            f"SELECT count(*) AS n FROM {table} WHERE {condition}", list(where.values())
        ).fetchone()["n"]

    def insert(self, table: str, **values) -> dict:
        """The new row."""
        columns = ", ".join(f'"{column}"' for column in values)
        with self.write() as db:
            return db.execute(
                f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(values))}) RETURNING *",
                list(values.values()),
            ).fetchall()[0]

    def update(self, table: str, id: int, **values) -> dict:
        """The row after the change."""
        changes = ", ".join(f'"{column}" = ?' for column in values)
        with self.write() as db:
            return db.execute(
                f"UPDATE {table} SET {changes} WHERE id = ? RETURNING *", [*values.values(), id]
            ).fetchall()[0]

    def delete(self, table: str, id: int) -> None:
        """Removes the row and what belongs to it; its blobs too."""
        with self.write() as db:
            blobs = []
            if table in OWNED_FILES:
                blobs = [r["blob"] for r in db.execute(f"SELECT blob FROM files WHERE {OWNED_FILES[table]}", [id])]
            db.execute(f"DELETE FROM {table} WHERE id = ?", [id])
        self._drop(blobs)

    # The three streams of a run. A retried chunk writes the same rows again, so it changes nothing.

    def append_history(self, run: dict, offset: int, lines: list[str], merge: bool = False) -> None:
        """History rows, one per _step; keeps the run's key table and row count.

        A row takes the place of the one that its step has; with `merge` (several writers) only its keys do.
        """
        rows, latest = [], {}
        for number, line in enumerate(lines, offset):
            row = json.loads(line)
            rows.append((run["id"], int(row.get("_step", number)), line))
            latest.update(row)
        if not rows:
            return
        low, high = min(r[1] for r in rows), max(r[1] for r in rows)
        between = "SELECT count(*) AS n FROM history WHERE run = ? AND step BETWEEN ? AND ?"
        with self.write() as db:
            before = db.execute(between, [run["id"], low, high]).fetchone()["n"]
            if merge and before:
                known = {row.get("_step"): row for row in map(json.loads, self.history(run["id"], low, high + 1))}
                rows = [(id, step, json.dumps(known.get(step, {}) | json.loads(line))) for id, step, line in rows]
            db.executemany("INSERT OR REPLACE INTO history VALUES (?, ?, ?)", rows)
            new = db.execute(between, [run["id"], low, high]).fetchone()["n"] - before
            known = db.execute("SELECT historyKeys FROM runs WHERE id = ?", [run["id"]]).fetchone()["historyKeys"]
            keys: dict = json.loads(known) if known else {"keys": {}, "sets": [], "lastStep": -1}
            for key, value in _flat(latest):
                kind = {str: "string", bool: "boolean", type(None): "nil"}.get(type(value), "number")
                keys["keys"][key] = {"typeCounts": [{"type": kind, "count": 1}], "previousValue": value}
            keys["lastStep"] = max(keys["lastStep"], high)
            db.execute(
                "UPDATE runs SET historyKeys = ?, historyLineCount = historyLineCount + ? WHERE id = ?",
                [json.dumps(keys), new, run["id"]],
            )

    def rewind(self, run: dict, step: int) -> dict:
        """The run without its history rows after this step."""
        with self.write() as db:
            lines = self.history(run["id"], high=step + 1)
            db.execute("DELETE FROM history WHERE run = ?", [run["id"]])
            self.update("runs", run["id"], historyKeys=None, historyLineCount=0)
            self.append_history(run, 0, lines)
        return self.row("runs", run["id"])

    def restart(self, run: dict) -> dict:
        """The run without anything that it has logged; its files stay until they are written again."""
        with self.write() as db:
            for table in ("history", "lines"):
                db.execute(f"DELETE FROM {table} WHERE run = ?", [run["id"]])
            nothing = dict.fromkeys(("historyKeys", "summaryMetrics", "systemMetrics", "exitcode", "tags", "notes"))
            return self.update(
                "runs", run["id"], **nothing, historyLineCount=0, shouldStop=0, state="running", createdAt=time.time()
            )

    def append_lines(self, run: dict, stream: str, offset: int, lines: list[str]) -> None:
        """Lines of another stream (system metrics, console), each at its number."""
        with self.write() as db:
            db.executemany(
                "INSERT OR REPLACE INTO lines VALUES (?, ?, ?, ?)",
                [(run["id"], stream, number, line) for number, line in enumerate(lines, offset)],
            )

    def history(self, run: int, low: int = 0, high: int = 2**62) -> list[str]:
        """The JSON lines with low <= _step < high, in order of step."""
        cursor = self._db.execute(
            "SELECT line FROM history WHERE run = ? AND step >= ? AND step < ? ORDER BY step", [run, low, high]
        )
        return [row["line"] for row in cursor]

    def lines(self, run: int, stream: str, low: int = 0, high: int = 2**62) -> list[tuple[int, str]]:
        """(number, line) of a stream, low <= number < high."""
        cursor = self._db.execute(
            "SELECT number, line FROM lines WHERE run = ? AND stream = ? AND number BETWEEN ? AND ? ORDER BY number",
            [run, stream, low, high - 1],
        )
        return [(row["number"], row["line"]) for row in cursor]

    def line_count(self, run: int, stream: str) -> int:
        """One more than the last line's number."""
        row = self._db.execute(
            "SELECT max(number) AS n FROM lines WHERE run = ? AND stream = ?", [run, stream]
        ).fetchone()
        return 0 if row["n"] is None else row["n"] + 1

    # Files. A blob's name on disk is random: a file's own name is only ever a value in the database.

    def new_blob(self) -> Path:
        """A path nothing else has, to be written and then passed to keep()."""
        return self.blobs / secrets.token_hex(16)

    def tidy(self) -> None:
        """Removes blobs of uploads that a killed server left unfinished. Only for who has the directory alone."""
        kept = {row["blob"] for row in self.find("files")}
        self._drop(path.name for path in self.blobs.iterdir() if path.name not in kept)

    def read(self, file: dict) -> bytes:
        """The content of a file that has been uploaded."""
        return (self.blobs / file["blob"]).read_bytes()

    def write_file(self, file: int, content: bytes) -> None:
        """Makes these bytes the content of the file."""
        blob = self.new_blob()
        blob.write_bytes(content)
        self.keep(file, blob, b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode())

    def keep(self, file: int, blob: Path, md5: str) -> None:
        """Makes the blob the content of the file; what it had before goes."""
        with self.write() as db:
            old = db.execute("SELECT blob FROM files WHERE id = ?", [file]).fetchall()
            self.update("files", file, blob=blob.name, sizeBytes=blob.stat().st_size, md5=md5, updatedAt=time.time())
        self._drop(row["blob"] for row in old)

    def _drop(self, blobs: Iterable[str | None]) -> None:
        for blob in blobs:
            if blob:
                (self.blobs / blob).unlink(missing_ok=True)


def _flat(row: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in row.items():
        if isinstance(value, dict) and "_type" not in value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
