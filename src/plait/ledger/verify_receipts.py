"""Claims about receipts, what crossed between stages, and the voucher that pays."""

from collections.abc import Sequence

from plait.envelope import digest
from plait.errors import BadProof
from plait.ledger.bundle import BundleParts
from plait.ledger.handoff import HandoffChain, ids_payload
from plait.ledger.receipt import ChunkClose, check_handoff, check_receipt, check_ring
from plait.ledger.voucher import Transcript, open_voucher, voucher_message
from plait.types import Digest
from plait.v1.ledger_pb2 import SessionVoucher, StageReceipt

Receipts = tuple[tuple[StageReceipt, ...], ...]
"""Checked receipts by chunk, then stage."""


def check_receipts_complete(parts: BundleParts, closes: Sequence[ChunkClose]) -> int:
    """There is one receipt for each stage and chunk; returns how many."""
    expected = len(closes) * len(parts.terms.stages)
    if len(parts.receipts) != expected:
        raise BadProof(f"{len(parts.receipts)} receipts, {expected} are due")
    return expected


def check_stage_receipts(
    parts: BundleParts, stage_index: int, closes: Sequence[ChunkClose]
) -> tuple[StageReceipt, ...]:
    """The stage signed a receipt for each chunk, each chained to the one before."""
    stages = len(parts.terms.stages)
    previous_digest = b""
    receipts = []
    for close in closes:
        envelope = parts.receipts[close.chunk * stages + stage_index]
        receipts.append(check_receipt(envelope, parts.terms, stage_index, close, previous_digest))
        previous_digest = digest(envelope.payload)
    return tuple(receipts)


def check_handoffs(receipts: Receipts) -> None:
    """Each stage received what the one before it sent."""
    for chunk, row in enumerate(receipts):
        for index in range(1, len(row)):
            check_handoff(row[index - 1], row[index], index, chunk)


def check_closed_ring(parts: BundleParts, receipts: Receipts, closes: Sequence[ChunkClose]) -> None:
    """Stage 0 was fed the prompt and what the last stage drew, and nothing else."""
    ends = _ring_commits(parts)
    for close, row, (sent, drawn) in zip(closes, receipts, ends, strict=True):
        check_ring(row[0], row[-1], sent, drawn, close.chunk)


def check_voucher(parts: BundleParts, closes: Sequence[ChunkClose]) -> SessionVoucher:
    """The client signed to pay each stage its price for exactly the receipted tokens."""
    terms = parts.terms
    voucher = open_voucher(parts.voucher, terms)
    transcript = Transcript(terms)
    transcript.add(parts.receipts)
    expected = voucher_message(
        terms, len(closes), closes[-1].counts, transcript.value, voucher.issued_ms
    )
    for field in SessionVoucher.DESCRIPTOR.fields:
        if getattr(voucher, field.name) != getattr(expected, field.name):
            raise BadProof(f"its {field.name} does not follow from the receipts and the prices")
    return voucher


def _ring_commits(parts: BundleParts) -> list[tuple[Digest, Digest]]:
    """The commitments of the first and last boundary at the end of each chunk."""
    sequence = (*parts.prompt_ids, *parts.token_ids)
    sent = HandoffChain(parts.terms, 0)
    drawn = HandoffChain(parts.terms, len(parts.terms.stages))
    draws = 0
    ends: list[tuple[Digest, Digest]] = []
    for traversal, first_position, rows, sample, close_chunk in parts.frames:
        fed = sequence[first_position : first_position + rows]
        sent.add(traversal, first_position, rows, ids_payload(fed))
        ids = parts.token_ids[draws : draws + sample]
        drawn.add(traversal, first_position, len(ids), ids_payload(ids))
        draws += len(ids)
        if close_chunk:
            ends.append((sent.commit, drawn.commit))
            sent.forget(traversal)
            drawn.forget(traversal)
    return ends
