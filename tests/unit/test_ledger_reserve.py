from collections.abc import Callable
from dataclasses import replace

import pytest

from plait.envelope import digest, seal
from plait.errors import BadProof, BadSignature, Overspend
from plait.ledger.opening import route_digest
from plait.ledger.reserve import check_grant, make_reservation
from plait.testing.accounting import (
    HOUR_MS,
    NOW_MS,
    Plot,
    grant_of,
    key_of,
    paper_network,
    terms_of,
)
from plait.types import U64_MAX, Prices
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation, ReservationGrant

TERMS = terms_of(Plot())
CLIENT = key_of("client ledger")
AUTHORITY = paper_network().authorities[0]
RESERVATION = make_reservation(CLIENT, TERMS, 4, 9, NOW_MS, HOUR_MS, route_digest(TERMS))
GRANT = grant_of(RESERVATION)


def reservation_with(change: Callable[[BudgetReservation], object]) -> SignedEnvelope:
    message = BudgetReservation.FromString(RESERVATION.payload)
    change(message)
    return seal(CLIENT, message)


def grant_with(**changes: object) -> SignedEnvelope:
    message = ReservationGrant.FromString(GRANT.payload)
    for name, value in changes.items():
        setattr(message, name, value)
    return seal(key_of("authority ledger"), message)


def test_it_reserves_what_each_stage_can_earn_at_most() -> None:
    message = BudgetReservation.FromString(RESERVATION.payload)
    assert [cap.microcredits for cap in message.caps] == [TERMS.price_max(i) for i in range(3)]
    assert message.amount == sum(TERMS.price_max(i) for i in range(3))
    assert (message.lane, message.sequence) == (4, 9)


def test_a_grant_gives_each_stage_its_cap() -> None:
    for index in range(3):
        cap = check_grant(GRANT, RESERVATION, AUTHORITY, TERMS, index, NOW_MS)
        assert cap == TERMS.price_max(index)
    total = check_grant(GRANT, RESERVATION, (AUTHORITY,), TERMS, None, NOW_MS)
    assert total == sum(TERMS.price_max(index) for index in range(3))


def test_only_the_authority_grants_and_only_the_client_reserves() -> None:
    forged = seal(key_of("stranger"), ReservationGrant.FromString(GRANT.payload))
    with pytest.raises(BadSignature, match="grant"):
        check_grant(forged, RESERVATION, AUTHORITY, TERMS, 0, NOW_MS)
    with pytest.raises(BadSignature, match="grant"):
        check_grant(GRANT, RESERVATION, (), TERMS, 0, NOW_MS)
    forged = seal(key_of("stranger"), BudgetReservation.FromString(RESERVATION.payload))
    with pytest.raises(BadSignature, match="reservation"):
        check_grant(grant_of(forged), forged, AUTHORITY, TERMS, 0, NOW_MS)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "network_id", "other"),
        lambda m: setattr(m, "account", key_of("stranger").peer_id),
        lambda m: setattr(m, "session_id", bytes(16)),
        lambda m: setattr(m, "epoch", 2),
        lambda m: setattr(m, "route_digest", bytes(32)),
        lambda m: m.caps.pop(),
        lambda m: m.caps.add(payee=TERMS.stages[0].peer, microcredits=1),
        lambda m: setattr(m.caps[0], "payee", TERMS.stages[1].peer),
    ],
)
def test_a_reservation_of_something_else_is_refused(
    change: Callable[[BudgetReservation], object],
) -> None:
    reservation = reservation_with(change)
    with pytest.raises(BadProof, match="reservation"):
        check_grant(grant_of(reservation), reservation, AUTHORITY, TERMS, 0, NOW_MS)


def test_caps_above_the_amount_are_refused() -> None:
    reservation = reservation_with(lambda m: setattr(m, "amount", m.amount - 1))
    with pytest.raises(Overspend):
        check_grant(grant_of(reservation), reservation, AUTHORITY, TERMS, 0, NOW_MS)


@pytest.mark.parametrize(
    "changes",
    [
        {"network_id": "other"},
        {"reservation_digest": digest(b"")},
        {"account": key_of("stranger").peer_id},
        {"session_id": bytes(16)},
        {"amount": 1},
        {"expires_ms": NOW_MS},
    ],
)
def test_a_grant_of_something_else_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BadProof, match="grant"):
        check_grant(grant_with(**changes), RESERVATION, AUTHORITY, TERMS, 0, NOW_MS)


def test_terms_that_cannot_be_paid_are_not_reserved() -> None:
    dear = [replace(stage, prices=Prices(output=U64_MAX // 7)) for stage in TERMS.stages]
    terms = replace(TERMS, stages=tuple(dear), max_tokens=1_000_000)
    with pytest.raises(Overspend, match="64 bits"):
        make_reservation(CLIENT, terms, 0, 1, NOW_MS, HOUR_MS, bytes(32))
