"""Death and power cuts at every write of a settlement and of a checkpoint.

The first half enumerates crash points in this process with a SQLite file system of our
own; the second kills real processes at real system calls.
"""

import asyncio
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from plait.errors import LedgerError
from plait.ledger.balances import Balances, entry_from_payload
from plait.ledger.service import recorder
from plait.ledger.service.head import HeadFile
from plait.testing.accounting import NETWORK_ID
from plait.testing.disk import CrashDisk, crash_disk
from plait.testing.ledger_crash import (
    LIFE,
    WRITE_CALLS,
    Acknowledged,
    examine,
    find_strace,
    kill_sweep,
    live,
    recording,
    steps,
    traced_life,
)

SESSIONS = 2
ENTRIES = 1 + 3 * SESSIONS


unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""What fails while SQLite closes has nowhere to go."""


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[CrashDisk]:
    """The disk; the head's file is on it as well."""
    with crash_disk() as disk:
        keep = HeadFile.keep

        def stepped(head: HeadFile, note: str) -> None:
            if Path(head._path).parent.name == "before":
                disk.step()
            keep(head, note)

        monkeypatch.setattr(HeadFile, "keep", stepped)
        monkeypatch.setattr(recorder, "CHECKPOINT_INTERVAL_MIN_S", 0)
        yield disk


async def lived(disk: CrashDisk, folder: Path, die_at: int) -> Acknowledged:
    """One life on the disk, which dies at an operation; what it acknowledged."""
    folder.mkdir(parents=True)
    disk.begin(die_at)
    acknowledged = Acknowledged()

    def acknowledge(entries: int, note: str) -> None:
        acknowledged.entries = entries
        if note:
            acknowledged.checkpoints.append(note)

    try:
        await live(folder / "journal.db", SESSIONS, acknowledge, disk.name)
    except LedgerError:
        assert disk.dead
    return acknowledged


def restored(disk: CrashDisk, before: Path, after: Path, kept: float) -> Path:
    """The files as a machine finds them after the cut."""
    after.mkdir()
    for name, content in disk.survivors(seed=disk.die_at, kept=kept).items():
        (after / Path(name).name).write_bytes(content)
    head = before / "journal.db.head"
    if head.exists():
        shutil.copy(head, after / head.name)
    return after / "journal.db"


@pytest.mark.slow
@unraisable
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0], ids=["lost", "torn", "written"])
async def test_a_power_cut_at_any_operation(tmp_path: Path, disk: CrashDisk, kept: float) -> None:
    """``kept`` of what was written but not synced has reached the disk."""
    whole = await lived(disk, tmp_path / "whole" / "before", 0)
    points = disk.operations
    assert (whole.entries, len(whole.checkpoints)) == (ENTRIES, 1 + 2 * SESSIONS)
    assert points > 100
    lost = 0
    for point in range(1, points + 1):
        before = tmp_path / str(point) / "before"
        acknowledged = await lived(disk, before, point)
        path = restored(disk, before, tmp_path / str(point) / "after", kept)
        assert await examine(path, acknowledged) == [], f"operation {point} of {points}"
        lost += acknowledged.entries < ENTRIES
        again = Acknowledged()
        await live(path, SESSIONS, lambda size, note: again.checkpoints.append(note))  # noqa: B023
        assert await examine(path, Acknowledged(ENTRIES, [*again.checkpoints[1::2]])) == []
        with recording(path) as opened:
            assert opened.committed_size == ENTRIES, "what was carried out is carried out once"
    assert lost > points / 2


@unraisable
async def test_the_crash_tests_can_fail(
    tmp_path: Path, disk: CrashDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that acknowledges before its disk has synced is found out."""
    monkeypatch.setattr(CrashDisk, "synced", lambda self, path: None)
    found: list[str] = []
    await lived(disk, tmp_path / "whole" / "before", 0)
    for point in range(20, disk.operations, 9):
        before = tmp_path / str(point) / "before"
        acknowledged = await lived(disk, before, point)
        path = restored(disk, before, tmp_path / str(point) / "after", 0.0)
        found += await examine(path, acknowledged)
    assert found


@pytest.mark.parametrize(("fault", "message"), [("full", "is full"), ("sync_fails", "failed")])
async def test_a_disk_that_is_full_or_cannot_sync_stops_the_writer(
    tmp_path: Path, disk: CrashDisk, fault: str, message: str
) -> None:
    path = tmp_path / "before" / "journal.db"
    path.parent.mkdir()
    acknowledged = 0
    with recording(path, disk.name) as opened:
        for number, step in enumerate(steps(SESSIONS)):
            if number == 2:
                setattr(disk, fault, True)
            try:
                await opened.apply(*step)
            except LedgerError as error:
                assert message in str(error) and error.remedy and error.exit_code == 9
                break
            acknowledged = opened.committed_size
        operations = disk.operations
        setattr(disk, fault, False)  # it is back: nothing is retried in place
        for step in steps(SESSIONS):
            with pytest.raises(LedgerError):
                await opened.apply(*step)
        with pytest.raises(LedgerError):
            await opened.checkpoint(covering=acknowledged + 1)
        assert disk.operations == operations
    assert acknowledged == 2
    assert await examine(path, Acknowledged(acknowledged)) == []
    await live(path, SESSIONS, lambda size, note: None)
    with recording(path) as again:
        assert again.committed_size == ENTRIES


@pytest.fixture(scope="module")
def strace() -> str:
    """The tracer, if it is installed and may trace."""
    found = find_strace()
    if found is None:
        pytest.skip("strace is not installed, or may not trace (apt-get install strace)")
    return found


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("call", WRITE_CALLS)
def test_sigkill_at_write_calls(tmp_path: Path, strace: str, call: str) -> None:
    """Of one order, reservation, settlement, and the checkpoints after them.

    Every fifth ``pwrite64``; ``benchmarks/ledger_crash.py`` kills at each.
    """
    sweep = kill_sweep(strace, tmp_path, call, sessions=1, step=5 if call == "pwrite64" else 1)
    assert sweep.violations == ()
    assert sweep.killed > 0, f"no {call} was seen"


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("fault", "said"),
    [("fdatasync:error=EIO:when=5+", "failed"), ("pwrite64:error=ENOSPC:when=60+", "is full")],
)
def test_a_failing_call_stops_the_ledger(
    tmp_path: Path, strace: str, fault: str, said: str
) -> None:
    """The first calls work; what fails then may or may not be on the disk."""
    path = tmp_path / "journal.db"
    ended = traced_life(strace, path, f"inject={fault}", 5)
    assert ended.code == 9, ended.said
    assert said in ended.said and "try: " in ended.said
    assert 0 < ended.acknowledged.entries < 16
    assert asyncio.run(examine(path, ended.acknowledged)) == []
    asyncio.run(live(path, 5, lambda size, note: None))


@pytest.mark.slow
@pytest.mark.e2e
def test_a_disk_of_2_mb(tmp_path: Path) -> None:
    """A file system that fills up: a clean end, and all that was acknowledged."""
    small = f"mount -t tmpfs -o size=2m none {tmp_path}"
    life = shlex.join([*LIFE, str(tmp_path / "journal.db"), "2000"])
    look = shlex.join([sys.executable, __file__, str(tmp_path / "journal.db")])
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, small], check=False).returncode:
        pytest.skip("no file system can be mounted here (unshare and tmpfs)")
    done = subprocess.run(
        [
            *unshare,
            f"{small} && {{ {life} > {tmp_path}.out; echo $?; tail -n1 {tmp_path}.out; {look}; }}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    code, acknowledged, found = done.stdout.splitlines()
    assert code == "9" and "the ledger's disk is full" in done.stderr, done.stderr
    assert "try: free some space" in done.stderr
    assert int(found) >= json.loads(acknowledged)[0] > 100


def entries_in(path: Path) -> int:
    """How many entries a full disk holds, in books that balance."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    balances = Balances(NETWORK_ID)
    for (payload,) in connection.execute("SELECT payload FROM entries ORDER BY position"):
        balances.post(entry_from_payload(payload))
    assert sum(balances.all().values()) == 0
    return balances.size


if __name__ == "__main__":
    print(entries_in(Path(sys.argv[1])))
