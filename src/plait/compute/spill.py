"""Room on disk for what parked sessions have cached.

Each session's numbers are in one file that has no name, so nobody else can open it and
nothing is left when the process ends, however it does. Sizes are checked on reading.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from plait.errors import CapacityError, LocalProtocolError
from plait.types import SessionId

BYTES_MAX = 4 << 30
_BUFFER_BYTES = 1 << 16  # larger pieces pass it by


class Spill:
    """At most ``bytes_max`` on disk, in ``folder`` or the system's temporary one."""

    def __init__(self, folder: Path | None = None, bytes_max: int = BYTES_MAX) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._files: dict[SessionId, tuple[IO[bytes], int]] = {}

    @property
    def bytes_used(self) -> int:
        """What is on disk."""
        return sum(size for _, size in self._files.values())

    def write(self, session: SessionId, strips: Sequence[torch.Tensor]) -> None:
        """Store a session's numbers, fp32 on the CPU. Raises ``CapacityError``."""
        self.drop(session)
        views = [_bytes_of(strip) for strip in strips]
        size = sum(len(view) for view in views)
        if self.bytes_used + size > self._bytes_max:
            raise CapacityError("the disk space for parked sessions is used up")
        file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115 - open until dropped
            dir=self._folder, buffering=_BUFFER_BYTES
        )
        try:
            for view in views:
                file.write(view)
            file.flush()
        except OSError as error:
            file.close()
            raise CapacityError(f"a session could not be parked: {error}") from error
        self._files[session] = (file, size)

    def read(self, session: SessionId, strips: Sequence[torch.Tensor]) -> None:
        """Fill ``strips`` with a session's numbers; raises ``LocalProtocolError`` unless
        they are as many as were written."""
        file, size = self._files[session]
        views = [_bytes_of(strip) for strip in strips]
        wanted = sum(len(view) for view in views)
        if wanted != size:
            raise LocalProtocolError(f"a parked session has {size} bytes, not {wanted}")
        file.seek(0)
        for view in views:
            if file.readinto(view) != len(view):  # type: ignore[attr-defined]
                raise LocalProtocolError("a parked session's file is too short")

    def drop(self, session: SessionId) -> None:
        """Forget a session; nothing happens if it is unknown."""
        file, _ = self._files.pop(session, (None, 0))
        if file is not None:
            file.close()


def _bytes_of(strip: torch.Tensor) -> memoryview:
    return strip.numpy().data.cast("B")
