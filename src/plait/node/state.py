"""A node's data folder: one process at a time, and a word on how far it is."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from plait.errors import ConfigError
from plait.logs import get_logger
from plait.net.membership import next_incarnation

log = get_logger(__name__)

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


@dataclass(frozen=True, slots=True)
class DrainEnd:
    """How a process ended its drain: ``reason`` says why, if sessions had to be ended for it."""

    pid: int
    sessions_ended: int = 0
    reason: Literal["", "the time to drain was up", "a second signal"] = ""


class DrainFile:
    """How the last process of a data folder ended its drain, for who asked for it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "drained"

    def clear(self) -> None:
        """Forget what an earlier process left."""
        self._path.unlink(missing_ok=True)

    def write(self, end: DrainEnd) -> None:
        """Leave it; on a disk that is full nothing is left."""
        part = self._path.with_suffix(".part")
        try:
            part.write_text(json.dumps(asdict(end)) + "\n")
            part.replace(self._path)
        except OSError as error:
            log.warning("end of drain not kept", reason=error.strerror)

    def read(self, pid: int) -> DrainEnd | None:
        """What this process has left; None if it has not."""
        try:
            end = DrainEnd(**json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return end if end.pid == pid else None


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


class Incarnations:
    """The numbers a data folder was started with, and the latest time its node signed something at.

    A clock that once ran ahead and was put right must not make our own past outrank us: what
    it said then would look like another process that lives under our name.
    """

    def __init__(self, folder: Path) -> None:
        self._started = folder / "incarnation"
        self._issued = folder / "issued"
        self._latest_ms = _read(self._issued)

    def next(self, now_ns: int) -> int:
        """A number above every earlier one and above all that was said, normally the time."""
        incarnation = next_incarnation(now_ns, _read(self._started), self._latest_ms)
        _replace(self._started, incarnation)
        return incarnation

    def note_issued(self, issued_ms: int) -> None:
        """Something was signed at this time, and is about to be published."""
        if issued_ms <= self._latest_ms:
            return  # the clock was put back: what was said before it still counts
        self._latest_ms = issued_ms
        try:
            _replace(self._issued, issued_ms)
        except OSError as error:
            # Without it only a restart after a clock was put back is at risk.
            log.warning("time of publication not kept", reason=error.strerror)


def _read(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _replace(path: Path, number: int) -> None:
    part = path.with_suffix(".part")
    part.write_text(f"{number}\n")
    part.replace(path)
