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
    """4-bit weights as stored: ``scale * code + offset``, codes 0…15 in groups of 32."""

    codes: Raw
    """[rows, width]."""
    scale: F32
    """[rows, width / 32]."""
    offset: F32
    """[rows, width / 32]."""


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
    """[groups, group_bytes] bytes -> codes [groups, group], and scale and offset
    [groups, group / 32], of each 4-bit plane whose sum the weights are."""

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

        One for the 4-bit formats, two (high and low halves) for Q8_0, none for others.
        """
        groups = (shape[0], shape[1] // NIBBLE_GROUP)
        return tuple(
            Nibbles(codes.reshape(shape), scale.reshape(groups), offset.reshape(groups))
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


def _q8_0(raw: Raw) -> F32:
    weights = raw[:, 2:].view(np.int8).astype(np.float32)
    weights *= _half(raw, 0)
    return weights


def _q8_0_planes(raw: Raw) -> tuple[Plane, Plane]:
    """A weight's code plus 128 is 16 * high + low, each half a 4-bit code of its own."""
    scale = _half(raw, 0)
    codes = raw[:, 2:] ^ np.uint8(128)
    high = (codes >> np.uint8(4), scale * np.float32(16), scale * np.float32(-128))
    return high, (codes & np.uint8(15), scale, np.zeros_like(scale))


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
    """Sixteen sub-groups of 16; 4 low bits and 2 high bits of a weight lie apart."""
    low = raw[:, :128].reshape(-1, 2, 64)
    high = raw[:, 128:192].reshape(-1, 2, 32)
    scale = _half(raw, 208) * raw[:, 192:208].view(np.int8).astype(np.float32)
    weights = np.empty((len(raw), 2, 4, 32), np.float32)
    for part in range(4):
        nibbles = low[:, :, (part % 2) * 32 :][:, :, :32] >> (4 * (part // 2)) & 15
        weights[:, :, part] = nibbles | (high >> (2 * part) & 3) << 4
    weights -= np.float32(32)
    scaled = weights.reshape(len(raw), 16, 16) * scale[:, :, None]
    return scaled.reshape(len(raw), 256)


TYPES = (
    TensorType("F32", 0, 1, 4, _f32),
    TensorType("F16", 1, 1, 2, _f16),
    TensorType("Q4_0", 2, 32, 18, _q4_0, _q4_0_planes),
    TensorType("Q4_1", 3, 32, 20, _q4_1, _q4_1_planes),
    TensorType("Q8_0", 8, 32, 34, _q8_0, _q8_0_planes),
    TensorType("Q4_K", 12, 256, 144, _q4_k, _q4_k_planes),
    TensorType("Q6_K", 14, 256, 210, _q6_k),
)
BY_CODE = {kind.code: kind for kind in TYPES}
BY_NAME = {kind.name: kind for kind in TYPES}
