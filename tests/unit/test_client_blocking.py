"""The client without async: when what it lives on breaks, and when a stream is left early."""

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Self, cast

import pytest

from plait.client import Answer, background
from plait.client.background import background_loop
from plait.client.blocking import BlockingStream, Client
from plait.client.driver import Deliver
from plait.client.generation import Generation
from plait.client.streaming import Begun, TextStream, Tokens
from plait.errors import LocalProtocolError
from plait.model.tokenizer import Tokenizer
from plait.task_scope import TaskScope

TIMEOUT_S = 5
"""How long a test that has to fail waits for what never comes."""


class Breaking:
    """An asynchronous client whose background work breaks while it answers."""

    def __init__(self) -> None:
        self.owner: asyncio.Task[Any] | None = None
        self.cancelled = False

    async def __aenter__(self) -> Self:
        self.owner = asyncio.current_task()
        return self

    async def __aexit__(self, *_: object) -> None:
        raise RuntimeError("a bug in the background")

    async def generate(self, *_: object) -> None:
        assert self.owner is not None
        self.owner.cancel()  # as a task group does when a child of it raises
        try:
            async with asyncio.timeout(5):  # for the test to fail in time
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def client_of(inner: object) -> Client:
    client = Client.__new__(Client)
    client._client, client._loop, client._living = inner, None, None  # type: ignore[assignment]
    return client


def test_a_call_does_not_wait_for_a_client_that_has_ended() -> None:
    inner = Breaking()
    client = client_of(inner)
    with pytest.raises(RuntimeError, match="a bug in the background") as raised, client:
        client.generate("tiny-random", "Hello")
    assert inner.cancelled
    assert isinstance(raised.value.__context__, asyncio.CancelledError | LocalProtocolError)


class Endless:
    """An asynchronous client, its one generation, which delivers a token and goes on for ever,
    and the tokenizer."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    async def __aenter__(self) -> Self:
        self.tasks = await TaskScope().__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tasks.__aexit__(None, None, None)

    def stream(self, *_: object) -> TextStream:
        async def begin(tokens: Tokens) -> Begun:
            tokens.emit(Deliver(ord("a"), -0.5))
            return Begun(cast("Generation", self), cast("Tokenizer", Letter()), self.tasks)

        return TextStream(begin)

    async def run(self, decode: Callable[[Any], str]) -> Answer:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError


class Letter:
    """A tokenizer for ASCII."""

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode()

    def stream(self) -> Self:
        return self

    def push(self, token: int) -> str:
        return chr(token)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No cyclic collector but where a test asks for it."""
    gc.disable()
    yield
    gc.enable()


async def _collect() -> None:
    gc.collect()


def on_the_loop(client: Client, work: Coroutine[Any, Any, None]) -> None:
    """Run something on the loop's thread; fails if it hangs there."""
    try:
        asyncio.run_coroutine_threadsafe(work, background_loop()).result(TIMEOUT_S)
    except TimeoutError:
        # The loop is lost: neither leaving the client nor the next test may wait for it.
        client._loop = background._running = None
        raise


@pytest.mark.usefixtures("uncollected")
def test_a_loop_left_early_cancels_the_session_without_a_collector() -> None:
    endless = Endless()
    with client_of(endless) as client:
        for _ in client.stream("tiny-random", "Hello"):
            break
        assert endless.cancelled.wait(TIMEOUT_S)


@pytest.mark.usefixtures("uncollected")
def test_a_stream_that_only_the_collector_finds_does_not_stop_the_loop() -> None:
    endless = Endless()
    with client_of(endless) as client:
        stream = client.stream("tiny-random", "Hello")
        next(stream)
        circle: list[object] = [stream]
        circle.append(circle)
        del stream, circle
        on_the_loop(client, _collect())
        assert endless.cancelled.wait(TIMEOUT_S)


@pytest.mark.usefixtures("uncollected")
def test_closing_on_the_loops_thread_cancels_without_waiting() -> None:
    endless = Endless()

    async def close(stream: BlockingStream) -> None:
        stream.close()

    with client_of(endless) as client:
        stream = client.stream("tiny-random", "Hello")
        next(stream)
        on_the_loop(client, close(stream))
        assert endless.cancelled.wait(TIMEOUT_S)
        assert list(stream) == []


def test_a_stream_that_is_kept_ends_with_its_block() -> None:
    endless = Endless()
    with client_of(endless) as client:
        with client.stream("tiny-random", "Hello") as stream:
            next(stream)
        assert endless.cancelled.is_set()
        stream.finish()
        assert list(stream) == []
