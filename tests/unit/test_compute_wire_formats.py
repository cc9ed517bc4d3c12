"""Activations on the wire: error bounds, sizes, and what is refused."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from plait.compute.port import Hidden
from plait.compute.wire_formats import GROUP, decode, encode, rounded, wire_bytes
from plait.errors import LocalProtocolError, RemoteProtocolError
from plait.types import WireDtype

DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
F32_MAX = float(np.finfo(np.float32).max)


def rows_of(limit: float) -> st.SearchStrategy[Hidden]:
    numbers = st.floats(-limit, limit, width=32)
    shapes = array_shapes(min_dims=1, max_dims=1, max_side=3).map(lambda rows: (*rows, 2 * GROUP))
    return arrays(np.float32, shapes, elements=numbers)


def there_and_back(hidden: Hidden, dtype: WireDtype) -> Hidden:
    rows, width = hidden.shape
    payload = encode(hidden, dtype)
    assert len(payload) == wire_bytes(rows, width, dtype)
    found = decode(payload, rows, width, dtype)
    assert found.dtype == np.float32
    assert found.shape == hidden.shape
    return found


@given(rows_of(F32_MAX))
def test_fp32_is_exact(hidden: Hidden) -> None:
    assert np.array_equal(there_and_back(hidden, "fp32"), hidden)


@given(rows_of(F32_MAX))
def test_bf16_keeps_eight_bits(hidden: Hidden) -> None:
    error = np.abs(there_and_back(hidden, "bf16").astype(np.float64) - hidden)
    tiniest = float(np.float32(2**-133))  # half the least bf16 above 0
    assert (error <= np.abs(hidden.astype(np.float64)) * 2.0**-8 + tiniest).all()


@given(rows_of(1e5))
def test_int8_keeps_each_number_to_a_part_of_its_groups_largest(hidden: Hidden) -> None:
    error = np.abs(there_and_back(hidden, "int8").astype(np.float64) - hidden)
    largest = np.abs(hidden.reshape(-1, GROUP)).max(1, keepdims=True).astype(np.float64)
    # Half a step of a scale rounded to 11 bits; below 2^-24 a scale in fp16 has fewer.
    bound = largest * (1 / 254 + 2.0**-11) + 127 * 2.0**-24
    assert (error.reshape(-1, GROUP) <= bound).all()


def test_bf16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    hidden = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    wanted = torch.from_numpy(hidden).bfloat16().float().numpy()
    assert np.array_equal(there_and_back(hidden, "bf16"), wanted)


def test_the_size_of_a_typical_row() -> None:
    assert [wire_bytes(1, 576, dtype) for dtype in DTYPES] == [2304, 1152, 612]


@every_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_sent(dtype: WireDtype, bad: float) -> None:
    hidden = np.ones((2, GROUP), np.float32)
    hidden[1, 3] = bad
    with pytest.raises(LocalProtocolError, match="not finite"):
        encode(hidden, dtype)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("fp32", b"\x00\x00\xc0\x7f"), ("bf16", b"\x80\x7f"), ("int8", b"\x00\x7c")]
)
def test_what_is_not_finite_is_refused(dtype: WireDtype, bits: bytes) -> None:
    payload = bytearray(encode(np.ones((1, GROUP), np.float32), dtype))
    payload[: len(bits)] = bits
    with pytest.raises(RemoteProtocolError, match="not finite"):
        decode(bytes(payload), 1, GROUP, dtype)


@every_dtype
@given(st.binary(max_size=300), st.integers(-1, 4), st.integers(-1, 70))
def test_no_payload_raises_anything_else(
    dtype: WireDtype, payload: bytes, rows: int, width: int
) -> None:
    try:
        hidden = decode(payload, rows, width, dtype)
    except RemoteProtocolError:
        return
    assert np.isfinite(hidden).all()
    assert hidden.shape == (rows, width)


def test_int8_takes_whole_groups_within_its_range() -> None:
    with pytest.raises(LocalProtocolError, match="multiples of 32"):
        encode(np.ones((1, 33), np.float32), "int8")
    with pytest.raises(LocalProtocolError, match="too large"):
        encode(np.full((1, GROUP), 1e7, np.float32), "int8")


@every_dtype
def test_a_prefix_of_rows_is_a_prefix_of_the_bytes(dtype: WireDtype) -> None:
    """What is retained is sent again from any row on."""
    hidden = np.random.default_rng(2).normal(size=(5, 2 * GROUP)).astype(np.float32)
    whole, size = encode(hidden, dtype), wire_bytes(1, 2 * GROUP, dtype)
    assert whole == b"".join(encode(row[None], dtype) for row in hidden)
    found = decode(whole[2 * size :], 3, 2 * GROUP, dtype)
    assert np.array_equal(found, rounded(hidden, dtype)[2:])
