"""Room on disk for the KV pages of kept prefixes: one file of equal slots.

The file has no name, so nobody else can open it and nothing is left when the process ends,
however it does. Slots are counted references, as pages are: one that is being read is not
given away. Reading and writing need no lock; everything else does.
"""

import os
import tempfile
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from plait.errors import CapacityError, LocalProtocolError

BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """At most ``bytes_max`` on disk, in ``folder`` or the system's temporary one."""

    folder: Path | None = None
    bytes_max: int = BYTES_MAX


class PageFile:
    """Slots of ``slot_bytes`` each, as many as the room holds."""

    def __init__(self, room: DiskRoom, slot_bytes: int) -> None:
        self._room = room
        self._slot_bytes = slot_bytes
        self._slots_max = room.bytes_max // slot_bytes
        self._holders: Counter[int] = Counter()
        self._free: list[int] = []
        self._descriptor = -1

    @property
    def slots(self) -> int:
        """Slots in use."""
        return len(self._holders)

    @property
    def bytes_used(self) -> int:
        """What they take."""
        return self.slots * self._slot_bytes

    def take(self) -> int | None:
        """A slot with one holder, or None when all are in use.

        Raises ``CapacityError`` if there can be no file.
        """
        if self.slots >= self._slots_max:
            return None
        if self._descriptor < 0:
            self._descriptor = self._opened()
        # All slots below the number in use that are not held were given back.
        slot = self._free.pop() if self._free else self.slots
        self._holders[slot] = 1
        return slot

    def hold(self, slot: int) -> None:
        """One more holder."""
        self._check_held(slot)
        self._holders[slot] += 1

    def release(self, slot: int) -> None:
        """One holder less; a slot that nobody holds is free. The last one shrinks the file."""
        self._check_held(slot)
        self._holders[slot] -= 1
        if self._holders[slot]:
            return
        del self._holders[slot]
        self._free.append(slot)
        if not self._holders:
            self._free.clear()
            os.ftruncate(self._descriptor, 0)

    def write(self, slot: int, data: memoryview) -> None:
        """Store up to a slot's size. Raises ``CapacityError`` if the disk does not take it."""
        try:
            written = os.pwrite(self._descriptor, data, slot * self._slot_bytes)
        except OSError as error:
            raise CapacityError(f"a prefix could not be parked: {error}") from error
        if written != len(data):
            raise CapacityError("a prefix could not be parked: the disk is full")

    def read(self, slot: int, data: memoryview) -> None:
        """Fill ``data`` from a slot. Raises ``CapacityError`` if it cannot be read."""
        try:
            count = os.preadv(self._descriptor, [data], slot * self._slot_bytes)
        except OSError as error:
            raise CapacityError(f"a parked prefix cannot be read: {error}") from error
        if count != len(data):
            raise CapacityError("a parked prefix cannot be read: the file is too short")

    def _opened(self) -> int:
        folder = self._room.folder
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                descriptor = os.dup(file.fileno())
        except OSError as error:
            raise CapacityError(f"prefixes cannot be parked: {error}") from error
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _check_held(self, slot: int) -> None:
        if slot not in self._holders:
            raise LocalProtocolError(f"slot {slot} is not held")
