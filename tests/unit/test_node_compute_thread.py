"""The compute thread: batches, order, errors and its end."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from plait.compute.port import Done, Scored, Work
from plait.errors import CapacityError, LocalProtocolError
from plait.node import compute_thread
from plait.node.compute_thread import ComputeThread
from plait.node.scheduler import Scheduler
from plait.types import SessionId


def work(job: int) -> Work:
    return Work(SessionId(bytes([job]) * 16), 0, (1,), None)


class Recorder:
    """A step that can be held back, and what came of it."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[int] = []
        self.threads: set[str] = set()
        self.done: list[int] = []
        self.finished = asyncio.Event()

    def step(self, works: Sequence[Work]) -> list[Done]:
        assert self.go.wait(5)
        self.batches.append(len(works))
        self.threads.add(threading.current_thread().name)
        return [Done() for _ in works]

    def on_done(self, job: int, done: Done) -> None:
        self.done.append(job)
        if len(self.done) == 6:
            self.finished.set()


def thread_of(recorder: Recorder) -> ComputeThread[int]:
    scheduler: Scheduler[int] = Scheduler(key=lambda job: job, rows=lambda job: 1, rows_max=4)
    return ComputeThread(recorder.step, scheduler, work, recorder.on_done, lambda elapsed_us: None)


async def test_what_has_queued_is_computed_together_off_the_loop() -> None:
    recorder = Recorder()
    subject = thread_of(recorder)
    for job in range(6):
        subject.submit(job)
    recorder.go.set()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(subject.run())
        async with asyncio.timeout(5):
            await recorder.finished.wait()
        running.cancel()
    assert recorder.batches == [4, 2]
    assert recorder.done == list(range(6))
    assert recorder.threads == {"compute"}
    assert subject.queued == 0


async def test_a_step_that_raises_fails_its_own_jobs_only() -> None:
    outcomes: asyncio.Queue[Done] = asyncio.Queue()
    fail = [True]

    def step(works: Sequence[Work]) -> list[Done]:
        if fail.pop():
            fail.append(False)
            raise ValueError("a bug")
        fail.append(False)
        return [Done() for _ in works]

    scheduler: Scheduler[int] = Scheduler(key=lambda job: job, rows=lambda job: 1)
    subject = ComputeThread(
        step, scheduler, work, lambda job, done: outcomes.put_nowait(done), lambda elapsed_us: None
    )
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(5):
        running = tasks.create_task(subject.run())
        subject.submit(1)
        assert isinstance((await outcomes.get()).error, LocalProtocolError)
        subject.submit(2)
        assert (await outcomes.get()).error is None
        running.cancel()


async def test_a_flood_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_thread, "QUEUED_MAX", 2)
    subject = thread_of(Recorder())
    subject.submit(1)
    subject.submit(2)
    with pytest.raises(CapacityError):
        subject.submit(3)


async def test_a_long_job_is_computed_in_pieces_and_delivered_whole() -> None:
    seen: list[tuple[int, int, bool]] = []
    outcomes: asyncio.Queue[tuple[int, Done]] = asyncio.Queue()

    def long_work(job: int) -> Work:
        hidden = np.arange(job, dtype=np.float32)[:, None]
        behind = tuple(range(1, job))
        return Work(SessionId(bytes(16)), 5, None, hidden, sample=True, drafts=(7,), scored=behind)

    def step(works: Sequence[Work]) -> list[Done]:
        (one,) = works
        seen.append((one.first_position, one.rows, one.sample))
        assert (one.drafts == (7,)) == one.sample
        if one.rows == 13:
            return [Done(error=CapacityError("too much"))]
        return [Done(hidden=one.hidden, scored=Scored(tuple(-float(i) for i in one.scored)))]

    scheduler: Scheduler[int] = Scheduler(key=lambda job: 0, rows=lambda job: job, piece_rows=50)
    subject = ComputeThread(
        step,
        scheduler,
        long_work,
        lambda job, done: outcomes.put_nowait((job, done)),
        lambda elapsed_us: None,
    )
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(5):
        running = tasks.create_task(subject.run())
        for job in (120, 63, 20):
            subject.submit(job)
        first, second, third = [await outcomes.get() for _ in range(3)]
        running.cancel()
    assert seen == [
        (5, 50, False), (55, 50, False), (105, 20, True),
        (5, 50, False), (55, 13, True),
        (5, 20, True),
    ]  # fmt: skip
    assert first[1].hidden is not None
    assert first[1].hidden[:, 0].tolist() == list(range(120))
    assert first[1].scored.logprobs == tuple(-float(i) for i in range(1, 120))
    assert isinstance(second[1].error, CapacityError)
    assert third[1].hidden is not None
