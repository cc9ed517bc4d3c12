"""The one thread that computes: takes whatever has queued as its batch, step after step.

Frames go to it straight from the event loop and results come back straight into it: no
task has to wake in between, which is a good part of a hop's cost.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from plait.compute.port import Done, Work
from plait.errors import CapacityError, LocalProtocolError
from plait.logs import get_logger
from plait.node.scheduler import Scheduler

log = get_logger(__name__)
JobT = TypeVar("JobT")

QUEUED_MAX = 1024


class ComputeThread(Generic[JobT]):
    """Computes jobs in batches chosen by a ``Scheduler``, which only this thread touches.

    ``work_of`` makes the work of a job. ``on_done`` is called on the event loop with each
    job and its outcome, ``on_step`` with the microseconds of each step of a single row.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Work]], list[Done]],
        scheduler: Scheduler[JobT],
        work_of: Callable[[JobT], Work],
        on_done: Callable[[JobT, Done], None],
        on_step: Callable[[float], None],
    ) -> None:
        self._step = step
        self._scheduler = scheduler
        self._work_of = work_of
        self._on_done = on_done
        self._on_step = on_step
        self._incoming: queue.SimpleQueue[JobT | None] = queue.SimpleQueue()

    @property
    def queued(self) -> int:
        """Jobs that wait, roughly."""
        return self._incoming.qsize() + len(self._scheduler)

    def submit(self, job: JobT) -> None:
        """Queue a job; raises ``CapacityError`` when too many wait."""
        if self.queued >= QUEUED_MAX:
            raise CapacityError("the stage has too many frames queued")
        self._incoming.put(job)

    async def run(self) -> None:
        """Compute until cancelled; a step that raises fails its own jobs only."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        thread = threading.Thread(
            target=self._compute, args=(loop, ended), name="compute", daemon=True
        )
        thread.start()
        try:
            await asyncio.shield(ended)
        finally:
            self._incoming.put(None)
            if not ended.done():
                await ended

    def _compute(self, loop: asyncio.AbstractEventLoop, ended: "asyncio.Future[None]") -> None:
        try:
            while self._fill():
                jobs = self._scheduler.take()
                works = [self._work_of(job) for job in jobs]
                started_s = time.perf_counter()
                results = self._step_safely(works)
                elapsed_us = (time.perf_counter() - started_s) * 1e6
                loop.call_soon_threadsafe(self._deliver, jobs, results, elapsed_us)
        except Exception as error:  # noqa: BLE001 - the top of a thread: the loop raises it
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set_exception, error)
        else:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set_result, None)

    def _step_safely(self, works: Sequence[Work]) -> list[Done]:
        try:
            return self._step(works)
        except Exception as error:
            log.exception("a step failed as a whole")
            failure = LocalProtocolError(f"the stage failed: {type(error).__name__}")
            return [Done(error=failure) for _ in works]

    def _fill(self) -> bool:
        """Move what has come to the scheduler, waiting if there is nothing; False to stop."""
        job = self._incoming.get() if not len(self._scheduler) else None
        if job is None and not len(self._scheduler):
            return False
        if job is not None:
            self._scheduler.add(job)
        with suppress(queue.Empty):
            while True:
                job = self._incoming.get_nowait()
                if job is None:
                    return False
                self._scheduler.add(job)
        return True

    def _deliver(self, jobs: Sequence[JobT], results: Sequence[Done], elapsed_us: float) -> None:
        if len(jobs) == 1 and self._work_of(jobs[0]).rows == 1:
            self._on_step(elapsed_us)
        for job, done in zip(jobs, results, strict=True):
            self._on_done(job, done)
