"""``TextStream``: tokens as they come, then the answer; and every way in which it may end."""

import asyncio
import gc
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from plait.client import Answer, TextDelta
from plait.client.driver import Deliver
from plait.client.generation import Generation
from plait.client.streaming import Begun, TextStream, Tokens
from plait.errors import CapacityError, ConfigError
from plait.model.tokenizer import Tokenizer
from plait.task_scope import TaskScope

ANSWER = cast("Answer", object())
EURO = "€".encode()


class Letters:
    """A tokenizer whose ids are bytes; it holds back characters that are not whole."""

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def stream(self) -> "Letters":
        self._held = b""
        return self

    def push(self, token: int) -> str:
        self._held += bytes([token])
        try:
            text, self._held = self._held.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text

    def flush(self) -> str:
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


@dataclass
class Script:
    """A generation that delivers bytes, one at each turn of the loop, then ends."""

    ids: bytes
    error: Exception | None = None
    stopped: bool = False
    cancelled: bool = False
    cost_microcredits: int = 0
    emitted: int = 0
    tokens: Tokens = field(default_factory=Tokens)

    def stop(self) -> None:
        self.stopped = True

    async def run(self, decode: Callable[[Any], str]) -> Answer:
        try:
            for token in self.ids:
                if self.stopped:
                    break
                self.tokens.emit(Deliver(token, -0.5))
                self.emitted += 1
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled = True
            self.cost_microcredits = 9
            raise
        if self.error is not None:
            raise self.error
        return ANSWER


def stream_of(script: Script, tasks: TaskScope) -> TextStream:
    async def begin(tokens: Tokens) -> Begun:
        script.tokens = tokens
        return Begun(cast("Generation", script), cast("Tokenizer", Letters()), tasks)

    return TextStream(begin)


async def test_every_token_then_what_was_held_back_then_the_answer() -> None:
    async with TaskScope() as tasks:
        items = [item async for item in stream_of(Script(b"a" + EURO + EURO[:2]), tasks)]
    *deltas, answer = items
    assert answer is ANSWER
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    read = cast("list[TextDelta]", deltas)
    assert [delta.text for delta in read] == ["a", "", "", "€", "", "", "\ufffd"]
    assert [token for delta in read for token in delta.token_ids] == list(b"a" + EURO + EURO[:2])
    assert [value for delta in read for value in delta.logprobs] == [-0.5] * 6


async def test_what_fails_is_raised_after_what_was_delivered() -> None:
    async with TaskScope() as tasks:
        stream, seen = stream_of(Script(b"ab", CapacityError("full")), tasks), list[Any]()
        with pytest.raises(CapacityError, match="full"):
            async for item in stream:
                seen.append(item)
        assert [item.text for item in seen] == ["a", "b"]
        # The client outlives one failed answer.
        assert [item async for item in stream_of(Script(b""), tasks)] == [ANSWER]


async def test_what_cannot_begin_is_raised_at_the_first_look() -> None:
    async def begin(tokens: Tokens) -> Begun:
        raise ConfigError("no")

    stream = TextStream(begin)
    stream.finish()
    with pytest.raises(ConfigError):
        await anext(stream)


async def test_finish_ends_in_good_order_also_before_the_start() -> None:
    async with TaskScope() as tasks:
        script = Script(b"abcdef")
        stream = stream_of(script, tasks)
        first = await anext(stream)
        stream.finish()
        rest = [item async for item in stream]
        assert (script.stopped, script.cancelled) == (True, False)
        assert isinstance(first, TextDelta)
        assert rest[-1] is ANSWER
        assert script.emitted == len(rest)  # all but the first, and the answer
        early = Script(b"abc")
        stream = stream_of(early, tasks)
        stream.finish()
        assert [item async for item in stream] == [ANSWER]


async def test_leaving_cancels_the_session_and_waits_for_its_end() -> None:
    async with TaskScope() as tasks:
        script = Script(b"abcdef")
        async with aclosing(stream_of(script, tasks)) as stream:
            assert stream.cost_microcredits == 0
            await anext(stream)
        assert script.cancelled
        assert stream.cost_microcredits == 9
        assert script.emitted < 6


class Endless:
    """A generation of as many tokens as there is time for."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def run(self, decode: Callable[[Any], str]) -> Answer:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError


async def test_a_loop_left_early_cancels_the_session_without_a_collector() -> None:
    endless = Endless()

    async def begin(tokens: Tokens) -> Begun:
        tokens.emit(Deliver(ord("a"), -0.5))
        return Begun(cast("Generation", endless), cast("Tokenizer", Letters()), tasks)

    gc.disable()
    try:
        async with TaskScope() as tasks:
            async for _ in TextStream(begin):
                break
            async with asyncio.timeout(5):  # for the test to fail in time
                await endless.cancelled.wait()
    finally:
        gc.enable()


async def test_a_stream_that_is_kept_ends_with_its_block() -> None:
    async with TaskScope() as tasks:
        script = Script(b"abcdef")
        async with stream_of(script, tasks) as stream:
            async for _ in stream:
                break
        assert script.cancelled
        assert [item async for item in stream] == []
