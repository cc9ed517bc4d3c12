"""What the gateway adds to an answer: how far its tokens lag behind a fixed-rate engine.

The engine gives token k at ``start + (k + 1) * interval``; what arrives later is lag, counted
from the moment a request is sent. Compared are, in interleaved rounds:

- ``direct``: the engine called in its own process, as a program calls the client library;
- ``gateway``: the same engine behind ``plait serve``'s application, asked over HTTP;
- ``bare``: the same engine behind the least HTTP server there can be (``testing.bare``);
- any other proxy, standing in front of ``bare``, which is to it what a network is to us.

``added`` is the difference of medians: for the gateway and ``bare`` over ``direct``, for a
proxy over ``bare``. ``end`` is what a request takes longer in all; the first token's lag has
the whole cost of taking the request. Compare within one run only: machines are noisy.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from plait.errors import ConfigError

MODEL = "tiny-random"
_TIMEOUT_S = 120.0
_GOLDEN = 0.618034
_CONTENT = re.compile(rb'"content": ?"[^"]')
_LAST_CHUNK = b"0\r\n\r\n"
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Streams at once, tokens of each, milliseconds between tokens, and rounds."""

    streams: int = 50
    tokens: int = 50
    interval_ms: float = 20.0
    rounds: int = 5
    proxies: tuple[tuple[str, str, str], ...] = ()
    """Others to compare with: name, base URL, model. They must stand before ``bare``."""
    port: int = 0
    """Of ``bare``; 0: chosen free."""

    @property
    def names(self) -> frozenset[str]:
        """Of the proxies."""
        return frozenset(name for name, _, _ in self.proxies)


@dataclass(slots=True)
class Lags:
    """Lag in milliseconds: of first tokens, of all tokens, and of the end of each answer."""

    first: list[float]
    every: list[float]
    end: list[float]

    def add(self, other: "Lags") -> None:
        """Take a round's figures in."""
        self.first += other.first
        self.every += other.every
        self.end += other.end

    def to_json(self) -> dict[str, float]:
        """Medians and tails."""
        figures = {}
        for name in ("first", "every", "end"):
            values = sorted(getattr(self, name))
            figures[f"{name}_p50_ms"] = round(statistics.median(values), 3)
            figures[f"{name}_p99_ms"] = round(values[int(0.99 * (len(values) - 1))], 3)
        return figures


def measure_gateway(plan: LoadPlan, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure; JSON-ready. Raises ``ConfigError`` if something does not answer."""
    arms: dict[str, Lags] = {}
    with _served(plan) as url, _served(plan, "--bare", "--port", str(plan.port)) as bare_url:
        targets = [("gateway", url, MODEL), ("bare", bare_url, MODEL), *plan.proxies]
        for target in targets:  # warm up
            _run(_http(plan, target, 2, 3))
        for number in range(plan.rounds):
            progress(f"round {number + 1} of {plan.rounds}")
            arms.setdefault("direct", Lags([], [], [])).add(_direct(plan))
            for target in targets:
                lags = _run(_http(plan, target, plan.streams, plan.tokens))
                arms.setdefault(target[0], Lags([], [], [])).add(lags)
    figures = {name: lags.to_json() for name, lags in arms.items()}
    added = {
        name: _above(figure, figures["bare" if name in plan.names else "direct"])
        for name, figure in figures.items()
        if name != "direct"
    }
    return {
        "streams": plan.streams,
        "tokens": plan.tokens,
        "interval_ms": plan.interval_ms,
        "rounds": plan.rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "lag": figures,
        "added": added,
    }


def _above(figure: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {key: round(value - base[key], 3) for key, value in figure.items() if "p50" in key}


@contextmanager
def _served(plan: LoadPlan, *arguments: str) -> Iterator[str]:
    """The fixed-rate engine behind HTTP, in a process of its own; gives its base URL."""
    command = [sys.executable, "-m", "plait.testing.obedient", "--endless", *arguments]
    command += ["--interval-ms", str(plan.interval_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not (url := process.stdout.readline().strip()):
                raise ConfigError("the engine did not start")
            yield url
        finally:
            process.terminate()
            process.communicate()


def _run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    # The load's own cost is lag, too: it gets the faster loop, as the servers do.
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _direct(plan: LoadPlan) -> Lags:
    """The engine without a gateway, in a process of its own."""
    command = [sys.executable, "-m", "plait.testing.obedient", "--endless", "--direct"]
    command += [str(plan.streams), "--tokens", str(plan.tokens)]
    command += ["--interval-ms", str(plan.interval_ms)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return _lags(json.loads(done.stdout), plan)


def _lags(times: list[list[float]], plan: LoadPlan) -> Lags:
    """From seconds since the start of each stream, per token."""
    step = plan.interval_ms / 1000
    behind = [[1000 * (at - (k + 1) * step) for k, at in enumerate(one)] for one in times]
    return Lags(
        [one[0] for one in behind],
        [lag for one in behind for lag in one],
        [one[-1] for one in behind],
    )


async def _http(plan: LoadPlan, target: tuple[str, str, str], streams: int, tokens: int) -> Lags:
    try:
        async with asyncio.timeout(_TIMEOUT_S), asyncio.TaskGroup() as group:
            work = [
                group.create_task(_one(target[1], target[2], tokens, number, streams, plan))
                for number in range(streams)
            ]
    except* (OSError, ValueError, TimeoutError) as errors:
        cause = errors.exceptions[0]
        raise ConfigError(f"{target[0]} at {target[1]} does not answer: {cause}") from cause
    return _lags([task.result() for task in work], plan)


async def _one(
    url: str, model: str, tokens: int, number: int, streams: int, plan: LoadPlan
) -> list[float]:
    """Seconds from sending a request to each token's arrival, of the second of three: all
    streams run then, and none starts with another."""
    await asyncio.sleep(offset_s(number, streams, tokens, plan.interval_ms))
    async with connected(url) as ask:
        times = [await ask(model, tokens) for _ in range(3)]
    return times[1]


def offset_s(number: int, streams: int, tokens: int, interval_ms: float) -> float:
    """When a stream starts: spread over an answer's length, and no two in step."""
    steps = number / streams * tokens + number * _GOLDEN % 1
    return steps * interval_ms / 1000


Ask = Callable[[str, int], Awaitable[list[float]]]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Ask]:
    """Asks over one connection, which is kept, as SDKs keep theirs.

    What it gives takes a model and a number of tokens, and returns the seconds from sending
    the request to the arrival of each token of its answer.
    """
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    where = parts.hostname or "127.0.0.1", parts.port or 80
    transport, reader = await loop.create_connection(_Arrivals, *where)
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nhost: {parts.hostname}\r\n"
    head += "content-type: application/json\r\nauthorization: Bearer none\r\n"

    async def ask(model: str, tokens: int) -> list[float]:
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        body = {"model": model, "messages": messages, "stream": True, "max_tokens": tokens}
        data = json.dumps(body).encode()
        ended = reader.expect()
        started_s = time.perf_counter()
        transport.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        await ended
        if len(reader.arrived_s) != tokens:
            raise ValueError(f"{len(reader.arrived_s)} of {tokens} tokens came")
        return [at_s - started_s for at_s in reader.arrived_s]

    try:
        yield ask
    finally:
        transport.close()


class _Arrivals(asyncio.Protocol):
    """Notes when each token of a streamed answer comes, and when the answer has ended."""

    def __init__(self) -> None:
        self.arrived_s: list[float] = []
        self._ended: asyncio.Future[None] | None = None
        self._rest = b""

    def expect(self) -> "asyncio.Future[None]":
        """An answer comes next; the future is done at its end."""
        self.arrived_s, self._rest = [], b""
        self._ended = asyncio.get_running_loop().create_future()
        return self._ended

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        whole, _, self._rest = (self._rest + data).rpartition(b"\n")
        self.arrived_s += [now_s] * len(_CONTENT.findall(whole))
        if data.endswith(_LAST_CHUNK):
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
