import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import RemoteProtocolError
from plait.ledger.handoff import PENDING_FRAMES_MAX, HandoffChain, ids_payload
from plait.testing.accounting import Plot, terms_of

TERMS = terms_of(Plot())

Frames = list[tuple[int, int, bytes]]


def test_the_chain_is_the_one_documented() -> None:
    start = b"plait.handoff.v1\0" + TERMS.handoff_salt + TERMS.session_id
    expected = hashlib.sha256(start + b"\0\0\0\1" + b"\0\0\0\2").digest()
    chain = HandoffChain(TERMS, 2)
    assert chain.commit == expected
    chain.add(7, 11, 3, b"payload")
    numbers = (7).to_bytes(8, "big") + (11).to_bytes(4, "big") + (3).to_bytes(4, "big")
    expected = hashlib.sha256(expected + numbers + hashlib.sha256(b"payload").digest()).digest()
    assert chain.commit == chain.commit_at(7) == expected


def test_ids_are_little_endian_32_bits() -> None:
    assert ids_payload([1, 258, 2**32 - 1]) == bytes.fromhex("0100000002010000ffffffff")
    assert ids_payload([]) == b""
    for wrong in (-1, 2**32):
        with pytest.raises(OverflowError):
            ids_payload([wrong])


FRAMES = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=8)),
    min_size=1,
    max_size=6,
)


def commit(frames: Frames, boundary: int = 0) -> bytes:
    chain = HandoffChain(TERMS, boundary)
    for traversal, frame in enumerate(frames):
        chain.add(traversal, *frame)
    return chain.commit


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(FRAMES, FRAMES)
def test_different_frames_have_different_commitments(first: Frames, second: Frames) -> None:
    assert (commit(first) == commit(second)) == (first == second)
    assert commit(first, 0) != commit(first, 1)


def test_traversals_rise() -> None:
    chain = HandoffChain(TERMS, 0)
    chain.add(3, 0, 1, b"a")
    for traversal in (3, 2):
        with pytest.raises(RemoteProtocolError):
            chain.add(traversal, 1, 1, b"b")


def test_closed_chunks_are_forgotten_and_open_ones_bounded() -> None:
    chain = HandoffChain(TERMS, 0)
    for traversal in range(PENDING_FRAMES_MAX):
        chain.add(traversal, 0, 0, b"")
    with pytest.raises(RemoteProtocolError, match="too many"):
        chain.add(PENDING_FRAMES_MAX, 0, 0, b"")
    chain.forget(9)
    assert chain.commit_at(9) is None
    assert chain.commit_at(10) is not None
    chain.add(PENDING_FRAMES_MAX, 0, 0, b"")
