"""A node's data folder: one process at a time, and a word on how far it is."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from plait.errors import ConfigError

NodeState = Literal["starting", "ready", "draining", "stopped"]


class StateFile:
    """One word in a file, replaced whole, for whoever watches the process from outside."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, state: NodeState) -> None:
        """Replace the word."""
        part = self._path.with_suffix(".part")
        part.write_text(state + "\n")
        part.replace(self._path)


@contextlib.contextmanager
def lock_data_dir(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; raises ``ConfigError`` if another one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot use the data folder {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another node uses the data folder {folder}",
                remedy="give this node another one with --data-dir",
            ) from error
        yield


def next_incarnation(path: Path, now_ns: int) -> int:
    """A number above every one this folder was started with, normally the time; keeps it.

    A clock that once ran ahead and was put right must not make our own past outrank us.
    """
    try:
        last = int(path.read_text())
    except (OSError, ValueError):
        last = 0
    incarnation = max(now_ns, last + 1)
    part = path.with_suffix(".part")
    part.write_text(f"{incarnation}\n")
    part.replace(path)
    return incarnation
