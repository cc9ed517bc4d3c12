"""A llama's span computed for many sessions at once, their rows side by side.

Every matrix meets the rows of all items together; attention runs per session over exactly
its own positions, without padding. So nothing a row is added up from, nor the order of it,
depends on the company it is computed in; and rows of an item of at most ``NARROW_ROWS`` are
each what they would be one at a time. ``hf.py`` is the slow oracle of this file.

Below fp32, what goes from layer to layer is rounded to bf16, as the default wire does between
stages: so an answer does not depend on where the pipeline is cut either.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import torch

from plait.compute import ggml_parts, ort
from plait.compute.attention import Attention, Item
from plait.compute.device import kernel_on
from plait.compute.device_linear import TORCH_DTYPES, load_on
from plait.compute.device_memory import HOST, DeviceMemory
from plait.compute.ggml_parts import GgmlParts
from plait.compute.kv import KvLayout
from plait.compute.layers import Layer, load_torch_layer, norm
from plait.compute.linear import NARROW_ROWS, Linear, kernel_of, load_head, load_linear
from plait.errors import LocalProtocolError
from plait.model.config import EMBEDDING, FINAL_NORM, ModelConfig
from plait.model.weights import Rows, Weights
from plait.types import Span

LayerProgress = Callable[[int, int], None]
"""Called with (layers loaded, layers to load)."""


class Head(Protocol):
    """The last matrix: normed rows to logits."""

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocabulary]; each row's result is the same in any company."""


class NarrowSpan(Protocol):
    """The layers of a stage for items of few rows, faster than one after the other."""

    def run(self, items: Sequence[Item], first: int, end: int) -> list[torch.Tensor]:
        """[rows, hidden] of each item behind the layers ``first`` to ``end`` of the stage."""


class RaggedModel:
    """The layers of a span, with embedding rows if first and norm and head if last."""

    batches = True

    def __init__(
        self,
        config: ModelConfig,
        span: Span,
        layers: Sequence[Layer],
        dtype: str,
        kernel: str,
        *,
        rows: Rows | None,
        final_norm: torch.Tensor | None,
        head: Head | None,
        factors: torch.Tensor | None = None,
        narrow: NarrowSpan | None = None,
        memory: DeviceMemory = HOST,
    ) -> None:
        self.config = config
        self.span = span
        self.layout = KvLayout(span, config.kv_heads, config.head_size, _kv_number(dtype, memory))
        self.memory = memory
        self.numerics = f"{dtype}/{kernel}"
        self._layers = layers
        self._narrow = narrow
        self._rounds = dtype != "fp32"
        self._rows = rows
        self._final_norm = final_norm
        self._head = head
        self._epsilon = memory.put(torch.tensor(config.norm_epsilon))
        even = torch.arange(0, config.head_size, 2).float()
        frequencies = 1.0 / config.rope_base ** (even / config.head_size)
        if factors is not None:
            frequencies /= factors
        self._frequencies = memory.put(frequencies)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), hidden] for ids in range. Only the first stage can."""
        if self._rows is None:
            raise LocalProtocolError(f"span {self.span} has no embedding")
        return torch.from_numpy(self._rows.fp32(ids))

    def run(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """[rows, hidden] of each item after its session's layers, normed after the last.

        The items' sessions differ, and all run the same span.
        """
        span = items[0].kv.span
        stretch = range(span.start - self.span.start, span.end - self.span.start)
        if self._narrow is None:
            results = self._layer_by_layer(items, stretch)
        else:
            results = self._narrow_apart(items, stretch, self._narrow)
        if span.end < self.config.layers or self._layers[-1].norms:
            return results
        assert self._final_norm is not None
        if len(results) == 1:
            return [norm(results[0], self._final_norm, self._epsilon)]
        normed = norm(torch.cat(results), self._final_norm, self._epsilon)
        return list(normed.split([item.rows for item in items]))

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] for normed rows, [n, hidden]. Only the last stage can."""
        assert self._head is not None
        return self._head.rows(normed)

    def _narrow_apart(
        self, items: Sequence[Item], stretch: range, narrow: NarrowSpan
    ) -> list[torch.Tensor]:
        if len(items) == 1 and items[0].rows <= NARROW_ROWS:
            return narrow.run(items, stretch.start, stretch.stop)
        few = [index for index, item in enumerate(items) if item.rows <= NARROW_ROWS]
        many = [index for index, item in enumerate(items) if item.rows > NARROW_ROWS]
        results: dict[int, torch.Tensor] = {}
        if few:
            found = narrow.run([items[index] for index in few], stretch.start, stretch.stop)
            results |= zip(few, found, strict=True)
        if many:
            found = self._layer_by_layer([items[index] for index in many], stretch)
            results |= zip(many, found, strict=True)
        return [results[index] for index in range(len(items))]

    def _layer_by_layer(self, items: Sequence[Item], stretch: range) -> list[torch.Tensor]:
        batch = _Batch(self.config, self._frequencies, items, self.memory)
        hidden = batch.hidden
        for index in stretch:
            hidden = self._layer(index, hidden, batch)
            if self._rounds and not self._layers[index].rounds:
                hidden = hidden.bfloat16().float()
        return batch.split(hidden)

    def _layer(self, index: int, hidden: torch.Tensor, batch: "_Batch") -> torch.Tensor:
        layer, config = self._layers[index], self.config
        projected = layer.projected(hidden, batch.positions, batch.apply)
        heads = projected.view(hidden.shape[0], -1, config.head_size)
        attended = batch.attention(index, heads if layer.turns else batch.rotated(heads))
        return layer.ended(hidden, attended, batch.apply)


class _Batch:
    """The rows of a step: items of few rows first, so that they form one piece."""

    def __init__(
        self,
        config: ModelConfig,
        frequencies: torch.Tensor,
        items: Sequence[Item],
        memory: DeviceMemory,
    ) -> None:
        self._order = sorted(range(len(items)), key=lambda i: items[i].rows > NARROW_ROWS)
        self._items = [items[i] for i in self._order]
        self._sizes = [item.rows for item in self._items]
        self.hidden = torch.cat([item.hidden for item in self._items])
        wide = [size for size in self._sizes if size > NARROW_ROWS]
        self._narrow_rows = sum(self._sizes) - sum(wide)
        self._pieces = [self._narrow_rows, *wide]
        self._attention = Attention(self._items, config.heads, config.kv_heads, memory)
        firsts = [(item.first_position, item.first_position + item.rows) for item in self._items]
        self.positions = torch.cat([torch.arange(*range_, dtype=torch.int32) for range_ in firsts])
        """[rows], on the host."""
        self._turned_heads = config.heads + config.kv_heads
        self._frequencies = frequencies
        self._carry = memory.carry

    def apply(self, linear: Linear, rows: torch.Tensor) -> torch.Tensor:
        """Multiply the narrow items' rows together, each wide item's alone."""
        if self._narrow_rows == rows.shape[0]:
            return linear.rows(rows)
        narrow, *wide = rows.split(self._pieces)
        results = [linear.item(piece) for piece in wide]
        if self._narrow_rows:
            results.insert(0, linear.rows(narrow))
        return torch.cat(results) if len(results) > 1 else results[0]

    @cached_property
    def _turns(self) -> torch.Tensor:
        angles = self._carry(self.positions.float())[:, None] * self._frequencies
        return torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(self, heads: torch.Tensor) -> torch.Tensor:
        """[rows, heads, head size], queries and keys turned by their rows' positions.

        GGUF interleaves the two halves of each head, so that neighbours turn together, as
        one complex number; transformers has another order, of the same numbers.
        """
        pairs = torch.view_as_complex(heads[:, : self._turned_heads].unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * self._turns).flatten(-2)
        return torch.cat([turned, heads[:, self._turned_heads :]], 1)

    def attention(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """[rows, heads, head size], all of them -> [rows, query heads * head size]."""
        return self._attention.of_layer(layer, heads)

    def split(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each item, in the order the items were given in."""
        results = dict(zip(self._order, hidden.split(self._sizes), strict=True))
        return [results[index] for index in range(len(self._order))]


def load_ragged(
    weights: Weights,
    span: Span,
    dtype: str,
    progress: LayerProgress,
    memory: DeviceMemory = HOST,
    kernel: str = "",
) -> RaggedModel:
    """Load the span in ``dtype``, one of ``load.DTYPES``. Raises ``ModelError`` on a bad tensor.

    On the host int4 is computed by ``kernel``: ggml's if it is ``ggml_parts.KERNEL``,
    onnxruntime's if it is ``ort.KERNEL``, else torch's.
    On an accelerator all but the embedding is in its memory: of that, a step needs a few rows.
    """
    parts = _parts(weights, dtype, memory, kernel)
    config = weights.config
    layers: list[Layer] = []
    for done, index in enumerate(range(span.start, span.end)):
        layers.append(parts.layer(index))
        progress(done + 1, len(span))
    last = span.end == config.layers
    head = parts.head() if last else None
    factors = weights.rotary_factors()
    return RaggedModel(
        config,
        span,
        layers,
        dtype,
        parts.kernel(),
        rows=weights.rows(EMBEDDING) if span.start == 0 else None,
        final_norm=memory.put(torch.from_numpy(weights.fp32(FINAL_NORM))) if last else None,
        head=head,
        factors=None if factors is None else torch.from_numpy(factors),
        narrow=parts.span() if isinstance(parts, GgmlParts) else None,
        memory=memory,
    )


def _kv_number(dtype: str, memory: DeviceMemory) -> torch.dtype:
    """What keys and values are kept in: an accelerator's memory is dear, and its attention
    is made for 16 bits."""
    if memory.device.is_accelerator and dtype != "fp32":
        return TORCH_DTYPES[dtype if dtype in TORCH_DTYPES else memory.device.half]
    return torch.float32


def _parts(
    weights: Weights, dtype: str, memory: DeviceMemory, kernel: str
) -> "_OrtParts | _TorchParts | GgmlParts":
    if (dtype, kernel) == ("int4", ggml_parts.KERNEL):
        return GgmlParts(weights)
    if (dtype, kernel) == ("int4", ort.KERNEL):
        return _OrtParts(weights)
    return _TorchParts(weights, dtype, memory)


class _TorchParts:
    """Loads layers and heads for torch, and knows what multiplies."""

    def __init__(self, weights: Weights, dtype: str, memory: DeviceMemory) -> None:
        self._weights = weights
        self._dtype = dtype
        self._memory = memory
        self._matrices: list[Linear] = []

    def layer(self, index: int) -> Layer:
        layer = load_torch_layer(self._weights, index, self._linear, self._memory)
        self._matrices += layer.matrices
        return layer

    def head(self) -> Head:
        name = self._weights.config.head_tensor
        if self._memory.device.is_accelerator:
            head = load_on(self._memory, self._weights, [name], self._dtype)
        else:
            head = load_head(self._weights, name, self._dtype)
        self._matrices.append(head)
        return head

    def kernel(self) -> str:
        if self._memory.device.is_accelerator:
            return kernel_on(self._memory.device, self._dtype)
        return kernel_of(self._dtype, self._matrices)

    def _linear(self, names: Sequence[str]) -> Linear:
        if self._memory.device.is_accelerator:
            return load_on(self._memory, self._weights, names, self._dtype)
        return load_linear(self._weights, names, self._dtype)


class _OrtParts:
    """The same for onnxruntime."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def layer(self, index: int) -> Layer:
        return ort.load_ort_layer(self._weights, index)

    def head(self) -> Head:
        return ort.load_ort_head(self._weights, self._weights.config.head_tensor)

    def kernel(self) -> str:
        return ort.KERNEL
