"""What a session's actions are on the wire, and what a result is to the core. Pure.

The client's shell and the simulated one send the same messages.
"""

import math
import struct
from collections.abc import Iterable, Sequence

from plait.client.actions import (
    Call,
    CloseEpoch,
    CloseStages,
    ConfirmStage,
    EpochClosed,
    Faulted,
    LeaveStages,
    OpenStages,
    Resulted,
    Send,
    ShowGrant,
    StageFailed,
)
from plait.client.driver import Extras, Top
from plait.types import PeerId, SessionId
from plait.v1 import session_pb2, stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope

_FLOAT_BYTES = 4


def open_request(
    action: OpenStages, index: int, client_cert: SignedEnvelope
) -> session_pb2.OpenRequest:
    """To the stage of this index, without its neighbours' offers."""
    return session_pb2.OpenRequest(
        session_open=action.opening,
        client_cert=client_cert,
        stage_index=index,
        context_ids=action.context_ids if index == len(action.offers) - 1 else (),
        prefix_digests=action.prefix,
    )


def confirm_request(session_id: SessionId, action: ConfirmStage) -> session_pb2.ConfirmRequest:
    """What makes a stage ready."""
    return session_pb2.ConfirmRequest(
        session_id=session_id,
        epoch=action.epoch,
        reservation=action.reservation,
        grant=action.grant,
        voucher=action.voucher,
        cached_tokens=action.cached_tokens,
    )


def grant_request(session_id: SessionId, action: ShowGrant) -> session_pb2.ConfirmRequest:
    """The grant for the reservation that a stage started on."""
    return session_pb2.ConfirmRequest(
        session_id=session_id,
        epoch=action.epoch,
        reservation=action.reservation,
        grant=action.grant,
    )


def close_epoch_request(session_id: SessionId, action: CloseEpoch) -> session_pb2.CloseEpochRequest:
    """What freezes an epoch."""
    return session_pb2.CloseEpochRequest(
        session_id=session_id,
        epoch=action.epoch,
        traversal=action.traversal,
        position=action.position,
    )


def epoch_closed(
    action: CloseEpoch, peer: PeerId, answer: session_pb2.CloseEpochResponse
) -> EpochClosed:
    """A stage's answer to it."""
    return EpochClosed(
        epoch=action.epoch,
        peer=peer,
        receipt=answer.receipt if answer.HasField("receipt") else None,
        positions=answer.positions,
        retained=answer.retained,
        traversals_received=answer.traversals_received,
        traversals_sent=answer.traversals_sent,
    )


def refused(epoch: int, peer: PeerId, call: Call, refusal: session_pb2.Refusal) -> StageFailed:
    """A stage's refusal of a call."""
    return StageFailed(
        epoch,
        peer,
        call,
        refusal.code,
        f"refused: {refusal.reason}",
        gone=False,
        retry_after_ms=refusal.retry_after_ms,
    )


def leave_request(session_id: SessionId, action: LeaveStages) -> session_pb2.CloseRequest:
    """To stages that are in the session no more."""
    return session_pb2.CloseRequest(
        session_id=session_id, epoch=action.epoch, voucher=action.voucher, reason="replaced"
    )


def close_request(session_id: SessionId, action: CloseStages) -> session_pb2.CloseRequest:
    """The end of a session."""
    return session_pb2.CloseRequest(
        session_id=session_id,
        epoch=action.epoch,
        voucher=action.voucher,
        reason=action.reason,
        prefix_digests=action.prefix,
        keep_alive_s=action.keep_alive_s,
    )


def frame_request(
    session_id: SessionId, action: Send, traceparent: str = ""
) -> stage_pb2.LinkRequest:
    """A frame to the first stage."""
    frame = action.frame
    message = stage_pb2.Frame(
        session_id=session_id,
        epoch=action.epoch,
        traversal=frame.traversal,
        first_position=frame.first_position,
        sample=frame.sample,
        close_chunk=frame.close_chunk,
        voucher=action.voucher,
        deadline_ms=action.deadline_ms,
        traceparent=traceparent,
        replay=frame.replay,
        draft_ids=frame.draft_ids,
        embedding=frame.embedding,
        score_ids=frame.scored,
    )
    if frame.ids:
        message.token_ids.ids.extend(frame.ids)
    return stage_pb2.LinkRequest(frame=message)


def resulted(message: stage_pb2.TokenResult) -> Resulted:
    """What the last stage sent."""
    return Resulted(
        epoch=message.epoch,
        traversal=message.traversal,
        ids=tuple(message.ids),
        logprobs=tuple(message.logprobs),
        receipts=tuple(message.receipts),
        statement=message.draws if message.HasField("draws") else None,
        stage_us=tuple(message.stage_us),
        extras=_extras(message),
    )


def faulted(fault: stage_pb2.SessionFault, sender: PeerId, peers: Sequence[PeerId]) -> Faulted:
    """A fault that came from ``sender``, in a pipeline of ``peers``.

    Only stages of the route can be to blame. ``peers[-1]`` sends to the client: if a stage finds
    the client out of reach, the link between these two is broken, whoever passed the fault on.
    Of any other name it is the sender's word.
    """
    blamed = PeerId(fault.peer_id) if fault.peer_id in peers else sender
    if is_our_link(fault, peers):
        blamed = peers[-1]
    return Faulted(fault.epoch, sender, blamed, fault.code, fault.reason)


def is_our_link(fault: stage_pb2.SessionFault, peers: Sequence[PeerId]) -> bool:
    """Whether the last stage finds nobody at the other end of our link to it."""
    return fault.code == "peer-unreachable" and fault.peer_id not in peers


def _extras(message: stage_pb2.TokenResult) -> Extras:
    data = message.embedding
    if len(data) % _FLOAT_BYTES:
        # Not a number of floats: to the core it is an embedding that cannot be.
        return Extras(embedding=(math.nan,))
    return Extras(
        tops=_tops(message.top_logprobs),
        embedding=struct.unpack(f"<{len(data) // _FLOAT_BYTES}f", data),
        scores=tuple(message.score_logprobs),
        score_tops=_tops(message.score_tops),
    )


def _tops(messages: Iterable[stage_pb2.TopLogprobs]) -> tuple[Top, ...]:
    return tuple(tuple(zip(top.ids, top.logprobs, strict=False)) for top in messages)
