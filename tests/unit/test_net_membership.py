"""Membership: who is believed, who is ignored, who is blamed, and what is forgotten."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.envelope import open_envelope, pae, seal
from plait.identity import SigningKey
from plait.net import membership as module
from plait.net.membership import (
    Change,
    Membership,
    MembershipLimits,
    Verdict,
    next_incarnation,
)
from plait.network_file import NetworkFile
from plait.router.view import LinkReport, MeasuredLink, Offer
from plait.router.wire import offer_from_message, offer_to_message, seal_link_report, seal_offer
from plait.testing.offers import plain_offer
from plait.types import Digest, PeerId, Span
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope

NOW_MS = 1_800_000_000_000
STARTED_NS = NOW_MS * 1_000_000
ALICE, BOB, EVE = (SigningKey.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
OPEN = NetworkFile("net-1", ALICE.peer_id, "open", b"i" * 32, (), ())


def offer_of(key: SigningKey = ALICE, **changes: Any) -> Offer:
    """An offer issued now for a minute."""
    given: dict[str, Any] = {"incarnation": STARTED_NS, "issued_ms": NOW_MS}
    given |= {"expires_ms": NOW_MS + 60_000, "region": "eu"}
    given |= {"kv_tokens_total": 10, "kv_tokens_free": 10}
    return replace(plain_offer(key.peer_id, Digest(b"m" * 32), Span(0, 4), **given), **changes)


def signed(key: SigningKey = ALICE, network_id: str = "net-1", **changes: Any) -> SignedEnvelope:
    """A sealed offer."""
    return seal_offer(key, offer_of(key, **changes), network_id)


def links_of(key: SigningKey, sequence: int = 1, **changes: Any) -> SignedEnvelope:
    """A sealed link report of a 5 ms round trip to BOB (or ALICE)."""
    other = BOB if key is not BOB else ALICE
    links = (MeasuredLink(other.peer_id, 5000, 10**6),)
    report = LinkReport(key.peer_id, STARTED_NS, sequence, NOW_MS, NOW_MS + 60_000, links)
    return seal_link_report(key, replace(report, **changes), "net-1")


def outcome(verdict: Verdict) -> tuple[str, str]:
    """Outcome and reason."""
    return verdict.outcome, verdict.reason


def unsigned() -> SignedEnvelope:
    envelope = signed()
    envelope.ClearField("signature")
    envelope.ClearField("signer")
    return envelope


def forged() -> SignedEnvelope:
    envelope = signed(EVE)
    envelope.signer = ALICE.public
    return envelope


def tampered() -> SignedEnvelope:
    envelope = signed()
    envelope.payload = envelope.payload.replace(b"eu", b"us")
    return envelope


def padded() -> bytes:
    return signed().SerializeToString() + b"\xf8\x01\x01"


def misaddressed() -> SignedEnvelope:
    envelope = seal(ALICE, NodeKeyCert(network_id="net-1"))
    envelope.payload_type = module._OFFER_TYPE
    envelope.signature = ALICE.sign(pae(envelope.payload_type, envelope.payload))
    return envelope


BAD: list[tuple[Callable[[], SignedEnvelope | bytes], str, str]] = [
    (unsigned, "reject", "not signed"),
    (forged, "reject", "does not match"),
    (tampered, "reject", "does not match"),
    (padded, "reject", "not canonically encoded"),
    (misaddressed, "reject", ""),
    (lambda: b"\xff\xff", "reject", "not an envelope"),
    (lambda: b"", "reject", "not gossiped"),
    (lambda: bytes(3000), "reject", "too many"),
    (lambda: signed(certificate=bytes(900)), "reject", "too many"),
    (lambda: signed(network_id="net-2"), "reject", "another network"),
    (lambda: signed(span=Span(0, 9999)), "reject", "impossible span"),
    (lambda: signed(region="\x1b[2J"), "reject", "unprintable"),
    (lambda: signed(kv_tokens_free=11), "reject", "more free than all"),
    (lambda: signed(expires_ms=NOW_MS + 600_001), "reject", "ten minutes"),
    (lambda: signed(expires_ms=NOW_MS), "reject", "before it was issued"),
    (lambda: signed(issued_ms=NOW_MS - 9, expires_ms=NOW_MS), "ignore", "has expired"),
    (lambda: signed(issued_ms=NOW_MS + 120_001, expires_ms=NOW_MS + 130_000), "ignore", "future"),
    (lambda: seal(ALICE, NodeKeyCert(network_id="net-1")), "reject", "not gossiped"),
    (lambda: links_of(ALICE, links=(MeasuredLink(BOB.peer_id, 0),)), "reject", "zero"),
    (lambda: links_of(ALICE, links=(MeasuredLink(ALICE.peer_id, 9),)), "reject", "bad peer id"),
    (lambda: links_of(ALICE, links=(MeasuredLink(PeerId("x0"), 9),)), "reject", "bad peer id"),
    (lambda: links_of(ALICE, links=(MeasuredLink(BOB.peer_id, 9),) * 2), "reject", "twice"),
]


@pytest.mark.parametrize(("make", "expected", "reason"), BAD)
@pytest.mark.parametrize("serialized", [False, True])
def test_bad_messages(
    make: Callable[[], SignedEnvelope | bytes], expected: str, reason: str, serialized: bool
) -> None:
    members = Membership(OPEN)
    message = make()
    if serialized and isinstance(message, SignedEnvelope):
        message = message.SerializeToString(deterministic=True)
    verdict = members.handle_envelope(message, NOW_MS)
    assert verdict.outcome == expected and reason in verdict.reason
    assert verdict.change is None and members.view().offers == {} and members.envelopes() == ()


def test_an_offer_and_a_report_make_a_view() -> None:
    members = Membership(OPEN)
    envelope = signed()
    verdict = members.handle_envelope(envelope.SerializeToString(deterministic=True), NOW_MS)
    assert verdict.outcome == "accept" and verdict.change is not None
    offer = verdict.change.offer
    assert offer is not None and verdict.change == Change(
        "offer", ALICE.peer_id, "", offer, envelope
    )
    assert replace(offer, digest=Digest(b"")) == offer_of()
    report = members.handle_envelope(links_of(ALICE), NOW_MS)
    assert report.change is not None and report.change.kind == "links"
    view = members.view()
    assert view.offers == {ALICE.peer_id: offer}
    assert view.link_rtt_us(BOB.peer_id, ALICE.peer_id) == 5000
    assert view.link_bandwidth(ALICE.peer_id, BOB.peer_id) == 10**6
    assert members.view() is view
    assert members.envelopes() == (envelope, links_of(ALICE))


def test_replays_and_stale_messages_change_nothing() -> None:
    members = Membership(OPEN)
    old, new = signed(), signed(sequence=2, sessions_active=3)
    assert members.handle_envelope(old, NOW_MS).outcome == "accept"
    assert members.handle_envelope(new, NOW_MS).outcome == "accept"
    assert outcome(members.handle_envelope(old, NOW_MS)) == ("ignore", "a later one is known")
    assert outcome(members.handle_envelope(new, NOW_MS)) == ("ignore", "it is known")
    other = members.handle_envelope(signed(sequence=2), NOW_MS)
    assert outcome(other) == ("ignore", "its author signed another with the same sequence")
    assert members.view().offers[ALICE.peer_id].sessions_active == 3


def test_a_signature_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = MembershipLimits(verified_remembered_max=1, decoded_remembered_max=1)
    members, verified = Membership(OPEN, limits), []

    def counting(envelope: SignedEnvelope, message_class: type[Any]) -> Any:
        verified.append(message_class)
        return open_envelope(envelope, message_class)

    monkeypatch.setattr("plait.net.membership.open_envelope", counting)
    for _ in range(3):
        members.handle_envelope(signed(), NOW_MS)
    assert len(verified) == 1
    members.handle_envelope(signed(BOB), NOW_MS)
    members.handle_envelope(signed(), NOW_MS)
    assert len(verified) == 3


def test_a_message_that_comes_again_is_judged_again_but_decoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, decoded = Membership(OPEN), []

    def counting(*given: Any) -> Offer:
        decoded.append(offer_from_message(*given))
        return decoded[-1]

    monkeypatch.setattr("plait.net.membership.offer_from_message", counting)
    data = signed().SerializeToString()
    assert members.handle_envelope(data, NOW_MS).outcome == "accept"
    assert outcome(members.handle_envelope(data, NOW_MS)) == ("ignore", "it is known")
    late = members.handle_envelope(data, NOW_MS + 60_000)
    assert outcome(late) == ("ignore", "it has expired")
    assert len(decoded) == 1


def test_a_restarted_node_outranks_its_ghost() -> None:
    members = Membership(OPEN)
    members.handle_envelope(signed(sequence=9), NOW_MS)
    members.handle_envelope(links_of(ALICE), NOW_MS)
    reborn = signed(incarnation=STARTED_NS + 1, sequence=1, span=Span(4, 8))
    assert members.handle_envelope(reborn, NOW_MS).outcome == "accept"
    assert members.view().offers[ALICE.peer_id].span == Span(4, 8)
    assert members.view().rtt_us == {}
    ghost = members.handle_envelope(signed(sequence=10), NOW_MS)
    assert outcome(ghost) == ("ignore", "it is of an earlier incarnation")
    assert ghost.conflict is None


def test_a_report_of_a_new_incarnation_drops_the_ghosts_offer() -> None:
    members = Membership(OPEN)
    members.handle_envelope(signed(), NOW_MS)
    verdict = members.handle_envelope(links_of(ALICE, incarnation=STARTED_NS + 1), NOW_MS)
    assert verdict.change is not None and verdict.change.kind == "gone"
    assert members.view().offers == {}


def test_a_copied_identity_is_named() -> None:
    members = Membership(OPEN)
    later = STARTED_NS + 10**9
    members.handle_envelope(signed(), NOW_MS)
    members.handle_envelope(signed(incarnation=later), NOW_MS + 1000)
    alive = signed(sequence=2, issued_ms=NOW_MS + 4000)
    verdict = members.handle_envelope(alive, NOW_MS + 4000)
    assert verdict.outcome == "ignore" and verdict.conflict is not None
    assert verdict.conflict.peer == ALICE.peer_id
    assert verdict.conflict.incarnations == (STARTED_NS, later)
    assert ALICE.peer_id in str(verdict.conflict) and "copied" in str(verdict.conflict)


def test_withdrawing_removes_and_is_remembered() -> None:
    members = Membership(OPEN)
    members.handle_envelope(signed(), NOW_MS)
    goodbye = signed(sequence=2, state="withdrawn")
    verdict = members.handle_envelope(goodbye, NOW_MS)
    assert verdict.change == Change("gone", ALICE.peer_id, "withdrawn", envelope=goodbye)
    assert members.view().offers == {} and members.envelopes() == ()
    assert members.handle_envelope(signed(), NOW_MS).outcome == "ignore"
    assert members.handle_envelope(signed(sequence=3), NOW_MS).outcome == "accept"


def test_a_dead_peer_stays_dead_until_it_speaks_again() -> None:
    members = Membership(OPEN)
    members.handle_envelope(signed(sequence=5), NOW_MS)
    members.handle_envelope(links_of(ALICE), NOW_MS)
    assert members.peer_down(BOB.peer_id, STARTED_NS) is None
    assert members.peer_down(ALICE.peer_id, STARTED_NS - 1) is None
    down = members.peer_down(ALICE.peer_id, STARTED_NS)
    assert down == Change("gone", ALICE.peer_id, "unreachable")
    assert members.peer_down(ALICE.peer_id, STARTED_NS) is None
    assert members.view().offers == {} and members.view().rtt_us == {}
    for sequence in (4, 5):
        verdict = members.handle_envelope(signed(sequence=sequence), NOW_MS)
        assert verdict.outcome == "ignore"
    assert members.handle_envelope(signed(sequence=6), NOW_MS).outcome == "accept"
    members.peer_down(ALICE.peer_id, STARTED_NS + 7)
    assert members.handle_envelope(signed(sequence=7), NOW_MS).outcome == "ignore"
    reborn = signed(incarnation=STARTED_NS + 7)
    assert members.handle_envelope(reborn, NOW_MS).outcome == "accept"


def test_expiry_drops_and_later_forgets() -> None:
    members = Membership(OPEN)
    members.handle_envelope(signed(), NOW_MS)
    members.handle_envelope(links_of(BOB, expires_ms=NOW_MS + 70_000), NOW_MS)
    assert members.next_expiry() == NOW_MS + 60_000
    assert members.expire(NOW_MS + 59_999) == ()
    assert members.expire(NOW_MS + 60_000) == (Change("gone", ALICE.peer_id, "expired"),)
    assert members.next_expiry() == NOW_MS + 70_000
    assert members.expire(NOW_MS + 70_000) == (Change("links", BOB.peer_id, "expired"),)
    assert members.next_expiry() is None and members.envelopes() == ()
    assert len(members._peers) == 2
    assert members.expire(NOW_MS + 600_000) == () and not members._peers and not members._hosts


def test_only_the_admitted_are_heard() -> None:
    network = replace(OPEN, admission="allowlist", allowed_peers=frozenset({BOB.peer_id}))
    members = Membership(network)
    assert members.handle_envelope(signed(ALICE), NOW_MS).outcome == "ignore"
    assert members.handle_envelope(signed(BOB), NOW_MS).outcome == "accept"


def test_an_author_is_limited_but_replays_do_not_count() -> None:
    members = Membership(OPEN, MembershipLimits(author_rate=1.0, author_burst=2))
    for _ in range(5):
        members.handle_envelope(signed(sequence=1), NOW_MS)
    assert members.handle_envelope(signed(sequence=2), NOW_MS).outcome == "accept"
    verdict = members.handle_envelope(signed(sequence=3), NOW_MS)
    assert outcome(verdict) == ("ignore", "its author sends too much")
    assert members.handle_envelope(signed(sequence=3), NOW_MS + 1000).outcome == "accept"


def test_a_forwarder_is_limited_before_any_signature_is_checked() -> None:
    limits = MembershipLimits(forwarder_rate=1.0, forwarder_burst=1, peers_remembered_max=1)
    members = Membership(OPEN, limits)
    assert members.handle_envelope(forged(), NOW_MS, "eve").outcome == "reject"
    verdict = members.handle_envelope(forged(), NOW_MS, "eve")
    assert outcome(verdict) == ("ignore", "its forwarder sends too much")
    assert members.handle_envelope(signed(), NOW_MS, "bob").outcome == "accept"
    assert len(members._forwarders) == 1


def test_peers_are_bounded_by_model_and_in_all() -> None:
    members = Membership(OPEN, MembershipLimits(peers_per_model_max=1, peers_remembered_max=2))
    assert members.handle_envelope(signed(ALICE), NOW_MS).outcome == "accept"
    verdict = members.handle_envelope(signed(BOB), NOW_MS)
    assert outcome(verdict) == ("ignore", "too many peers serve its model")
    assert members.handle_envelope(signed(ALICE, sequence=2), NOW_MS).outcome == "accept"
    other = Digest(b"n" * 32)
    assert members.handle_envelope(signed(BOB, model_digest=other), NOW_MS).outcome == "accept"
    verdict = members.handle_envelope(signed(EVE, model_digest=Digest(b"o" * 32)), NOW_MS)
    assert outcome(verdict) == ("ignore", "too many peers are known")
    members.peer_down(ALICE.peer_id, STARTED_NS)
    moved = signed(BOB, sequence=2)
    assert members.handle_envelope(moved, NOW_MS).outcome == "accept"


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.permutations(range(8)), st.data())
def test_any_order_of_delivery_ends_with_the_newest(order: list[int], data: st.DataObject) -> None:
    newest = offer_of(incarnation=STARTED_NS + 3, sequence=1)
    messages = [
        signed(incarnation=STARTED_NS + number // 2, sequence=1 - number % 2 + 1)
        for number in range(6)
    ]
    messages += [signed(incarnation=newest.incarnation), links_of(BOB)]
    members = Membership(OPEN)
    for at in order:
        members.handle_envelope(messages[at], NOW_MS)
        if data.draw(st.booleans()):
            members.handle_envelope(messages[at], NOW_MS)
    assert members.view().offers[ALICE.peer_id].incarnation == newest.incarnation
    assert len(members.envelopes()) == 2


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_flipped_bit_is_accepted(data: st.DataObject) -> None:
    message = bytearray(signed().SerializeToString(deterministic=True))
    bit = data.draw(st.integers(0, len(message) * 8 - 1))
    message[bit // 8] ^= 1 << bit % 8
    assert Membership(OPEN).handle_envelope(bytes(message), NOW_MS).outcome == "reject"


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=1100))
def test_noise_is_rejected(noise: bytes) -> None:
    assert Membership(OPEN).handle_envelope(noise, NOW_MS).outcome == "reject"


def test_the_envelope_of_a_full_offer_fits() -> None:
    offer = offer_of(
        certificate=bytes(420),
        multiaddrs=(f"/ip4/203.0.113.77/tcp/40401/p2p/{ALICE.peer_id}",),
        numeric_class="0123456789abcdef:fp32:torch:f32:8",
        public_address="203.0.113.77:40402",
        peer_address="203.0.113.77:40403",
        millijoules_per_token_layer=2**32,
        grams_co2_per_kwh=400,
    )
    assert seal(ALICE, offer_to_message(offer, "net-1")).ByteSize() <= module.OFFER_BYTES_MAX


@given(jump_ms=st.integers(-120_000, 120_000), later_ms=st.integers(0, 60_000))
@settings(max_examples=50)
def test_a_node_whose_clock_jumped_is_not_taken_for_two_when_it_restarts(
    jump_ms: int, later_ms: int
) -> None:
    members = Membership(OPEN)
    said_ms = NOW_MS + jump_ms
    ghost = signed(sequence=2, issued_ms=said_ms, expires_ms=said_ms + 60_000)
    restarted_ms = NOW_MS + later_ms
    reborn = signed(
        incarnation=next_incarnation(restarted_ms * 1_000_000, STARTED_NS, said_ms),
        sequence=1,
        issued_ms=restarted_ms,
        expires_ms=restarted_ms + 60_000,
    )
    assert members.handle_envelope(reborn, restarted_ms).outcome == "accept"
    verdict = members.handle_envelope(ghost, restarted_ms)
    assert (verdict.outcome, verdict.conflict) == ("ignore", None)
