"""A disk that fails, dies or loses power on command, under the SQLite of the ledger."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import apsw

SECTOR_BYTES = 512


class CrashFile(apsw.VFSFile):
    """One file of a ``CrashDisk``."""

    def __init__(self, disk: "CrashDisk", name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._path = name if isinstance(name, str) else name.filename()
        super().__init__(disk.below, name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        """Write, unless the disk is dead or full."""
        if self._disk.step():
            if self._disk.full:
                raise apsw.FullError("no space left on device")
            super().xWrite(data, offset)
            self._disk.written(self._path, offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        """Cut the file."""
        if self._disk.step():
            super().xTruncate(size)
            self._disk.truncated(self._path, size)

    def xSync(self, flags: int) -> None:
        """Make the file durable."""
        if self._disk.step():
            if self._disk.sync_fails:
                raise apsw.IOError("fsync: Input/output error")
            super().xSync(flags)
            self._disk.synced(self._path)


class CrashDisk(apsw.VFS):
    """SQLite files over the ordinary ones, with numbered operations that change the disk.

    At operation ``die_at`` (from 1; 0: never) power fails: neither it nor any later one
    happens. ``survivors`` then gives what a disk may hold: all that was synced, and of the
    rest whatever a seed says, in whole sectors. ``full`` refuses writes, ``sync_fails``
    fails every sync.
    """

    def __init__(self, name: str = "crash", below: str = "") -> None:
        self.name, self.below = name, below
        self.operations = self.die_at = 0
        self.dead = self.full = self.sync_fails = False
        self._durable: dict[str, bytes] = {}
        self._pending: dict[str, list[tuple[int, bytes | None]]] = {}
        super().__init__(name, below)

    def xOpen(self, name: Any, flags: list[int]) -> CrashFile:
        """Open a file."""
        return CrashFile(self, name, flags)

    def xDelete(self, name: str, sync_folder: bool) -> None:
        """Delete a file."""
        if self.step():
            super().xDelete(name, sync_folder)
            self._durable.pop(name, None)
            self._pending.pop(name, None)

    def begin(self, die_at: int) -> None:
        """Forget everything and start anew, to die at an operation."""
        self.operations, self.die_at, self.dead = 0, die_at, False
        self._durable, self._pending = {}, {}

    def step(self) -> bool:
        """Count an operation; whether it may happen. Raises ``apsw.IOError`` at the cut.

        What SQLite does later, to clean up, is lost without a word.
        """
        if self.dead:
            return False
        self.operations += 1
        self.dead = self.operations == self.die_at
        if self.dead:
            raise apsw.IOError("the disk lost power")
        return True

    def written(self, path: str, offset: int, data: bytes) -> None:
        """Note a write that is not durable yet."""
        self._pending.setdefault(path, []).append((offset, data))

    def truncated(self, path: str, size: int) -> None:
        """Note a truncation that is not durable yet."""
        self._pending.setdefault(path, []).append((size, None))

    def synced(self, path: str) -> None:
        """All that was written to the file is durable now."""
        self._durable[path] = self._applied(path, random.Random(0), 1.0)
        self._pending.pop(path, None)

    def survivors(self, seed: int, kept: float) -> dict[str, bytes]:
        """File contents after the cut: of what was not synced, the share ``kept`` in sectors."""
        rng = random.Random(seed)
        names = sorted(self._durable.keys() | self._pending.keys())
        return {name: self._applied(name, rng, kept) for name in names}

    def _applied(self, path: str, rng: random.Random, kept: float) -> bytes:
        content = bytearray(self._durable.get(path, b""))
        for offset, data in self._pending.get(path, ()):
            if data is None:
                if rng.random() < kept:
                    del content[offset:]
                continue
            for start in range(0, len(data), SECTOR_BYTES):
                if rng.random() < kept:
                    part = data[start : start + SECTOR_BYTES]
                    end = offset + start + len(part)
                    content.extend(bytes(max(0, end - len(content))))
                    content[offset + start : end] = part
        return bytes(content)


@contextmanager
def crash_disk(name: str = "crash") -> Iterator[CrashDisk]:
    """A registered ``CrashDisk``; ``open_store(path, network, vfs=disk.name)`` uses it."""
    disk = CrashDisk(name)
    try:
        yield disk
    finally:
        disk.unregister()
