"""Matrices on an accelerator: fp32 rows in, fp32 rows out, as in ``linear.py``.

A row's result should not depend on its company there either. Libraries choose a kernel by the
number of rows, so few rows are filled up to tiles of always ``NARROW_ROWS``: a product that
is bound by reading the weights takes no longer for it. An item of more rows goes alone.

int4 on cards with bf16 is torch's own kernel (``_weight_int4pack_mm``, "tinygemm") on the file's
codes, with groups of 32, which it takes; it goes through its rows in tiles of 16 by itself.
Elsewhere the codes stay in 4 bits and are expanded to fp16 for each product: that saves memory
but no time. int8 is one scale per output, expanded likewise.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from plait.compute.device import Device
from plait.compute.device_memory import DeviceMemory
from plait.compute.linear import (
    NARROW_ROWS,
    JoinedLinear,
    Linear,
    SumLinear,
    nibble_planes,
    stacked,
)
from plait.model.gguf_types import NIBBLE_GROUP, Nibbles
from plait.model.weights import Weights

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_K_TILES = (8, 4, 2)
"""Tiles of 16 inputs that the 4-bit kernel packs together; 2 divide any matrix of groups of 32."""
_TILE_INPUTS = 16


class Matrix(Protocol):
    """Weights in whatever form they are kept."""

    def dense(self) -> torch.Tensor:
        """[outputs, inputs] in a type that the device multiplies."""


class DenseMatrix:
    """Weights as they are multiplied."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, memory: DeviceMemory) -> None:
        self._weight = memory.put(weight.to(dtype))

    def dense(self) -> torch.Tensor:
        """See ``Matrix.dense``."""
        return self._weight


class Int8Matrix:
    """8-bit codes with one scale per output."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, memory: DeviceMemory) -> None:
        scale = weight.abs().amax(1, keepdim=True).div(127).clamp(min=1e-30).to(dtype)
        # In fp16 a scale may vanish: the row is then as good as zero.
        codes = (weight / scale.float().clamp(min=1e-30)).round().clamp(-127, 127)
        self._codes = memory.put(codes.to(torch.int8))
        self._scale = memory.put(scale)

    def dense(self) -> torch.Tensor:
        """See ``Matrix.dense``."""
        return self._codes.to(self._scale.dtype) * self._scale


class Int4Matrix:
    """4-bit codes in groups of 32, each with a scale and an offset."""

    def __init__(self, weights: Nibbles, dtype: torch.dtype, memory: DeviceMemory) -> None:
        self._bytes = memory.put(nibble_bytes(weights))
        self._scale = memory.put(torch.from_numpy(weights.scale).to(dtype)[..., None])
        self._offset = memory.put(torch.from_numpy(weights.offset).to(dtype)[..., None])

    def dense(self) -> torch.Tensor:
        """See ``Matrix.dense``."""
        codes = torch.stack([self._bytes >> 4, self._bytes & 15], -1)
        groups = codes.view(len(codes), -1, NIBBLE_GROUP).to(self._scale.dtype)
        return torch.addcmul(self._offset, groups, self._scale).flatten(1)


class TiledLinear:
    """A matrix that few rows meet in tiles of always the same number."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        weight = self._matrix.dense()
        filled = functional.pad(rows.to(weight.dtype), (0, 0, 0, -len(rows) % NARROW_ROWS))
        tiles = [functional.linear(tile, weight) for tile in filled.split(NARROW_ROWS)]
        return torch.cat(tiles)[: len(rows)].float()

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.item``."""
        if len(rows) <= NARROW_ROWS:
            return self.rows(rows)
        weight = self._matrix.dense()
        return functional.linear(rows.to(weight.dtype), weight).float()


class TinyGemmLinear:
    """torch's 4-bit CUDA kernel: (code - 8) * scale + zero, in bf16, added up in fp32."""

    def __init__(self, weights: Nibbles, memory: DeviceMemory) -> None:
        self._packed = torch._convert_weight_to_int4pack(
            memory.put(nibble_bytes(weights)), k_tiles(weights.codes.shape[1])
        )
        self._scale_and_zero = memory.put(scale_and_zero(weights))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        return torch._weight_int4pack_mm(
            rows.bfloat16().contiguous(), self._packed, NIBBLE_GROUP, self._scale_and_zero
        ).float()

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.item``."""
        return self.rows(rows)


def nibble_bytes(weights: Nibbles) -> torch.Tensor:
    """[outputs, inputs / 2] uint8: two codes a byte, that of the even input above."""
    codes = torch.from_numpy(weights.codes)
    return (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()


def scale_and_zero(weights: Nibbles) -> torch.Tensor:
    """[groups, outputs, 2] bf16: the scale of a group and what its code 8 stands for."""
    zero = weights.offset + np.float32(8) * weights.scale
    pairs = torch.from_numpy(np.stack([weights.scale, zero], -1)).bfloat16()
    return pairs.permute(1, 0, 2).contiguous()


def k_tiles(inputs: int) -> int:
    """How many tiles of inputs to pack together: as many as divide ``inputs``."""
    return next(tiles for tiles in _K_TILES if inputs % (tiles * _TILE_INPUTS) == 0)


def load_on(memory: DeviceMemory, weights: Weights, names: Sequence[str], dtype: str) -> Linear:
    """The matrices ``names``, joined, in ``dtype`` on an accelerator.

    Raises ``ModelError`` naming a tensor that does not match the manifest.
    """
    if dtype == "int4":
        return _load_int4(memory, weights, names)
    dense = torch.cat([torch.from_numpy(weights.fp32(name)) for name in names])
    if dtype == "int8":
        return TiledLinear(Int8Matrix(dense, TORCH_DTYPES[memory.device.half], memory))
    return TiledLinear(DenseMatrix(dense, TORCH_DTYPES[dtype], memory))


def _load_int4(memory: DeviceMemory, weights: Weights, names: Sequence[str]) -> Linear:
    planes = [nibble_planes(weights, name) for name in names]
    made = int4_maker(memory)
    if all(len(of_matrix) == 1 for of_matrix in planes):
        return made(stacked([of_matrix[0] for of_matrix in planes]))
    if len(names) > 1:
        return JoinedLinear([_load_int4(memory, weights, [name]) for name in names])
    if planes[0]:
        return SumLinear([made(plane) for plane in planes[0]])
    return load_on(memory, weights, names, memory.device.half)


def int4_maker(memory: DeviceMemory) -> Callable[[Nibbles], Linear]:
    """How 4-bit codes are multiplied on this device."""
    device: Device = memory.device
    if device.has_bf16:
        return lambda weights: TinyGemmLinear(weights, memory)
    half = TORCH_DTYPES[device.half]
    return lambda weights: TiledLinear(Int4Matrix(weights, half, memory))
