"""The event loop of blocking clients."""

import asyncio
import threading

from plait.client.background import background_loop, in_background


async def _where() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    return asyncio.get_running_loop(), threading.current_thread()


def test_all_clients_of_a_process_share_one_loop_in_a_thread_of_its_own() -> None:
    first, again = background_loop(), background_loop()
    assert first is again

    loop, thread = asyncio.run_coroutine_threadsafe(_where(), first).result()
    assert loop is first
    assert thread is not threading.current_thread()
    assert thread.daemon


async def _asked() -> bool:
    return in_background()


def test_only_the_loops_own_thread_is_in_the_background() -> None:
    loop = background_loop()
    assert not in_background()
    assert asyncio.run_coroutine_threadsafe(_asked(), loop).result()
