"""Making a process slow: a CPU quota of its own, or stopping it most of the time.

A control group (version 1 or 2) is the honest way and needs privileges; without them the
process is stopped and continued in a fixed rhythm, which also delays its answers to pings.
"""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

PERIOD_US = 50_000
_ROOT = Path("/sys/fs/cgroup")
_GROUP = "plait-slow-"


class Quota:
    """A control group that holds one process to a share of one core."""

    def __init__(self, pid: int, share: float) -> None:
        """Raises ``OSError`` where that is not allowed."""
        self._home, version = _home_of(pid)
        self._group = self._home / f"{_GROUP}{pid}"
        self._group.mkdir()
        quota_us = max(1000, round(PERIOD_US * share))
        try:
            if version == 1:
                (self._group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (self._group / "cpu.cfs_quota_us").write_text(str(quota_us))
            else:
                (self._group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            (self._group / "cgroup.procs").write_text(str(pid))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Let the process go, if it still lives, and remove the group."""
        with suppress(OSError):
            _dissolve(self._group)


def is_held(pid: int) -> bool:
    """Whether a process is held by a quota, whoever made it."""
    with suppress(OSError):
        return _home_of(pid)[0].name.startswith(_GROUP)
    return False


def release(pid: int) -> None:
    """End the quota that holds a process, if one does; raises ``OSError``."""
    if is_held(pid):
        _dissolve(_home_of(pid)[0])


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _dissolve(group: Path) -> None:
    """Move a group's processes to the one above and remove it."""
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            (group.parent / "cgroup.procs").write_text(pid)
    group.rmdir()


async def stutter(pid: int, share: float) -> None:
    """Let a process run only a share of the time, until cancelled or it is gone."""
    period_s = PERIOD_US / 1e6
    try:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(period_s * (1 - share))
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(period_s * share)
    except ProcessLookupError:
        return
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _home_of(pid: int) -> tuple[Path, int]:
    """The group a process is in now, where CPU is controlled, and the version."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            for name in ("cpu", controllers):
                if (_ROOT / name).is_dir():
                    return _ROOT / name / path.lstrip("/"), 1
        elif not controllers and (_ROOT / path.lstrip("/") / "cpu.max").exists():
            return _ROOT / path.lstrip("/"), 2
    raise FileNotFoundError("no control group for CPU time")
