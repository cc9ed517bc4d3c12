"""What a client asks for: the lots of a bundle, those that were drawn, and the challenge.

Everything but the nonce and two proofs of the log is in the bundle.
"""

from collections.abc import Iterator, Sequence

from plait.envelope import digest
from plait.errors import BadProof
from plait.ledger.balances import EntryKind, entry_from_payload
from plait.ledger.bundle import BundleParts, EpochParts
from plait.ledger.lottery import Lot
from plait.ledger.verify_frames import cached_positions
from plait.types import AccountId, Digest, PeerId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.stage_pb2 import AuditAnchor, AuditChallenge, AuditEpoch


def lots_of(parts: BundleParts) -> tuple[Lot, ...]:
    """Every chunk of every stage that is receipted in a bundle."""
    return tuple(
        Lot(epoch.terms.epoch, chunk, index)
        for epoch in parts.epochs
        for index in range(len(epoch.terms.stages))
        for chunk, _ in enumerate(_receipts(epoch, index))
    )


def audited_peer(parts: BundleParts, lot: Lot) -> PeerId:
    """Whose work a lot is."""
    return _epoch(parts, lot.epoch).terms.stages[lot.stage_index].peer


def paying_entry(parts: BundleParts, lot: Lot) -> tuple[int, SignedEnvelope]:
    """The first entry (its place in the bundle) that paid the stage for the chunk, and why.

    Raises ``BadProof`` if the ledger has not paid for it: then it cannot be audited.
    """
    peer = audited_peer(parts, lot)
    vouchers = {
        digest(epoch.voucher.payload): epoch.voucher
        for epoch in parts.epochs
        if epoch.voucher is not None and epoch.terms.epoch >= lot.epoch
    }
    for number, payload in enumerate(parts.entries):
        entry = entry_from_payload(payload)
        credited = {line.account for line in entry.lines if line.credit}
        voucher = vouchers.get(Digest(entry.cause))
        if entry.kind == EntryKind.SETTLE and voucher and AccountId(peer) in credited:
            return number, voucher
    raise BadProof("the ledger has not paid the stage for this chunk")


def challenge_for(
    parts: BundleParts, lot: Lot, nonce: bytes, anchor: AuditAnchor
) -> AuditChallenge:
    """The challenge of one lot, for its stage and for the auditor.

    Raises ``BadProof`` if the stage began from cached positions: nobody can open those.
    """
    epoch = _epoch(parts, lot.epoch)
    stage = epoch.terms.stages[lot.stage_index]
    if stage.entered_epoch == 1 and (cached := cached_positions(parts)):
        raise BadProof(f"the stage took {cached} positions from its cache, which it cannot open")
    stint = list(_stint(parts, stage.peer, stage.entered_epoch, lot.epoch))
    own = _receipts(epoch, lot.stage_index)
    return AuditChallenge(
        epochs=[
            *(
                AuditEpoch(session_open=one.session_open, receipt=receipts[-1])
                for one, receipts in stint
            ),
            AuditEpoch(
                session_open=epoch.session_open,
                receipt=own[lot.chunk],
                previous=own[lot.chunk - 1] if lot.chunk else None,
            ),
        ],
        nonce=nonce,
        anchor=anchor,
        client_cert=parts.client_cert,
        stage_cert=epoch.stage_certs[lot.stage_index],
        offer=epoch.offers[lot.stage_index],
    )


def _stint(
    parts: BundleParts, peer: PeerId, entered: int, before: int
) -> Iterator[tuple[EpochParts, Sequence[SignedEnvelope]]]:
    for epoch in parts.epochs:
        if not entered <= epoch.terms.epoch < before:
            continue
        for index, stage in enumerate(epoch.terms.stages):
            receipts = _receipts(epoch, index)
            if stage.peer == peer and receipts:
                yield epoch, receipts


def _receipts(epoch: EpochParts, stage_index: int) -> Sequence[SignedEnvelope]:
    """A stage's receipts of an epoch in order, that of the cut included."""
    receipts = list(epoch.receipts[stage_index :: len(epoch.terms.stages)])
    if epoch.cut is not None:
        cut = epoch.cut.receipts[stage_index]
        receipts += [cut] if cut is not None else []
    return receipts


def _epoch(parts: BundleParts, number: int) -> EpochParts:
    for epoch in parts.epochs:
        if epoch.terms.epoch == number:
            return epoch
    raise BadProof(f"the bundle has no epoch {number}")
