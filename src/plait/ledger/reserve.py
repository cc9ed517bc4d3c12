"""Reservations: the client sets credit aside, with a cap for each stage; the ledger grants."""

from collections.abc import Sequence

from plait.envelope import digest, open_envelope, seal
from plait.errors import BadProof, BadSignature, Overspend
from plait.identity import SigningKey
from plait.ledger.blame import about
from plait.ledger.opening import route_digest as route_digest_of
from plait.ledger.terms import SessionTerms
from plait.network_file import Authority
from plait.types import U64_MAX, Microcredits
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation, PayeeAmount, ReservationGrant


def make_reservation(
    key: SigningKey,
    terms: SessionTerms,
    lane: int,
    sequence: int,
    now_ms: int,
    ttl_ms: int,
    route_digest: bytes,
    *,
    sub_account: str = "",
) -> SignedEnvelope:
    """Ask for the most that the stages that enter in this epoch can still earn.

    Each one's cap is its own maximum; the others have theirs from an earlier epoch.
    ``key`` is the client's ledger key; ``sequence`` rises by one per (account, lane).
    ``sub_account`` is the share of the account whose limits count too.
    Raises ``Overspend`` if the price does not fit 64 bits.
    """
    entered = _entered(terms)
    caps = [Microcredits(terms.price_max(index) - terms.stages[index].carried) for index in entered]
    if sum(caps) > U64_MAX:
        raise Overspend("the session's price does not fit 64 bits")
    reservation = BudgetReservation(
        network_id=terms.network_id,
        account=terms.client,
        lane=lane,
        sequence=sequence,
        session_id=terms.session_id,
        epoch=terms.epoch,
        amount=sum(caps),
        caps=[
            PayeeAmount(payee=terms.stages[index].peer, microcredits=cap)
            for index, cap in zip(entered, caps, strict=True)
        ],
        route_digest=route_digest,
        issued_ms=now_ms,
        expires_ms=now_ms + ttl_ms,
        sub_account=sub_account,
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
    reservation = _open_reservation(reservation_envelope, terms)
    amount = check_grant_of(grant_envelope, reservation_envelope, authority, now_ms)
    if stage_index is None:
        return amount
    return _cap(reservation, terms, stage_index)


def check_supplement(
    reservation_envelope: SignedEnvelope, terms: SessionTerms, stage_index: int, now_ms: int
) -> Microcredits:
    """Check a reservation that the ledger has not granted yet; return the stage's cap.

    Raises as ``check_grant`` does.
    """
    reservation = _open_reservation(reservation_envelope, terms)
    with about("reservation"):
        if now_ms >= reservation.expires_ms:
            raise BadProof("it has expired")
    return _cap(reservation, terms, stage_index)


def check_grant_of(
    grant_envelope: SignedEnvelope,
    reservation_envelope: SignedEnvelope,
    authority: Authority | Sequence[Authority],
    now_ms: int,
) -> Microcredits:
    """Check that an authority granted a reservation that was checked before; return the amount.

    Raises ``BadSignature`` or ``BadProof``.
    """
    with about("grant"):
        reservation = open_envelope(reservation_envelope, BudgetReservation)
        authorities = [authority] if isinstance(authority, Authority) else authority
        if grant_envelope.signer not in {one.ledger_key for one in authorities}:
            raise BadSignature("it is not signed by a ledger authority of the network")
        grant = open_envelope(grant_envelope, ReservationGrant)
        _check_grant_fields(grant, reservation, digest(reservation_envelope.payload), now_ms)
    return Microcredits(grant.amount)


def caps_of(reservation: BudgetReservation, terms: SessionTerms) -> tuple[Microcredits | None, ...]:
    """The caps in stage order, None for a stage that entered earlier.

    Raises ``BadProof`` unless each stage that enters has exactly one.
    """
    entered = _entered(terms)
    if [cap.payee for cap in reservation.caps] != [terms.stages[index].peer for index in entered]:
        raise BadProof("the reservation's caps are not one for each stage that enters, in order")
    caps: list[Microcredits | None] = [None] * len(terms.stages)
    for index, cap in zip(entered, reservation.caps, strict=True):
        caps[index] = Microcredits(cap.microcredits)
    return tuple(caps)


def _cap(reservation: BudgetReservation, terms: SessionTerms, stage_index: int) -> Microcredits:
    cap = caps_of(reservation, terms)[stage_index]
    if cap is None:
        raise BadProof("reservation: it sets nothing aside for this stage")
    return cap


def _entered(terms: SessionTerms) -> list[int]:
    return [index for index in range(len(terms.stages)) if terms.entered(index)]


def _open_reservation(envelope: SignedEnvelope, terms: SessionTerms) -> BudgetReservation:
    with about("reservation"):
        reservation = open_envelope(envelope, BudgetReservation, signer=terms.client_ledger_key)
        _check_reservation(reservation, terms)
    return reservation


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
    if sum(cap or 0 for cap in caps_of(reservation, terms)) > reservation.amount:
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
