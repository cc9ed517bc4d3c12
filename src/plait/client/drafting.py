"""The model that drafts beside the driver: one for all sessions of a client, on its own thread.

The event loop never computes: it hands ids to the thread and hears of the outcome later. Each
session has its place in the model's cache; sessions take turns by the id.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from plait.compute.model_drafts import Answered, PairedDrafter
from plait.compute.port import StageCompute, Work
from plait.errors import ConfigError, LocalProtocolError
from plait.logs import get_logger
from plait.model.local import LocalModel
from plait.model.manifest import vocabulary_digest
from plait.types import Sampling, SessionId, Span

log = get_logger(__name__)

AHEAD_MAX = 64
"""Positions beyond the answer's end that drafts may reach."""

Spawn = Callable[[Coroutine[Any, Any, None]], object]


class DraftModel:
    """A loaded model that drafts. ``spawn`` starts a task that lives as long as the client."""

    def __init__(self, local: LocalModel, stage: StageCompute, spawn: Spawn) -> None:
        self._local = local
        self._stage = stage
        self._spawn = spawn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drafts")

    @classmethod
    async def load(cls, local: LocalModel, spawn: Spawn) -> "DraftModel":
        """Load all layers, off the event loop; raises ``ConfigError`` without torch."""
        try:
            from plait.compute.load import AUTO, load_stage
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        try:
            span = Span(0, local.manifest.layers)
            stage = await asyncio.to_thread(load_stage, local, span, AUTO)
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        return cls(local, stage, spawn)

    def fits(self, target: LocalModel) -> bool:
        """Whether its ids mean what the target's mean; chat templates may differ.

        Raises ``ModelError`` if a weights file is gone.
        """
        return vocabulary_digest(self._local) == vocabulary_digest(target)

    def drafter(
        self,
        prompt_ids: tuple[int, ...],
        max_tokens: int,
        sampling: Sampling,
        ready: Callable[[], None],
    ) -> tuple[PairedDrafter, Callable[[], None]]:
        """A session's drafter, and what to call when the session has ended.

        It draws with the session's own seed: where both models see it alike, so do the draws.
        """
        plain = Sampling(
            temperature_micros=sampling.temperature_micros,
            top_p_micros=sampling.top_p_micros,
            top_k=sampling.top_k,
            min_p_micros=sampling.min_p_micros,
            seed=sampling.seed,
        )
        room = len(prompt_ids) + max_tokens + AHEAD_MAX
        place = _Place(SessionId(secrets.token_bytes(16)), room, plain)

        def ask(first: int, ids: tuple[int, ...], answered: Answered) -> None:
            if not place.ended:
                self._spawn(self._follow(place, first, ids, answered))

        def end() -> None:
            place.ended = True
            with contextlib.suppress(RuntimeError):  # the client is closed already
                self._thread.submit(self._stage.free, place.session)

        return PairedDrafter(prompt_ids, ask, ready), end

    def close(self) -> None:
        """Stop the thread once it has done what it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _follow(
        self, place: "_Place", first: int, ids: tuple[int, ...], answered: Answered
    ) -> None:
        if place.ended:
            return
        loop = asyncio.get_running_loop()
        try:
            work = loop.run_in_executor(self._thread, self._next_id, place, first, ids)
            token, took_ms = await work
        except Exception:  # drafts are a help: without them the session goes on
            log.exception("drafts end", model=self._local.name)
            answered(None, 0.0)
        else:
            answered(token, took_ms)

    def _next_id(self, place: "_Place", first: int, ids: tuple[int, ...]) -> tuple[int, float]:
        started_s = time.perf_counter()
        if first == 0:
            self._stage.reserve(place.session, place.room, place.sampling)
        [done] = self._stage.step([Work(place.session, first, ids, None, sample=True)])
        if done.error is not None:
            raise done.error
        if done.drawn is None:
            raise LocalProtocolError("a model with all layers drew nothing")
        return done.drawn.ids[0], (time.perf_counter() - started_s) * 1e3


@dataclass(slots=True)
class _Place:
    """A session's place in the model's cache: ``room`` positions."""

    session: SessionId
    room: int
    sampling: Sampling
    ended: bool = False


def _missing(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"drafting with a model needs {error.name}, which is not installed",
        remedy="pip install 'plait[node]'",
    )
