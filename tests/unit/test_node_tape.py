"""The tape of audits: many frames a write, all of them there when an audit reads."""

import hashlib

import pytest

from plait.errors import CapacityError
from plait.node.open_files import OTHER_FILES, tapes_within
from plait.node.retained import KINDS, Key
from plait.node.tape import SESSIONS_MAX, UNWRITTEN_BYTES_MAX, EpochTape, Tape
from plait.types import Digest, SessionId

SESSION = SessionId(b"s" * 16)
ROW = bytes(range(256)) * 4


class FakeFiles:
    """Files in memory that count writes, and fail when told."""

    def __init__(self) -> None:
        self.data: dict[Key, bytearray] = {}
        self.writes = 0
        self.full = False

    def append(self, key: Key, data: bytes) -> None:
        if self.full:
            raise OSError("the disk is full")
        self.writes += 1
        self.data.setdefault(key, bytearray()).extend(data)

    def read(self, key: Key, offset: int, size: int) -> bytes:
        held = bytes(self.data.get(key, b""))[offset : offset + size]
        if len(held) != size:
            raise OSError("the file is too short")
        return held

    def truncate(self, key: Key, size: int) -> None:
        del self.data[key][size:]

    def drop(self, key: Key) -> None:
        self.data.pop(key, None)


def taped(files: FakeFiles) -> tuple[Tape, EpochTape]:
    tape = Tape(files, bytes_max=1 << 20, window_ms=1_000)
    epoch = tape.begin(SESSION, 1, "client", b"c" * 32)
    assert epoch is not None
    return tape, epoch


def feed(epoch: EpochTape, frames: int) -> list[bytes]:
    payloads = [ROW + bytes([number % 256]) for number in range(frames)]
    for number, payload in enumerate(payloads):
        epoch.received(number, number, 1, payload, Digest(hashlib.sha256(payload).digest()))
    return payloads


def test_a_frame_is_not_written_alone_and_an_audit_reads_all_of_them() -> None:
    files = FakeFiles()
    tape, epoch = taped(files)
    payloads = feed(epoch, 100)
    assert files.writes == len(ROW) * 100 // UNWRITTEN_BYTES_MAX
    opened = tape.crossings(SESSION, 1, "input", 99, 0)
    assert [one.payload for one in opened] == payloads
    payloads += feed(epoch, 1)
    assert tape.crossings(SESSION, 1, "input", 99, 0)[-1].payload == payloads[-1]


def test_nothing_waits_in_memory_once_a_session_has_ended() -> None:
    files = FakeFiles()
    tape, epoch = taped(files)
    payloads = feed(epoch, 3)
    tape.end(SESSION, 5)
    assert bytes(files.data[SESSION, "input"]) == b"".join(payloads)
    tape.expire(1_005)
    assert tape.bytes_kept == 0 and not files.data


@pytest.mark.parametrize("fails_at", ["end", "audit", "append"])
def test_a_disk_that_fails_late_is_an_audit_not_answered(fails_at: str) -> None:
    files = FakeFiles()
    tape, epoch = taped(files)
    feed(epoch, 3)
    files.full = True
    if fails_at == "end":
        tape.end(SESSION, 5)
    elif fails_at == "append":
        feed(epoch, 100)
    with pytest.raises(CapacityError):
        tape.crossings(SESSION, 1, "input", 2, 0)
    assert tape.bytes_kept == 0


def test_no_more_sessions_are_kept_than_files_may_be_open() -> None:
    """The session that ended first gives way; one that runs does not."""
    tape = Tape(FakeFiles(), bytes_max=1 << 20, window_ms=60_000, sessions_max=2)
    first, second, third = (SessionId(bytes([number]) * 16) for number in range(3))
    for session in (first, second):
        assert tape.begin(session, 1, "client", b"c" * 32) is not None
    assert tape.begin(third, 1, "client", b"c" * 32) is None
    tape.end(second, now_ms=5)
    assert tape.begin(third, 1, "client", b"c" * 32) is not None
    assert len(tape) == 2
    with pytest.raises(CapacityError):
        tape.commitment(second)
    assert tape.commitment(first) == b"c" * 32


def test_sessions_kept_for_audits_leave_files_for_the_rest() -> None:
    for files in (1, 256, 1024, 20_000, 1 << 30):
        kept = tapes_within(files)
        assert 1 <= kept <= SESSIONS_MAX
        assert kept == 1 or kept * len(KINDS) + OTHER_FILES <= files
