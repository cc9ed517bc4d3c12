"""Signatures verified ahead change nothing but the time."""

from collections.abc import Iterator

import pytest

from plait.envelope import open_envelope, seal
from plait.errors import BadSignature
from plait.identity import SigningKey
from plait.ledger.journal_audit import JournalPage
from plait.ledger.service.verify_ahead import AHEAD_OBJECTS_MAX, verified_ahead
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import IssueOrder

KEY = SigningKey.from_seed(bytes(32))


def page(number: int, objects: int = 40) -> JournalPage:
    orders = (IssueOrder(order_id=b"%d %d" % (number, one)) for one in range(objects))
    return JournalPage((b"%d" % number,), tuple(seal(KEY, order) for order in orders))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_pages_come_as_they_were_in_order_and_not_all_at_once(workers: int) -> None:
    pages = [page(number) for number in range(40)]
    taken = 0

    def source() -> Iterator[JournalPage]:
        nonlocal taken
        for one in pages:
            taken += 1
            yield one

    found = verified_ahead(source(), workers)
    assert next(found) is pages[0]
    assert taken * 40 <= AHEAD_OBJECTS_MAX + 40
    assert list(found) == pages[1:]


def test_a_bad_signature_is_left_for_the_audit() -> None:
    good = page(0, 1)
    bad = SignedEnvelope.FromString(good.objects[0].SerializeToString())
    bad.signature = bytes(64)
    [shown] = verified_ahead([JournalPage((b"0",), (bad, SignedEnvelope()))], 1)
    with pytest.raises(BadSignature):
        open_envelope(shown.objects[0], IssueOrder)
