"""The client without async, when what it lives on breaks."""

import asyncio
from typing import Any, Self

import pytest

from plait.client.blocking import Client
from plait.errors import LocalProtocolError


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


def test_a_call_does_not_wait_for_a_client_that_has_ended() -> None:
    inner, client = Breaking(), Client.__new__(Client)
    client._client, client._loop, client._living = inner, None, None  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="a bug in the background") as raised, client:
        client.generate("tiny-random", "Hello")
    assert inner.cancelled
    assert isinstance(raised.value.__context__, asyncio.CancelledError | LocalProtocolError)
