"""The ledger's disk: append-only tables of entries and of the signed objects behind them.

SQLite through apsw, WAL, ``synchronous=FULL``. One ``Store`` owns a file (a lock file
keeps a second process out) and ``commit`` is called by one thread only. After any error
of a commit its outcome is unknown: the store refuses to go on and must be opened again.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Any

import apsw

from plait.envelope import digest
from plait.errors import LedgerError
from plait.ledger.fork import ReservationFork
from plait.ledger.service.head import HeadFile
from plait.ledger.service.records import (
    INTEGER_MAX,
    Change,
    StoredCert,
    StoredDelegation,
    StoredEntry,
    StoredFork,
    StoredRelease,
    fork_proofs_in,
)
from plait.types import AccountId, Digest, PeerId, SessionId
from plait.v1.identity_pb2 import SignedEnvelope

__all__ = [
    "Change",
    "Store",
    "StoredCert",
    "StoredDelegation",
    "StoredEntry",
    "StoredFork",
    "StoredRelease",
    "open_store",
]

SQLITE_VERSION_MIN = (3, 51, 3)
"""Older versions can lose committed data when the WAL is reset."""

SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE network (id TEXT NOT NULL) STRICT;
CREATE TABLE entries (position INTEGER PRIMARY KEY, payload BLOB NOT NULL,
                      leaf_hash BLOB NOT NULL) STRICT;
CREATE TABLE objects (digest BLOB PRIMARY KEY, envelope BLOB NOT NULL) STRICT;
CREATE TABLE releases (session_id BLOB NOT NULL, epoch INTEGER NOT NULL, payee TEXT NOT NULL,
                       request BLOB NOT NULL, PRIMARY KEY (session_id, epoch, payee)) STRICT;
CREATE TABLE forks (account TEXT NOT NULL, first BLOB NOT NULL, second BLOB NOT NULL,
                    PRIMARY KEY (first, second)) STRICT;
CREATE TABLE certs (peer TEXT PRIMARY KEY, serial TEXT NOT NULL, envelope BLOB NOT NULL) STRICT;
CREATE TABLE checkpoints (size INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT;
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
"""

_SCHEMA_2 = """
CREATE TABLE delegations (peer TEXT NOT NULL, ledger_key BLOB NOT NULL,
                          expires_ms INTEGER NOT NULL, digest BLOB NOT NULL,
                          PRIMARY KEY (peer, ledger_key, expires_ms)) STRICT;
"""
"""Added by version 2: journals of before lack the certificates that an audit asks for."""


class Store:
    """One ledger file: a ``LedgerStore``. Open it with ``open_store``."""

    def __init__(
        self, path: Path, writer: apsw.Connection, reader: apsw.Connection, lock: IO[str]
    ) -> None:
        self._head = HeadFile(path.with_name(path.name + ".head"))
        self._writer = writer
        self._reader = reader
        self._lock = lock
        self._failed = False

    def commit(self, changes: Sequence[Change]) -> None:
        """Make changes durable in one transaction.

        Raises ``LedgerError`` when the disk fails; from then on always.
        """
        if self._failed:
            raise LedgerError("the ledger's store has failed before and must be opened again")
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            self._add(changes)
            self._writer.execute("COMMIT")
            heads = [change.checkpoint for change in changes if change.checkpoint is not None]
            if heads:
                self._head.keep(heads[-1][1])
        except (apsw.Error, OSError) as error:
            self._failed = True
            raise _store_error(error) from error

    def entries(self, first: int = 0, limit: int = -1) -> Iterator[StoredEntry]:
        """Committed entries from index ``first`` on, in order; ``limit`` -1 is all."""
        rows = self._read(
            "SELECT position, payload, leaf_hash FROM entries WHERE position >= ?"
            " ORDER BY position LIMIT ?",
            (first, limit),
        )
        for position, payload, leaf_hash in rows:
            yield StoredEntry(position, payload, Digest(leaf_hash))

    def object(self, object_digest: bytes) -> SignedEnvelope | None:
        """A committed signed object by the digest of its payload."""
        rows = self._read("SELECT envelope FROM objects WHERE digest = ?", (object_digest,))
        row = next(rows, None)
        return SignedEnvelope.FromString(row[0]) if row else None

    def delegation(self, peer: str, ledger_key: bytes, at_ms: int) -> SignedEnvelope | None:
        """The certificate under which a peer's ledger key signed at a time."""
        rows = self._read(
            "SELECT envelope FROM delegations JOIN objects USING (digest)"
            " WHERE peer = ? AND ledger_key = ? AND expires_ms > ? ORDER BY expires_ms LIMIT 1",
            (peer, ledger_key, at_ms),
        )
        row = next(rows, None)
        return SignedEnvelope.FromString(row[0]) if row else None

    def release_requests(
        self, session_id: bytes, epoch: int
    ) -> list[tuple[SignedEnvelope, AccountId]]:
        """The signed requests by which payees released one hold, each with its payee."""
        rows = self._read(
            "SELECT envelope, payee FROM releases JOIN objects ON digest = request"
            " WHERE session_id = ? AND epoch = ?",
            (session_id, epoch),
        )
        return [(SignedEnvelope.FromString(row[0]), AccountId(row[1])) for row in rows]

    def releases(self) -> list[StoredRelease]:
        """All releases."""
        rows = self._read("SELECT session_id, epoch, payee, request FROM releases")
        return [
            StoredRelease(SessionId(session_id), epoch, AccountId(payee), Digest(request))
            for session_id, epoch, payee, request in rows
        ]

    def forks(self) -> list[StoredFork]:
        """All double signatures seen."""
        rows = self._read("SELECT account, first, second FROM forks")
        return [StoredFork(AccountId(row[0]), Digest(row[1]), Digest(row[2])) for row in rows]

    def fork_proofs(self) -> list[ReservationFork]:
        """Portable proofs of the double signatures seen."""
        return fork_proofs_in(self)

    def certs(self) -> list[StoredCert]:
        """The newest certificate of each peer."""
        rows = self._read("SELECT peer, serial, envelope FROM certs")
        return [StoredCert(PeerId(peer), int(serial), envelope) for peer, serial, envelope in rows]

    def checkpoint(self) -> tuple[int, str] | None:
        """The last signed checkpoint: its size and note.

        It is also kept in a file of its own: when the ledger's file alone is restored from
        an old backup, the head it has already signed is still known.
        """
        row = next(
            self._read("SELECT size, note FROM checkpoints ORDER BY size DESC LIMIT 1"), None
        )
        stored = [(int(row[0]), str(row[1]))] if row else []
        head = self._head.read()
        return max([*stored, *([head] if head else [])], default=None)

    def close(self) -> None:
        """Close the file; after a failure without touching it."""
        if self._failed:
            self._writer.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            self._reader.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        try:
            self._reader.close()
            self._writer.close()
        except apsw.Error as error:
            raise _store_error(error) from error
        finally:
            self._lock.close()

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._reader.execute(query, values)
        except apsw.Error as error:
            raise _store_error(error) from error

    def _add(self, changes: Sequence[Change]) -> None:
        """Each table's rows of all changes at once: statements cost more than rows."""
        entries = [(e.index, e.payload, e.leaf_hash) for one in changes for e in one.entries]
        self._insert("INSERT INTO entries VALUES (?, ?, ?)", entries)
        self._insert(
            "INSERT OR IGNORE INTO objects VALUES (?, ?)",
            [(digest(o.payload), o.SerializeToString()) for one in changes for o in one.objects],
        )
        self._insert(
            "INSERT OR IGNORE INTO releases VALUES (?, ?, ?, ?)",
            [(r.session_id, r.epoch, r.payee, r.request) for one in changes for r in one.releases],
        )
        self._insert(
            "INSERT OR IGNORE INTO forks VALUES (?, ?, ?)",
            [(fork.account, fork.first, fork.second) for one in changes for fork in one.forks],
        )
        self._insert(
            "INSERT OR REPLACE INTO certs VALUES (?, ?, ?)",
            [(cert.peer, str(cert.serial), cert.envelope) for one in changes for cert in one.certs],
        )
        self._insert(
            "INSERT OR IGNORE INTO delegations VALUES (?, ?, ?, ?)",
            [
                (item.peer, item.ledger_key, min(item.expires_ms, INTEGER_MAX), item.cert)
                for one in changes
                for item in one.delegations
            ],
        )
        self._insert(
            "INSERT OR IGNORE INTO checkpoints VALUES (?, ?)",
            [one.checkpoint for one in changes if one.checkpoint is not None],
        )

    def _insert(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self._writer.executemany(statement, rows)


def open_store(
    path: Path,
    network_id: str,
    *,
    vfs: str | None = None,
    sqlite_version: str | None = None,
) -> Store:
    """Open or create a network's ledger file.

    ``vfs`` names another SQLite file system, for fault injection. Raises ``LedgerError``
    if SQLite is too old, the file is in use, damaged, unwritable or another network's.
    """
    version = sqlite_version or apsw.sqlite_lib_version()
    if tuple(int(part) for part in version.split(".")) < SQLITE_VERSION_MIN:
        raise LedgerError(
            f"SQLite {version} can lose committed entries",
            remedy="install a newer apsw: pip install -U apsw",
        )
    with ExitStack() as opened:
        lock = opened.enter_context(_lock(path))
        try:
            writer = opened.enter_context(closing(apsw.Connection(str(path), vfs=vfs)))
            _prepare(writer, network_id)
            flags = apsw.SQLITE_OPEN_READONLY
            reader = apsw.Connection(str(path), flags=flags, vfs=vfs)
        except apsw.Error as error:
            raise _store_error(error) from error
        opened.pop_all()
        return Store(path, writer, reader, lock)


def _lock(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = path.with_name(path.name + ".lock").open("w")
    except OSError as error:
        raise LedgerError(f"cannot open the ledger {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise LedgerError(f"the ledger {path} is in use by another process") from error
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _prepare(writer: apsw.Connection, network_id: str) -> None:
    mode = writer.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != ("wal",):
        raise LedgerError(f"the ledger's file system cannot do WAL: {mode}")
    writer.execute("PRAGMA synchronous=FULL")
    version = writer.execute("PRAGMA user_version").fetchone()
    if version == (0,):
        with writer:
            writer.execute(_SCHEMA + _SCHEMA_2)
            writer.execute("INSERT INTO network VALUES (?)", (network_id,))
            writer.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    elif version == (1,):
        with writer:
            writer.execute(_SCHEMA_2)
            writer.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    elif version != (SCHEMA_VERSION,):
        raise LedgerError(f"the ledger's file has the unknown version {version}")
    stored = writer.execute("SELECT id FROM network").fetchone()
    if stored != (network_id,):
        raise LedgerError(f"the ledger's file is another network's: {stored}")


def _store_error(error: apsw.Error | OSError) -> LedgerError:
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or isinstance(error, apsw.FullError):
        return LedgerError(
            "the ledger's disk is full", remedy="free some space and start the ledger again"
        )
    return LedgerError(
        f"the ledger's disk failed: {error}", remedy="check the disk and start the ledger again"
    )
