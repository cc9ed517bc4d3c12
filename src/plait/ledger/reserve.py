"""Reservations: the client sets credit aside, with a cap for each stage; the ledger grants."""

from collections.abc import Sequence

from plait.envelope import digest, open_envelope, seal
from plait.errors import BadProof, BadSignature, Overspend
from plait.identity import SigningKey
from plait.ledger.blame import about
from plait.ledger.opening import route_digest as route_digest_of
from plait.ledger.terms import SessionTerms
from plait.ledger.voucher import amounts_of, payee_amounts
from plait.network_file import Authority
from plait.types import Microcredits, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation, ReservationGrant


def make_reservation(
    key: SigningKey,
    terms: SessionTerms,
    lane: int,
    sequence: int,
    now_ms: int,
    ttl_ms: int,
    route_digest: bytes,
) -> SignedEnvelope:
    """Ask for the most that the session can cost; each stage's cap is its own maximum.

    ``key`` is the client's ledger key; ``sequence`` rises by one per (account, lane).
    Raises ``Overspend`` if the price does not fit 64 bits.
    """
    most = TokenCounts(prompt=terms.prompt_tokens, output=terms.max_tokens)
    caps = amounts_of(terms, most)
    reservation = BudgetReservation(
        network_id=terms.network_id,
        account=terms.client,
        lane=lane,
        sequence=sequence,
        session_id=terms.session_id,
        epoch=terms.epoch,
        amount=sum(caps),
        caps=payee_amounts(terms, caps),
        route_digest=route_digest,
        issued_ms=now_ms,
        expires_ms=now_ms + ttl_ms,
    )
    return seal(key, reservation)


def check_grant(
    grant_envelope: SignedEnvelope,
    reservation_envelope: SignedEnvelope,
    authority: Authority | Sequence[Authority],
    terms: SessionTerms,
    stage_index: int | None,
    now_ms: int,
) -> Microcredits:
    """Check a reservation and its grant, and return the stage's cap.

    ``authority`` is who may grant; of several, any one. With no stage index, return the
    whole amount. Raises ``BadSignature`` for a wrong
    signer, ``BadProof`` for a grant or reservation of something else or out of time, and
    ``Overspend`` if the caps exceed the amount.
    """
    with about("reservation"):
        reservation = open_envelope(
            reservation_envelope, BudgetReservation, signer=terms.client_ledger_key
        )
        _check_reservation(reservation, terms)
    with about("grant"):
        authorities = [authority] if isinstance(authority, Authority) else authority
        if grant_envelope.signer not in {one.ledger_key for one in authorities}:
            raise BadSignature("it is not signed by a ledger authority of the network")
        grant = open_envelope(grant_envelope, ReservationGrant)
        _check_grant_fields(grant, reservation, digest(reservation_envelope.payload), now_ms)
    if stage_index is None:
        return Microcredits(grant.amount)
    return caps_of(reservation, terms)[stage_index]


def caps_of(reservation: BudgetReservation, terms: SessionTerms) -> tuple[Microcredits, ...]:
    """The caps in stage order; raises ``BadProof`` unless each stage has exactly one."""
    if [cap.payee for cap in reservation.caps] != [stage.peer for stage in terms.stages]:
        raise BadProof("the reservation's caps are not one for each stage, in order")
    return tuple(Microcredits(cap.microcredits) for cap in reservation.caps)


def _check_reservation(reservation: BudgetReservation, terms: SessionTerms) -> None:
    stated = (
        reservation.network_id,
        reservation.account,
        reservation.session_id,
        reservation.epoch,
    )
    if stated != (terms.network_id, terms.client, terms.session_id, terms.epoch):
        raise BadProof("it is for another network, account, session or epoch")
    if reservation.route_digest != route_digest_of(terms):
        raise BadProof("it is for another route")
    if sum(caps_of(reservation, terms)) > reservation.amount:
        raise Overspend("the caps sum to more than the amount reserved")


def _check_grant_fields(
    grant: ReservationGrant, reservation: BudgetReservation, reservation_digest: bytes, now_ms: int
) -> None:
    if grant.reservation_digest != reservation_digest:
        raise BadProof("it is for another reservation")
    stated = (grant.network_id, grant.account, grant.session_id, grant.amount)
    reserved = (
        reservation.network_id,
        reservation.account,
        reservation.session_id,
        reservation.amount,
    )
    if stated != reserved:
        raise BadProof("it grants something else than was reserved")
    if now_ms >= grant.expires_ms:
        raise BadProof("it has expired")
