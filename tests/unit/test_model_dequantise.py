"""Expansion of packed weights, to the bit, against ggml's definitions weight by weight."""

import struct
from collections.abc import Callable

import numpy as np
import pytest

from plait.model.gguf_types import BY_NAME, TYPES

F = np.float32


def half(raw: bytes, start: int) -> np.float32:
    return F(struct.unpack_from("<e", raw, start)[0])


def q4_0(raw: bytes, index: int) -> np.float32:
    byte = raw[2 + index % 16]
    return F((byte & 15 if index < 16 else byte >> 4) - 8) * half(raw, 0)


def q4_1(raw: bytes, index: int) -> np.float32:
    byte = raw[4 + index % 16]
    return F(byte & 15 if index < 16 else byte >> 4) * half(raw, 0) + half(raw, 2)


def q5_0(raw: bytes, index: int) -> np.float32:
    """As dequantize_row_q5_0 of ggml does."""
    byte = raw[6 + index % 16]
    fifth = struct.unpack_from("<I", raw, 2)[0] >> index & 1
    return F(((byte & 15 if index < 16 else byte >> 4) | fifth << 4) - 16) * half(raw, 0)


def q8_0(raw: bytes, index: int) -> np.float32:
    return F(struct.unpack_from("<b", raw, 2 + index)[0]) * half(raw, 0)


def q4_k(raw: bytes, index: int) -> np.float32:
    """As get_scale_min_k4 and dequantize_row_q4_K of ggml do."""
    group, packed = index // 32, raw[4:16]
    if group < 4:
        scale, offset = packed[group] & 63, packed[group + 4] & 63
    else:
        scale = (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4)
        offset = (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4)
    byte = raw[16 + 32 * (group // 2) + index % 32]
    weight = byte >> 4 if group % 2 else byte & 15
    return half(raw, 0) * F(scale) * F(weight) - half(raw, 2) * F(offset)


def q6_k(raw: bytes, index: int) -> np.float32:
    """As dequantize_row_q6_K of ggml does."""
    side, rest = divmod(index, 128)
    part, place = divmod(rest, 32)
    low = raw[64 * side + place + 32 * (part % 2)]
    low = low >> 4 if part >= 2 else low & 15
    high = (raw[128 + 32 * side + place] >> (2 * part)) & 3
    scale = struct.unpack_from("<b", raw, 192 + index // 16)[0]
    return half(raw, 208) * F(scale) * F((low | high << 4) - 32)


@pytest.mark.parametrize(
    ("name", "weight_of", "halves"),
    [
        ("Q4_0", q4_0, (0,)),
        ("Q4_1", q4_1, (0, 2)),
        ("Q5_0", q5_0, (0,)),
        ("Q8_0", q8_0, (0,)),
        ("Q4_K", q4_k, (0, 2)),
        ("Q6_K", q6_k, (208,)),
    ],
)
def test_every_weight_is_as_defined(
    name: str, weight_of: Callable[[bytes, int], np.float32], halves: tuple[int, ...]
) -> None:
    kind = BY_NAME[name]
    chance = np.random.default_rng(3)
    raw = chance.integers(0, 256, (4, kind.group_bytes), dtype=np.uint8)
    for start in halves:  # scales that are numbers
        scales = chance.normal(size=(4, 1)).astype(np.float16)
        raw[:, start : start + 2] = scales.view(np.uint8)
    found = kind.to_fp32(raw.reshape(-1), (4, kind.group))
    for row in range(4):
        expected = [weight_of(raw[row].tobytes(), index) for index in range(kind.group)]
        assert found[row].tolist() == [float(weight) for weight in expected]


def test_plain_floats() -> None:
    values = np.array([[1.5, -2.25], [0.0, 65504.0]], np.float32)
    for name, dtype in (("F32", np.float32), ("F16", np.float16)):
        raw = values.astype(dtype).view(np.uint8).reshape(-1)
        assert BY_NAME[name].to_fp32(raw, (2, 2)).tolist() == values.tolist()


def test_bf16_is_the_upper_half_of_fp32() -> None:
    values = np.array([[1.5, -2.25], [0.0, 3.0e38]], np.float32)
    upper = values.view(np.uint32) & np.uint32(0xFFFF0000)
    raw = (upper >> np.uint32(16)).astype(np.uint16).view(np.uint8).reshape(-1)
    assert BY_NAME["BF16"].to_fp32(raw, (2, 2)).tolist() == upper.view(np.float32).tolist()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q6_K", "Q8_0"])
def test_planes_add_up_to_the_weights(name: str) -> None:
    kind, chance = BY_NAME[name], np.random.default_rng(4)
    raw = chance.integers(0, 256, (6, kind.group_bytes), dtype=np.uint8)
    for start in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(name, (0,)):
        raw[:, start : start + 2] = chance.normal(size=(6, 1)).astype(np.float16).view(np.uint8)
    shape = (2, 3 * kind.group)
    planes = kind.to_nibbles(raw.reshape(-1), shape)
    assert {plane.group for plane in planes} == {16 if name == "Q6_K" else 32}
    assert len(planes) == (1 if name.startswith("Q4") else 2)
    total = np.zeros(shape, np.float64)
    for plane in planes:
        assert plane.codes.dtype == np.uint8 and plane.codes.max() <= 15
        total += plane.codes * plane.scale.repeat(plane.group, 1).astype(np.float64)
        total += plane.offset.repeat(plane.group, 1)
    weights = kind.to_fp32(raw.reshape(-1), shape)
    np.testing.assert_allclose(total, weights, rtol=0, atol=1e-6 * np.abs(weights).max())


def test_sizes_count_whole_groups_only() -> None:
    sizes = [2048, 1024, 288, 320, 352, 544, 288, 420, 1024]
    assert [kind.size((2, 256)) for kind in TYPES] == sizes
    assert BY_NAME["Q4_K"].size((2, 32)) is None
