"""The ledger in a PostgreSQL database of its own: the second ``LedgerStore``.

One connection writes and holds an advisory lock, another reads. A lost connection is a
failed disk: nothing is retried, the ledger stops and is started again. The last signed
checkpoint is kept in a local file too, so that a restored database is found out.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any, LiteralString

import psycopg

from plait.envelope import digest
from plait.errors import ConfigError, LedgerError
from plait.ledger.fork import ReservationFork
from plait.ledger.service.head import HeadFile
from plait.ledger.service.records import (
    INTEGER_MAX,
    Change,
    StoredCert,
    StoredEntry,
    StoredFork,
    StoredRelease,
    fork_proofs_in,
)
from plait.types import AccountId, Digest, PeerId, SessionId
from plait.v1.identity_pb2 import SignedEnvelope

SCHEMA_VERSION = 1
PAGE = 1_000
CONNECT_TIMEOUT_S = 10
_LOCK = 0x706C616974  # "plait"

_SCHEMA: LiteralString = """
CREATE TABLE plait_ledger (network TEXT NOT NULL, version INTEGER NOT NULL);
CREATE TABLE entries (position BIGINT PRIMARY KEY, payload BYTEA NOT NULL,
                      leaf_hash BYTEA NOT NULL);
CREATE TABLE objects (digest BYTEA PRIMARY KEY, envelope BYTEA NOT NULL);
CREATE TABLE releases (session_id BYTEA NOT NULL, epoch BIGINT NOT NULL, payee TEXT NOT NULL,
                       request BYTEA NOT NULL, PRIMARY KEY (session_id, epoch, payee));
CREATE TABLE forks (account TEXT NOT NULL, first BYTEA NOT NULL, second BYTEA NOT NULL,
                    PRIMARY KEY (first, second));
CREATE TABLE certs (peer TEXT PRIMARY KEY, serial TEXT NOT NULL, envelope BYTEA NOT NULL);
CREATE TABLE delegations (peer TEXT NOT NULL, ledger_key BYTEA NOT NULL,
                          expires_ms BIGINT NOT NULL, digest BYTEA NOT NULL,
                          PRIMARY KEY (peer, ledger_key, expires_ms));
CREATE TABLE checkpoints (size BIGINT PRIMARY KEY, note TEXT NOT NULL);
CREATE FUNCTION entries_stay() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'entries are append-only'; END $$;
CREATE TRIGGER entries_stay BEFORE UPDATE OR DELETE ON entries
    FOR EACH ROW EXECUTE FUNCTION entries_stay();
"""


class PostgresStore:
    """One ledger database: a ``LedgerStore``. Open it with ``open_postgres``."""

    def __init__(
        self,
        writer: "psycopg.Connection[Any]",
        reader: "psycopg.Connection[Any]",
        head: HeadFile,
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._head = head
        self._failed = False

    def commit(self, changes: Sequence[Change]) -> None:
        """Make changes durable in one transaction.

        Raises ``LedgerError`` when the database fails; from then on always.
        """
        if self._failed:
            raise LedgerError("the ledger's store has failed before and must be opened again")
        try:
            with self._writer.transaction(), self._writer.pipeline():
                for change in changes:
                    self._add(change)
            heads = [change.checkpoint for change in changes if change.checkpoint is not None]
            if heads:
                self._head.keep(heads[-1][1])
        except (psycopg.Error, OSError) as error:
            self._failed = True
            raise _store_error(error) from error

    def entries(self, first: int = 0, limit: int = -1) -> Iterator[StoredEntry]:
        """Committed entries from index ``first`` on, in order; ``limit`` -1 is all."""
        left = limit if limit >= 0 else INTEGER_MAX
        while left > 0:
            rows = self._read(
                "SELECT position, payload, leaf_hash FROM entries WHERE position >= %s"
                " ORDER BY position LIMIT %s",
                (first, min(left, PAGE)),
            )
            for position, payload, leaf_hash in rows:
                yield StoredEntry(position, payload, Digest(leaf_hash))
            if len(rows) < PAGE:
                return
            first, left = rows[-1][0] + 1, left - len(rows)

    def object(self, object_digest: bytes) -> SignedEnvelope | None:
        """A committed signed object by the digest of its payload."""
        rows = self._read("SELECT envelope FROM objects WHERE digest = %s", (object_digest,))
        return SignedEnvelope.FromString(rows[0][0]) if rows else None

    def delegation(self, peer: str, ledger_key: bytes, at_ms: int) -> SignedEnvelope | None:
        """The certificate under which a peer's ledger key signed at a time."""
        rows = self._read(
            "SELECT envelope FROM delegations JOIN objects USING (digest)"
            " WHERE peer = %s AND ledger_key = %s AND expires_ms > %s ORDER BY expires_ms LIMIT 1",
            (peer, ledger_key, at_ms),
        )
        return SignedEnvelope.FromString(rows[0][0]) if rows else None

    def release_requests(
        self, session_id: bytes, epoch: int
    ) -> list[tuple[SignedEnvelope, AccountId]]:
        """The signed requests by which payees released one hold, each with its payee."""
        rows = self._read(
            "SELECT envelope, payee FROM releases JOIN objects ON digest = request"
            " WHERE session_id = %s AND epoch = %s",
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
        """The last signed checkpoint: its size and note."""
        rows = self._read("SELECT size, note FROM checkpoints ORDER BY size DESC LIMIT 1")
        head = self._head.read()
        return max([*((row[0], row[1]) for row in rows), *([head] if head else [])], default=None)

    def close(self) -> None:
        """Close the connections, and with them give up the lock."""
        self._reader.close()
        self._writer.close()

    def _read(self, query: LiteralString, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            rows: list[tuple[Any, ...]] = self._reader.execute(query, values).fetchall()
        except psycopg.Error as error:
            raise _store_error(error) from error
        return rows

    def _add(self, change: Change) -> None:
        write = self._writer.cursor().executemany
        if change.entries:
            write(
                "INSERT INTO entries VALUES (%s, %s, %s)",
                [(entry.index, entry.payload, entry.leaf_hash) for entry in change.entries],
            )
        if change.objects:
            write(
                "INSERT INTO objects VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [(digest(item.payload), item.SerializeToString()) for item in change.objects],
            )
        if change.releases:
            write(
                "INSERT INTO releases VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                [(one.session_id, one.epoch, one.payee, one.request) for one in change.releases],
            )
        if change.forks:
            write(
                "INSERT INTO forks VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
                [(fork.account, fork.first, fork.second) for fork in change.forks],
            )
        self._add_certs(change)
        if change.checkpoint is not None:
            write(
                "INSERT INTO checkpoints VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [change.checkpoint],
            )

    def _add_certs(self, change: Change) -> None:
        write = self._writer.cursor().executemany
        if change.certs:
            write(
                "INSERT INTO certs VALUES (%s, %s, %s) ON CONFLICT (peer)"
                " DO UPDATE SET serial = EXCLUDED.serial, envelope = EXCLUDED.envelope",
                [(cert.peer, str(cert.serial), cert.envelope) for cert in change.certs],
            )
        if change.delegations:
            write(
                "INSERT INTO delegations VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                [
                    (one.peer, one.ledger_key, min(one.expires_ms, INTEGER_MAX), one.cert)
                    for one in change.delegations
                ],
            )


def open_postgres(database: str, network_id: str, head: HeadFile) -> PostgresStore:
    """Open or create a network's ledger in a database of its own.

    ``database`` is a libpq connection string or URI. Raises ``LedgerError`` if it does not
    answer, does not sync its disk, is in use, or is another network's.
    """
    with ExitStack() as opened:
        try:
            writer = opened.enter_context(closing(_connect(database)))
            _prepare(writer, network_id)
            reader = _connect(database)
        except psycopg.ProgrammingError as error:
            raise ConfigError(f"the ledger's database cannot be used: {error}") from error
        except psycopg.Error as error:
            raise _store_error(error) from error
        opened.pop_all()
        return PostgresStore(writer, reader, head)


def _connect(database: str) -> "psycopg.Connection[Any]":
    return psycopg.connect(
        database,
        autocommit=True,
        connect_timeout=CONNECT_TIMEOUT_S,
        application_name="plait-ledger",
    )


def _prepare(writer: "psycopg.Connection[Any]", network_id: str) -> None:
    if _value(writer, "SELECT pg_try_advisory_lock(%s)", (_LOCK,)) is not True:
        raise LedgerError("the ledger's database is in use by another process")
    if "off" in (_value(writer, "SHOW fsync"), _value(writer, "SHOW full_page_writes")):
        raise LedgerError(
            "the ledger's database does not sync its disk",
            remedy="set fsync and full_page_writes to on in postgresql.conf",
        )
    writer.execute("SET synchronous_commit = on")
    with writer.transaction():
        if _value(writer, "SELECT to_regclass('plait_ledger')") is None:
            writer.execute(_SCHEMA)
            writer.execute("INSERT INTO plait_ledger VALUES (%s, %s)", (network_id, SCHEMA_VERSION))
    stored = writer.execute("SELECT network, version FROM plait_ledger").fetchone()
    if stored is None or stored[1] != SCHEMA_VERSION:
        raise LedgerError(f"the ledger's database has an unknown version: {stored}")
    if stored[0] != network_id:
        raise LedgerError(f"the ledger's database is another network's: {stored[0]}")


def _value(
    connection: "psycopg.Connection[Any]", query: LiteralString, values: tuple[Any, ...] = ()
) -> Any:
    row = connection.execute(query, values).fetchone()
    return row and row[0]


def _store_error(error: psycopg.Error | OSError) -> LedgerError:
    if isinstance(error, psycopg.errors.DiskFull):
        return LedgerError(
            "the disk of the ledger's database is full",
            remedy="free some space and start the ledger again",
        )
    return LedgerError(
        f"the ledger's database failed: {error}",
        remedy="check the database server and start the ledger again",
    )
