"""The ledger's disk: what is acknowledged survives, and a failed disk stops everything."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from plait.envelope import digest, seal
from plait.errors import LedgerError
from plait.identity import SigningKey
from plait.ledger.checkpoint import open_checkpoint
from plait.ledger.journal import Accepted, Fork, Issue, Refusal, Reserve, Settle
from plait.ledger.merkle import verify_consistency
from plait.ledger.service.recorder import LogIdentity, Recorder
from plait.ledger.service.store import Change, Store, StoredEntry, open_store
from plait.types import AccountId, Digest, SessionId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    PayeeAmount,
    SessionVoucher,
    SettlementRequest,
)

NETWORK = "net-1"
NOW = 1_700_000_000_000
ISSUER, CLIENT, PAYEE, LOG = (SigningKey.from_seed(bytes([seed]) * 32) for seed in range(1, 5))
LOG_IDENTITY = LogIdentity("ledger.example/net-1", LOG)


@contextmanager
def recording(
    path: Path, vfs: str | None = None, identity: LogIdentity = LOG_IDENTITY
) -> Iterator[Recorder]:
    store = open_store(path, NETWORK, vfs=vfs)
    try:
        recorder = Recorder(store, NETWORK, identity, lambda: NOW)
    except BaseException:
        store.close()
        raise
    try:
        yield recorder
    finally:
        recorder.close()


def issue(number: int, amount: int = 1_000) -> tuple[Issue, list[SignedEnvelope]]:
    order = IssueOrder(
        network_id=NETWORK,
        account=CLIENT.peer_id,
        amount=amount,
        order_id=b"%d" % number,
        issued_ms=NOW,
    )
    envelope = seal(ISSUER, order)
    return Issue(order, digest(envelope.payload)), [envelope]


def reserve(number: int, session: bytes | None = None) -> tuple[Reserve, list[SignedEnvelope]]:
    reservation = BudgetReservation(
        network_id=NETWORK,
        account=CLIENT.peer_id,
        sequence=number,
        session_id=session or number.to_bytes(16, "big"),
        amount=10,
        caps=[PayeeAmount(payee=PAYEE.peer_id, microcredits=8)],
        issued_ms=NOW,
        expires_ms=NOW + 60_000,
    )
    envelope = seal(CLIENT, reservation)
    return Reserve(reservation, digest(envelope.payload)), [envelope]


def settle(number: int, amount: int, release: bool) -> tuple[Settle, list[SignedEnvelope]]:
    session_id = number.to_bytes(16, "big")
    voucher = SessionVoucher(
        network_id=NETWORK,
        session_id=session_id,
        account=CLIENT.peer_id,
        amounts=[PayeeAmount(payee=PAYEE.peer_id, microcredits=amount)],
    )
    signed = seal(CLIENT, voucher)
    request = SettlementRequest(
        network_id=NETWORK,
        session_id=session_id,
        payee=PAYEE.peer_id,
        voucher_digest=digest(signed.payload),
        release=release,
        issued_ms=NOW,
    )
    asked = seal(PAYEE, request)
    command = Settle(voucher, digest(signed.payload), request, digest(asked.payload))
    return command, [asked, signed]


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with recording(path) as recorder:
        for command in (issue(1), reserve(1), reserve(2), settle(1, 5, True), settle(2, 3, False)):
            assert isinstance(await recorder.apply(*command), Accepted)
        assert isinstance(await recorder.apply(*reserve(1, b"f" * 16)), Fork)
        first_size, first_note = await recorder.checkpoint(covering=1)
        root, balances = recorder.tree.root(), recorder.books.balances.all()
    with recording(path) as again:
        assert again.tree.root() == root
        assert again.books.balances.all() == balances
        assert again.books.settled(SessionId((1).to_bytes(16, "big")))
        assert again.books.frozen == {AccountId(CLIENT.peer_id)}
        assert again.signer_of(reserve(1)[0].digest) == CLIENT.public
        assert await again.checkpoint() == (first_size, first_note)
        assert await again.apply(*reserve(1)) == Accepted((), (), 1)
        assert isinstance(await again.apply(*reserve(3)), Refusal)
        await again.apply(*issue(2))
        _, note = await again.checkpoint(covering=again.committed_size)
        old = open_checkpoint(first_note, LOG_IDENTITY.origin, LOG.public)
        new = open_checkpoint(note, LOG_IDENTITY.origin, LOG.public)
        proof = again.tree.consistency_proof(old.size, new.size)
        verify_consistency(old.size, new.size, old.root, new.root, proof)


async def test_concurrent_commands_share_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording(tmp_path / "journal.db") as recorder:
        commits: list[int] = []
        commit = recorder.store.commit

        def counted(_store: Store, changes: Sequence[Change]) -> None:
            commits.append(len(changes))
            commit(changes)

        monkeypatch.setattr(Store, "commit", counted)
        outcomes = await asyncio.gather(*(recorder.apply(*issue(n)) for n in range(200)))
        assert [outcome.value for outcome in outcomes if isinstance(outcome, Accepted)] == list(
            range(200)
        )
        assert sum(commits) == 200
        assert len(commits) < 50
        assert recorder.committed_size == 200


async def test_the_same_reservation_at_once_is_granted_once(tmp_path: Path) -> None:
    with recording(tmp_path / "journal.db") as recorder:
        await recorder.apply(*issue(1))
        outcomes = await asyncio.gather(*(recorder.apply(*reserve(1)) for _ in range(20)))
        assert {outcome.value for outcome in outcomes if isinstance(outcome, Accepted)} == {1}
        assert (
            recorder.books.pending(recorder.books.holds(SessionId(bytes(15) + b"\1"))[0].account)
            == 10
        )


def test_entries_are_append_only(tmp_path: Path) -> None:
    store = open_store(tmp_path / "journal.db", NETWORK)
    store.commit([Change(entries=(StoredEntry(0, b"payload", Digest(bytes(32))),))])
    with pytest.raises(LedgerError):
        store.commit([Change(entries=(StoredEntry(0, b"other", Digest(bytes(32))),))])
    with pytest.raises(LedgerError, match="failed before"):
        store.commit([])
    store.close()
    connection = apsw.Connection(str(tmp_path / "journal.db"))
    for statement in ("DELETE FROM entries", "UPDATE entries SET payload = x'00'"):
        with pytest.raises(apsw.ConstraintError, match="append-only"):
            connection.execute(statement)
    assert connection.execute("SELECT payload FROM entries").fetchall() == [(b"payload",)]
    connection.close()


async def test_a_journal_of_the_first_version_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with recording(path) as recorder:
        await recorder.apply(*issue(1))
    connection = apsw.Connection(str(path))
    connection.execute("DROP TABLE delegations; PRAGMA user_version=1")
    connection.close()
    with recording(path) as recorder:
        await recorder.apply(*issue(2))
        assert recorder.committed_size == 2
        assert recorder.store.delegation(CLIENT.peer_id, b"key", 0) is None


def test_an_old_sqlite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"3\.51\.2"):
        open_store(tmp_path / "journal.db", NETWORK, sqlite_version="3.51.2")


def test_a_file_has_one_network_and_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    store = open_store(path, NETWORK)
    with pytest.raises(LedgerError, match="in use"):
        open_store(path, NETWORK)
    store.close()
    with pytest.raises(LedgerError, match="another network"):
        open_store(path, "net-2")
    open_store(path, NETWORK).close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(LedgerError):
        open_store(path, NETWORK)
    with pytest.raises(LedgerError):
        open_store(tmp_path / "journal.db" / "below", NETWORK)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE entries SET payload = zeroblob(9) WHERE position = 1",
        "DELETE FROM entries WHERE position = 2",
        "DELETE FROM entries WHERE position = 1",
        "DELETE FROM objects",
        "UPDATE objects SET envelope = x''",
    ],
)
async def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "journal.db"
    with recording(path) as recorder:
        for command in (issue(1), reserve(1), reserve(2)):
            await recorder.apply(*command)
        await recorder.checkpoint(covering=3)
    connection = apsw.Connection(str(path))
    connection.execute("DROP TRIGGER entries_stay; DROP TRIGGER entries_remain")
    connection.execute(damage)
    connection.close()
    with pytest.raises(LedgerError), recording(path):
        pass


async def test_an_old_backup_is_refused(tmp_path: Path) -> None:
    """Otherwise the log would sign a second history over the one already published."""
    path = tmp_path / "journal.db"
    with recording(path) as recorder:
        await recorder.apply(*issue(1))
        await recorder.checkpoint(covering=1)
    backup = path.read_bytes()
    with recording(path) as recorder:
        await recorder.apply(*issue(2))
        await recorder.checkpoint(covering=2)
    path.write_bytes(backup)
    with pytest.raises(LedgerError, match="contradicts"), recording(path):
        pass
    path.with_name("journal.db.head").write_text("damaged")
    with pytest.raises(LedgerError, match="damaged"), recording(path):
        pass


async def test_another_log_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with recording(path) as recorder:
        await recorder.checkpoint()
    with (
        pytest.raises(LedgerError, match="not its own"),
        recording(path, identity=LogIdentity("x", PAYEE)),
    ):
        pass


class FaultyFile(apsw.VFSFile):
    """A file whose writes and syncs do what the file system says."""

    def __init__(self, faults: "FaultyFiles", name: Any, flags: list[int]) -> None:
        self._faults = faults
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._faults.on_write(lambda cut: super(FaultyFile, self).xWrite(data[:cut], offset))
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._faults.on_sync()
        super().xSync(flags)


class FaultyFiles(apsw.VFS):
    """A file system that fails or dies on command."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.die_at_write = 0
        self.writes = 0
        super().__init__("faulty", "")

    def xOpen(self, name: Any, flags: list[int]) -> FaultyFile:
        return FaultyFile(self, name, flags)

    def on_write(self, write_part: Callable[[int], None]) -> None:
        self.writes += 1
        if isinstance(self.error, apsw.FullError):
            raise self.error
        if self.writes == self.die_at_write:
            write_part(100)  # torn: only the beginning reaches the file
            os._exit(9)

    def on_sync(self) -> None:
        if isinstance(self.error, apsw.IOError):
            raise self.error


@pytest.fixture
def files() -> Iterator[FaultyFiles]:
    faulty = FaultyFiles()
    yield faulty
    faulty.unregister()


@pytest.mark.parametrize(
    ("error", "message"), [(apsw.FullError("full"), "full"), (apsw.IOError("io"), "failed")]
)
async def test_a_failed_disk_stops_the_ledger(
    tmp_path: Path, files: FaultyFiles, error: Exception, message: str
) -> None:
    path = tmp_path / "journal.db"
    with recording(path, "faulty") as recorder:
        await recorder.apply(*issue(1))
        files.error = error
        failed = await asyncio.gather(
            *(recorder.apply(*issue(n)) for n in range(2, 6)), return_exceptions=True
        )
        assert all(isinstance(item, LedgerError) and message in str(item) for item in failed)
        assert recorder.stopped.is_set()
        files.error = None  # the disk is back: still nothing is accepted
        with pytest.raises(LedgerError):
            await recorder.apply(*issue(6))
        with pytest.raises(LedgerError):
            await recorder.durable()
    with recording(path) as again:
        assert isinstance(await again.apply(*issue(1)), Accepted)
        assert isinstance(await again.apply(*issue(7)), Accepted)


async def work_until_death(path: Path, die_at_write: int) -> None:
    """Run in a process of its own: print each acknowledged index, die at the chosen write."""
    files = FaultyFiles()
    with recording(path, "faulty") as recorder:
        files.writes, files.die_at_write = 0, die_at_write
        for number in range(1, 30):
            for command in (issue(number), reserve(number), settle(number, 5, number % 2 == 0)):
                outcome = await recorder.apply(*command)
                assert isinstance(outcome, Accepted)
                size = recorder.committed_size
                _, note = await recorder.checkpoint(covering=size if number % 5 == 0 else 0)
                print(size, len(note), flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("die_at_write", [1, 2, 7, 20, 45, 81])
async def test_what_was_acknowledged_survives_a_crash(tmp_path: Path, die_at_write: int) -> None:
    path = tmp_path / "journal.db"
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, __file__, str(path), str(die_at_write)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 9, process.stderr
    acknowledged = int(process.stdout.split()[-2]) if process.stdout else 0
    with recording(path) as recorder:  # rebuilds and checks every rule of the books
        assert recorder.committed_size >= acknowledged
        assert sum(recorder.books.balances.all().values()) == 0
        balances = recorder.books.balances.all()
        for number in range(1, acknowledged // 4):
            repeated = await recorder.apply(*issue(number))
            assert isinstance(repeated, Accepted) and not repeated.entries
        assert recorder.books.balances.all() == balances
        await recorder.checkpoint(covering=recorder.committed_size)


if __name__ == "__main__":
    asyncio.run(work_until_death(Path(sys.argv[1]), int(sys.argv[2])))
