"""Runs a trio program in a thread of its own beside asyncio, and passes calls both ways.

The asyncio side starts, calls and stops; the trio side posts and asks. A trio program
that crashes takes nothing else down: ``done`` says so, and a new bridge can be built.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from plait.errors import NetworkError

ResultT = TypeVar("ResultT")

Main = Callable[["Bridge", Callable[[], None]], Awaitable[None]]
"""The trio program: gets its bridge and a callable that says it is ready."""


class Bridge:
    """One ``trio.run`` in a thread, owned by one asyncio event loop."""

    def __init__(self, main: Main, name: str) -> None:
        self._main = main
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._counter = _TaskCounter()
        self.done: asyncio.Future[BaseException | None] = self._loop.create_future()
        """Resolves when the trio program has ended, with what ended it."""

    @property
    def tasks(self) -> int:
        """How many trio tasks run for the program and the calls to it, trio's own among them."""
        return self._counter.alive

    async def start(self) -> None:
        """Start the thread and wait until the program is ready; raises ``NetworkError``."""
        threading.Thread(target=self._run, name=self._name, daemon=True).start()
        await _first(self._ready, self.done)
        if self.done.done():
            raise NetworkError(f"{self._name} did not start: {describe(self.done.result())}")

    async def stop(self) -> None:
        """Cancel the program and wait for its end; may be called twice."""
        self._in_trio(self._cancel)
        await asyncio.shield(self.done)

    async def call(
        self, function: Callable[..., Awaitable[ResultT]], *arguments: object
    ) -> ResultT:
        """Run an async function in trio and return what it returns or raises.

        Cancelling the caller cancels the function. Raises ``NetworkError`` when the
        program has ended.
        """
        answer: asyncio.Future[ResultT] = self._loop.create_future()
        scope = trio.CancelScope()

        def settle(result: ResultT | None, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        async def task() -> None:
            result: ResultT | None = None
            error: Exception | None = None
            try:
                with scope:
                    result = await function(*arguments)
                if scope.cancelled_caught:
                    error = NetworkError(f"{self._name} was stopped")
            except Exception as caught:  # noqa: BLE001 - handed to the caller
                error = caught
            except BaseException:
                error = NetworkError(f"{self._name} was stopped")
                raise
            finally:
                self.post(settle, result, error)

        def spawn() -> None:
            if self._nursery is None:
                self.post(settle, None, NetworkError(f"{self._name} is down"))
            else:
                self._nursery.start_soon(task)

        if not self._in_trio(spawn):
            raise NetworkError(f"{self._name} is down")
        try:
            await _first(answer, self.done)
            if not answer.done():
                raise NetworkError(f"{self._name} is down")
            return answer.result()
        except asyncio.CancelledError:
            self._in_trio(scope.cancel)
            raise

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """From trio: run a plain function on the asyncio loop, soon."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # The loop has closed: nobody is left to be told.
            return

    async def ask(self, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        """From trio: run a plain function on the asyncio loop and return what it returns."""
        answered = trio.Event()
        results: list[ResultT] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                results.append(function(*arguments))
            except Exception as error:  # noqa: BLE001 - raised in trio instead
                errors.append(error)
            self._in_trio(answered.set)

        self.post(run)
        await answered.wait()
        if errors:
            raise errors[0]
        return results[0]

    def _in_trio(self, function: Callable[[], object]) -> bool:
        try:
            if self._token is not None:
                self._token.run_sync_soon(function)
                return True
        except trio.RunFinishedError:
            pass
        return False

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            trio.run(self._root, instruments=[self._counter])
        except BaseException as error:  # noqa: BLE001 - reported through ``done``
            end = error
        self.post(_resolve, self.done, end)

    async def _root(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._main(self, self._set_ready)
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()

    def _set_ready(self) -> None:
        self.post(_resolve, self._ready, None)

    def _cancel(self) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()


class _TaskCounter(trio.abc.Instrument):
    """Counts tasks in trio's thread; the number may be read in any."""

    def __init__(self) -> None:
        self.alive = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.alive += 1

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self.alive -= 1


async def _first(*futures: "asyncio.Future[Any]") -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _resolve(future: "asyncio.Future[ResultT]", result: ResultT) -> None:
    if not future.done():
        future.set_result(result)


def describe(error: BaseException | None) -> str:
    """Say in one line what ended a program, looking into exception groups."""
    if error is None:
        return "it ended by itself"
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(describe(inner) for inner in error.exceptions)
    return f"{type(error).__name__}: {error}"
