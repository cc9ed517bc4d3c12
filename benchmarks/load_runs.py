"""Closed and open loops of a client, for ``overload.py``: what came of each request, and when.

A refusal is timed from the request's arrival. One that was made in the client, because a stage has
just said no to another session, is told from one for which stages were asked; each ``Open`` is
timed on its own, from the call to its answer, and so is how late the client's event loop comes.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from plait.client import AsyncClient, Options
from plait.errors import PlaitError
from plait.testnet.load import PROMPTS
from plait.v1 import stage_pb2_grpc

WARM_UP_S = 2.0
"""Of each run: not counted."""
DRAIN_S = 60.0
REFUSED_REST_S = 0.1
"""Of a worker of a closed loop that was refused."""
HEARTBEAT_S = 0.02


@dataclass(slots=True)
class Request:
    """One request: ``code`` is the error's, empty if it was answered."""

    started_s: float
    ended_s: float = 0.0
    opens: int = 0
    """Stages that were asked to take it."""
    code: str = ""
    reason: str = ""

    @property
    def took_s(self) -> float:
        """From its arrival to its end."""
        return self.ended_s - self.started_s


@dataclass(slots=True)
class Load:
    """Requests of one run, the Opens they cost, and how busy the generator itself was."""

    requests: list[Request] = field(default_factory=list)
    opens_s: list[float] = field(default_factory=list)
    refused_opens_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    loop_late_s: list[float] = field(default_factory=list)
    cpu_share: float = 0.0


CURRENT: ContextVar[Request] = ContextVar("the request that a task works for")


def quantile(values: list[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 1)


class Timed:
    """Times every ``Open`` that the client library makes; ``into`` is where they are noted."""

    def __init__(self) -> None:
        self.into = Load()
        plain: Callable[[Any], Any] = stage_pb2_grpc.StageServiceStub

        def stub(channel: Any) -> Any:
            made = plain(channel)
            inner = made.Open

            async def timed_open(request: Any, timeout: float) -> Any:
                load, started_s = self.into, time.monotonic()
                CURRENT.get().opens += 1
                response = await inner(request, timeout=timeout)
                took_s = time.monotonic() - started_s
                load.opens_s.append(took_s)
                if response.HasField("refusal"):
                    load.refused_opens_s.append(took_s)
                return response

            made.Open = timed_open
            return made

        stage_pb2_grpc.StageServiceStub = stub  # type: ignore[assignment,misc]


class Bench:
    """The runs on one testnet."""

    def __init__(self, client: AsyncClient, options: argparse.Namespace) -> None:
        self.client = client
        self.options = options
        self.timed = Timed()
        self.draw = random.Random(options.seed)
        self.slo_s = 0.0
        self.number = 0

    async def ask(self, load: Load) -> Request:
        """One request from arrival to end."""
        self.number += 1
        request = Request(time.monotonic())
        CURRENT.set(request)  # what this task starts has it, too
        asked = Options(
            max_tokens=self.options.tokens,
            seed=self.number,
            temperature=0.8,
            qos=self.options.qos,
        )
        prompt = PROMPTS[self.number % len(PROMPTS)]
        try:
            async with asyncio.timeout(DRAIN_S):
                await self.client.generate(self.options.model, prompt, asked)
        except TimeoutError:
            request.code = "timeout"
        except PlaitError as error:
            request.code, request.reason = error.code, str(error)
        request.ended_s = time.monotonic()
        load.requests.append(request)
        return request

    async def alone(self) -> float:
        """The median time of an answer when nothing else runs; warms everything up first."""
        warming, load = Load(), Load()
        for _ in range(4):
            await self.ask(warming)
        for _ in range(6):
            await self.ask(load)
        failed = [request.reason for request in load.requests if request.code]
        if failed:
            raise SystemExit(f"not even one at a time: {failed[0]}")
        return statistics.median(request.took_s for request in load.requests)

    async def closed(self, workers: int) -> dict[str, Any]:
        """``workers`` who each ask again as soon as they are answered."""

        async def work(load: Load, until_s: float) -> None:
            while time.monotonic() < until_s:
                if (await self.ask(load)).code:
                    await asyncio.sleep(REFUSED_REST_S)

        async def loop(load: Load, until_s: float) -> None:
            await asyncio.gather(*(work(load, until_s) for _ in range(workers)))

        return {"workers": workers, **await self.run(loop)}

    async def open(self, rate: float) -> dict[str, Any]:
        """Arrivals at a fixed rate, whatever comes of them, spaced as a Poisson process is."""

        async def loop(load: Load, until_s: float) -> None:
            due_s = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                while due_s < until_s:
                    await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                    load.late_s.append(time.monotonic() - due_s)
                    tasks.create_task(self.ask(load))
                    due_s += self.draw.expovariate(rate)

        return {"rate": round(rate, 2), **await self.run(loop)}

    async def run(self, loop: Callable[[Load, float], Awaitable[None]]) -> dict[str, Any]:
        """One run; what ends between the warm-up and its last second counts."""
        load = Load()
        self.timed.into = load
        cpu_s, started_s = time.process_time(), time.monotonic()
        from_s, until_s = started_s + WARM_UP_S, started_s + WARM_UP_S + self.options.seconds

        async def share() -> None:
            await asyncio.sleep(until_s - started_s)
            load.cpu_share = (time.process_time() - cpu_s) / (until_s - started_s)

        async def beat() -> None:
            while time.monotonic() < until_s:
                due_s = time.monotonic() + HEARTBEAT_S
                await asyncio.sleep(HEARTBEAT_S)
                load.loop_late_s.append(time.monotonic() - due_s)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(share())
            tasks.create_task(beat())
            await loop(load, until_s)
        await asyncio.sleep(0.3)
        return self.figures(load, from_s, until_s)

    def figures(self, load: Load, from_s: float, until_s: float) -> dict[str, Any]:
        """What one run came to."""
        answered = [request for request in load.requests if not request.code]
        ended = [request for request in answered if from_s <= request.ended_s < until_s]
        good = [request for request in ended if request.took_s <= self.slo_s]
        return {
            "goodput": round(len(good) / (until_s - from_s), 3),
            "throughput": round(len(ended) / (until_s - from_s), 3),
            "requests": len(load.requests),
            "answered": len(answered),
            "answered_within_slo": sum(request.took_s <= self.slo_s for request in answered),
            "answer_p50_ms": quantile([request.took_s for request in answered], 0.5),
            "answer_p99_ms": quantile([request.took_s for request in answered], 0.99),
            "errors": dict(Counter(request.code for request in load.requests if request.code)),
            "reasons": dict(Counter(_kind(request.reason) for request in load.requests)),
            **refusals(load),
            "opens_per_request": round(len(load.opens_s) / max(1, len(load.requests)), 3),
            "client_loop_late_p99_ms": quantile(load.loop_late_s, 0.99),
            "generator_cpu_share": round(load.cpu_share, 3),
            "arrival_late_p99_ms": quantile(load.late_s, 0.99),
        }


def refusals(load: Load) -> dict[str, Any]:
    """How long refusals took: all, those made in the client, those that asked stages."""
    refused = [request for request in load.requests if request.code == "capacity"]
    kinds = {
        "refused": [request.took_s for request in refused],
        "refused_here": [request.took_s for request in refused if not request.opens],
        "refused_asked": [request.took_s for request in refused if request.opens],
        "open_refused": load.refused_opens_s,
    }
    figures: dict[str, Any] = {}
    for name, times in kinds.items():
        figures[f"{name}"] = len(times)
        figures[f"{name}_p50_ms"] = quantile(times, 0.5)
        figures[f"{name}_p99_ms"] = quantile(times, 0.99)
    return figures


def _kind(reason: str) -> str:
    """A reason without its numbers and names."""
    words = [word for word in reason.split() if not any(ch.isdigit() for ch in word)]
    return " ".join(words)[:120]
