"""Frames: every malformed one is refused with the peer to blame, before anything is allocated."""

from collections.abc import Callable

import numpy as np
import pytest

from plait.compute.port import Drawn, Scored
from plait.compute.wire_formats import rounded, wire_bytes
from plait.errors import RemoteProtocolError
from plait.node.wire import (
    FRAME_ROWS_MAX,
    decode_activations,
    decode_frame,
    onward_frame,
    result_message,
)
from plait.types import WireDtype
from plait.v1 import session_pb2, stage_pb2

WIDTH, VOCABULARY = 8, 100


def ids_frame(ids: tuple[int, ...] = (1, 2, 3)) -> stage_pb2.Frame:
    return stage_pb2.Frame(
        session_id=b"s" * 16,
        epoch=1,
        traversal=0,
        sample=True,
        token_ids=stage_pb2.TokenIds(ids=ids),
    )


def hidden_frame(values: np.ndarray | None = None) -> stage_pb2.Frame:
    values = np.arange(16, dtype="<f4").reshape(2, WIDTH) if values is None else values
    return stage_pb2.Frame(
        session_id=b"s" * 16,
        epoch=1,
        traversal=0,
        sample=True,
        activations=stage_pb2.Activations(
            dtype=session_pb2.WIRE_DTYPE_F32,
            rows=values.shape[0],
            width=WIDTH,
            data=values.tobytes(),
        ),
    )


def test_token_ids_and_activations_come_through() -> None:
    first = decode_frame(ids_frame(), first_stage=True, width=WIDTH, vocabulary=VOCABULARY)
    assert (first.ids, first.rows, first.payload) == ((1, 2, 3), 3, b"\1\0\0\0\2\0\0\0\3\0\0\0")
    later = decode_frame(hidden_frame(), first_stage=False, width=WIDTH, vocabulary=VOCABULARY)
    assert later.hidden is not None
    assert later.hidden.shape == (2, WIDTH)
    onward = onward_frame(later, later.hidden, ())
    assert onward.activations == hidden_frame().activations


@pytest.mark.parametrize("wire_dtype", ["bf16", "int8"])
def test_lean_activations_come_through(wire_dtype: WireDtype) -> None:
    values = np.linspace(-1, 1, 2 * 32, dtype=np.float32).reshape(2, 32)
    given = decode_frame(hidden_frame(), first_stage=False, width=WIDTH, vocabulary=VOCABULARY)
    message = onward_frame(given, values, (), wire_dtype=wire_dtype)
    assert len(message.activations.data) == wire_bytes(2, 32, wire_dtype)
    frame = decode_frame(
        message, first_stage=False, width=32, vocabulary=VOCABULARY, wire_dtype=wire_dtype
    )
    assert frame.payload == message.activations.data
    assert frame.hidden is not None
    assert np.array_equal(frame.hidden, rounded(values, wire_dtype))
    for other in {"fp32", "bf16", "int8"} - {wire_dtype}:
        with pytest.raises(RemoteProtocolError, match="dtype"):
            decode_activations(message.activations, 32, other)  # type: ignore[arg-type]
    message.activations.data += b"!"
    with pytest.raises(RemoteProtocolError, match="bytes"):
        decode_activations(message.activations, 32, wire_dtype)


def test_a_frame_without_rows_only_closes_a_chunk() -> None:
    message = stage_pb2.Frame(session_id=b"s" * 16, epoch=1, traversal=9, close_chunk=True)
    frame = decode_frame(message, first_stage=False, width=WIDTH, vocabulary=VOCABULARY)
    assert (frame.rows, frame.payload) == (0, b"")
    message.close_chunk = False
    with pytest.raises(RemoteProtocolError, match="only close"):
        decode_frame(message, first_stage=False, width=WIDTH, vocabulary=VOCABULARY)


def _nan(message: stage_pb2.Frame) -> None:
    message.activations.data = np.full((2, WIDTH), np.nan, dtype="<f4").tobytes()


def _infinite(message: stage_pb2.Frame) -> None:
    message.activations.data = np.full((2, WIDTH), np.inf, dtype="<f4").tobytes()


def _dtype(message: stage_pb2.Frame) -> None:
    message.activations.dtype = session_pb2.WIRE_DTYPE_BF16


def _width(message: stage_pb2.Frame) -> None:
    message.activations.width = WIDTH + 1


def _huge(message: stage_pb2.Frame) -> None:
    message.activations.rows = FRAME_ROWS_MAX + 1


def _short(message: stage_pb2.Frame) -> None:
    message.activations.data = message.activations.data[:-1]


def _ids(message: stage_pb2.Frame) -> None:
    message.token_ids.ids.append(1)


@pytest.mark.parametrize(
    ("mutate", "says"),
    [
        (_nan, "not finite"),
        (_infinite, "not finite"),
        (_dtype, "dtype"),
        (_width, "shape"),
        (_huge, "shape"),
        (_short, "bytes of activations"),
        (_ids, "takes activations"),
    ],
)
def test_bad_activations_are_the_peers_fault(
    mutate: Callable[[stage_pb2.Frame], None], says: str
) -> None:
    message = hidden_frame()
    mutate(message)
    with pytest.raises(RemoteProtocolError, match=says):
        decode_frame(message, first_stage=False, width=WIDTH, vocabulary=VOCABULARY)


@pytest.mark.parametrize("ids", [(), (VOCABULARY,), tuple([1] * (FRAME_ROWS_MAX + 1))])
def test_bad_ids_are_the_peers_fault(ids: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_frame(ids_frame(ids), first_stage=True, width=WIDTH, vocabulary=VOCABULARY)


def test_too_many_receipts_are_refused() -> None:
    message = ids_frame()
    for _ in range(65):
        message.receipts.add()
    with pytest.raises(RemoteProtocolError, match="receipts"):
        decode_frame(message, first_stage=True, width=WIDTH, vocabulary=VOCABULARY)


def test_an_embedding_is_asked_along_the_route_and_answered_in_fp32() -> None:
    message = hidden_frame()
    message.embedding = True
    frame = decode_frame(message, first_stage=False, width=WIDTH, vocabulary=VOCABULARY)
    assert onward_frame(frame, frame.hidden, ()).embedding
    drawn = Drawn((7,), (-0.5,), embedding=(0.5, -1.25))
    result = result_message(frame, drawn, (), None, 0).result
    assert np.frombuffer(result.embedding, "<f4").tolist() == [0.5, -1.25]
    assert result_message(frame, None, (), None, 0).result.embedding == b""
    message.sample = False
    with pytest.raises(RemoteProtocolError, match="embedding"):
        decode_frame(message, first_stage=False, width=WIDTH, vocabulary=VOCABULARY)


def test_ids_to_score_travel_along_the_route_and_their_scores_back() -> None:
    message = hidden_frame()
    message.sample, message.close_chunk = False, True
    message.score_ids.extend((4, 5))
    frame = decode_frame(message, first_stage=False, width=WIDTH, vocabulary=VOCABULARY)
    assert onward_frame(frame, frame.hidden, ()).score_ids == [4, 5]
    scored = Scored((-0.5, -1.0), (((4, -0.5), (9, -2.0)), ()))
    result = result_message(frame, None, (), None, 0, scored).result
    assert list(result.score_logprobs) == [-0.5, -1.0]
    assert [list(top.ids) for top in result.score_tops] == [[4, 9], []]


@pytest.mark.parametrize(
    ("ids", "change"),
    [
        ((4,), {}),  # fewer than rows
        ((4, 5), {"sample": True}),  # the drawn one has no score
        ((4, VOCABULARY), {}),
        ((4, 5), {"replay": True, "close_chunk": False}),
    ],
)
def test_other_ids_to_score_are_refused(ids: tuple[int, ...], change: dict[str, bool]) -> None:
    message = hidden_frame()
    message.sample, message.close_chunk = False, True
    message.score_ids.extend(ids)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(RemoteProtocolError, match="score"):
        decode_frame(message, first_stage=False, width=WIDTH, vocabulary=VOCABULARY)


def test_the_ids_to_score_are_the_ids_fed() -> None:
    message = ids_frame((1, 2, 3))
    message.score_ids.extend((2, 4))
    with pytest.raises(RemoteProtocolError, match="not the ids fed"):
        decode_frame(message, first_stage=True, width=WIDTH, vocabulary=VOCABULARY)
