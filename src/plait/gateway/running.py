"""Running jobs: the client's streams, through the stop filters, as one queue of events."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from plait.client import Answer
from plait.errors import CapacityError, PlaitError
from plait.gateway.orders import Job
from plait.gateway.port import Upstream
from plait.gateway.shelf import cost_of
from plait.gateway.stops import StopFilter
from plait.logs import get_logger
from plait.types import TokenCounts

log = get_logger(__name__)

_ROOM = 16
"""Events of a job besides its tokens."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. ``answer`` is None when a stop sequence cut it short: the session was
    then cancelled, and ``cost`` is the predicted route's price of the tokens drawn."""

    finish_reason: Literal["stop", "length"]
    completion_tokens: int
    cost: int | None
    answer: Answer | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one job."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """A job ended well."""

    index: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Failed:
    """A job failed, or the gateway is closing."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Gone:
    """Nobody waits for the answer any more."""


Event = Piece | Done | Failed | Gone


class Events:
    """Events of all jobs of one request; there is always room, as the jobs are bounded."""

    def __init__(self, jobs: list[Job]) -> None:
        size = sum(job.options.max_tokens + _ROOM for job in jobs)
        self._queue: asyncio.Queue[Event] = asyncio.Queue(size)

    def put(self, event: Event) -> None:
        """Add an event."""
        self._queue.put_nowait(event)

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event, or None after ``timeout_s``."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._queue.get()
        except TimeoutError:
            return None


class InProgress:
    """The requests being answered, bounded, and all ended when the gateway closes."""

    def __init__(self, sessions_max: int) -> None:
        self._sessions_max = sessions_max
        self._sessions: dict[int, tuple[Events, int]] = {}
        self.closing = False

    @property
    def sessions(self) -> int:
        """Answers in progress."""
        return sum(count for _, count in self._sessions.values())

    def enter(self, events: Events, count: int) -> bool:
        """Take ``count`` answers in; False when that is too many or the gateway closes."""
        if self.closing or self.sessions + count > self._sessions_max:
            return False
        self._sessions[id(events)] = (events, count)
        return True

    def leave(self, events: Events) -> None:
        """A request is over."""
        self._sessions.pop(id(events), None)

    def close(self) -> None:
        """End all requests, and take no more."""
        self.closing = True
        error = CapacityError("the gateway is shutting down", retry_after_s=2.0)
        for events, _ in self._sessions.values():
            events.put(Failed(error))


async def run_job(upstream: Upstream, job: Job, events: Events) -> None:
    """Run one job to its end; every failure becomes an event. Cancelling ends the session."""
    try:
        await _run(upstream, job, events)
    except PlaitError as error:
        events.put(Failed(error))
    except Exception as error:
        # The task boundary: one broken answer must not end its neighbours.
        log.exception("an answer failed")
        events.put(Failed(error))


async def _run(upstream: Upstream, job: Job, events: Events) -> None:
    stops, delivered = StopFilter(job.stops), 0
    if job.echo:
        events.put(Piece(job.index, job.echo))
    stream = upstream.stream(job.model.name, job.prompt, job.options)
    # The stream is emptied as fast as it comes: a slow reader must not fill the client's queue.
    async with aclosing(stream):
        async for item in stream:
            if isinstance(item, Answer):
                _put(events, job, stops.flush())
                outcome = Outcome(
                    item.finish_reason, item.completion_tokens, item.cost_microcredits, item
                )
                events.put(Done(job.index, outcome))
                return
            delivered += len(item.token_ids)
            _put(events, job, stops.push(item.text))
            if stops.stopped:
                cost = _predicted_cost(upstream, job, delivered)
                events.put(Done(job.index, Outcome("stop", delivered, cost, None)))
                return


def _put(events: Events, job: Job, text: str) -> None:
    if text:
        events.put(Piece(job.index, text))


def _predicted_cost(upstream: Upstream, job: Job, delivered: int) -> int | None:
    try:
        plan = upstream.plan(job.model.name, job.prompt_tokens, job.options)
    except PlaitError:
        return None
    return cost_of(plan, TokenCounts(prompt=job.prompt_tokens, output=delivered))
