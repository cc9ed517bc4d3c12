"""A task group whose children end with it: every task has a parent and none outlives it."""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

ResultT = TypeVar("ResultT")


class TaskScope:
    """``asyncio.TaskGroup``, but leaving it cancels the children that still run.

    A child that raises cancels the others and the body, as in a task group.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(kind, error, traceback)

    def create_task(
        self, work: Coroutine[Any, Any, ResultT], *, name: str | None = None
    ) -> "asyncio.Task[ResultT]":
        """Start a child."""
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
