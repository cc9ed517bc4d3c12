"""Small disks for nodes, so that one can be filled: a tmpfs on each data folder.

They are mounted in a mount namespace of the supervisor's own and vanish with it.
"""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from plait.errors import ConfigError

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 1 << 14, 1 << 18, 2, 4
_FILLER = "filler"
_PIECE = bytes(64 * 1024)


def mount_small(folders: Sequence[Path], size_mb: int) -> None:
    """Give each folder a disk of its own with the files it holds; raises ``ConfigError``."""
    try:
        _call("unshare", _CLONE_NEWNS)
        _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        for folder in folders:
            with tempfile.TemporaryDirectory() as aside:
                shutil.copytree(folder, aside, dirs_exist_ok=True)
                options = f"size={size_mb}m,mode=700".encode()
                flags = _MS_NOSUID | _MS_NODEV
                _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options)
                shutil.copytree(aside, folder, dirs_exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot give the nodes small disks: {error}", remedy="leave --disk-mb out"
        ) from error


def seen_by(pid: int, folder: Path) -> Path:
    """A folder as a process sees it, mounts of its own included."""
    return Path(f"/proc/{pid}/root{folder.resolve()}")


def fill(folder: Path) -> int:
    """Write until nothing more fits; returns the bytes written."""
    written = 0
    with (folder / _FILLER).open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            written += filler.write(_PIECE)
    return written


def is_filled(folder: Path) -> bool:
    """Whether what ``fill`` has written is there; raises ``OSError`` where we may not look."""
    return (folder / _FILLER).exists()


def empty(folder: Path) -> None:
    """Take back what ``fill`` has written."""
    (folder / _FILLER).unlink(missing_ok=True)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
