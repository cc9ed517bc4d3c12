"""The event loop of blocking clients: one thread for the whole process, as long as it lives.

gRPC has one completion queue a process and reports to every loop that it was used on. A loop
that is closed makes it complain at each late event, so ours never is.
"""

import asyncio
import os
import threading
from collections.abc import Callable

_lock = threading.Lock()
_running: tuple[int, asyncio.AbstractEventLoop, threading.Thread] | None = None
"""The process it runs in, since a fork has no threads, the loop and its thread."""


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop, which runs in a thread of its own; started by the first call."""
    global _running
    with _lock:
        if _running is None or _running[0] != os.getpid():
            loop = _new_loop()()
            thread = threading.Thread(target=loop.run_forever, name="plait client", daemon=True)
            thread.start()
            _running = os.getpid(), loop, thread
        return _running[1]


def in_background() -> bool:
    """Whether this thread is the loop's own, which must never wait for the loop."""
    running = _running
    return running is not None and running[2] is threading.current_thread()


def _new_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop where the node extra has brought it, asyncio otherwise."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
