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
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np

from plait.compute.port import NOT_SCORED, Done, Hidden, Work
from plait.errors import CapacityError, LocalProtocolError
from plait.logs import get_logger
from plait.node.scheduler import Part, Scheduler

log = get_logger(__name__)
JobT = TypeVar("JobT")

QUEUED_MAX = 1024


class ComputeThread(Generic[JobT]):
    """Computes jobs in batches chosen by a ``Scheduler``, which only this thread touches.

    ``work_of`` makes the work of a job; a job that the scheduler cuts is computed in several
    steps and delivered once. ``on_done`` is called on the event loop with each job and its
    outcome, ``on_step`` with the microseconds of each step of a single row.
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
        self._pieces: dict[int, Pieces] = {}
        """By the identity of an unfinished job, which the scheduler holds."""

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
                parts = self._scheduler.take_parts()
                works = [_work_of_part(self._work_of(part.item), part) for part in parts]
                started_s = time.perf_counter()
                results = self._step_safely(works)
                elapsed_us = (time.perf_counter() - started_s) * 1e6
                self._scheduler.stepped(parts, elapsed_us)
                alone_us = elapsed_us if len(works) == 1 and works[0].rows == 1 else None
                if (ended_items := self._ended(parts, results)) or alone_us is not None:
                    loop.call_soon_threadsafe(self._deliver, ended_items, alone_us)
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

    def _ended(
        self, parts: Sequence[Part[JobT]], results: Sequence[Done]
    ) -> list[tuple[JobT, Done]]:
        """The jobs that ended in this step, each with its outcome put together."""
        ended: list[tuple[JobT, Done]] = []
        for part, done in zip(parts, results, strict=True):
            if part.start == 0 and part.last:
                ended.append((part.item, done))
                continue
            pieces = self._pieces.setdefault(id(part.item), Pieces())
            pieces.add(done)
            if done.error is None and not part.last:
                continue
            del self._pieces[id(part.item)]
            if done.error is not None:
                self._scheduler.abandon(part)
            ended.append((part.item, pieces.whole(done)))
        return ended

    def _deliver(self, ended: Sequence[tuple[JobT, Done]], alone_us: float | None) -> None:
        for job, done in ended:
            self._on_done(job, done)
        if alone_us is not None:
            self._on_step(alone_us)


class Pieces:
    """The outcomes of a job that was cut, put together."""

    def __init__(self) -> None:
        self._hidden: list[Hidden] = []
        self._scored = NOT_SCORED

    def add(self, done: Done) -> None:
        """The next part's."""
        if done.hidden is not None:
            self._hidden.append(done.hidden)
        self._scored = self._scored.then(done.scored)

    def whole(self, last: Done) -> Done:
        """The job's outcome after its last part, or the first that failed."""
        if last.error is not None:
            return last
        hidden = np.concatenate(self._hidden) if self._hidden else None
        return replace(last, hidden=hidden, scored=self._scored)


def _work_of_part(work: Work, part: Part[JobT]) -> Work:
    if part.start == 0 and part.last:
        return work
    rows = slice(part.start, part.start + part.rows)
    return Work(
        work.session,
        work.first_position + part.start,
        None if work.ids is None else work.ids[rows],
        None if work.hidden is None else work.hidden[rows],
        sample=work.sample and part.last,
        drafts=work.drafts if part.last else (),
        claimed=work.claimed if part.last else (),
        embedding=work.embedding and part.last,
        scored=work.scored[rows],
    )
