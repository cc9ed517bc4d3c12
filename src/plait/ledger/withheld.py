"""Whether an authority kept a grant out of its log: judged from signed bytes alone. Pure.

A grant says that its entry is in the log at most ``merge_delay_ms`` after it was given. The
whole journal under a later checkpoint, without that entry, is proof against the authority.
How late a checkpoint is follows from what it covers and from its cosignatures, never from
anybody's word: an entry that the same authority dated later, or a witness's time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from plait.envelope import open_envelope
from plait.errors import BadProof
from plait.ledger.balances import EntryKind, entry_from_payload
from plait.ledger.checkpoint import open_checkpoint
from plait.ledger.cosignature import open_cosignatures
from plait.ledger.merkle import leaf_hash, root_of
from plait.network_file import Authority, NetworkFile
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import ReservationGrant

Finding = Literal["included", "withheld", "not yet due"]


@dataclass(frozen=True, slots=True)
class GrantVerdict:
    """What a journal says of a grant. ``index`` is the entry's, of an included one.

    ``due_ms`` is when the entry had to be there, ``seen_ms`` the latest time that the
    checkpoint is proven to be of.
    """

    finding: Finding
    authority: Authority
    index: int | None
    due_ms: int
    seen_ms: int
    tree_size: int


def judge_grant(
    grant: SignedEnvelope, leaves: Sequence[bytes], checkpoint: str, network: NetworkFile
) -> GrantVerdict:
    """Judge one authority's grant by its journal from the first entry on.

    Entries beyond the checkpoint are not looked at. Raises ``BadSignature`` and ``BadProof``
    if the grant, the checkpoint or the journal is not that authority's.
    """
    authority = next((a for a in network.authorities if a.ledger_key == grant.signer), None)
    if authority is None:
        raise BadProof("the grant is not signed by a ledger authority of the network")
    granted = open_envelope(grant, ReservationGrant)
    if granted.network_id != network.network_id:
        raise BadProof("the grant is of another network")
    head = open_checkpoint(checkpoint, authority.log_origin, authority.log_key)
    covered = leaves[: head.size]
    if len(covered) < head.size or root_of(map(leaf_hash, covered)) != head.root:
        raise BadProof("the journal is not the one that the checkpoint signs")
    entries = [entry_from_payload(leaf) for leaf in covered]
    times = [entry.posted_ms for entry in entries]
    if network.witnesses:
        # A witness cosigned it at that time: no later entry was needed for it to be late.
        times += quorum_time_ms(checkpoint, network)
    due_ms, seen_ms = granted.granted_ms + granted.merge_delay_ms, max(times, default=0)
    for entry in entries:
        if entry.kind is EntryKind.RESERVE and entry.cause == granted.reservation_digest:
            return GrantVerdict("included", authority, entry.index, due_ms, seen_ms, head.size)
    finding: Finding = "withheld" if seen_ms > due_ms else "not yet due"
    return GrantVerdict(finding, authority, None, due_ms, seen_ms, head.size)


def quorum_time_ms(checkpoint: str, network: NetworkFile) -> list[int]:
    """The time that as many witnesses as the quorum confirm, or nothing: fewer may lie about it."""
    found = open_cosignatures(checkpoint, network.witnesses)
    times = sorted((one.time_s * 1000 for one in found), reverse=True)
    return times[max(network.witness_quorum, 1) - 1 :][:1]
