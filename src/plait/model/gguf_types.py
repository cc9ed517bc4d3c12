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


@dataclass(frozen=True, slots=True)
class TensorType:
    """A storage format: ``group`` weights in ``group_bytes`` bytes."""

    name: str
    code: int
    group: int
    group_bytes: int
    expand: Callable[[Raw], F32]
    """[groups, group_bytes] bytes -> [groups, group] weights."""

    def size(self, shape: tuple[int, ...]) -> int | None:
        """Bytes of a tensor; None when its rows are not whole groups."""
        if shape[-1] % self.group:
            return None
        return prod(shape) // self.group * self.group_bytes

    def to_fp32(self, raw: Raw, shape: tuple[int, ...]) -> F32:
        """The weights of ``raw`` (as many bytes as ``size(shape)``) as a new fp32 array."""
        return self.expand(raw.reshape(-1, self.group_bytes)).reshape(shape)


def _half(raw: Raw, start: int) -> F32:
    """The fp16 at byte ``start`` of each group, as a column."""
    column = np.ascontiguousarray(raw[:, start : start + 2]).view(np.float16)
    return column.astype(np.float32)


def _f32(raw: Raw) -> F32:
    return raw.view(np.float32).copy()


def _f16(raw: Raw) -> F32:
    return raw.view(np.float16).astype(np.float32)


def _nibbles(packed: Raw) -> F32:
    """Low halves of all bytes, then high halves."""
    half = packed.shape[1]
    weights = np.empty((len(packed), 2 * half), np.float32)
    weights[:, :half] = packed & 15
    weights[:, half:] = packed >> 4
    return weights


def _q4_0(raw: Raw) -> F32:
    weights = _nibbles(raw[:, 2:])
    weights -= np.float32(8)
    weights *= _half(raw, 0)
    return weights


def _q4_1(raw: Raw) -> F32:
    weights = _nibbles(raw[:, 4:])
    weights *= _half(raw, 0)
    weights += _half(raw, 2)
    return weights


def _q8_0(raw: Raw) -> F32:
    weights = raw[:, 2:].view(np.int8).astype(np.float32)
    weights *= _half(raw, 0)
    return weights


def _q4_k(raw: Raw) -> F32:
    """Eight sub-groups of 32; 6-bit scales and offsets are packed in 12 bytes."""
    packed = raw[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    scale = _half(raw, 0) * scales.astype(np.float32)
    offset = _half(raw, 2) * offsets.astype(np.float32)
    # Each 32 bytes hold two sub-groups: low halves, then high halves.
    weights = _nibbles(raw[:, 16:].reshape(-1, 32)).reshape(len(raw), 8, 32)
    weights *= scale[:, :, None]
    weights -= offset[:, :, None]
    return weights.reshape(len(raw), 256)


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
    TensorType("Q4_0", 2, 32, 18, _q4_0),
    TensorType("Q4_1", 3, 32, 20, _q4_1),
    TensorType("Q8_0", 8, 32, 34, _q8_0),
    TensorType("Q4_K", 12, 256, 144, _q4_k),
    TensorType("Q6_K", 14, 256, 210, _q6_k),
)
BY_CODE = {kind.code: kind for kind in TYPES}
BY_NAME = {kind.name: kind for kind in TYPES}
