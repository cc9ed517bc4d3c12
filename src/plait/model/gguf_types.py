"""GGUF tensor types Plait reads, and their exact expansion to fp32.

The quantised formats store groups of weights as small integers with a scale (and an
offset); the layouts are those of ggml's ``ggml-common.h``. Every product and sum here is
one rounded fp32 operation, in ggml's order, so results are reproducible to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Plane = tuple[Raw, F32, F32]
NIBBLE_GROUP = 32


@dataclass(frozen=True, slots=True)
class Nibbles:
    """4-bit weights as stored: ``scale * code + offset``, codes 0…15 in groups."""

    codes: Raw
    """[rows, width]."""
    scale: F32
    """[rows, width / group]."""
    offset: F32
    """[rows, width / group]."""

    @property
    def group(self) -> int:
        """How many codes share a scale and an offset: 32, and 16 in Q6_K."""
        return int(self.codes.shape[1]) // int(self.scale.shape[1])

    def ordered(self, rows: npt.NDArray[np.int64]) -> "Nibbles":
        """The same rows in another order."""
        return Nibbles(self.codes[rows], self.scale[rows], self.offset[rows])


@dataclass(frozen=True, slots=True)
class TensorType:
    """A storage format: ``group`` weights in ``group_bytes`` bytes."""

    name: str
    code: int
    group: int
    group_bytes: int
    expand: Callable[[Raw], F32]
    """[groups, group_bytes] bytes -> [groups, group] weights."""
    unpack: Callable[[Raw], tuple[Plane, ...]] = lambda raw: ()
    """[groups, group_bytes] bytes -> codes [groups, group], and scale and offset [groups,
    group / 32] (of Q6_K group / 16), of each 4-bit plane whose sum the weights are."""

    def size(self, shape: tuple[int, ...]) -> int | None:
        """Bytes of a tensor; None when its rows are not whole groups."""
        if shape[-1] % self.group:
            return None
        return prod(shape) // self.group * self.group_bytes

    def to_fp32(self, raw: Raw, shape: tuple[int, ...]) -> F32:
        """The weights of ``raw`` (as many bytes as ``size(shape)``) as a new fp32 array."""
        return self.expand(raw.reshape(-1, self.group_bytes)).reshape(shape)

    def to_nibbles(self, raw: Raw, shape: tuple[int, int]) -> tuple[Nibbles, ...]:
        """Planes whose sum the weights of ``raw`` are, without going through floats.

        One for the 4-bit formats, two (high and low halves) for those of 5, 6 and 8 bits,
        none for others.
        """
        rows = shape[0]
        return tuple(
            Nibbles(codes.reshape(shape), scale.reshape(rows, -1), offset.reshape(rows, -1))
            for codes, scale, offset in self.unpack(raw.reshape(-1, self.group_bytes))
        )


def _half(raw: Raw, start: int) -> F32:
    """The fp16 at byte ``start`` of each group, as a column."""
    column = np.ascontiguousarray(raw[:, start : start + 2]).view(np.float16)
    return column.astype(np.float32)


def _f32(raw: Raw) -> F32:
    return raw.view(np.float32).copy()


def _f16(raw: Raw) -> F32:
    return raw.view(np.float16).astype(np.float32)


def _codes(packed: Raw) -> Raw:
    """Low halves of all bytes, then high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _bf16(raw: Raw) -> F32:
    return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _halves(codes: Raw, scale: F32) -> tuple[Plane, Plane]:
    """``scale * (code - 128)`` for 8-bit codes, as the sum of two 4-bit planes."""
    high = (codes >> np.uint8(4), scale * np.float32(16), scale * np.float32(-128))
    return high, (codes & np.uint8(15), scale, np.zeros_like(scale))


def _q4_0(raw: Raw) -> F32:
    weights = _codes(raw[:, 2:]).astype(np.float32)
    weights -= np.float32(8)
    weights *= _half(raw, 0)
    return weights


def _q4_0_planes(raw: Raw) -> tuple[Plane]:
    scale = _half(raw, 0)
    return ((_codes(raw[:, 2:]), scale, np.float32(-8) * scale),)


def _q4_1(raw: Raw) -> F32:
    weights = _codes(raw[:, 4:]).astype(np.float32)
    weights *= _half(raw, 0)
    weights += _half(raw, 2)
    return weights


def _q4_1_planes(raw: Raw) -> tuple[Plane]:
    return ((_codes(raw[:, 4:]), _half(raw, 0), _half(raw, 2)),)


def _q5_0(raw: Raw) -> F32:
    weights = _q5_0_codes(raw).astype(np.float32)
    weights -= np.float32(16)
    weights *= _half(raw, 0)
    return weights


def _q5_0_codes(raw: Raw) -> Raw:
    """Codes 0…31: the fifth bits of a group lie in 32 bits of their own."""
    fifth = np.unpackbits(raw[:, 2:6], axis=1, bitorder="little")
    return _codes(raw[:, 6:]) | fifth << np.uint8(4)


def _q5_0_planes(raw: Raw) -> tuple[Plane, Plane]:
    return _halves(_q5_0_codes(raw) + np.uint8(128 - 16), _half(raw, 0))


def _q8_0(raw: Raw) -> F32:
    weights = raw[:, 2:].view(np.int8).astype(np.float32)
    weights *= _half(raw, 0)
    return weights


def _q8_0_planes(raw: Raw) -> tuple[Plane, Plane]:
    return _halves(raw[:, 2:] ^ np.uint8(128), _half(raw, 0))


def _q4_k(raw: Raw) -> F32:
    ((codes, scale, offset),) = _q4_k_planes(raw)
    weights = codes.reshape(len(raw), 8, 32).astype(np.float32)
    weights *= scale[:, :, None]
    weights += offset[:, :, None]
    return weights.reshape(len(raw), 256)


def _q4_k_planes(raw: Raw) -> tuple[Plane]:
    """Eight sub-groups of 32; 6-bit scales and offsets are packed in 12 bytes."""
    packed = raw[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    scale = _half(raw, 0) * scales.astype(np.float32)
    offset = -(_half(raw, 2) * offsets.astype(np.float32))
    # Each 32 bytes hold two sub-groups: low halves, then high halves.
    return ((_codes(raw[:, 16:].reshape(-1, 32)).reshape(len(raw), 256), scale, offset),)


def _q6_k(raw: Raw) -> F32:
    weights = _q6_k_codes(raw).astype(np.float32)
    weights -= np.float32(32)
    scaled = weights.reshape(len(raw), 16, 16) * _q6_k_scale(raw)[:, :, None]
    return scaled.reshape(len(raw), 256)


def _q6_k_codes(raw: Raw) -> Raw:
    """Codes 0…63; 4 low bits and 2 high bits of a weight lie apart."""
    low = raw[:, :128].reshape(-1, 2, 64)
    high = raw[:, 128:192].reshape(-1, 2, 32)
    codes = np.empty((len(raw), 2, 4, 32), np.uint8)
    for part in range(4):
        nibbles = low[:, :, (part % 2) * 32 :][:, :, :32] >> (4 * (part // 2)) & 15
        codes[:, :, part] = nibbles | (high >> (2 * part) & 3) << 4
    return codes.reshape(len(raw), 256)


def _q6_k_scale(raw: Raw) -> F32:
    """Of sixteen sub-groups of 16."""
    return _half(raw, 208) * raw[:, 192:208].view(np.int8).astype(np.float32)


def _q6_k_planes(raw: Raw) -> tuple[Plane, Plane]:
    return _halves(_q6_k_codes(raw) + np.uint8(128 - 32), _q6_k_scale(raw))


TYPES = (
    TensorType("F32", 0, 1, 4, _f32),
    TensorType("F16", 1, 1, 2, _f16),
    TensorType("Q4_0", 2, 32, 18, _q4_0, _q4_0_planes),
    TensorType("Q4_1", 3, 32, 20, _q4_1, _q4_1_planes),
    TensorType("Q5_0", 6, 32, 22, _q5_0, _q5_0_planes),
    TensorType("Q8_0", 8, 32, 34, _q8_0, _q8_0_planes),
    TensorType("Q4_K", 12, 256, 144, _q4_k, _q4_k_planes),
    TensorType("Q6_K", 14, 256, 210, _q6_k, _q6_k_planes),
    TensorType("BF16", 30, 1, 2, _bf16),
)
BY_CODE = {kind.code: kind for kind in TYPES}
BY_NAME = {kind.name: kind for kind in TYPES}
