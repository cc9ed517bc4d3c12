"""Calls between asyncio and a trio thread, and what happens when that thread dies."""

import asyncio
import threading
from collections.abc import Callable

import pytest
import trio

from plait.errors import NetworkError
from plait.net.bridge import Bridge, Main, describe


async def forever(bridge: Bridge, ready: Callable[[], None]) -> None:
    ready()
    await trio.sleep_forever()


async def started(main: Main = forever) -> Bridge:
    bridge = Bridge(main, "test")
    await bridge.start()
    return bridge


async def test_calls_run_in_the_trio_thread_and_return_or_raise() -> None:
    bridge = await started()

    async def where(word: str) -> tuple[str, str]:
        await trio.lowlevel.checkpoint()
        return word, threading.current_thread().name

    async def fail() -> None:
        raise KeyError("no")

    assert await bridge.call(where, "hello") == ("hello", "test")
    with pytest.raises(KeyError):
        await bridge.call(fail)
    await bridge.stop()
    await bridge.stop()
    with pytest.raises(NetworkError, match="down"):
        await bridge.call(where, "late")


async def test_tasks_are_counted_while_they_run_and_none_is_left_at_the_end() -> None:
    bridge = await started()
    idle = bridge.tasks
    running, go_on = asyncio.Event(), trio.Event()

    async def wait() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_on.wait)
            bridge.post(running.set)

    async def release() -> None:
        go_on.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bridge.call(wait))
        await running.wait()
        assert bridge.tasks == idle + 2, "the call and its child"
        await bridge.call(release)
    await bridge.stop()
    assert bridge.tasks == 0


async def test_cancelling_the_caller_cancels_the_call() -> None:
    bridge = await started()
    cancelled = asyncio.Event()
    running = asyncio.Event()

    async def wait() -> None:
        bridge.post(running.set)
        try:
            await trio.sleep_forever()
        finally:
            bridge.post(cancelled.set)

    with pytest.raises(asyncio.CancelledError):
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(bridge.call(wait))
            await running.wait()
            call.cancel()
            await cancelled.wait()
            await call
    await bridge.stop()


async def test_stopping_fails_a_call_in_flight() -> None:
    bridge = await started()
    async with asyncio.TaskGroup() as tasks:
        call = tasks.create_task(_outcome(bridge))
        await bridge.call(trio.sleep, 0)
        await bridge.stop()
    assert isinstance(call.result(), NetworkError)


async def _outcome(bridge: Bridge) -> Exception | None:
    try:
        await bridge.call(trio.sleep_forever)
    except NetworkError as error:
        return error
    return None


async def test_trio_asks_asyncio() -> None:
    main_thread = threading.current_thread().name

    async def program(bridge: Bridge, ready: Callable[[], None]) -> None:
        name = await bridge.ask(lambda: threading.current_thread().name)
        try:
            await bridge.ask(int, "x")
        except ValueError:
            bridge.post(answers.append, name)
        ready()
        await trio.sleep_forever()

    answers: list[str] = []
    bridge = await started(program)
    assert answers == [main_thread]
    await bridge.stop()


async def test_a_crash_is_reported_and_harms_nobody() -> None:
    crash = trio.Event()

    async def program(bridge: Bridge, ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            ready()
            await crash.wait()
            raise OSError("broken")

    async def trigger() -> None:
        crash.set()

    bridge = await started(program)
    await bridge.call(trigger)
    assert describe(await bridge.done) == "OSError: broken"
    with pytest.raises(NetworkError):
        await bridge.call(trigger)


async def test_a_program_that_cannot_start_says_why() -> None:
    async def program(bridge: Bridge, ready: Callable[[], None]) -> None:
        raise OSError("address in use")

    with pytest.raises(NetworkError, match="address in use"):
        await started(program)
    assert describe(None) == "it ended by itself"
