"""A committee of ledger authorities: n = 3f + 1 of them, up to f may lie or be dead.

FastPay (Baudet, Danezis, Sonnino; AFT 2020): an account orders its own reservations, so
that the authorities need no consensus. Each keeps its own journal and grants one
reservation per (account, lane, number). Any two sets of 2f + 1 share an honest authority:
at most one reservation of a number can ever have 2f + 1 grants. An account has one lane
here, so that whoever grants a number has booked all before it.
"""

from collections.abc import Sequence

from plait.envelope import decode, digest, encode, open_envelope
from plait.errors import BadProof, BadSignature
from plait.ledger.blame import about
from plait.ledger.reserve import check_grant
from plait.ledger.terms import SessionTerms
from plait.network_file import Authority
from plait.types import Microcredits
from plait.v1.committee_pb2 import CommitteeGrant
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import ReservationGrant

COMMITTEE_GRANT_TYPE = "application/vnd.plait.committee-grant.v1"
COMMITTEE_LANE = 0
"""The one lane of every account whose network has a committee."""


def faults_max(authorities: int) -> int:
    """How many of so many authorities may lie: f of 3f + 1."""
    return (authorities - 1) // 3


def quorum_of(authorities: int) -> int:
    """How many of so many must grant: 2f + 1 of 3f + 1, and all of two or three."""
    return authorities - faults_max(authorities)


def combine_grants(
    grants: Sequence[SignedEnvelope], authorities: Sequence[Authority]
) -> SignedEnvelope:
    """One envelope with the grants of several authorities, in the network file's order.

    Of one authority alone it is that one's grant. Nothing is checked.
    """
    if len(authorities) == 1 and len(grants) == 1:
        return grants[0]
    order = {one.ledger_key: index for index, one in enumerate(authorities)}
    ordered = sorted(grants, key=lambda grant: order.get(grant.signer, len(order)))
    return SignedEnvelope(
        payload_type=COMMITTEE_GRANT_TYPE, payload=encode(CommitteeGrant(grants=ordered))
    )


def grants_in(envelope: SignedEnvelope) -> tuple[SignedEnvelope, ...]:
    """The single grants in a grant; raises ``BadProof`` if a committee's is malformed."""
    if envelope.payload_type != COMMITTEE_GRANT_TYPE:
        return (envelope,)
    with about("grant"):
        if envelope.signer or envelope.signature:
            raise BadProof("a committee's grant is signed inside only")
        return tuple(decode(envelope.payload, CommitteeGrant).grants)


def granters(
    grant: SignedEnvelope, reservation: SignedEnvelope, authorities: Sequence[Authority]
) -> tuple[Authority, ...]:
    """The authorities that granted a reservation, in the network file's order.

    ``authorities`` are all that the network file names. Raises ``BadProof`` for fewer than a
    quorum, for one named twice and for a grant of something else, and ``BadSignature``.
    """
    grants = grants_in(grant)
    known = {one.ledger_key: index for index, one in enumerate(authorities)}
    with about("grant"):
        if any(one.signer not in known for one in grants):
            raise BadSignature("it is not signed by a ledger authority of the network")
        order = [known[one.signer] for one in grants]
        if sorted(set(order)) != order:
            raise BadProof("an authority granted twice, or they are not in order")
        if len(order) < quorum_of(len(authorities)):
            raise BadProof(
                f"{len(order)} of {len(authorities)} authorities granted, "
                f"{quorum_of(len(authorities))} are needed"
            )
        expected = digest(reservation.payload)
        for one in grants:
            if open_envelope(one, ReservationGrant).reservation_digest != expected:
                raise BadProof("it is for another reservation")
    return tuple(authorities[index] for index in order)


def check_grants(
    grant: SignedEnvelope,
    reservation: SignedEnvelope,
    authorities: Sequence[Authority],
    terms: SessionTerms,
    stage_index: int | None,
    now_ms: int,
    *,
    trusted: Sequence[Authority] | None = None,
) -> Microcredits:
    """Check a reservation and its grant by one authority or by a committee.

    Returns the stage's cap, or with no stage index the whole amount. ``authorities`` are all
    of the network file; ``trusted`` leaves out those caught lying: their grants count no
    more. Raises what ``check_grant`` and ``granters`` raise.
    """
    allowed = authorities if trusted is None else trusted
    keys = {one.ledger_key for one in allowed}
    counted = [one for one in grants_in(grant) if one.signer in keys]
    if trusted is not None and not counted:
        raise BadSignature("grant: it is signed only by authorities that have lied")
    if trusted is not None and len(counted) < len(grants_in(grant)):
        grant = combine_grants(counted, authorities)
    granters(grant, reservation, authorities)
    caps = [
        check_grant(one, reservation, allowed, terms, stage_index, now_ms)
        for one in grants_in(grant)
    ]
    return min(caps)
