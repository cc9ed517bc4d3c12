"""Task scopes: nothing outlives them, and a failing child ends the rest."""

import asyncio

import pytest

from plait.task_scope import TaskScope


async def forever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append("cancelled")


async def test_leaving_cancels_what_still_runs() -> None:
    ended: list[str] = []
    async with TaskScope() as tasks:
        tasks.create_task(forever(ended))
        await asyncio.sleep(0)
    assert ended == ["cancelled"]


async def test_a_failing_child_ends_the_body_and_the_others() -> None:
    ended: list[str] = []

    async def fail() -> None:
        raise ValueError("a bug")

    with pytest.RaisesGroup(ValueError):
        async with TaskScope() as tasks:
            tasks.create_task(forever(ended))
            tasks.create_task(fail())
            await asyncio.Event().wait()
    assert ended == ["cancelled"]
