"""Messages of the peer port from and to values. A frame is checked whole before it is used."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plait.compute.port import NOT_SCORED, Done, Drawn, Scored
from plait.compute.wire_formats import GROUP, decode, encode
from plait.errors import RemoteProtocolError
from plait.ledger.handoff import ids_payload
from plait.ledger.opening import wire_to_message
from plait.ledger.terms import DRAFTS_MAX
from plait.replay_cuts import PROMPT_ROWS_MAX
from plait.types import PeerId, SessionId, WireDtype
from plait.v1 import stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope

Activations = npt.NDArray[np.float32]
"""Hidden states, float32 ``[rows, width]``."""

FRAME_ROWS_MAX = 4096
REPLAY_BYTES_MAX = 512 * 1024
REASON_CHARACTERS_MAX = 500
_STAGES_MAX = 64


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
    replay: bool
    drafts: tuple[int, ...]
    """The ids of rows 1, 2, … that the last stage compares its draws with."""
    voucher: SignedEnvelope | None
    receipts: tuple[SignedEnvelope, ...]
    stage_us: tuple[int, ...]
    """How long each stage passed took, in microseconds."""
    deadline_ms: int
    traceparent: str
    embedding: bool = False
    """The last stage also answers with the final hidden state of the last row."""
    scored: tuple[int, ...] = ()
    """The ids behind the rows, whose log-probabilities the last stage gives."""

    @property
    def rows(self) -> int:
        """Positions the frame covers; 0 only closes a chunk."""
        if self.hidden is not None:
            return int(self.hidden.shape[0])
        return len(self.ids or ())

    @property
    def end(self) -> int:
        """The position after its last row."""
        return self.first_position + self.rows


def decode_frame(
    message: stage_pb2.Frame,
    *,
    first_stage: bool,
    width: int,
    vocabulary: int,
    wire_dtype: WireDtype = "fp32",
) -> StageFrame:
    """Check a frame for a stage; raises ``RemoteProtocolError`` naming what is wrong."""
    if max(len(message.receipts), len(message.stage_us)) > _STAGES_MAX:
        raise RemoteProtocolError("more receipts or times than stages in a frame")
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
        hidden = decode_activations(message.activations, width, wire_dtype)
        payload = message.activations.data
    frame = StageFrame(
        session=SessionId(message.session_id),
        epoch=message.epoch,
        traversal=message.traversal,
        first_position=message.first_position,
        ids=ids,
        hidden=hidden,
        payload=payload,
        sample=message.sample,
        close_chunk=message.close_chunk,
        replay=message.replay,
        drafts=tuple(message.draft_ids),
        voucher=message.voucher if message.HasField("voucher") else None,
        receipts=tuple(message.receipts),
        stage_us=tuple(message.stage_us),
        deadline_ms=message.deadline_ms,
        traceparent=message.traceparent,
        embedding=message.embedding,
        scored=tuple(message.score_ids),
    )
    _check_replay(frame)
    _check_drafts(frame, vocabulary)
    _check_scored(frame, vocabulary)
    if frame.embedding and (not frame.sample or frame.drafts):
        raise RemoteProtocolError("an embedding comes with a draw, without drafts")
    return frame


def _check_replay(frame: StageFrame) -> None:
    if not frame.replay:
        return
    if frame.sample or frame.close_chunk or frame.drafts or frame.receipts or not frame.rows:
        raise RemoteProtocolError("a replayed frame only rebuilds the cache")
    if frame.rows > PROMPT_ROWS_MAX or len(frame.payload) > max(
        REPLAY_BYTES_MAX, len(frame.payload) // frame.rows
    ):
        raise RemoteProtocolError(
            f"a replayed frame has at most {PROMPT_ROWS_MAX} rows and {REPLAY_BYTES_MAX} bytes"
        )


def _check_drafts(frame: StageFrame, vocabulary: int) -> None:
    drafts = frame.drafts
    if not drafts:
        return
    if len(drafts) > DRAFTS_MAX or frame.rows != len(drafts) + 1:
        raise RemoteProtocolError("a frame's drafts are the ids of all rows but the first")
    if not frame.sample or frame.close_chunk:
        raise RemoteProtocolError("a frame with drafts draws, and closes no chunk")
    if max(drafts) >= vocabulary:
        raise RemoteProtocolError("a draft is outside the vocabulary")
    if frame.ids is not None and frame.ids[1:] != drafts:
        raise RemoteProtocolError("the drafts are not the ids fed")


def _check_scored(frame: StageFrame, vocabulary: int) -> None:
    scored = frame.scored
    if not scored:
        return
    if frame.replay or frame.drafts or len(scored) != frame.rows - frame.sample:
        raise RemoteProtocolError("ids to score are those behind a frame's rows")
    if max(scored) >= vocabulary:
        raise RemoteProtocolError("an id to score is outside the vocabulary")
    if frame.ids is not None and frame.ids[1:] != scored[: frame.rows - 1]:
        raise RemoteProtocolError("the ids to score are not the ids fed")


def _checked_ids(message: stage_pb2.TokenIds, vocabulary: int) -> tuple[int, ...]:
    if not 0 < len(message.ids) <= FRAME_ROWS_MAX:
        raise RemoteProtocolError(f"a frame holds 1 to {FRAME_ROWS_MAX} rows")
    if max(message.ids) >= vocabulary:
        raise RemoteProtocolError("a token id is outside the vocabulary")
    return tuple(message.ids)


def decode_activations(
    message: stage_pb2.Activations, width: int, wire_dtype: WireDtype = "fp32"
) -> Activations:
    """A payload as ``[rows, width]`` of fp32; raises ``RemoteProtocolError``.

    The size is checked before anything is allocated.
    """
    if message.dtype != wire_to_message(wire_dtype):
        raise RemoteProtocolError(
            f"activations have the wrong dtype: the session's is {wire_dtype}"
        )
    if message.width != width or not 0 < message.rows <= FRAME_ROWS_MAX:
        raise RemoteProtocolError(
            f"activations have shape [{message.rows}, {message.width}], "
            f"not [1 to {FRAME_ROWS_MAX}, {width}]"
        )
    return decode(message.data, message.rows, width, wire_dtype)


def takes_width(width: int, wire_dtype: WireDtype) -> bool:
    """Whether rows of this width can cross a hop in ``wire_dtype``."""
    return wire_dtype != "int8" or width % GROUP == 0


def payload_of(hidden: Activations) -> bytes:
    """Activations in fp32, finite or not."""
    return np.ascontiguousarray(hidden, dtype="<f4").tobytes()


def state_of(done: Done) -> bytes:
    """What a last stage draws from, as it commits to it.

    The final hidden states, fp32 little-endian [rows, width]; then for each draw the
    log-probability, and the logarithm of the sum of exponentials of the model's logits.
    """
    rows = b"" if done.hidden is None else payload_of(done.hidden)
    if done.drawn is None:
        return rows
    pairs = np.array([done.drawn.logprobs, done.drawn.totals], dtype="<f4")
    return rows + np.ascontiguousarray(pairs.T).tobytes()


def onward_frame(
    frame: StageFrame,
    hidden: Activations | None,
    receipts: Sequence[SignedEnvelope],
    residence_us: int = 0,
    wire_dtype: WireDtype = "fp32",
) -> stage_pb2.Frame:
    """The frame for the next stage; ``residence_us`` is how long it was here.

    Raises ``LocalProtocolError`` for activations that cannot be sent.
    """
    message = stage_pb2.Frame(
        session_id=frame.session,
        epoch=frame.epoch,
        traversal=frame.traversal,
        first_position=frame.first_position,
        sample=frame.sample,
        close_chunk=frame.close_chunk,
        replay=frame.replay,
        draft_ids=frame.drafts,
        voucher=frame.voucher,
        receipts=receipts,
        stage_us=(*frame.stage_us, residence_us),
        deadline_ms=frame.deadline_ms,
        traceparent=frame.traceparent,
        embedding=frame.embedding,
        score_ids=frame.scored,
    )
    if hidden is not None:
        sent = message.activations
        sent.rows, sent.width = hidden.shape
        sent.dtype = wire_to_message(wire_dtype)
        sent.data = encode(hidden, wire_dtype)
    return message


def replay_frame(
    session: SessionId,
    epoch: int,
    traversal: int,
    first_position: int,
    *,
    rows: int,
    width: int,
    data: bytes,
    wire_dtype: WireDtype = "fp32",
) -> stage_pb2.Frame:
    """Retained rows, as they were sent, for a stage that is being rebuilt."""
    return stage_pb2.Frame(
        session_id=session,
        epoch=epoch,
        traversal=traversal,
        first_position=first_position,
        replay=True,
        activations=_activations(rows, width, data, wire_dtype),
    )


def _activations(
    rows: int, width: int, data: bytes, wire_dtype: WireDtype
) -> stage_pb2.Activations:
    return stage_pb2.Activations(
        dtype=wire_to_message(wire_dtype), rows=rows, width=width, data=data
    )


def result_message(
    frame: StageFrame,
    drawn: Drawn | None,
    receipts: Sequence[SignedEnvelope],
    draws: SignedEnvelope | None,
    residence_us: int,
    scored: Scored = NOT_SCORED,
) -> stage_pb2.LinkResponse:
    """The last stage's answer to a frame."""
    result = stage_pb2.TokenResult(
        session_id=frame.session,
        epoch=frame.epoch,
        traversal=frame.traversal,
        ids=drawn.ids if drawn is not None else (),
        logprobs=drawn.logprobs if drawn is not None else (),
        receipts=receipts,
        draws=draws,
        stage_us=(*frame.stage_us, residence_us),
        top_logprobs=_tops(drawn.tops) if drawn is not None else (),
        embedding=np.array(drawn.embedding, dtype="<f4").tobytes() if drawn is not None else b"",
        score_logprobs=scored.logprobs,
        score_tops=_tops(scored.tops),
    )
    return stage_pb2.LinkResponse(result=result)


def _tops(tops: Sequence[Sequence[tuple[int, float]]]) -> list[stage_pb2.TopLogprobs]:
    return [
        stage_pb2.TopLogprobs(ids=[token for token, _ in top], logprobs=[value for _, value in top])
        for top in tops
    ]


def fault_message(
    session: SessionId, epoch: int, peer: PeerId, code: str, reason: str
) -> stage_pb2.SessionFault:
    """What goes wrong with a session; ``peer`` is who is to blame or lost."""
    return stage_pb2.SessionFault(
        session_id=session,
        epoch=epoch,
        peer_id=peer,
        code=code,
        reason=reason[:REASON_CHARACTERS_MAX],
    )
