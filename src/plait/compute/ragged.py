"""A llama's span computed for many sessions at once, their rows side by side.

Every matrix meets the rows of all items together; attention runs per session over exactly
its own positions, without padding. So nothing a row is added up from, nor the order of it,
depends on the company it is computed in; and rows of an item of at most ``NARROW_ROWS`` are
each what they would be one at a time. ``hf.py`` is the slow oracle of this
file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from plait.compute.device import kernel_on
from plait.compute.device_linear import TORCH_DTYPES, load_on
from plait.compute.device_memory import HOST, DeviceMemory
from plait.compute.kv import KvLayout, SessionKv
from plait.compute.linear import NARROW_ROWS, Linear, kernel_of, load_head, load_linear
from plait.errors import LocalProtocolError
from plait.model.config import EMBEDDING, FINAL_NORM, LlamaConfig
from plait.model.weights import Rows, Weights
from plait.types import Span

LayerProgress = Callable[[int, int], None]
"""Called with (layers loaded, layers to load)."""


@dataclass(frozen=True, slots=True)
class Item:
    """Rows of one session, [rows, hidden], at ``first_position`` and behind it."""

    hidden: torch.Tensor
    first_position: int
    kv: SessionKv


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. ``queries_keys_values`` and ``gate_up`` are joined matrices."""

    attention_norm: torch.Tensor
    queries_keys_values: Linear
    attention_output: Linear
    feed_forward_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class RaggedModel:
    """The layers of a span, with embedding rows if first and norm and head if last."""

    batches = True

    def __init__(
        self,
        config: LlamaConfig,
        span: Span,
        layers: Sequence[Layer],
        dtype: str,
        *,
        rows: Rows | None,
        final_norm: torch.Tensor | None,
        head: Linear | None,
        memory: DeviceMemory = HOST,
    ) -> None:
        self.config = config
        self.span = span
        self.layout = KvLayout(span, config.kv_heads, config.head_size, _kv_number(dtype, memory))
        self.memory = memory
        self.numerics = f"{dtype}/{_kernel(dtype, layers, head, memory)}"
        self._layers = layers
        self._rows = rows
        self._final_norm = final_norm
        self._head = head
        self._epsilon = memory.put(torch.tensor(config.norm_epsilon))
        even = torch.arange(0, config.head_size, 2).float()
        self._frequencies = memory.put(1.0 / config.rope_base ** (even / config.head_size))

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), hidden] for ids in range. Only the first stage can."""
        if self._rows is None:
            raise LocalProtocolError(f"span {self.span} has no embedding")
        return torch.from_numpy(self._rows.fp32(ids))

    def run(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """[rows, hidden] of each item after its session's layers, normed after the last.

        The items' sessions differ, and all run the same span.
        """
        batch = _Batch(self.config, self._frequencies, items, self.memory)
        span = items[0].kv.span
        hidden = batch.hidden
        for index in range(span.start - self.span.start, span.end - self.span.start):
            hidden = self._layer(index, hidden, batch)
        if span.end == self.config.layers:
            assert self._final_norm is not None
            hidden = self._norm(hidden, self._final_norm)
        return batch.split(hidden)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] for normed rows, [n, hidden]. Only the last stage can."""
        assert self._head is not None
        return self._head.rows(normed)

    def _layer(self, index: int, hidden: torch.Tensor, batch: "_Batch") -> torch.Tensor:
        layer, config = self._layers[index], self.config
        normed = self._norm(hidden, layer.attention_norm)
        projected = batch.apply(layer.queries_keys_values, normed)
        projected = projected.view(len(hidden), -1, config.head_size)
        turned, values = projected.split([config.heads + config.kv_heads, config.kv_heads], 1)
        queries, keys = batch.rotated(turned).split([config.heads, config.kv_heads], 1)
        attended = batch.attention(index, queries, keys, values)
        hidden = hidden + batch.apply(layer.attention_output, attended)
        normed = self._norm(hidden, layer.feed_forward_norm)
        gate, up = batch.apply(layer.gate_up, normed).chunk(2, 1)
        return hidden + batch.apply(layer.down, functional.silu(gate) * up)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # As functional.rms_norm, in fewer calls: they take longer than the sums.
        size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        mean = torch.addcmul(self._epsilon, size, size, value=1 / self.config.hidden_size)
        return hidden * torch.rsqrt(mean) * weight


class _Batch:
    """The rows of a step: items of few rows first, so that they form one piece."""

    def __init__(
        self,
        config: LlamaConfig,
        frequencies: torch.Tensor,
        items: Sequence[Item],
        memory: DeviceMemory,
    ) -> None:
        self._order = sorted(range(len(items)), key=lambda i: len(items[i].hidden) > NARROW_ROWS)
        self._items = [items[i] for i in self._order]
        self._sizes = [len(item.hidden) for item in self._items]
        self.hidden = torch.cat([item.hidden for item in self._items])
        wide = [size for size in self._sizes if size > NARROW_ROWS]
        self._narrow_rows = sum(self._sizes) - sum(wide)
        self._pieces = [self._narrow_rows, *wide]
        self._group = config.heads // config.kv_heads
        self._masks = [_mask(item, memory) for item in self._items]
        positions = [torch.arange(len(i.hidden)) + i.first_position for i in self._items]
        angles = memory.carry(torch.cat(positions).float())[:, None] * frequencies
        self._turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def apply(self, linear: Linear, rows: torch.Tensor) -> torch.Tensor:
        """Multiply the narrow items' rows together, each wide item's alone."""
        if self._narrow_rows == len(rows):
            return linear.rows(rows)
        narrow, *wide = rows.split(self._pieces)
        results = [linear.item(piece) for piece in wide]
        if self._narrow_rows:
            results.insert(0, linear.rows(narrow))
        return torch.cat(results) if len(results) > 1 else results[0]

    def rotated(self, heads: torch.Tensor) -> torch.Tensor:
        """[rows, heads, head size], turned by its rows' positions.

        GGUF interleaves the two halves of each head, so that neighbours turn together, as
        one complex number; transformers has another order, of the same numbers.
        """
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self._turns).flatten(-2)

    def attention(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """[rows, heads, head size] each -> [rows, heads * head size]."""
        results = [
            self._attend(layer, item, mask, *of_item)
            for item, mask, *of_item in zip(
                self._items,
                self._masks,
                queries.split(self._sizes),
                keys.split(self._sizes),
                values.split(self._sizes),
                strict=True,
            )
        ]
        return torch.cat(results) if len(results) > 1 else results[0]

    def _attend(
        self,
        layer: int,
        item: Item,
        mask: torch.Tensor | None,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        rows, heads, size = queries.shape
        cached_keys, cached_values = item.kv.write(
            layer, item.first_position, keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        )
        queries = queries.to(cached_keys.dtype)
        if rows <= NARROW_ROWS:
            # Each row by itself, so that a draft's row is what it would be without drafts.
            # The query heads that share a key head stand in as rows: nothing is copied.
            grouped = queries.view(rows, 1, heads // self._group, self._group, size)
            ends = range(item.first_position + 1, item.first_position + rows + 1)
            each = [
                functional.scaled_dot_product_attention(
                    query, cached_keys[:, :, :end], cached_values[:, :, :end]
                )
                for query, end in zip(grouped, ends, strict=True)
            ]
            return (torch.cat(each) if rows > 1 else each[0]).reshape(rows, heads * size).float()
        attended = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            cached_keys,
            cached_values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self._group > 1,
        )
        return attended[0].transpose(0, 1).reshape(rows, heads * size).float()

    def split(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each item, in the order the items were given in."""
        results = dict(zip(self._order, hidden.split(self._sizes), strict=True))
        return [results[index] for index in range(len(self._order))]


def _mask(item: Item, memory: DeviceMemory) -> torch.Tensor | None:
    """[rows, keys], what each row may see; None if that is a plain causal triangle."""
    rows = len(item.hidden)
    if rows <= NARROW_ROWS or item.first_position == 0:
        return None
    seen = torch.ones(rows, item.first_position + rows, dtype=torch.bool)
    return memory.carry(seen.tril(item.first_position))


def load_ragged(
    weights: Weights,
    span: Span,
    dtype: str,
    progress: LayerProgress,
    memory: DeviceMemory = HOST,
) -> RaggedModel:
    """Load the span in ``dtype``, one of ``load.DTYPES``. Raises ``ModelError`` on a bad tensor.

    On an accelerator all but the embedding is in its memory: of that, a step needs a few rows.
    """
    config = weights.config
    layers = []
    for done, index in enumerate(range(span.start, span.end)):
        layers.append(_load_layer(weights, index, dtype, memory))
        progress(done + 1, len(span))
    last = span.end == config.layers
    return RaggedModel(
        config,
        span,
        layers,
        dtype,
        rows=weights.rows(EMBEDDING) if span.start == 0 else None,
        final_norm=memory.put(torch.from_numpy(weights.fp32(FINAL_NORM))) if last else None,
        head=_load_head(weights, config.head_tensor, dtype, memory) if last else None,
        memory=memory,
    )


def _load_head(weights: Weights, name: str, dtype: str, memory: DeviceMemory) -> Linear:
    if memory.device.is_accelerator:
        return load_on(memory, weights, [name], dtype)
    return load_head(weights, name, dtype)


def _kernel(dtype: str, layers: Sequence[Layer], head: Linear | None, memory: DeviceMemory) -> str:
    if memory.device.is_accelerator:
        return kernel_on(memory.device, dtype)
    return kernel_of(dtype, _matrices(layers, head))


def _kv_number(dtype: str, memory: DeviceMemory) -> torch.dtype:
    """What keys and values are kept in: an accelerator's memory is dear, and its attention
    is made for 16 bits."""
    if memory.device.is_accelerator and dtype != "fp32":
        return TORCH_DTYPES[dtype if dtype in TORCH_DTYPES else memory.device.half]
    return torch.float32


def _matrices(layers: Sequence[Layer], head: Linear | None) -> list[Linear]:
    found = [] if head is None else [head]
    for layer in layers:
        found += [layer.queries_keys_values, layer.attention_output, layer.gate_up, layer.down]
    return found


def _load_layer(weights: Weights, index: int, dtype: str, memory: DeviceMemory) -> Layer:
    def name(part: str) -> str:
        return f"blk.{index}.{part}.weight"

    def linear(*parts: str) -> Linear:
        names = [name(part) for part in parts]
        if memory.device.is_accelerator:
            return load_on(memory, weights, names, dtype)
        return load_linear(weights, names, dtype)

    def norm(part: str) -> torch.Tensor:
        return memory.put(torch.from_numpy(weights.fp32(name(part))))

    return Layer(
        attention_norm=norm("attn_norm"),
        queries_keys_values=linear("attn_q", "attn_k", "attn_v"),
        attention_output=linear("attn_output"),
        feed_forward_norm=norm("ffn_norm"),
        gate_up=linear("ffn_gate", "ffn_up"),
        down=linear("ffn_down"),
    )
