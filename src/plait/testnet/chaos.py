"""A chaos run: load, faults by plan, healing, and a report of what users noticed."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from plait.client import AsyncClient
from plait.errors import PlaitError
from plait.task_scope import TaskScope
from plait.testnet.chaos_plan import ChaosPlan, Fault, check_plan
from plait.testnet.chaos_report import (
    Applied,
    faults_report,
    gaps_report,
    requests_report,
    verdict,
)
from plait.testnet.control import request
from plait.testnet.faults import Injector, Skipped, refusal
from plait.testnet.folder import CLIENT_DIR, NETWORK_FILE
from plait.testnet.healing import check_whole
from plait.testnet.leaks import Holdings, grown, holdings, wait_until_quiet
from plait.testnet.load import Case, Outcome, undisturbed, work
from plait.types import Span

_ENDING = (signal.SIGINT, signal.SIGTERM)

Tell = Callable[[str], None]


def hosts_of(status: Mapping[str, Any]) -> dict[str, Span | None]:
    """Every node of a testnet and its span."""
    return {node["name"]: Span(*node["span"]) if node["span"] else None for node in status["nodes"]}


async def run_chaos(
    directory: Path, plan: ChaosPlan, *, max_tokens: int, tell: Tell
) -> dict[str, Any]:
    """Run a plan on the live testnet in ``directory`` and return the report.

    SIGINT and SIGTERM end it early; everything is healed and reported all the same. Raises
    ``ConfigError`` for a testnet that is not whole and for a plan that does not fit it, and
    ``PlaitError`` if it does not work before the first fault.
    """
    await asyncio.to_thread(check_whole, directory)
    status = await asyncio.to_thread(request, directory, "status")
    check_plan(plan, hosts_of(status))
    model = next(node["model"] for node in status["nodes"] if node["model"])
    async with AsyncClient(
        directory / NETWORK_FILE, account=directory / CLIENT_DIR, audits=False
    ) as client:
        await client.wait_ready(model)
        tell("computing the undisturbed answers")
        cases = await undisturbed(client, model, max_tokens)
        run = _Run(directory, plan, client, model, cases, tell)
        return await run.perform()


class _Run:
    """One run on its way."""

    def __init__(
        self,
        directory: Path,
        plan: ChaosPlan,
        client: AsyncClient,
        model: str,
        cases: tuple[Case, ...],
        tell: Tell,
    ) -> None:
        self._directory = directory
        self._plan = plan
        self._client = client
        self._model = model
        self._cases = cases
        self._tell = tell
        self._outcomes: list[Outcome] = []
        self._applied: list[Applied] = []
        self._stop = asyncio.Event()
        self._signal: str | None = None
        self._over = asyncio.Event()

    async def perform(self) -> dict[str, Any]:
        status = await self._status()
        names = {node["peer"]: node["name"] for node in status["nodes"] if node["span"]}
        before = await self._holdings()
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            loop.add_signal_handler(number, self._end_early, number)
        started_s = time.monotonic()
        try:
            unhealed = await self._disturb(started_s)
        finally:
            for number in _ENDING:
                loop.remove_signal_handler(number)
        self._tell("waiting until the testnet is quiet")
        busy = await wait_until_quiet(self._client, names)
        after = await self._holdings()
        report: dict[str, Any] = {
            "directory": str(self._directory),
            "model": self._model,
            "wan": status["wan"],
            "duration_s": round(time.monotonic() - started_s, 1),
            "interrupted": self._stop.is_set(),
            "signal": self._signal,
            "load": self._plan.load,
            "faults": faults_report(self._applied, started_s),
            "unhealed": unhealed,
            "requests": requests_report(self._outcomes),
            "gap_s": gaps_report(self._outcomes, self._applied),
            "ledger": await self._audit(),
            "leaks": busy | grown(before, after),
        }
        return report | {"wrong": [*verdict(report), *(f"not healed: {what}" for what in unhealed)]}

    def _end_early(self, number: signal.Signals) -> None:
        self._signal = number.name
        self._stop.set()

    async def _disturb(self, started_s: float) -> list[str]:
        """Load and faults; returns what could not be healed and why, empty if all was."""
        async with TaskScope() as tasks:
            injector = Injector(self._directory, tasks)
            workers = [
                tasks.create_task(self._work(number), name=f"load {number}")
                for number in range(self._plan.load)
            ]
            try:
                await self._follow_plan(injector, started_s)
            finally:
                self._tell("healing everything")
                try:
                    unhealed = list((await injector.heal_everything()).failed)
                except PlaitError as error:
                    unhealed = [str(error)]
            self._over.set()
            if workers:
                await asyncio.wait(workers)  # every request has its own time limit
        return unhealed

    async def _work(self, number: int) -> None:
        model, outcomes = self._model, self._outcomes
        await work(self._client, model, self._cases, number, outcomes, self._over.is_set)

    async def _follow_plan(self, injector: Injector, started_s: float) -> None:
        for fault in self._plan.faults:
            if await self._interrupted_until(started_s + fault.at_s):
                return
            await self._apply(injector, fault, started_s)
        await self._interrupted_until(started_s + self._plan.duration_s)

    async def _interrupted_until(self, when_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, when_s - time.monotonic())):
                await self._stop.wait()
        return self._stop.is_set()

    async def _apply(self, injector: Injector, fault: Fault, started_s: float) -> None:
        at_s = time.monotonic()
        try:
            how = await injector.apply(fault)
        except (Skipped, PlaitError) as error:
            how = refusal(error)
        self._applied.append((fault, at_s, how))
        done = sum(not o.failure for o in self._outcomes)
        failed = len(self._outcomes) - done
        self._tell(
            f"{at_s - started_s:7.1f} s  {fault.kind} {fault.node}: {how}; "
            f"{done} answers, {failed} failed"
        )

    async def _status(self) -> dict[str, Any]:
        return await asyncio.to_thread(request, self._directory, "status")

    async def _holdings(self) -> Holdings:
        return await asyncio.to_thread(holdings, self._directory, await self._status())

    async def _audit(self) -> dict[str, Any]:
        """The ledger's books, recomputed from its journal by the command anybody would use."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "plait", "ledger", "audit", "--json", "--no-witnesses"),
            *("--network", str(self._directory / NETWORK_FILE)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        output, _ = await process.communicate()
        try:
            found = json.loads(output.splitlines()[-1])
            return {name: found[name] for name in ("balanced", "entries", "violations")}
        except (IndexError, KeyError, ValueError):
            words = output.decode(errors="replace")[-500:]
            return {"balanced": False, "entries": 0, "violations": [f"no audit: {words}"]}
