"""Verify the signatures of a journal ahead of its audit, on other cores.

What is found good is remembered by ``identity.verify``, so that the audit, which decides
alone and in order, finds its checks made. libsodium lets other threads run meanwhile.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from plait.envelope import pae
from plait.errors import BadSignature
from plait.identity import verify
from plait.ledger.journal_audit import JournalPage

AHEAD_OBJECTS_MAX = 1_024
"""Well below what ``identity.verify`` remembers: else it would forget before it is asked."""


def verified_ahead(pages: Iterable[JournalPage], workers: int) -> Iterator[JournalPage]:
    """The same pages, each after its objects' signatures were looked at.

    Nothing is decided here: a bad signature is left for the audit to find. ``workers`` are
    threads beside the caller's; with 0 there is nothing to gain, and nothing is done.
    """
    if workers < 1:
        yield from pages
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        ahead: deque[tuple[JournalPage, Future[None]]] = deque()
        objects = 0
        for page in pages:
            ahead.append((page, pool.submit(_verify, page)))
            objects += len(page.objects)
            while ahead and objects > AHEAD_OBJECTS_MAX:
                done = _finished(ahead)
                objects -= len(done.objects)
                yield done
        while ahead:
            yield _finished(ahead)


def _finished(ahead: deque[tuple[JournalPage, Future[None]]]) -> JournalPage:
    page, looked_at = ahead.popleft()
    looked_at.result()
    return page


def _verify(page: JournalPage) -> None:
    for envelope in page.objects:
        with suppress(BadSignature):
            message = pae(envelope.payload_type, envelope.payload)
            verify(envelope.signer, envelope.signature, message)
