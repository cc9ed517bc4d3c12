"""Frames from and to protobuf. A frame is checked whole before anything is allocated."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plait.errors import RemoteProtocolError
from plait.ledger.handoff import ids_payload
from plait.types import SessionId
from plait.v1 import session_pb2, stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope

Activations = npt.NDArray[np.float32]
"""Hidden states, float32 ``[rows, width]``."""

FRAME_ROWS_MAX = 4096
_RECEIPTS_MAX = 64
_BYTES_PER_VALUE = 4


@dataclass(frozen=True, slots=True)
class StageFrame:
    """A checked frame: token ids for the first stage, activations for the others."""

    session: SessionId
    epoch: int
    traversal: int
    first_position: int
    ids: tuple[int, ...] | None
    hidden: Activations | None
    payload: bytes
    """The bytes that are hashed into the hand-off chain."""
    sample: bool
    close_chunk: bool
    voucher: SignedEnvelope | None
    receipts: tuple[SignedEnvelope, ...]
    deadline_ms: int
    traceparent: str

    @property
    def rows(self) -> int:
        """Positions the frame covers; 0 only closes a chunk."""
        if self.hidden is not None:
            return int(self.hidden.shape[0])
        return len(self.ids or ())


def decode_frame(
    message: stage_pb2.Frame, *, first_stage: bool, width: int, vocabulary: int
) -> StageFrame:
    """Check a frame for a stage; raises ``RemoteProtocolError`` naming what is wrong."""
    if len(message.receipts) > _RECEIPTS_MAX:
        raise RemoteProtocolError("too many receipts in a frame")
    kind = message.WhichOneof("payload")
    ids: tuple[int, ...] | None = None
    hidden: Activations | None = None
    payload = b""
    if kind is None:
        if message.sample or not message.close_chunk:
            raise RemoteProtocolError("a frame without rows can only close a chunk")
        ids = ()
    elif first_stage:
        if kind != "token_ids":
            raise RemoteProtocolError("the first stage takes token ids")
        ids = _checked_ids(message.token_ids, vocabulary)
        payload = ids_payload(ids)
    else:
        if kind != "activations":
            raise RemoteProtocolError("a later stage takes activations")
        hidden = decode_activations(message.activations, width)
        payload = message.activations.data
    return StageFrame(
        session=SessionId(message.session_id),
        epoch=message.epoch,
        traversal=message.traversal,
        first_position=message.first_position,
        ids=ids,
        hidden=hidden,
        payload=payload,
        sample=message.sample,
        close_chunk=message.close_chunk,
        voucher=message.voucher if message.HasField("voucher") else None,
        receipts=tuple(message.receipts),
        deadline_ms=message.deadline_ms,
        traceparent=message.traceparent,
    )


def _checked_ids(message: stage_pb2.TokenIds, vocabulary: int) -> tuple[int, ...]:
    if not 0 < len(message.ids) <= FRAME_ROWS_MAX:
        raise RemoteProtocolError(f"a frame holds 1 to {FRAME_ROWS_MAX} rows")
    if max(message.ids) >= vocabulary:
        raise RemoteProtocolError("a token id is outside the vocabulary")
    return tuple(message.ids)


def decode_activations(message: stage_pb2.Activations, width: int) -> Activations:
    """View a payload as ``[rows, width]``; raises ``RemoteProtocolError``."""
    if message.dtype != session_pb2.WIRE_DTYPE_F32:
        raise RemoteProtocolError("activations have the wrong dtype")
    if message.width != width or not 0 < message.rows <= FRAME_ROWS_MAX:
        raise RemoteProtocolError(
            f"activations have shape [{message.rows}, {message.width}], "
            f"not [1 to {FRAME_ROWS_MAX}, {width}]"
        )
    if len(message.data) != message.rows * width * _BYTES_PER_VALUE:
        raise RemoteProtocolError("activations and their shape differ in size")
    values = np.frombuffer(message.data, dtype="<f4").reshape(message.rows, width)
    if not np.isfinite(values).all():
        raise RemoteProtocolError("activations hold NaN or infinity")
    return values


def onward_frame(
    frame: StageFrame, hidden: Activations | None, receipts: tuple[SignedEnvelope, ...]
) -> stage_pb2.Frame:
    """The frame for the next stage."""
    message = stage_pb2.Frame(
        session_id=frame.session,
        epoch=frame.epoch,
        traversal=frame.traversal,
        first_position=frame.first_position,
        sample=frame.sample,
        close_chunk=frame.close_chunk,
        voucher=frame.voucher,
        receipts=receipts,
        deadline_ms=frame.deadline_ms,
        traceparent=frame.traceparent,
    )
    if hidden is not None:
        rows, width = hidden.shape
        message.activations.CopyFrom(
            stage_pb2.Activations(
                dtype=session_pb2.WIRE_DTYPE_F32,
                rows=rows,
                width=width,
                data=np.ascontiguousarray(hidden, dtype="<f4").tobytes(),
            )
        )
    return message
