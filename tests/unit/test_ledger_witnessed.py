"""What a payee keeps until witnesses have seen its settlement in the log."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadProof, PlaitError
from plait.ledger.policy import policy_of, read_policy
from plait.ledger.witnessed import (
    ASKED_AT_ONCE_MAX,
    AWAITING_MAX,
    Awaiting,
    Claim,
    Patience,
    check_claim,
    claim_of,
)
from plait.testing.accounting import (
    Evidence,
    PaperSession,
    Plot,
    cert_of,
    cosigned_by,
    key_of,
    witnessed_network,
)
from plait.types import AccountId, Microcredits, SessionId
from plait.v1.ledger_pb2 import SettleRequest

NETWORK = witnessed_network()
POLICY = read_policy(policy_of(NETWORK).encode())
PLAYED = PaperSession(Plot()).play()
EVIDENCE = PLAYED.settle()
PATIENCE = Patience(credit_max=Microcredits(100), wait_ms=1_000)


def claim(index: int = 0) -> Claim:
    books = PLAYED.stages[index]
    message = SettleRequest(
        request=books.settlement(5, True),
        payee_cert=cert_of(f"stage {index}"),
        voucher=books.voucher,
    )
    return claim_of(message)


def check(one: Claim, evidence: Evidence, witnesses: Iterable[int] = (0, 1)) -> None:
    note = cosigned_by(evidence.checkpoint, witnesses)
    check_claim(one, evidence.entries, evidence.proofs, note, POLICY)


@pytest.mark.parametrize("index", range(3))
def test_a_settlement_under_a_quorum_is_proven(index: int) -> None:
    one = claim(index)
    assert one.payee == AccountId(key_of(f"stage {index}").peer_id)
    assert one.amount == PLAYED.stages[index].earned > 0
    assert one.since_ms == 5
    check(one, EVIDENCE)


@pytest.mark.parametrize("witnesses", [(), (0,), (2,)])
def test_without_the_quorum_nothing_is_proven(witnesses: tuple[int, ...]) -> None:
    with pytest.raises(BadProof, match="quorum"):
        check(claim(), EVIDENCE, witnesses)


def test_the_authoritys_word_without_the_entry_proves_nothing() -> None:
    ours = EVIDENCE.entries.index(next(e for e in EVIDENCE.entries if pays(e, claim())))
    entries = EVIDENCE.entries[:ours] + EVIDENCE.entries[ours + 1 :]
    proofs = EVIDENCE.proofs[:ours] + EVIDENCE.proofs[ours + 1 :]
    with pytest.raises(BadProof, match="proves 0 of"):
        check(claim(), replace(EVIDENCE, entries=entries, proofs=proofs))


def pays(entry: bytes, one: Claim) -> bool:
    """Whether the entry is what proves the claim: alone it does."""
    at = EVIDENCE.entries.index(entry)
    try:
        check(one, replace(EVIDENCE, entries=(entry,), proofs=(EVIDENCE.proofs[at],)))
    except BadProof:
        return False
    return True


def test_one_entry_shown_twice_counts_once() -> None:
    entry = next(e for e in EVIDENCE.entries if pays(e, claim()))
    at = EVIDENCE.entries.index(entry)
    twice = replace(EVIDENCE, entries=(entry, entry), proofs=(EVIDENCE.proofs[at],) * 2)
    with pytest.raises(BadProof, match="twice"):
        check(replace(claim(), amount=Microcredits(2 * claim().amount)), twice)


def test_another_session_or_payee_or_amount_is_not_proven() -> None:
    for wrong in (
        replace(claim(), session=SessionId(b"x" * 16)),
        replace(claim(), payee=AccountId(key_of("stranger").peer_id)),
        replace(claim(), amount=Microcredits(claim().amount + 1)),
    ):
        with pytest.raises(BadProof):
            check(wrong, EVIDENCE)


@given(st.integers(0, 10**6))
def test_no_flipped_bit_is_proven(at: int) -> None:
    entry = next(e for e in EVIDENCE.entries if pays(e, claim()))
    where = EVIDENCE.entries.index(entry)
    bit = at % (8 * len(entry))
    damaged = bytearray(entry)
    damaged[bit // 8] ^= 1 << bit % 8
    told = replace(EVIDENCE, entries=(bytes(damaged),), proofs=(EVIDENCE.proofs[where],))
    with pytest.raises(PlaitError):
        check(claim(), told)


def claims(*amounts: int, since_ms: int = 0) -> Awaiting:
    awaiting = Awaiting()
    for number, amount in enumerate(amounts):
        session = SessionId(number.to_bytes(16, "big"))
        one = Claim(session, AccountId("a"), Microcredits(amount), since_ms)
        awaiting.add(str(number), one)
    return awaiting


def test_too_much_for_too_long_refuses_and_what_is_proven_does_not_count() -> None:
    awaiting = claims(60, 41)
    assert awaiting.credit == 101
    assert awaiting.refusal(1_000, PATIENCE) == ""
    assert "101 microcredits" in awaiting.refusal(1_001, PATIENCE)
    awaiting.drop("1")
    assert awaiting.refusal(10**9, PATIENCE) == ""


def test_epochs_of_one_session_count_once() -> None:
    awaiting = Awaiting()
    for epoch, amount in enumerate((60, 90)):
        one = Claim(SessionId(bytes(16)), AccountId("a"), Microcredits(amount), 0)
        awaiting.add(str(epoch), one)
    assert awaiting.credit == 90
    assert awaiting.refusal(10**9, PATIENCE) == ""


def test_memory_is_bounded_too() -> None:
    assert claims(*[0] * (AWAITING_MAX - 1)).refusal(0, PATIENCE) == ""
    assert "wait for" in claims(*[0] * AWAITING_MAX).refusal(0, PATIENCE)


@given(st.integers(1, 60))
def test_everybody_is_asked_for_in_turn(number: int) -> None:
    awaiting = claims(*[1] * number)
    rounds = -(-number // ASKED_AT_ONCE_MAX)
    asked = [name for _ in range(rounds) for name, _ in awaiting.next()]
    assert set(asked) == {str(one) for one in range(number)}
    assert all(asked.count(name) <= 2 for name in asked)
