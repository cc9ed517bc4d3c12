"""A process that ends with the one that started it: its standard input is a pipe from there.

However the other one ends, the kernel closes the pipe, and nothing is left behind.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Generator

_STDIN = 0


@contextlib.contextmanager
def watching_parent(call: Callable[[], None]) -> Generator[None, None, None]:
    """Call once when standard input ends, on the running event loop."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(_STDIN, 4096):
            loop.remove_reader(_STDIN)
            call()

    loop.add_reader(_STDIN, read)
    try:
        yield
    finally:
        loop.remove_reader(_STDIN)
