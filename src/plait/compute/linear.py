"""Matrices in fp32, bf16, int4 or int8: fp32 rows in, fp32 rows out, faster in between.

A row's result must not depend on what it is computed with. The 4- and 8-bit kernels add up
each row alone. bf16 products run through oneDNN, which chooses by the number of rows: few
rows go in tiles of at most ``NARROW_ROWS``, where it adds up alike, and an item of more
rows goes alone (``item``), whatever its company. fp32 weights are reordered once for a fixed
number of rows, so that oneDNN takes the same kernel for any number; that is checked on the
machine, and where it does not hold, rows go one by one.

int4 computes on the file's own codes: Q4_0, Q4_1 and Q4_K as they are, Q5_0 and Q8_0 as the sum
of two 4-bit planes, with scale and offset rounded to bf16. Other formats, and shapes that the
kernel does not take, fall back to bf16.

Where oneDNN has no bf16 (on x86: without AVX-512), torch multiplies bf16 number by number, up
to sixty times slower than fp32. There, what int4 would leave to bf16 is done in fp32: items of many
rows, formats without 4-bit codes, and an 8-bit head, which is also read faster than twice four
bits. This follows from the instruction set and not from a measurement, so that replicas
on machines of one kind are of one numeric class; the class's kernel name says which it is.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from plait.model.gguf_types import NIBBLE_GROUP, Nibbles
from plait.model.weights import Weights

NARROW_ROWS = 32
"""Items of more rows than this are computed by themselves."""
UNPACK_ROWS = 128
"""From this many rows of one item on, int4 weights are first expanded to bf16."""
UNPACK_ROWS_FP32 = 64
"""The same where they are expanded to fp32, for want of bf16 in the machine."""

PACKED_ROWS = 16
"""The number of rows that fp32 weights are laid out for; any other number is as right."""

KERNELS = {
    "fp32": "onednn-packed",
    "bf16": "onednn-bf16",
    "int4": "torch-int4pack32",
    "int8": "torch-int8pack",
}
_OUTPUTS_MULTIPLE = 16  # what torch's 4-bit packing takes


class Linear(Protocol):
    """``weight @ row`` for rows of fp32."""

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, inputs] -> [n, outputs]; each row's result is the same in any company."""

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for all the rows of one item; results may depend on their number."""


class Fp32Linear:
    """Weights as they are; a row's sum is added up alike in any company.

    Plain ``functional.linear`` has other orders for one, two and three rows than for more,
    which differ by 1e-6.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._packed = _packed(weight) if packs_alike(*weight.shape) else None
        self.one_by_one = self._packed is None
        self._weight = weight if self._packed is None else None

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        if self._packed is not None:
            return _product(rows, self._packed)
        assert self._weight is not None
        return torch.cat([functional.linear(row, self._weight) for row in rows.split(1)])

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.item``."""
        return self.rows(rows)


def kernel_of(dtype: str, matrices: Iterable[Linear]) -> str:
    """What multiplies, for the numeric class."""
    one_by_one = any(isinstance(matrix, Fp32Linear) and matrix.one_by_one for matrix in matrices)
    fp32 = "torch-rows" if one_by_one else KERNELS["fp32"]
    if dtype == "fp32":
        return fp32
    if dtype == "int4" and not has_bf16():
        return f"{KERNELS[dtype]}+{fp32}"
    return KERNELS[dtype]


@cache
def has_bf16() -> bool:
    """Whether the machine multiplies bf16 by instructions of its own."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def packs_alike(outputs: int, inputs: int) -> bool:
    """Whether oneDNN adds up a row alike in any company, for matrices of this shape here."""
    if not torch.backends.mkldnn.is_available():
        return False
    chance = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=chance)
    given = torch.randn(40, inputs, generator=chance)
    packed = _packed(weight)
    whole = _product(given, packed)
    pieces = [_product(piece, packed) for piece in given.split([1, 2, 3, 4, 7, 23])]
    return torch.equal(whole, torch.cat(pieces))


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
    return packed


def _product(rows: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return result


class Bf16Linear:
    """Weights and inputs rounded to bf16, added up in fp32, rounded to bf16."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.bfloat16()

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        if len(rows) <= NARROW_ROWS:
            return self.item(rows)
        return torch.cat([self.item(tile) for tile in rows.split(NARROW_ROWS)])

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.item``."""
        return functional.linear(rows.bfloat16(), self._weight).float()


class Int8Linear:
    """Weights in 8 bits with one scale per output; inputs in bf16."""

    def __init__(self, weight: torch.Tensor) -> None:
        scale = weight.abs().amax(1).div(127).clamp(min=1e-30).bfloat16()
        self._codes = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self._scale = scale

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        return torch._weight_int8pack_mm(rows.bfloat16(), self._codes, self._scale).float()

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.item``."""
        return self.rows(rows)


class Int4Linear:
    """4-bit codes in groups of 32 with a bf16 scale and offset; inputs in bf16.

    Many rows of one item are multiplied with weights expanded to bf16 on the spot, or to fp32
    where that is faster: the 4-bit kernel saves reading memory, and with many rows that is
    not what takes time.
    """

    def __init__(self, weights: Nibbles) -> None:
        bf16 = has_bf16()
        self._wide, self._wide_rows = (
            (torch.bfloat16, UNPACK_ROWS) if bf16 else (torch.float32, UNPACK_ROWS_FP32)
        )
        codes = torch.from_numpy(weights.codes)
        self._packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        # The kernel computes (code - 8) * scale + zero.
        zero = weights.offset + np.float32(8) * weights.scale
        pairs = torch.from_numpy(np.stack([weights.scale, zero], -1)).bfloat16()
        self._scale_and_zero = pairs.permute(1, 0, 2).contiguous()
        # [groups, half a group, outputs]: outputs are innermost so that expanding is fast.
        groups = codes.t().reshape(-1, 2, NIBBLE_GROUP // 2, len(codes))
        self._bytes = (groups[:, 0] | groups[:, 1] << 4).contiguous()

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        return torch._weight_int4pack_mm_for_cpu(
            rows.bfloat16(), self._packed, NIBBLE_GROUP, self._scale_and_zero
        ).float()

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.item``."""
        if len(rows) < self._wide_rows:
            return self.rows(rows)
        # The inputs are rounded to bf16 in any case, as the 4-bit kernel has them.
        return (rows.bfloat16().to(self._wide) @ self.expanded()).float()

    def expanded(self) -> torch.Tensor:
        """[inputs, outputs] in bf16, or in fp32 where there is no bf16."""
        groups, half, outputs = self._bytes.shape
        weight = torch.empty(groups, 2, half, outputs, dtype=self._wide)
        weight[:, 0] = self._bytes & 15
        weight[:, 1] = self._bytes >> 4
        weight -= 8
        pairs = self._scale_and_zero.permute(2, 0, 1)[:, :, None, None]
        scale, zero = pairs.to(self._wide).contiguous()
        torch.addcmul(zero, weight, scale, out=weight)
        return weight.view(groups * 2 * half, outputs)


class SumLinear:
    """The sum of matrices of one shape."""

    def __init__(self, terms: Sequence[Linear]) -> None:
        self._terms = terms

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        first, *others = (term.rows(rows) for term in self._terms)
        return sum(others, first)

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.item``."""
        first, *others = (term.item(rows) for term in self._terms)
        return sum(others, first)


class JoinedLinear:
    """Matrices over the same inputs, their outputs one after the other."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = parts

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        return torch.cat([part.rows(rows) for part in self._parts], 1)

    def item(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.item``."""
        return torch.cat([part.item(rows) for part in self._parts], 1)


def load_linear(weights: Weights, names: Sequence[str], dtype: str) -> Linear:
    """The matrices ``names``, joined, in ``dtype`` (bf16, int4, int8, or fp32 to compare).

    Raises ``ModelError`` naming a tensor that does not match the manifest.
    """
    if dtype == "int4":
        return _load_int4(weights, names)
    dense = torch.cat([torch.from_numpy(weights.fp32(name)) for name in names])
    kinds: dict[str, Callable[[torch.Tensor], Linear]] = {
        "fp32": Fp32Linear,
        "bf16": Bf16Linear,
        "int8": Int8Linear,
    }
    return kinds[dtype](dense)


def load_head(weights: Weights, name: str, dtype: str) -> Linear:
    """The head's matrix in ``dtype``, or in fp32 where that is faster than an int4 sum."""
    if dtype == "int4" and not has_bf16() and len(nibble_planes(weights, name)) > 1:
        return load_linear(weights, [name], "fp32")
    return load_linear(weights, [name], dtype)


def _load_int4(weights: Weights, names: Sequence[str]) -> Linear:
    planes = [nibble_planes(weights, name) for name in names]
    if all(len(of_matrix) == 1 for of_matrix in planes):
        return Int4Linear(stacked([of_matrix[0] for of_matrix in planes]))
    if len(names) > 1:
        return JoinedLinear([_load_int4(weights, [name]) for name in names])
    if planes[0]:
        return SumLinear([Int4Linear(plane) for plane in planes[0]])
    dense = torch.from_numpy(weights.fp32(names[0]))
    return Bf16Linear(dense) if has_bf16() else Fp32Linear(dense)


def nibble_planes(weights: Weights, name: str) -> tuple[Nibbles, ...]:
    """The 4-bit planes whose sum a matrix is; none if no 4-bit kernel takes it."""
    planes = weights.nibbles(name)
    taken = all(
        len(plane.codes) % _OUTPUTS_MULTIPLE == 0 and plane.group == NIBBLE_GROUP
        for plane in planes
    )
    return planes if taken else ()


def stacked(parts: Sequence[Nibbles]) -> Nibbles:
    """Matrices over the same inputs as one, their outputs one after the other."""
    return Nibbles(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate([part.offset for part in parts]),
    )
