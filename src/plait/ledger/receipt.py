"""Receipts: a stage's signed statement of its work for a chunk."""

from dataclasses import dataclass

from plait.envelope import open_envelope
from plait.errors import BadProof
from plait.ledger.blame import about
from plait.ledger.terms import SessionTerms, class_on_wire
from plait.types import Digest, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import DrawStatement, StageReceipt


@dataclass(frozen=True, slots=True)
class ChunkClose:
    """Where a chunk ends: what every stage's receipt for it must say.

    ``chunk`` counts from 0 within the epoch; ``traversal`` is the last one covered;
    ``counts`` are cumulative.
    """

    chunk: int
    traversal: int
    counts: TokenCounts


def receipt_message(
    terms: SessionTerms,
    stage_index: int,
    close: ChunkClose,
    *,
    input_commit: bytes,
    output_commit: bytes,
    previous_digest: bytes,
    issued_ms: int,
    state_commit: bytes = b"",
) -> StageReceipt:
    """The receipt of a stage for a chunk; ``previous_digest`` is ``b""`` for chunk 0.

    ``state_commit`` is the last stage's alone.
    """
    stage = terms.stages[stage_index]
    return StageReceipt(
        network_id=terms.network_id,
        session_id=terms.session_id,
        epoch=terms.epoch,
        stage_index=stage_index,
        chunk=close.chunk,
        start_layer=stage.span.start,
        end_layer=stage.span.end,
        model_digest=terms.model_digest,
        numeric_class=class_on_wire(stage.numeric_class, terms.wire_dtype),
        traversal=close.traversal,
        prompt_tokens=close.counts.prompt,
        output_tokens=close.counts.output,
        input_commit=input_commit,
        output_commit=output_commit,
        previous_digest=previous_digest,
        issued_ms=issued_ms,
        cached_prompt_tokens=close.counts.cached_prompt,
        rejected_draft_tokens=close.counts.rejected_draft,
        replayed_tokens=stage.replayed,
        state_commit=state_commit,
    )


def draw_statement(terms: SessionTerms, traversal: int, commit: Digest) -> DrawStatement:
    """What the last stage signs for the ids drawn up to a traversal."""
    return DrawStatement(
        network_id=terms.network_id,
        session_id=terms.session_id,
        epoch=terms.epoch,
        traversal=traversal,
        output_commit=commit,
    )


def check_receipt(
    envelope: SignedEnvelope,
    terms: SessionTerms,
    stage_index: int,
    close: ChunkClose,
    previous_digest: bytes,
) -> StageReceipt:
    """Check all of a receipt but its commitments, which the caller compares with others'.

    Raises ``BadSignature`` or ``BadProof`` naming the stage and the chunk.
    """
    with about(receipt_name(stage_index, close.chunk)):
        key = terms.stages[stage_index].ledger_key
        receipt = open_envelope(envelope, StageReceipt, signer=key)
        expected = receipt_message(
            terms,
            stage_index,
            close,
            input_commit=receipt.input_commit,
            output_commit=receipt.output_commit,
            previous_digest=previous_digest,
            issued_ms=receipt.issued_ms,
            state_commit=receipt.state_commit,
        )
        if receipt != expected:
            raise BadProof(f"it states a different {_difference(receipt, expected)}")
        if len(receipt.input_commit) != 32 or len(receipt.output_commit) != 32:
            raise BadProof("a commitment is 32 bytes")
        due = 32 if stage_index == len(terms.stages) - 1 else 0
        if len(receipt.state_commit) != due:
            raise BadProof(f"the commitment to what was drawn from is {due} bytes")
    return receipt


def check_handoff(
    upstream: StageReceipt, downstream: StageReceipt, stage_index: int, chunk: int
) -> None:
    """Check that the stage received what the one before it sent; raises ``BadProof``."""
    if upstream.output_commit != downstream.input_commit:
        raise BadProof(
            f"hand-off from stage {stage_index - 1} to stage {stage_index}, chunk {chunk}: "
            "they signed different data"
        )


def check_ring(
    first: StageReceipt, last: StageReceipt, sent: Digest, drawn: Digest, chunk: int
) -> None:
    """Check the ends against the client's own ids, so that the ring is closed.

    ``sent`` and ``drawn`` are the client's commitments for the first and last boundary.
    Raises ``BadProof`` naming the stage.
    """
    if first.input_commit != sent:
        raise BadProof(f"{receipt_name(0, chunk)}: it is for other ids than were sent")
    if last.output_commit != drawn:
        raise BadProof(
            f"{receipt_name(last.stage_index, chunk)}: it is for other ids than were drawn"
        )


def receipt_name(stage_index: int, chunk: int) -> str:
    """How claims and errors name a receipt."""
    return f"receipt of stage {stage_index} chunk {chunk}"


def _difference(receipt: StageReceipt, expected: StageReceipt) -> str:
    for field in StageReceipt.DESCRIPTOR.fields:
        stated, agreed = getattr(receipt, field.name), getattr(expected, field.name)
        if stated != agreed:
            return f"{field.name}, {_shown(stated)} instead of {_shown(agreed)}"
    raise AssertionError("the receipts are equal")


def _shown(value: object) -> str:
    return value.hex() or "none" if isinstance(value, bytes) else repr(value)[:80]
