"""Claims about receipts, what crossed between stages, and the voucher that pays."""

from collections.abc import Mapping, Sequence

from plait.envelope import digest, open_envelope
from plait.errors import BadProof
from plait.ledger.bundle import BundleParts, EpochParts
from plait.ledger.handoff import HandoffChain, ids_payload
from plait.ledger.receipt import (
    check_handoff,
    check_receipt,
    check_ring,
    draw_statement,
)
from plait.ledger.report import Absent
from plait.ledger.verify_frames import EpochFrames
from plait.ledger.voucher import Transcript, open_voucher, voucher_message
from plait.types import Digest, Microcredits, PeerId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import DrawStatement, SessionVoucher, StageReceipt

Row = tuple[StageReceipt | None, ...]
"""The checked receipts of one chunk by stage; None of a stage that was lost in it."""


def check_receipts_complete(epoch: EpochParts, frames: EpochFrames) -> int:
    """There is one receipt for each stage and whole chunk; returns how many."""
    expected = len(frames.closes) * len(epoch.terms.stages)
    if len(epoch.receipts) != expected:
        raise BadProof(f"{len(epoch.receipts)} receipts, {expected} are due")
    if epoch.cut is not None and len(epoch.cut.receipts) != len(epoch.terms.stages):
        raise BadProof("the cut does not say for each stage whether it signed")
    return expected


def check_stage_receipts(
    epoch: EpochParts, stage_index: int, frames: EpochFrames
) -> tuple[StageReceipt | None, ...]:
    """The stage signed a receipt for each chunk, each chained to the one before.

    The last one is that of the cut, if there was one; None if the stage did not sign it.
    """
    stages = len(epoch.terms.stages)
    envelopes: list[SignedEnvelope | None] = [
        epoch.receipts[close.chunk * stages + stage_index] for close in frames.closes
    ]
    closes = list(frames.closes)
    if frames.cut is not None and epoch.cut is not None:
        envelopes.append(epoch.cut.receipts[stage_index])
        closes.append(frames.cut)
    previous_digest = b""
    receipts: list[StageReceipt | None] = []
    for close, envelope in zip(closes, envelopes, strict=True):
        if envelope is None:
            receipts.append(None)
            continue
        receipts.append(check_receipt(envelope, epoch.terms, stage_index, close, previous_digest))
        previous_digest = digest(envelope.payload)
    return tuple(receipts)


def check_handoffs(rows: Sequence[Row]) -> None:
    """Each stage received what the one before it sent."""
    for chunk, row in enumerate(rows):
        for index in range(1, len(row)):
            upstream, downstream = row[index - 1], row[index]
            if upstream is not None and downstream is not None:
                check_handoff(upstream, downstream, index, chunk)


def check_closed_ring(
    parts: BundleParts, epoch: EpochParts, frames: EpochFrames, rows: Sequence[Row]
) -> None:
    """Stage 0 was fed the prompt and what the last stage drew, and nothing else."""
    ends = _ring_commits(parts, epoch, frames)
    closes = [*frames.closes, *([frames.cut] if frames.cut is not None else [])]
    for close, row, (sent, drawn) in zip(closes, rows, ends, strict=True):
        first, last = row[0], row[-1]
        if first is not None:
            check_ring(first, first, sent, _own_output(first, row, drawn), close.chunk)
        if last is not None:
            check_ring(last, last, _own_input(last, row, sent), drawn, close.chunk)


def check_draws(parts: BundleParts, epoch: EpochParts, frames: EpochFrames) -> str:
    """The last stage signed for the ids of the chunk that was cut; returns how."""
    cut = epoch.cut
    if cut is None or frames.cut is None:
        return "no chunk was cut"
    if cut.receipts[-1] is not None:
        return "by its receipt for the cut"
    if cut.draws is None:
        raise Absent("the last stage was lost, and its statement of the draws is not here")
    _, drawn = _ring_commits(parts, epoch, frames)[-1]
    key = epoch.terms.stages[-1].ledger_key
    statement = open_envelope(cut.draws, DrawStatement, signer=key)
    if statement != draw_statement(epoch.terms, cut.traversal, drawn):
        raise BadProof("the last stage's statement is of other draws")
    return "by its statement"


def check_voucher(
    epoch: EpochParts, frames: EpochFrames, promised: Mapping[PeerId, int]
) -> SessionVoucher | None:
    """The client signed to pay each stage its price for exactly the receipted tokens.

    ``promised`` is what earlier epochs promised; None if nothing of this one is payable.
    """
    terms, cut = epoch.terms, epoch.cut
    if cut is not None and len(cut.receipts) != len(terms.stages):
        raise BadProof("the cut does not say for each stage whether it signed")
    signed = [one for one in cut.receipts if one is not None] if cut is not None else []
    if not frames.closes and not signed:
        if epoch.voucher is not None:
            raise BadProof("it pays for work that nobody signed for")
        return None
    if epoch.voucher is None:
        raise BadProof("there is no voucher for the work that was signed for")
    voucher = open_voucher(epoch.voucher, terms)
    transcript = Transcript(terms)
    transcript.add(epoch.receipts)
    transcript.add(signed)
    expected = _expected(epoch, frames, promised, transcript.value, voucher.issued_ms)
    for field in SessionVoucher.DESCRIPTOR.fields:
        if getattr(voucher, field.name) != getattr(expected, field.name):
            raise BadProof(f"its {field.name} does not follow from the receipts and the prices")
    return voucher


def _expected(
    epoch: EpochParts,
    frames: EpochFrames,
    promised: Mapping[PeerId, int],
    transcript: bytes,
    issued_ms: int,
) -> SessionVoucher:
    terms, cut = epoch.terms, epoch.cut
    if frames.cut is None or cut is None or not any(cut.receipts):
        last = frames.closes[-1]
        return voucher_message(terms, len(frames.closes), last.counts, transcript, issued_ms)
    amounts = [
        terms.price(index, frames.cut.counts)
        if cut.receipts[index] is not None
        else _amount_before(epoch, frames, index, promised)
        for index in range(len(terms.stages))
    ]
    return voucher_message(
        terms,
        len(frames.closes) + 1,
        frames.cut.counts,
        transcript,
        issued_ms,
        cut_amounts=amounts,
    )


def _amount_before(
    epoch: EpochParts, frames: EpochFrames, index: int, promised: Mapping[PeerId, int]
) -> Microcredits:
    terms, stage = epoch.terms, epoch.terms.stages[index]
    if frames.closes:
        return terms.price(index, frames.closes[-1].counts)
    return Microcredits(max(promised.get(stage.peer, 0), stage.carried))


def _own_output(first: StageReceipt, row: Row, drawn: Digest) -> Digest:
    """Only a pipeline of one stage ends where it begins."""
    return drawn if len(row) == 1 else Digest(first.output_commit)


def _own_input(last: StageReceipt, row: Row, sent: Digest) -> Digest:
    return sent if len(row) == 1 else Digest(last.input_commit)


def _ring_commits(
    parts: BundleParts, epoch: EpochParts, frames: EpochFrames
) -> list[tuple[Digest, Digest]]:
    """The commitments of the first and last boundary at the end of each chunk, and at the cut."""
    sequence = (*parts.prompt_ids, *parts.token_ids)
    terms = epoch.terms
    sent = HandoffChain(terms, 0)
    drawn = HandoffChain(terms, len(terms.stages))
    closed = {close.traversal for close in frames.closes}
    if frames.cut is not None:
        closed.add(frames.cut.traversal)
    ends: list[tuple[Digest, Digest]] = []
    for frame, ids in zip(epoch.frames, frames.drawn, strict=True):
        traversal, first_position, rows, drafts, _, _, replay = frame
        known = sequence[first_position : first_position + rows - len(drafts)]
        sent.add(traversal, first_position, rows, ids_payload((*known, *drafts)))
        if replay:
            continue
        drawn.add(traversal, first_position, len(ids), ids_payload(ids))
        if traversal in closed:
            ends.append((sent.commit, drawn.commit))
            sent.forget(traversal)
            drawn.forget(traversal)
    return ends
