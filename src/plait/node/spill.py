"""Spill files: retained rows that do not fit in memory. Nothing of them survives the process.

A file has no name once it is open, so that a crash leaves nothing behind and nobody else
can open what passed between two stages.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

from plait.node.retained import Key


class SpillFiles:
    """One nameless file per key in ``folder``, which is emptied and made at the start."""

    def __init__(self, folder: Path) -> None:
        # Of a file system where files cannot be nameless, or of an earlier version.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._folder = folder
        self._files: dict[Key, BinaryIO] = {}
        self._ends: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._files)

    def append(self, key: Key, data: bytes) -> None:
        """Write at the end; raises ``OSError``, and then nothing was written that counts."""
        file = self._files.get(key)
        if file is None:
            made = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            file = self._files[key] = cast("BinaryIO", made)
        end = self._ends.get(key, 0)
        if os.pwrite(file.fileno(), data, end) != len(data):
            file.truncate(end)
            raise OSError("the disk took only a part")
        self._ends[key] = end + len(data)

    def read(self, key: Key, offset: int, size: int) -> bytes:
        """Read exactly ``size`` bytes; raises ``OSError``."""
        file = self._files.get(key)
        data = os.pread(file.fileno(), size, offset) if file else b""
        if len(data) != size:
            raise OSError("the spill file is too short")
        return data

    def truncate(self, key: Key, size: int) -> None:
        """Forget all but the first ``size`` bytes."""
        file = self._files.get(key)
        if file is not None:
            file.truncate(size)
            self._ends[key] = size

    def drop(self, key: Key) -> None:
        """Close the file, which frees its room."""
        file = self._files.pop(key, None)
        self._ends.pop(key, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        """Drop every file."""
        for key in tuple(self._files):
            self.drop(key)
