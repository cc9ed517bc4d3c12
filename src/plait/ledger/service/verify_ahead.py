"""Verify the signatures of a journal ahead of its audit, in processes of their own.

The audit decides alone and in order; a signature depends on nothing, so other cores may look at
it. A process gets signed envelopes in the protocol's form and answers with a byte for each: good
or not. Only what is good is taken on its word; the audit looks at everything else itself, so that
its findings do not depend on how many processes there are. Threads would not do: each would wait
for the interpreter after every signature.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from multiprocessing.connection import Connection

from plait.errors import LedgerError
from plait.ledger.journal_audit import JournalPage
from plait.ledger.service.verify_process import verify_all
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import ExportResponse

PART_OBJECTS = 64
"""Objects sent at once."""
PARTS_AHEAD = 8
"""Parts that each process may have before the first of them is asked for. Their answers fit
into its pipe, so that it never waits for us while we wait for it."""
PROCESSES_MAX = 64
SMALL_OBJECTS = 8_192
"""Journals with fewer signed objects are done before processes would have started."""


def processes_for(pages: Sequence[JournalPage]) -> int:
    """How many processes are worth it for a journal: one per core, or none but ours."""
    if sum(len(page.objects) for page in pages) < SMALL_OBJECTS:
        return 1
    return min(PROCESSES_MAX, os.cpu_count() or 1)


def verified_ahead(
    pages: Iterable[JournalPage], processes: int, *, from_the_first: bool = False
) -> Iterator[JournalPage]:
    """The same pages, each with word of which of its objects' signatures are good.

    Without such word the audit verifies for itself: with one process, and while the processes
    start, unless ``from_the_first`` page on they are to be waited for. Raises ``LedgerError`` if
    one of the processes ends early.
    """
    if processes < 2:
        yield from pages
        return
    with _verifiers(processes) as connections:
        try:
            rest = iter(pages)
            if not from_the_first and not (yield from _while_starting(rest, connections)):
                return
            for connection in connections:
                connection.recv_bytes()  # it has started
            yield from _verified(rest, connections)
        except (EOFError, OSError) as error:
            raise LedgerError(
                "a process that verifies signatures has ended", remedy="audit with --jobs 1"
            ) from error


def _while_starting(
    pages: Iterator[JournalPage], connections: Sequence[Connection]
) -> Generator[JournalPage, None, bool]:
    """Pages as they are until all processes have started; whether they have."""
    while not all(connection.poll() for connection in connections):
        page = next(pages, None)
        if page is None:
            return False
        yield page
    return True


@dataclass(slots=True)
class _Asked:
    """A page whose objects are being looked at: how many parts are out, and what came back."""

    page: JournalPage
    parts: int
    sound: list[bool] = field(default_factory=list)


def _verified(
    pages: Iterable[JournalPage], connections: Sequence[Connection]
) -> Iterator[JournalPage]:
    turns = cycle(connections)
    asked: deque[_Asked] = deque()
    out: deque[tuple[_Asked, Connection]] = deque()
    for page in pages:
        parts = list(_parts(page.objects))
        asked.append(_Asked(page, len(parts)))
        for part in parts:
            if len(out) == PARTS_AHEAD * len(connections):
                _take(*out.popleft())
            connection = next(turns)
            connection.send_bytes(ExportResponse(objects=part).SerializeToString())
            out.append((asked[-1], connection))
        while asked and not asked[0].parts:
            yield _finished(asked.popleft())
    while asked:
        while asked[0].parts:
            _take(*out.popleft())
        yield _finished(asked.popleft())


def _parts(objects: Sequence[SignedEnvelope]) -> Iterator[Sequence[SignedEnvelope]]:
    for start in range(0, len(objects), PART_OBJECTS):
        yield objects[start : start + PART_OBJECTS]


def _take(asked: _Asked, connection: Connection) -> None:
    asked.sound += (flag == 1 for flag in connection.recv_bytes(PART_OBJECTS))
    asked.parts -= 1


def _finished(asked: _Asked) -> JournalPage:
    return replace(asked.page, sound=tuple(asked.sound))


@contextmanager
def _verifiers(processes: int) -> Iterator[list[Connection]]:
    """So many processes that verify what they are sent, ended afterwards."""
    context = multiprocessing.get_context("spawn")
    started = []
    for _ in range(processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=verify_all, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # else its end would not be seen here
        started.append((process, ours))
    try:
        yield [connection for _, connection in started]
    finally:
        for process, connection in started:
            connection.close()
            process.terminate()
            process.join()
