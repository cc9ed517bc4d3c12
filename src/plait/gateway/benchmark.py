"""What the gateway adds to an answer: the lag of each token behind a fixed-rate engine.

The engine gives token k at ``start + (k + 1) * interval``; what arrives later than that is
lag. Rounds are interleaved: the engine called directly, the gateway in front of it, and any
other proxy in front of the gateway. Compare within one run only: machines are noisy.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from plait.errors import ConfigError

MODEL = "tiny-random"
_TIMEOUT_S = 120.0
_GOLDEN = 0.618034


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Streams at once, tokens of each, milliseconds between tokens, and rounds."""

    streams: int = 50
    tokens: int = 50
    interval_ms: float = 20.0
    rounds: int = 5
    proxies: tuple[tuple[str, str, str], ...] = ()
    """Others to compare with: name, base URL, model. They must stand before this gateway."""
    port: int = 0


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
    with _engine(plan) as url:
        targets = [("gateway", url, MODEL), *plan.proxies]
        for target in targets:  # warm up
            asyncio.run(_http(plan, target, 2, 3))
        for number in range(plan.rounds):
            progress(f"round {number + 1} of {plan.rounds}")
            arms.setdefault("direct", Lags([], [], [])).add(_direct(plan))
            for target in targets:
                lags = asyncio.run(_http(plan, target, plan.streams, plan.tokens))
                arms.setdefault(target[0], Lags([], [], [])).add(lags)
    figures = {name: lags.to_json() for name, lags in arms.items()}
    base = figures["direct"]
    added = {
        name: {key: round(value - base[key], 3) for key, value in figure.items() if "p50" in key}
        for name, figure in figures.items()
        if name != "direct"
    }
    return {
        "streams": plan.streams,
        "tokens": plan.tokens,
        "interval_ms": plan.interval_ms,
        "rounds": plan.rounds,
        "lag": figures,
        "added": added,
    }


class _engine:
    """A gateway over the fixed-rate engine, in a process of its own."""

    def __init__(self, plan: LoadPlan) -> None:
        self._command = [sys.executable, "-m", "plait.testing.obedient", "--endless"]
        self._command += ["--interval-ms", str(plan.interval_ms), "--port", str(plan.port)]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if not (url := self._process.stdout.readline().strip()):
            raise ConfigError("the engine did not start")
        return url

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.communicate()


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
    except* (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as errors:
        cause = errors.exceptions[0]
        raise ConfigError(f"{target[0]} at {target[1]} does not answer: {cause}") from cause
    return _lags([task.result() for task in work], plan)


async def _one(
    url: str, model: str, tokens: int, number: int, streams: int, plan: LoadPlan
) -> list[float]:
    """Seconds from sending a request to each token's arrival, of the second of three: all
    streams run then, and none starts with another."""
    await asyncio.sleep(offset_s(number, streams, tokens, plan.interval_ms))
    times = [await _ask(url, model, tokens) for _ in range(3)]
    return times[1]


def offset_s(number: int, streams: int, tokens: int, interval_ms: float) -> float:
    """When a stream starts: spread over an answer's length, and no two in step."""
    steps = number / streams * tokens + number * _GOLDEN % 1
    return steps * interval_ms / 1000


async def _ask(url: str, model: str, tokens: int) -> list[float]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": tokens}
    data = json.dumps(body).encode()
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nhost: {parts.hostname}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n"
    head += "authorization: Bearer none\r\nconnection: close\r\n\r\n"
    started_s = time.perf_counter()
    writer.write(head.encode() + data)
    times = []
    with suppress(ConnectionError):
        while line := await reader.readline():
            if (
                line.startswith(b"data: {")
                and b'"content":"' in line
                and b'"content":""' not in line
            ):
                times.append(time.perf_counter() - started_s)
    writer.close()
    if len(times) != tokens:
        raise ValueError(f"{len(times)} of {tokens} tokens came")
    return times
