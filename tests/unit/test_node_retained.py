"""Retained rows: by position, bounded in memory and on disk, given up rather than wrong."""

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import CapacityError
from plait.node.retained import Key, Retained
from plait.node.spill import SpillFiles
from plait.types import SessionId

ROW = 4
ONE: Key = (SessionId(b"1" * 16), "output")
TWO: Key = (SessionId(b"2" * 16), "output")


class MemorySpill:
    """Spill files in memory; ``broken`` makes every write fail."""

    def __init__(self) -> None:
        self.files: dict[Key, bytearray] = {}
        self.broken = False

    def append(self, key: Key, data: bytes) -> None:
        if self.broken:
            raise OSError(errno.ENOSPC, "full")
        self.files.setdefault(key, bytearray()).extend(data)

    def read(self, key: Key, offset: int, size: int) -> bytes:
        return bytes(self.files[key][offset : offset + size])

    def truncate(self, key: Key, size: int) -> None:
        del self.files.get(key, bytearray())[size:]

    def drop(self, key: Key) -> None:
        self.files.pop(key, None)


def rows_of(*values: int) -> bytes:
    return b"".join(value.to_bytes(ROW, "little") for value in values)


def test_rows_come_back_across_memory_and_file() -> None:
    kept = Retained(MemorySpill(), memory_bytes_max=3 * ROW, spill_bytes_max=100)
    for position in range(6):
        kept.put(ONE, position, 1, rows_of(position))
    assert (kept.memory_bytes, kept.spill_bytes) == (3 * ROW, 3 * ROW)
    assert kept.end(ONE) == 6
    assert kept.read(ONE, 1, 4) == rows_of(1, 2, 3, 4)
    assert kept.read(ONE, 4, 2) == rows_of(4, 5)
    with pytest.raises(CapacityError):
        kept.read(ONE, 4, 3)


def test_what_fits_nowhere_is_given_up_and_stays_so_until_freed() -> None:
    kept = Retained(MemorySpill(), memory_bytes_max=ROW, spill_bytes_max=ROW)
    for position in range(3):
        kept.put(ONE, position, 1, rows_of(position))
    assert (kept.end(ONE), kept.memory_bytes, kept.spill_bytes) == (0, 0, 0)
    kept.put(ONE, 0, 1, rows_of(0))
    assert kept.end(ONE) == 0
    kept.free(ONE[0])
    kept.put(ONE, 0, 1, rows_of(0))
    assert kept.end(ONE) == 1


def test_a_full_disk_costs_only_the_session_that_spills() -> None:
    spill = MemorySpill()
    kept = Retained(spill, memory_bytes_max=2 * ROW, spill_bytes_max=100)
    kept.put(ONE, 0, 1, rows_of(7))
    kept.put(TWO, 0, 1, rows_of(8))
    spill.broken = True
    kept.put(TWO, 1, 1, rows_of(9))
    assert (kept.end(ONE), kept.end(TWO)) == (1, 0)
    assert kept.read(ONE, 0, 1) == rows_of(7)


def test_a_gap_or_another_row_size_is_given_up() -> None:
    kept = Retained(MemorySpill(), memory_bytes_max=100, spill_bytes_max=100)
    kept.put(ONE, 1, 1, rows_of(1))
    kept.put(TWO, 0, 1, rows_of(1))
    kept.put(TWO, 1, 1, b"longer row")
    assert (kept.end(ONE), kept.end(TWO), kept.memory_bytes) == (0, 0, 0)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12), st.integers(1, 4)), max_size=30),
    st.integers(0, 12),
)
def test_kept_rows_are_the_last_written_and_bytes_add_up(
    writes: list[tuple[int, int, int]], memory_rows: int
) -> None:
    spill = MemorySpill()
    kept = Retained(spill, memory_bytes_max=memory_rows * ROW, spill_bytes_max=10**6)
    oracle: dict[Key, list[int]] = {ONE: [], TWO: []}
    for number, (which, wanted, rows) in enumerate(writes):
        key = (ONE, TWO)[which]
        first = min(wanted, len(oracle[key]))
        values = [number * 10 + row for row in range(rows)]
        oracle[key][first:] = values
        kept.put(key, first, rows, rows_of(*values))
    for key, values in oracle.items():
        assert kept.end(key) == len(values)
        for first in range(len(values)):
            count = len(values) - first
            assert kept.read(key, first, count) == rows_of(*values[first:])
    assert kept.memory_bytes <= memory_rows * ROW
    total = sum(len(values) for values in oracle.values()) * ROW
    assert kept.memory_bytes + kept.spill_bytes == total
    assert kept.spill_bytes == sum(len(data) for data in spill.files.values())
    for key in oracle:
        kept.free(key[0])
    assert (kept.memory_bytes, kept.spill_bytes, spill.files) == (0, 0, {})


def test_spill_files_have_no_name_and_go_with_their_session(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    folder.mkdir()
    (folder / "left by a crash").write_bytes(b"secret")
    files = SpillFiles(folder)
    kept = Retained(files, memory_bytes_max=0, spill_bytes_max=100)
    kept.put(ONE, 0, 3, rows_of(1, 2, 3))
    kept.put(ONE, 1, 1, rows_of(9))
    assert kept.read(ONE, 0, 2) == rows_of(1, 9)
    assert list(folder.iterdir()) == []
    assert (len(files), kept.spill_bytes) == (1, 2 * ROW)
    kept.free(ONE[0])
    assert (len(files), kept.spill_bytes) == (0, 0)
    files.close()
