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


def test_sizes_count_whole_groups_only() -> None:
    assert [kind.size((2, 256)) for kind in TYPES] == [2048, 1024, 288, 320, 544, 288, 420]
    assert BY_NAME["Q4_K"].size((2, 32)) is None
