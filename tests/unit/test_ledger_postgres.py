"""One suite for both stores: SQLite, and a real PostgreSQL server that the tests start."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from plait.errors import LedgerError
from plait.ledger.checkpoint import open_checkpoint
from plait.ledger.journal import Accepted
from plait.ledger.journal_audit import JournalAuditor, JournalPage, audit_journal
from plait.ledger.service.export import objects_behind
from plait.ledger.service.head import HeadFile
from plait.ledger.service.recorder import Recorder
from plait.ledger.service.records import Change, LedgerStore, StoredEntry
from plait.ledger.service.store import open_store
from plait.testing.accounting import NETWORK_ID, key_of
from plait.testing.ledger_crash import IDENTITY, NOW_MS, steps
from plait.types import AccountId, Digest

SESSIONS = 3
ENTRIES = 1 + 3 * SESSIONS


def find_server() -> Path | None:
    """The folder of the server's programs."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("postgres")
    folders += [Path(found).resolve().parent] if found else []
    return next((f for f in folders if (f / "initdb").exists()), None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A connection string without a database: a server of our own on a Unix socket."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (plait[postgres])")
    programs = find_server()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    # It refuses to run as root, and a socket's path must be short.
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="pg") as name:
        folder, data = Path(name), Path(name) / "data"
        if user:
            shutil.chown(folder, "nobody")
        options: dict[str, Any] = {"cwd": folder, "stderr": subprocess.STDOUT, **user}
        subprocess.run(
            [programs / "initdb", "-D", data, "-A", "trust", "-U", "plait", "-E", "UTF8"],
            check=True,
            stdout=subprocess.DEVNULL,
            **options,
        )
        log = (folder / "log").open("w")
        start = [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses="]
        process = subprocess.Popen([*map(str, start)], stdout=log, **options)
        try:
            _wait_for(programs, folder)
            yield f"host={folder} user=plait"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
            log.close()


def _wait_for(programs: Path, folder: Path) -> None:
    ready = [*map(str, [programs / "pg_isready", "-h", folder, "-t", "1"])]
    for _ in range(60):
        if subprocess.run(ready, stdout=subprocess.DEVNULL, check=False).returncode == 0:
            return
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError((folder / "log").read_text())


@dataclass
class Place:
    """Where a ledger is kept, and how it is opened, spoiled and run in another process."""

    open: Callable[[str], LedgerStore]
    execute: Callable[[str], Any]
    run: list[str]
    head: Path


def sqlite_place(folder: Path) -> Place:
    import apsw

    path = folder / "journal.db"

    def execute(statement: str) -> Any:
        connection = apsw.Connection(str(path))
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    head = path.with_name("journal.db.head")
    return Place(lambda network: open_store(path, network), execute, [str(path)], head)


def postgres_place(server: str, folder: Path, name: str) -> Place:
    import psycopg

    from plait.ledger.service.postgres import open_postgres

    with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    database, head = f"{server} dbname={name}", folder / "journal.db.head"

    def execute(statement: str) -> Any:
        with psycopg.connect(database, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def opened(network: str) -> LedgerStore:
        return open_postgres(database, network, HeadFile(head))

    return Place(opened, execute, [str(folder / "journal.db"), database], head)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        return sqlite_place(tmp_path)
    number = request.node.name.partition("[")[0][:50]
    return postgres_place(request.getfixturevalue("server"), tmp_path, number)


@contextmanager
def recording(place: Place) -> Iterator[Recorder]:
    store = place.open(NETWORK_ID)
    try:
        recorder = Recorder(store, NETWORK_ID, IDENTITY, lambda: NOW_MS)
    except BaseException:
        store.close()
        raise
    try:
        yield recorder
    finally:
        recorder.close()


async def test_everything_is_there_after_a_restart(place: Place) -> None:
    with recording(place) as recorder:
        for step in steps(SESSIONS):
            assert isinstance(await recorder.apply(*step), Accepted)
        checkpoint = await recorder.checkpoint(covering=ENTRIES)
        root, balances = recorder.tree.root(), recorder.books.balances.all()
    with recording(place) as again:
        assert (again.tree.root(), again.books.balances.all()) == (root, balances)
        assert again.committed_size == ENTRIES
        assert await again.checkpoint() == checkpoint
        for step in steps(SESSIONS):
            repeated = await again.apply(*step)
            assert isinstance(repeated, Accepted) and not repeated.entries
        assert len(list(again.store.entries(2, 3))) == 3
        assert len(again.store.releases()) == SESSIONS


async def test_an_export_audits(place: Place) -> None:
    with recording(place) as recorder:
        for step in steps(SESSIONS):
            await recorder.apply(*step)
        _, note = await recorder.checkpoint(covering=ENTRIES)
        payloads = [entry.payload for entry in recorder.store.entries()]
        objects = objects_behind(recorder.store, payloads)
    auditor = JournalAuditor(NETWORK_ID, key_of("issuer").public)
    page = JournalPage(tuple(payloads), tuple(objects))
    signed = open_checkpoint(note, IDENTITY.origin, IDENTITY.key.public)
    report = audit_journal(auditor, [page], signed)
    assert report.entries == ENTRIES
    assert report.violations == ()


async def test_commands_at_once(place: Place) -> None:
    with recording(place) as recorder:
        first, *rest = steps(40)
        await recorder.apply(*first)
        reserved = [step for step in rest if len(step[1]) == 1]
        outcomes = []
        for group in (reserved, [step for step in rest if len(step[1]) == 2]):
            outcomes += await asyncio.gather(*(recorder.apply(*step) for step in group))
        assert all(isinstance(outcome, Accepted) for outcome in outcomes)
        assert recorder.committed_size == 1 + 3 * 40


def test_one_owner_and_one_network(place: Place) -> None:
    store = place.open(NETWORK_ID)
    with pytest.raises(LedgerError, match="in use"):
        place.open(NETWORK_ID)
    store.close()
    with pytest.raises(LedgerError, match="another network"):
        place.open("net-2")
    place.open(NETWORK_ID).close()


def test_entries_are_append_only(place: Place) -> None:
    store = place.open(NETWORK_ID)
    store.commit([Change(entries=(StoredEntry(0, b"payload", Digest(bytes(32))),))])
    with pytest.raises(LedgerError):
        store.commit([Change(entries=(StoredEntry(0, b"other", Digest(bytes(32))),))])
    with pytest.raises(LedgerError, match="failed before"):
        store.commit([])
    store.close()
    for statement in ("DELETE FROM entries", "UPDATE entries SET position = 9"):
        with pytest.raises(Exception, match="append-only"):
            place.execute(statement)
    store = place.open(NETWORK_ID)
    assert [entry.payload for entry in store.entries()] == [b"payload"]
    store.close()


async def test_a_restored_backup_is_refused(place: Place) -> None:
    with recording(place) as recorder:
        for step in steps(1):
            await recorder.apply(*step)
        await recorder.checkpoint(covering=4)
    place.execute("DELETE FROM checkpoints")
    with recording(place) as recorder:
        assert (await recorder.checkpoint())[0] == 4
    place.head.write_text(place.head.read_text().replace("\n4\n", "\n5\n", 1))
    with pytest.raises(LedgerError), recording(place):
        pass


KILL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'plait-ledger'"
)


async def test_a_lost_database_stops_the_ledger(server: str, tmp_path: Path) -> None:
    place = postgres_place(server, tmp_path, "lost")
    commands = list(steps(SESSIONS))
    with recording(place) as recorder:
        for step in commands[:3]:
            await recorder.apply(*step)
        place.execute(KILL)
        for step in commands[3:]:
            with pytest.raises(LedgerError) as caught:
                await recorder.apply(*step)
            assert "database failed" in str(caught.value) and caught.value.remedy
        assert recorder.stopped.is_set()
    with recording(place) as again:
        assert again.committed_size == 4
        for step in commands:
            assert isinstance(await again.apply(*step), Accepted)
        assert again.committed_size == ENTRIES


async def live_and_die(place: Place, die_after: int) -> None:
    """In a process of its own: print what is acknowledged, then die without a word."""
    with recording(place) as recorder:
        for number, step in enumerate(steps(SESSIONS)):
            if number == die_after:
                recorder._enqueue(Change())  # the writer is busy while we die
                os.kill(os.getpid(), signal.SIGKILL)
            await recorder.apply(*step)
            size, note = await recorder.checkpoint(covering=recorder.committed_size)
            print(json.dumps([size, note]), flush=True)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("die_after", [1, 4])
async def test_death_loses_nothing_acknowledged(
    server: str, tmp_path: Path, die_after: int
) -> None:
    place = postgres_place(server, tmp_path, f"death{die_after}")
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, __file__, *place.run, str(die_after)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    acknowledged, note = json.loads(process.stdout.splitlines()[-1])
    with recording(place) as recorder:
        assert recorder.committed_size >= acknowledged > 0
        published = open_checkpoint(note, IDENTITY.origin, IDENTITY.key.public)
        assert recorder.tree.root(published.size) == published.root
        assert sum(recorder.books.balances.all().values()) == 0
        assert recorder.books.balances.of(AccountId("nobody")) == 0


if __name__ == "__main__":
    from plait.ledger.service.postgres import open_postgres

    home, dsn, number = sys.argv[1:]
    head_file = Path(home).with_name("journal.db.head")
    asyncio.run(
        live_and_die(
            Place(
                lambda network: open_postgres(dsn, network, HeadFile(head_file)),
                lambda statement: None,
                [],
                head_file,
            ),
            int(number),
        )
    )
