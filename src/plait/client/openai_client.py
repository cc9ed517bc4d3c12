"""OpenAI's own client, over a gateway in a child process."""

import asyncio
import importlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plait.client.children import Child
from plait.errors import ConfigError, DeadlineExceeded

START_S = 60.0
_LOOK_S = 0.05
_SERVING = re.compile(r"serving (http://\S+?/v1)")


def openai_classes() -> tuple[Any, Any]:
    """``OpenAI`` and ``AsyncOpenAI``; raises ``ConfigError`` if the package is not there."""
    try:
        openai = importlib.import_module("openai")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed", remedy="pip install openai 'plait[gateway]'"
        ) from error
    return openai.OpenAI, openai.AsyncOpenAI


def gateway_arguments(network: Path) -> Sequence[str]:
    """A gateway for this machine, on a free port."""
    return ["serve", "--port", "0", "--no-keys", "--network", str(network), "--with-parent"]


async def address_of(gateway: Child) -> str:
    """The base URL, once it serves. Raises ``ConfigError`` or ``DeadlineExceeded``."""
    deadline_s = time.monotonic() + START_S
    while not (found := _SERVING.search(gateway.log())):
        if gateway.ended:
            raise ConfigError(f"the gateway ended: {gateway.last_words()}")
        if time.monotonic() > deadline_s:
            raise DeadlineExceeded("the gateway does not start")
        await asyncio.sleep(_LOOK_S)
    return found[1]
