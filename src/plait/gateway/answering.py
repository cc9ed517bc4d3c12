"""One request's response: runs its jobs and writes JSON or server-sent events.

The status line waits for the first event (or ``keep_alive_s``), so that what fails before
the first token is a proper HTTP error; what fails later is an error event, without [DONE].
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from plait.gateway import failure
from plait.gateway.bundles import BundleStore
from plait.gateway.config import GatewayConfig
from plait.gateway.dialects import Dialect, Head
from plait.gateway.failure import ApiError
from plait.gateway.metrics import Metrics
from plait.gateway.orders import Job
from plait.gateway.port import Upstream
from plait.gateway.running import (
    Done,
    Events,
    Failed,
    Gone,
    InProgress,
    Outcome,
    Piece,
    run_job,
)
from plait.task_scope import TaskScope

BUNDLE_PATH = "/v1/bundles/"
_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Desk:
    """What all responses of a gateway share."""

    upstream: Upstream
    config: GatewayConfig
    metrics: Metrics
    bundles: BundleStore
    in_progress: InProgress


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
        stream: bool,
        include_usage: bool,
    ) -> None:
        self._desk, self._config, self._dialect = desk, desk.config, dialect
        self._jobs = jobs
        self._request_id, self._owner = request_id, owner
        self._stream, self._include_usage = stream, include_usage
        self._head = Head(dialect.prefix + request_id, int(time.time()), jobs[0].model.name)
        self._events = Events(jobs)
        self._outcomes: dict[int, Outcome] = {}
        self._texts: dict[int, list[str]] = {job.index: [] for job in jobs}
        self._started_s = time.monotonic()
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._desk.in_progress.enter(self._events, len(self._jobs)):
            await _too_many(self._desk.in_progress).response()(scope, receive, send)
            return
        self._count_sessions()
        try:
            async with TaskScope() as tasks:
                tasks.create_task(self._watch(receive), name="disconnect watch")
                for job in self._jobs:
                    work = run_job(self._desk.upstream, job, self._events)
                    tasks.create_task(work, name=f"answer {self._request_id}")
                await self._respond(scope, receive, send)
        finally:
            self._desk.in_progress.leave(self._events)
            self._count_sessions()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    await (self._write_stream(send) if self._stream else self._write_whole(send))
            except _ClientGone:
                return
            except Exception as error:  # noqa: BLE001 - every failure of a job arrives here
                problem = failure.of(error)
                if self._begun:
                    await self._send_event(send, problem.body(), last=True)
                else:
                    await problem.response()(scope, receive, send)
        except _ClientGone:
            return

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put(Gone())

    # Whole --------------------------------------------------------------------------

    async def _write_whole(self, send: Send) -> None:
        while len(self._outcomes) < len(self._jobs):
            await self._take(None)
        choices, answers = [], []
        for job in self._jobs:
            outcome = self._outcomes[job.index]
            choices.append(self._dialect.choice(job, "".join(self._texts[job.index]), outcome))
            answers.append(self._account(job, outcome))
        body = self._head.of(self._dialect.whole_kind) | {
            "choices": choices,
            "usage": self._usage(),
            "plait": {"answers": answers},
        }
        headers = _headers(answers, self._usage()["cost"])
        await failure.json_response(body, headers=headers)({"type": "http"}, _nothing, send)

    # Streamed -----------------------------------------------------------------------

    async def _write_stream(self, send: Send) -> None:
        event = await self._take(self._config.keep_alive_s)
        await self._begin(send)
        while True:
            match event:
                case None:
                    await self._send(send, _KEEP_ALIVE)
                case Piece(index, text):
                    await self._send_choice(send, self._dialect.piece(index, text))
                case Done(index, outcome):
                    job = self._jobs[index]
                    choice = self._dialect.closing(job, outcome)
                    extra = {"answers": [self._account(job, outcome)]}
                    await self._send_choice(send, choice, {"plait": extra})
            if len(self._outcomes) == len(self._jobs):
                break
            event = await self._take(self._config.keep_alive_s)
        if self._include_usage:
            usage = {"choices": [], "usage": self._usage()}
            await self._send_event(send, self._head.of(self._dialect.chunk_kind) | usage)
        await self._send(send, _DONE, last=True)

    async def _begin(self, send: Send) -> None:
        self._begun = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for job in self._jobs:
            if (choice := self._dialect.opening(job.index)) is not None:
                await self._send_choice(send, choice)

    async def _send_choice(
        self, send: Send, choice: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> None:
        chunk = self._head.of(self._dialect.chunk_kind) | {"choices": [choice]} | (extra or {})
        if self._include_usage:
            chunk["usage"] = None
        await self._send_event(send, chunk)

    async def _send_event(self, send: Send, value: object, *, last: bool = False) -> None:
        await self._send(send, b"data: " + msgspec.json.encode(value) + b"\n\n", last=last)

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        # A reader that stalls must not keep its place for ever.
        try:
            async with asyncio.timeout(self._config.write_timeout_s):
                await send({"type": "http.response.body", "body": data, "more_body": not last})
        except (TimeoutError, OSError) as error:
            raise _ClientGone from error

    # Both ---------------------------------------------------------------------------

    async def _take(self, timeout_s: float | None) -> Piece | Done | None:
        """The next event, noted; raises what a job raised, or that the client is gone."""
        event = await self._events.next(timeout_s)
        match event:
            case Gone():
                raise _ClientGone
            case Failed(error):
                raise error
            case Piece(index, text):
                if not any(self._texts.values()):
                    self._desk.metrics.first_token_s.labels(self._head.model).observe(
                        time.monotonic() - self._started_s
                    )
                self._texts[index].append(text)
            case Done(index, outcome):
                self._outcomes[index] = outcome
                self._note(self._jobs[index], outcome)
        return event

    def _note(self, job: Job, outcome: Outcome) -> None:
        metrics, model = self._desk.metrics, job.model.name
        metrics.prompt_tokens.labels(model).inc(job.prompt_tokens)
        metrics.completion_tokens.labels(model).inc(outcome.completion_tokens)
        metrics.cost.labels(model).inc(outcome.cost or 0)
        if len(self._outcomes) == len(self._jobs):
            metrics.request_s.labels(model).observe(time.monotonic() - self._started_s)
        if outcome.answer is not None and outcome.answer.bundle is not None:
            self._desk.bundles.put(self._bundle_id(job), self._owner, outcome.answer.bundle)

    def _usage(self) -> dict[str, Any]:
        # A prompt counts once, however many choices were drawn for it.
        prompt = sum(job.prompt_tokens for job in self._jobs if job.choice == 0)
        completion = sum(outcome.completion_tokens for outcome in self._outcomes.values())
        costs = [outcome.cost for outcome in self._outcomes.values()]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "cost": sum(cost for cost in costs if cost is not None),
        }

    def _account(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """What Plait adds to an answer: who did it, what it cost, where the evidence is."""
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

    def _count_sessions(self) -> None:
        self._desk.metrics.sessions.set(self._desk.in_progress.sessions)


def _headers(answers: list[dict[str, Any]], cost: int) -> dict[str, str]:
    headers = {"x-plait-cost-microcredits": str(cost)}
    routes = [answer["route"] for answer in answers if "route" in answer]
    if routes:
        steps = (f"{step['start']}:{step['end']}={step['peer']}" for step in routes[0])
        headers["x-plait-route"] = ",".join(steps)
    if bundles := [answer["bundle"] for answer in answers if answer.get("bundle")]:
        headers["x-plait-bundle"] = bundles[0]
    return headers


def _too_many(in_progress: InProgress) -> ApiError:
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
