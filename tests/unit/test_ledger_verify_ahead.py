"""Signatures verified ahead change nothing but the time."""

import multiprocessing
from collections.abc import Iterator
from itertools import count

import pytest

from plait.envelope import digest, seal
from plait.errors import LedgerError
from plait.identity import SigningKey
from plait.ledger.checkpoint import Checkpoint
from plait.ledger.journal import Accepted, Books, Issue
from plait.ledger.journal_audit import JournalAuditor, JournalPage, JournalReport, audit_journal
from plait.ledger.merkle import leaf_hash, root_of
from plait.ledger.service.verify_ahead import (
    PART_OBJECTS,
    PARTS_AHEAD,
    PROCESSES_MAX,
    SMALL_OBJECTS,
    processes_for,
    verified_ahead,
)
from plait.testing.accounting import key_of
from plait.types import AccountId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import IssueOrder

KEY = SigningKey.from_seed(bytes(32))
NETWORK, NOW = "net-1", 1_700_000_000_000
ACCOUNT = AccountId(key_of("client").peer_id)


def page(number: int, objects: int) -> JournalPage:
    orders = (IssueOrder(order_id=b"%d %d" % (number, one)) for one in range(objects))
    return JournalPage((b"%d" % number,), tuple(seal(KEY, order) for order in orders))


def spoiled(envelope: SignedEnvelope) -> SignedEnvelope:
    other = SignedEnvelope.FromString(envelope.SerializeToString())
    other.signature = KEY.sign(b"something else")
    return other


class Journal:
    """Orders of the issuer, so many a page."""

    def __init__(self, pages: int, orders: int) -> None:
        self._books, self._leaves = Books(NETWORK), list[bytes]()
        self.pages = [
            self._page([b"%d %d" % (number, one) for one in range(orders)])
            for number in range(pages)
        ]

    def _page(self, order_ids: list[bytes]) -> JournalPage:
        leaves, objects = list[bytes](), list[SignedEnvelope]()
        for order_id in order_ids:
            order = IssueOrder(
                network_id=NETWORK, account=ACCOUNT, amount=1, order_id=order_id, issued_ms=NOW
            )
            objects.append(seal(KEY, order))
            outcome = self._books.apply(Issue(order, digest(objects[-1].payload)), NOW)
            assert isinstance(outcome, Accepted), outcome
            leaves += [entry.payload for entry in outcome.entries]
        self._leaves += leaves
        return JournalPage(tuple(leaves), tuple(objects))

    def spoil(self, number: int, one: int) -> None:
        objects = list(self.pages[number].objects)
        objects[one] = spoiled(objects[one])
        self.pages[number] = JournalPage(self.pages[number].entries, tuple(objects))

    def audit(self, processes: int) -> JournalReport:
        signed = Checkpoint("log", len(self._leaves), root_of(map(leaf_hash, self._leaves)))
        auditor = JournalAuditor(NETWORK, KEY.public)
        pages = verified_ahead(self.pages, processes, from_the_first=True)
        return audit_journal(auditor, pages, signed)


@pytest.mark.parametrize("bad", [[], [(5, 7)], [(9, 0), (6, 69)]])
@pytest.mark.slow
def test_an_audit_finds_the_same_with_any_number_of_processes(bad: list[tuple[int, int]]) -> None:
    journal = Journal(10, 70)
    for place in bad:
        journal.spoil(*place)
    alone = journal.audit(1)
    assert alone.violations == (
        (f"entry {bad[-1][0] * 70 + bad[-1][1]}: signature does not match",) if bad else ()
    )
    assert [journal.audit(processes) for processes in (2, 3)] == [alone, alone]


@pytest.mark.slow
def test_pages_come_in_order_with_true_words_and_not_all_at_once() -> None:
    ahead = PART_OBJECTS * PARTS_AHEAD * 2
    sizes = [40, 0, ahead + 2 * PART_OBJECTS + 1, 1, *[40] * 60]
    pages = [page(number, size) for number, size in enumerate(sizes)]
    bad = JournalPage((b"bad",), (spoiled(pages[0].objects[0]), *pages[0].objects[1:]))
    pages[7], taken = bad, 0

    def source() -> Iterator[JournalPage]:
        nonlocal taken
        for one in pages:
            taken += len(one.objects)
            yield one

    found = []
    for given in verified_ahead(source(), 2, from_the_first=True):
        found.append(given)
        seen = sum(len(one.objects) for one in found)
        assert taken - seen <= ahead + sizes[2]
    assert [(one.entries, one.objects) for one in found] == [
        (one.entries, one.objects) for one in pages
    ]
    for one, given in zip(pages, found, strict=True):
        assert given.sound == tuple(one is not bad or n > 0 for n in range(len(one.objects)))


def test_with_one_process_the_audit_verifies_for_itself() -> None:
    pages = [page(0, 2)]
    assert list(verified_ahead(pages, 1)) == pages
    assert pages[0].sound == ()


@pytest.mark.slow
def test_nobody_waits_for_the_processes_to_start() -> None:
    pages = [page(number, 1) for number in range(3)]
    assert list(verified_ahead(pages, 2)) == pages  # gone before they could
    started = verified_ahead((page(number, 64) for number in count()), 2)
    given = next(one for one in started if one.sound)
    assert given.sound == (True,) * 64


@pytest.mark.slow
def test_a_process_that_ends_early_is_named() -> None:
    pages = (page(number, 64) for number in range(100))
    found = verified_ahead(pages, 2, from_the_first=True)
    next(found)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(LedgerError, match="has ended"):
        list(found)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_no_process_outlives_an_audit_that_is_left_early() -> None:
    found = verified_ahead((page(number, 64) for number in range(100)), 2)
    next(found)
    assert len(multiprocessing.active_children()) == 2
    assert isinstance(found, Iterator)
    found.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_processes_only_for_large_journals() -> None:
    large = page(0, 64)
    pages = [large] * (SMALL_OBJECTS // 64)
    assert processes_for(pages[1:]) == 1
    assert 1 <= processes_for(pages) <= PROCESSES_MAX


def test_words_about_signatures_are_one_per_object() -> None:
    with pytest.raises(ValueError, match="one word per object"):
        JournalPage((), page(0, 2).objects, (True,))
