"""The shell around a ``Race``: up to two generations, of which one answers."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Protocol

from plait.client.answer import Answer, RouteStep
from plait.client.driver import Deliver
from plait.client.hedging import Race, Side
from plait.errors import PlaitError
from plait.logs import get_logger
from plait.router.cost import Prediction
from plait.types import PeerId

log = get_logger(__name__)

Emit = Callable[[Deliver], None]


class Running(Protocol):
    """A generation: one session, or two of which one answers."""

    @property
    def embedding(self) -> tuple[float, ...]:
        """The prompt's final hidden state, if it was ordered and is known."""

    @property
    def peers(self) -> Collection[PeerId]:
        """The stages asked so far; empty before the first."""

    @property
    def route(self) -> tuple[RouteStep, ...]:
        """The stages at work, in order; empty before the first are."""

    @property
    def predicted(self) -> Prediction | None:
        """What was predicted of the first route; None before there is one."""

    @property
    def cost_microcredits(self) -> int:
        """What vouchers promise by now; final once ``run`` has ended, however."""

    def stop(self) -> None:
        """End the answer with the token that is due."""

    async def run(self, decode: Callable[[Sequence[int]], str]) -> Answer:
        """Generate; raises ``PlaitError`` subclasses."""


class HedgedGeneration:
    """Runs one order on a second pipeline too if its first token is late.

    ``make`` gives a generation whose route leaves out some peers; ``allowed`` says, once and
    then, whether a hedge without these peers is worth its cost.
    """

    def __init__(
        self,
        make: Callable[[frozenset[PeerId], Emit], Running],
        emit: Emit,
        spawn: Callable[[Coroutine[Any, Any, Answer | PlaitError]], "asyncio.Task[Any]"],
        *,
        late_s: float,
        allowed: Callable[[frozenset[PeerId]], bool],
    ) -> None:
        self._make, self._emit, self._spawn = make, emit, spawn
        self._late_s, self._allowed = late_s, allowed
        self._race = Race()
        self._sides: dict[Side, Running] = {"first": make(frozenset(), self._taker("first"))}
        self._tasks: dict[Side, asyncio.Task[Answer | PlaitError]] = {}

    @property
    def _answering(self) -> Running:
        """The first, until another has won."""
        return self._sides[self._race.winner or "first"]

    @property
    def embedding(self) -> tuple[float, ...]:
        """Of the generation that answers."""
        return self._answering.embedding

    @property
    def peers(self) -> Collection[PeerId]:
        """Of the generation that answers."""
        return self._answering.peers

    @property
    def route(self) -> tuple[RouteStep, ...]:
        """Of the generation that answers."""
        return self._answering.route

    @property
    def predicted(self) -> Prediction | None:
        """Of the generation that answers."""
        return self._answering.predicted

    @property
    def cost_microcredits(self) -> int:
        """Of both sessions: the one that lost is paid for what it had receipted."""
        return sum(side.cost_microcredits for side in self._sides.values())

    def stop(self) -> None:
        """End the answer with the token that is due."""
        for side in self._sides.values():
            side.stop()

    async def run(self, decode: Callable[[Sequence[int]], str]) -> Answer:
        """Generate; raises what a generation raises."""
        self._tasks["first"] = self._spawn(_outcome(self._sides["first"], decode))
        due_s = asyncio.get_running_loop().time() + self._late_s
        try:
            while True:
                outcome = await self._step(decode, due_s)
                if isinstance(outcome, PlaitError):
                    raise outcome
                if outcome is not None:
                    return outcome
        finally:
            tasks = tuple(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _step(
        self, decode: Callable[[Sequence[int]], str], due_s: float
    ) -> Answer | PlaitError | None:
        """Wait for an end, or for the moment to ask a second pipeline; the outcome, if any."""
        loop = asyncio.get_running_loop()
        timeout_s = max(0.0, due_s - loop.time()) if self._race.undecided else None
        waited = {side: task for side, task in self._tasks.items() if not task.cancelling()}
        done, _ = await asyncio.wait(
            waited.values(), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not done and self._race.undecided:
            self._hedge(decode)
        for side, task in waited.items():
            if task not in done or task.cancelled():
                continue
            del self._tasks[side]
            outcome = task.result()
            decides, loser = self._race.ended(side, failed=isinstance(outcome, PlaitError))
            self._cancel(loser)
            if decides:
                return outcome
        return None

    def _hedge(self, decode: Callable[[Sequence[int]], str]) -> None:
        peers = frozenset(self._sides["first"].peers)
        if self._race.late(allowed=bool(peers) and self._allowed(peers)):
            log.info("hedged", late_s=self._late_s)
            self._sides["second"] = second = self._make(peers, self._taker("second"))
            self._tasks["second"] = self._spawn(_outcome(second, decode))

    def _taker(self, side: Side) -> Emit:
        def take(token: Deliver) -> None:
            self._cancel(self._race.came(side))
            if self._race.winner == side:
                self._emit(token)

        return take

    def _cancel(self, side: Side | None) -> None:
        """The session is closed on its stages, and pays for what they had receipted."""
        if side is not None and side in self._tasks:
            self._tasks[side].cancel()


async def _outcome(
    generation: Running, decode: Callable[[Sequence[int]], str]
) -> Answer | PlaitError:
    # An error is returned, not raised: the task group must outlive one failed answer.
    try:
        return await generation.run(decode)
    except PlaitError as error:
        return error
