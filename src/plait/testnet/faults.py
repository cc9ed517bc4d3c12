"""Doing to a live testnet what a plan says, and undoing all of it at the end."""

import asyncio
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.task_scope import TaskScope
from plait.testnet import disks
from plait.testnet.chaos_plan import Fault
from plait.testnet.control import request
from plait.testnet.folder import data_dir
from plait.testnet.healing import Healed, heal
from plait.testnet.slowdown import Quota, stutter


class Skipped(Exception):
    """This machine or testnet cannot suffer the fault; the message says why."""


class Injector:
    """Applies faults to the testnet in a folder. ``tasks`` owns what lasts."""

    def __init__(self, directory: Path, tasks: TaskScope) -> None:
        self._directory = directory
        self._tasks = tasks
        self._quotas: dict[str, Quota] = {}
        self._stutters: dict[str, asyncio.Task[None]] = {}
        self._cut: set[str] = set()
        self._full: set[str] = set()

    async def apply(self, fault: Fault) -> str:
        """Do it; returns how. Raises ``Skipped`` and what the supervisor refuses with."""
        match fault.kind:
            case "kill" | "hang" | "resume" | "restart":
                await self._command(fault.kind, fault.node)
            case "drain":
                await self._command("stop", fault.node)
            case "slow":
                return await self._slow(fault.node, fault.factor)
            case "cut":
                await self._set_cut(fault.node, fault.direction, cut=True)
            case "fill":
                return await self._fill(fault.node)
            case "heal":
                await self._heal(fault.node)
        return "applied"

    async def heal_everything(self) -> Healed:
        """End every fault, this run's or not, and wait until each node is ready again.

        Raises ``PlaitError`` where no supervisor answers.
        """
        for quota in self._quotas.values():
            quota.close()
        for task in self._stutters.values():
            task.cancel()
        await asyncio.gather(*self._stutters.values(), return_exceptions=True)
        return await asyncio.to_thread(heal, self._directory)

    async def _command(self, command: str, node: str) -> None:
        await asyncio.to_thread(request, self._directory, command, node)

    async def _status(self) -> dict[str, Any]:
        return await asyncio.to_thread(request, self._directory, "status")

    async def _pid(self, name: str) -> int:
        status = await self._status()
        pid = next(node["pid"] for node in status["nodes"] if node["name"] == name)
        if pid is None:
            raise Skipped(f"{name} does not run")
        return int(pid)

    async def _slow(self, name: str, factor: float) -> str:
        pid = await self._pid(name)
        try:
            self._quotas[name] = Quota(pid, 1 / factor)
        except OSError as error:
            task = self._tasks.create_task(stutter(pid, 1 / factor), name=f"stutter {name}")
            self._stutters[name] = task
            return f"applied by stopping it most of the time (no CPU quota: {error.strerror})"
        return "applied by a CPU quota"

    async def _set_cut(self, name: str, direction: str, *, cut: bool) -> None:
        if (await self._status())["wan"] is None:
            raise Skipped("this testnet has no WAN: up --wan PROFILE")
        ways = []
        if direction in ("both", "in"):
            ways.append({"targets": [name]})
        if direction in ("both", "out"):
            ways.append({"sources": [name]})
        for way in ways:
            change = {**way, "cut": cut}
            await asyncio.to_thread(request, self._directory, "shape", change=change)
        (self._cut.add if cut else self._cut.discard)(name)

    async def _fill(self, name: str) -> str:
        status = await self._status()
        if not status["disk_mb"]:
            raise Skipped("the nodes have no disks of their own: up --disk-mb N")
        folder = disks.seen_by(status["supervisor_pid"], data_dir(self._directory, name))
        written = await asyncio.to_thread(disks.fill, folder)
        self._full.add(name)
        return f"applied: {written} bytes were left"

    async def _heal(self, name: str) -> None:
        if (quota := self._quotas.pop(name, None)) is not None:
            quota.close()
        if (task := self._stutters.pop(name, None)) is not None:
            task.cancel()
        if name in self._cut:
            await self._set_cut(name, "both", cut=False)
        if name in self._full:
            self._full.discard(name)
            supervisor = (await self._status())["supervisor_pid"]
            disks.empty(disks.seen_by(supervisor, data_dir(self._directory, name)))


def refusal(error: PlaitError | Skipped) -> str:
    """How a report words a fault that was not applied."""
    return f"skipped: {error}" if isinstance(error, Skipped) else f"failed: {error}"
