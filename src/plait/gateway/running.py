"""Running jobs: the client's streams, through stop filters and call readers, as events."""

import asyncio
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from plait.client import Answer, RouteStep, TextDelta, Top
from plait.errors import CapacityError, PlaitError, SessionLost
from plait.gateway.orders import Job
from plait.gateway.port import Stream, Upstream
from plait.gateway.stops import StopFilter
from plait.gateway.tools import CallReader, ToolCall
from plait.logs import get_logger

log = get_logger(__name__)

Reason = Literal["stop", "length", "tool_calls"]

_ROOM = 16
"""Events of a job besides its tokens."""


@dataclass(frozen=True, slots=True)
class Token:
    """A delivered token, the log-probability the model gave it, and the likeliest ones.

    ``cut`` is how many bytes at its end were not, where a stop sequence begins within it.
    """

    id: int
    logprob: float | None
    top: Top = ()
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended; ``stop`` is the stop sequence that cut it.

    ``answer`` is None when its session could only be cancelled; ``cost`` is what its vouchers
    promise, microcredits.
    """

    finish_reason: Reason
    completion_tokens: int
    cost: int
    answer: Answer | None
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one job, the tokens it came with, and calls that became complete."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Routed:
    """A job's first token is there: by whom, and for what in all as far as was predicted."""

    index: int
    route: tuple[RouteStep, ...]
    predicted_cost: int | None


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
class Closed:
    """A job's session is over, well or not: ``vouched`` is what its vouchers promise,
    microcredits. The last event of a job."""

    index: int
    vouched: int


@dataclass(frozen=True, slots=True)
class Gone:
    """Nobody waits for the answer any more."""


Event = Routed | Piece | Done | Failed | Closed | Gone


class Events:
    """Events of all jobs of one request, for one reader.

    Their number is bounded, as the jobs are: more than that is a bug and raises.
    """

    def __init__(self, jobs: list[Job]) -> None:
        self._most = sum(job.max_tokens + _ROOM for job in jobs)
        self._events: deque[Event] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add an event."""
        if len(self._events) >= self._most:
            raise asyncio.QueueFull
        self._events.append(event)
        self.nudge()

    def nudge(self) -> None:
        """Let ``next`` return, without an event if there is none."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def next_now(self) -> Event | None:
        """The next event if there is one."""
        return self._events.popleft() if self._events else None

    async def next(self) -> Event | None:
        """The next event, or None after a nudge."""
        if not self._events:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self.next_now()


@dataclass(slots=True)
class Place:
    """A request's place: ``open`` is set when its answers may run."""

    events: Events
    count: int
    open: asyncio.Event = field(default_factory=asyncio.Event)


class InProgress:
    """The requests being answered and those that wait for a place, both bounded.

    First come, first served; all end when the gateway closes.
    """

    def __init__(self, sessions_max: int, waiting_max: int = 0) -> None:
        self._sessions_max, self._waiting_max = sessions_max, waiting_max
        self._running: dict[int, Place] = {}
        self._waiting: deque[Place] = deque()
        self.sessions = 0
        """Answers in progress."""
        self.closing = False

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def enter(self, events: Events, count: int) -> Place | None:
        """A place for ``count`` answers, perhaps later; None when there will be none."""
        if self.closing or count > self._sessions_max:
            return None
        place = Place(events, count)
        if not self._waiting and self._fits(place):
            self._start(place)
            return place
        if len(self._waiting) >= self._waiting_max:
            return None
        self._waiting.append(place)
        return place

    def position(self, place: Place) -> int:
        """How many requests stand before this one and itself; 0 once it runs."""
        return 0 if place.open.is_set() else self._waiting.index(place) + 1

    def leave(self, place: Place) -> None:
        """A request is over: the next ones may start."""
        if self._running.pop(id(place), None) is not None:
            self.sessions -= place.count
        elif place in self._waiting:
            self._waiting.remove(place)
        while self._waiting and self._fits(self._waiting[0]):
            self._start(self._waiting.popleft())

    def close(self) -> None:
        """End all requests, and take no more."""
        self.closing = True
        error = CapacityError("the gateway is shutting down", retry_after_s=2.0)
        for place in (*self._running.values(), *self._waiting):
            place.events.put(Failed(error))

    def _fits(self, place: Place) -> bool:
        return self.sessions + place.count <= self._sessions_max

    def _start(self, place: Place) -> None:
        self._running[id(place)] = place
        self.sessions += place.count
        place.open.set()


async def run_job(upstream: Upstream, job: Job, events: Events) -> None:
    """Run one job to its end; every failure becomes an event, and ``Closed`` comes last.
    Cancelling ends the session."""
    failure: Exception | None = None
    stream: Stream | None = None
    try:
        stream = upstream.stream(job.ask)
        # Closing pays for what was cut: only then is known what the session costs.
        async with aclosing(stream):
            await _run(stream, job, events)
    except PlaitError as error:
        failure = error
    except Exception as error:
        # The task boundary: one broken answer must not end its neighbours.
        log.exception("an answer failed")
        failure = error
    finally:
        if failure is not None:
            events.put(Failed(failure))
        events.put(Closed(job.index, stream.cost_microcredits if stream is not None else 0))


async def _run(stream: Stream, job: Job, events: Events) -> None:
    reader, out = _Reader(job), _Echo(job, events)
    # The stream is emptied as fast as it comes: a slow reader must not fill the client's queue.
    routed = False
    async for item in stream:
        if not routed:
            routed = True
            predicted = stream.predicted
            price = predicted.price_microcredits if predicted is not None else None
            events.put(Routed(job.index, stream.route, price))
        if isinstance(item, Answer):
            reader.end(out)
            out.end(item)
            events.put(Done(job.index, reader.outcome(item)))
            return
        if reader.stopped:
            continue
        reader.push(item, out)
        if reader.stopped:
            stream.finish()
    if reader.stopped:
        # The session could not be ended in good order, only cancelled.
        reader.end(out)
        out.end(None)
        events.put(Done(job.index, reader.cut(stream.cost_microcredits)))


class _Echo:
    """Puts the prompt before the text. Its log-probabilities are known at the end only, so
    everything waits for them where they are asked for."""

    def __init__(self, job: Job, events: Events) -> None:
        self._job, self._events = job, events
        self._waits = job.ask.options.score_prompt
        self._held: list[Piece] = []
        if job.echo and not self._waits:
            events.put(Piece(job.index, job.echo))

    def put(self, piece: Piece) -> None:
        if self._waits:
            self._held.append(piece)
        elif not self._job.echo_only:
            self._events.put(piece)

    def end(self, answer: Answer | None) -> None:
        """Everything is known. Raises ``SessionLost`` if the scores are not."""
        if not self._waits:
            return
        if answer is None:
            raise SessionLost("the session ended before the prompt's scores came")
        tokens = [Token(self._job.ask.prompt_ids[0], None)]
        tokens += [Token(one.token_id, one.logprob, one.top) for one in answer.prompt_scores]
        self._events.put(Piece(self._job.index, self._job.echo, tuple(tokens)))
        if self._job.echo_only:
            return
        for piece in self._held:
            self._events.put(piece)
        # Harnesses count on one entry per token drawn, an end token too.
        if answer.end is not None:
            end = Token(answer.end.token_id, answer.end.logprob, answer.end.top)
            self._events.put(Piece(self._job.index, "", (end,)))


class _Reader:
    """The text of one job on its way: stop sequences end it, calls are taken out.

    A token goes out once its text has, at the latest with the end; of one that a stop sequence
    cut only that part, and one that only a stop sequence needed does not.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._stops = StopFilter(job.stops)
        self._calls = CallReader(job.tools)
        self._tokens: list[tuple[int, str, Token]] = []
        """Those that wait, each with the place and the text of its delta."""
        self._read = self._passed = 0
        self._over = False
        self.delivered = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence is complete."""
        return self._stops.stopped

    def push(self, delta: TextDelta, events: _Echo) -> None:
        self.delivered += len(delta.token_ids)
        for number, token in enumerate(delta.token_ids):
            logprob = delta.logprobs[number] if delta.logprobs else None
            top = delta.top_logprobs[number] if delta.top_logprobs else ()
            known = Token(token, logprob, top)
            self._tokens.append((self._read, delta.text, known))
        self._read += len(delta.text)
        if text := self._stops.push(delta.text):
            self._passed += len(text)
            self._put(*self._calls.push(text), events)

    def end(self, events: _Echo) -> None:
        self._over = True
        held = self._stops.flush()
        text, calls = self._calls.push(held)
        more, last = self._calls.flush()
        if not self.stopped:
            self._passed = self._read + 1  # tokens without text, too
        self._put(text + more, calls + last, events)

    def _put(self, text: str, calls: list[ToolCall], events: _Echo) -> None:
        tokens = self._ready() if text or calls or self._over else ()
        if text or calls or tokens:
            events.put(Piece(self._job.index, text, tokens, tuple(calls)))

    def _ready(self) -> tuple[Token, ...]:
        """The tokens whose text has passed, which then wait no more."""
        passed, ended = self._passed, self._over or self.stopped
        ready, waiting = list[Token](), list[tuple[int, str, Token]]()
        for start, text, token in self._tokens:
            if start >= passed or (start + len(text) > passed and not ended):
                waiting.append((start, text, token))
            else:
                cut = len(text[passed - start :].encode())
                ready.append(replace(token, cut=cut) if cut else token)
        self._tokens = waiting
        return tuple(ready)

    def outcome(self, answer: Answer) -> Outcome:
        reason: Reason = (
            "length" if self._job.echo_only or answer.finish_reason == "length" else "stop"
        )
        if self._calls.calls and not self._calls.cut:
            reason = "tool_calls"
        reason = "stop" if self.stopped else reason
        cost, count = answer.cost_microcredits, answer.completion_tokens
        return Outcome(reason, count, cost, answer, self._stops.found)

    def cut(self, cost: int) -> Outcome:
        return Outcome("stop", self.delivered, cost, None, self._stops.found)
