"""One request's response: runs its jobs and writes JSON or server-sent events.

The status line waits for the first event (or ``keep_alive_s``), so that what fails before
the first token is a proper HTTP error; what fails later is an error event. Money is held
before the work and settled after it, whatever happens between.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Receive, Scope, Send

from plait.gateway import failure
from plait.gateway.budgets import Key
from plait.gateway.bundles import BundleStore
from plait.gateway.config import GatewayConfig
from plait.gateway.failure import ApiError
from plait.gateway.frames import Dialect, Result, Usage
from plait.gateway.headers import stream_headers, whole_headers
from plait.gateway.key_store import Cashier, Spent
from plait.gateway.metrics import Metrics
from plait.gateway.orders import Job
from plait.gateway.port import Upstream
from plait.gateway.running import (
    Closed,
    Done,
    Event,
    Events,
    Failed,
    Gone,
    InProgress,
    Outcome,
    Piece,
    Place,
    Routed,
    run_job,
)
from plait.gateway.shares import Shares
from plait.gateway.till import Till
from plait.gateway.watchdog import Watchdog
from plait.task_scope import TaskScope

BUNDLE_PATH = "/v1/bundles/"
_KEEP_ALIVE = b": keep-alive\n\n"
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True, slots=True)
class Desk:
    """What all responses of a gateway share."""

    upstream: Upstream
    config: GatewayConfig
    metrics: Metrics
    bundles: BundleStore
    in_progress: InProgress
    cashier: Cashier | None
    shares: Shares

    def count_sessions(self) -> None:
        """Show in the metrics how many answers are in progress and wait."""
        self.metrics.sessions.set(self.in_progress.sessions)
        self.metrics.waiting.set(self.in_progress.waiting)


class _ClientGone(Exception):
    """The other end closed the connection, or reads no more."""


class Answering:
    """An ASGI response. ``owner`` is whose key asked; bundles are theirs only."""

    def __init__(
        self,
        desk: Desk,
        dialect: Dialect,
        jobs: list[Job],
        *,
        request_id: str,
        owner: str,
        key: Key | None,
        stream: bool,
    ) -> None:
        self._desk, self._config, self._dialect = desk, desk.config, dialect
        jobs = [_of_owner(job, owner) for job in jobs]
        self._jobs = jobs
        self._request_id, self._owner = request_id, owner
        self._stream = stream
        self._till = Till(desk.cashier, desk.shares, key, desk.upstream)
        self._events = Events(jobs)
        self._results = [Result(job) for job in jobs]
        self._unfinished = len(jobs)
        self._delivered = False
        self._started_s = time.monotonic()
        self._begun = False
        self._stalled = False
        self._watchdog = Watchdog(
            self._config.keep_alive_s,
            self._config.write_timeout_s,
            on_quiet=self._events.nudge,
            on_stall=self._stall,
        )
        self._limit = asyncio.timeout(self._config.request_timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = self._desk.in_progress.enter(self._events, len(self._jobs))
        if place is None:
            problem = too_many(self._desk.in_progress)
            await problem.response(scope)(scope, receive, send)
            return
        try:
            async with TaskScope() as tasks:
                tasks.create_task(self._watch(receive), name="disconnect watch")
                await self._respond(tasks, place, scope, receive, send)
        finally:
            self._desk.in_progress.leave(place)
            self._settle()
            self._desk.count_sessions()

    async def _respond(
        self, tasks: TaskScope, place: Place, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            try:
                async with self._limit:
                    with self._watchdog:
                        await self._wait(place, send)
                        await self._start(tasks)
                        write = self._write_stream if self._stream else self._write_whole
                        await write(send)
            except _ClientGone:
                return
            except Exception as error:  # noqa: BLE001 - every failure of a job arrives here
                if self._stalled:
                    return
                await self._fail(failure.of(error), scope, receive, send)
        except _ClientGone:
            return

    async def _fail(self, problem: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Say what went wrong, to whoever still reads."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.write_timeout_s):
                if self._begun:
                    await self._send(send, self._dialect.failed(problem), last=True)
                else:
                    await problem.response(scope)(scope, receive, send)

    def _stall(self) -> None:
        # A reader that stalls must not keep its place for ever.
        self._stalled = True
        self._limit.reschedule(0.0)

    async def _wait(self, place: Place, send: Send) -> None:
        """Wait for a place, telling a stream how many stand before it."""
        while not place.open.is_set():
            try:
                async with asyncio.timeout(self._config.keep_alive_s):
                    await place.open.wait()
            except TimeoutError:
                if self._stream:
                    position = self._desk.in_progress.position(place)
                    frames = await self._begin(send)
                    await self._send(send, [*frames, b": queue position %d\n\n" % position])
            self._take_now()
        self._desk.count_sessions()

    async def _start(self, tasks: TaskScope) -> None:
        self._jobs = await self._till.open(self._jobs)
        for result, job in zip(self._results, self._jobs, strict=True):
            result.job = job
            work = run_job(self._desk.upstream, job, self._events)
            tasks.create_task(work, name=f"answer {self._request_id}")

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put(Gone())

    # Whole --------------------------------------------------------------------------

    async def _write_whole(self, send: Send) -> None:
        while self._unfinished:
            await self._take()
        answers = [self._account(result) for result in self._results]
        usage = self._usage()
        body = self._dialect.whole(self._results, usage, {"answers": answers})
        headers = whole_headers(self._results, answers, usage.cost)
        await failure.json_response(body, headers=headers)({"type": "http"}, _nothing, send)

    # Streamed -----------------------------------------------------------------------

    async def _write_stream(self, send: Send) -> None:
        event = await self._take()
        frames = await self._begin(send)
        while True:
            frames += self._frames(event)
            try:
                # What has come meanwhile goes out in the same write.
                while self._unfinished and (event := self._take_now()) is not None:
                    frames += self._frames(event)
            except Exception:
                await self._send(send, frames)
                raise
            if not self._unfinished:
                break
            await self._send(send, frames)
            frames = []
            event = await self._take()
        frames += self._dialect.end(self._results, self._usage())
        await self._send(send, frames, last=True)

    def _frames(self, event: Piece | Done | None) -> list[bytes]:
        match event:
            case None:
                return [_KEEP_ALIVE]
            case Piece():
                return self._dialect.piece(event)
            case Done(index):
                result = self._results[index]
                return self._dialect.finish(result, {"answers": [self._account(result)]})

    async def _begin(self, send: Send) -> list[bytes]:
        """Send the status line; the frames that come first, for whoever sends the next ones."""
        if self._begun:
            return []
        self._begun = True
        headers = [*_STREAM_HEADERS, *stream_headers(self._results[0])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        return self._dialect.begin(self._results)

    async def _send(self, send: Send, frames: list[bytes], *, last: bool = False) -> None:
        body = b"".join(frames)
        self._watchdog.writing()
        try:
            await send({"type": "http.response.body", "body": body, "more_body": not last})
        except OSError as error:
            raise _ClientGone from error
        self._watchdog.written()

    # Both ---------------------------------------------------------------------------

    async def _take(self) -> Piece | Done | None:
        """The next event, noted, or None after a silence; raises what a job raised, or that
        the client is gone."""
        while True:
            event = await self._events.next()
            self._note(event)
            wanted = _wanted(event)
            if event is None or wanted is not None:
                return wanted

    def _take_now(self) -> Piece | Done | None:
        event = self._events.next_now()
        self._note(event)
        return _wanted(event)

    def _note(self, event: Event | None) -> None:
        match event:
            case Piece(index):
                if not self._delivered:
                    self._delivered = True
                    self._desk.metrics.first_token_s.labels(self._model).observe(
                        time.monotonic() - self._started_s
                    )
                self._results[index].add(event)
            case Done(index, outcome):
                self._results[index].outcome = outcome
                self._unfinished -= 1
                self._note_answer(self._results[index].job, outcome)
            case Routed(index, route, predicted_cost):
                self._results[index].route = route
                self._results[index].predicted_cost = predicted_cost
            case Closed(index, vouched):
                self._results[index].vouched = vouched

    @property
    def _model(self) -> str:
        return self._jobs[0].model.name

    def _note_answer(self, job: Job, outcome: Outcome) -> None:
        if not self._unfinished:
            took_s = time.monotonic() - self._started_s
            self._desk.metrics.request_s.labels(job.model.name).observe(took_s)
        if outcome.answer is not None and outcome.answer.bundle is not None:
            self._desk.bundles.put(self._bundle_id(job), self._owner, outcome.answer.bundle)

    def _usage(self) -> Usage:
        # A prompt counts once, however many choices were drawn for it.
        outcomes = [result.outcome for result in self._results if result.outcome is not None]
        return Usage(
            prompt_tokens=sum(job.prompt_tokens for job in self._jobs if job.choice == 0),
            completion_tokens=sum(outcome.completion_tokens for outcome in outcomes),
            cost=sum(outcome.cost for outcome in outcomes),
            cached_tokens=sum(
                result.outcome.answer.cached_tokens
                for result in self._results
                if result.job.choice == 0 and result.outcome and result.outcome.answer
            ),
        )

    def _settle(self) -> None:
        """All jobs have ended: charge what their vouchers promise, also to who has left."""
        while (event := self._events.next_now()) is not None:
            self._note(event)
        spent = self._spent()
        self._till.close(spent)
        self._desk.metrics.add_spend(self._model, spent)

    def _spent(self) -> Spent:
        usage = self._usage()
        cost = sum(result.vouched for result in self._results)
        completion = usage.completion_tokens + sum(
            len(result.tokens) for result in self._results if result.outcome is None
        )
        return Spent(usage.prompt_tokens if completion or cost else 0, completion, cost)

    def _account(self, result: Result) -> dict[str, Any]:
        """What Plait adds to an answer: who did it, what it cost, where the evidence is."""
        job, outcome = result.job, result.finished
        answer = outcome.answer
        account: dict[str, Any] = {
            "index": job.index,
            "cost_microcredits": outcome.cost,
            "cost_is_estimate": answer is None,
        }
        if answer is None:
            return account
        stored = self._desk.bundles.get(self._bundle_id(job), self._owner) is not None
        return account | {
            "route": [
                {"peer": step.peer, "start": step.span.start, "end": step.span.end}
                for step in answer.route
            ],
            "epochs": answer.epochs,
            "seed": answer.seed,
            "receipts_verified": answer.receipts_verified,
            "ttft_s": round(answer.ttft_s, 6),
            "tpot_s": round(answer.tpot_s, 6),
            "bundle": BUNDLE_PATH + self._bundle_id(job) if stored else None,
        }

    def _bundle_id(self, job: Job) -> str:
        return self._request_id if len(self._jobs) == 1 else f"{self._request_id}-{job.index}"


def _wanted(event: Event | None) -> Piece | Done | None:
    """What a response is made of; raises what a job raised, or that the client is gone."""
    match event:
        case Gone():
            raise _ClientGone
        case Failed(error):
            raise error
        case Piece() | Done():
            return event
    return None


def _of_owner(job: Job, owner: str) -> Job:
    """A job that shares cached prompts with jobs of the same owner only."""
    if job.ask.options.tenant == owner:
        return job
    options = replace(job.ask.options, tenant=owner)
    return replace(job, ask=replace(job.ask, options=options))


def too_many(in_progress: InProgress) -> ApiError:
    """Why there is no place."""
    if in_progress.closing:
        return ApiError(
            503, "the gateway is shutting down", kind="overloaded_error", code="overloaded"
        )
    return ApiError(
        429,
        f"{in_progress.sessions} answers are in progress, and no more are taken",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
    )


async def _nothing() -> Any:
    raise AssertionError("a response does not read")
