"""Attention of a step's items, each over exactly its own positions, without padding.

All rows are written to the cache at once. Of items of at most ``NARROW_ROWS`` rows each row
is then computed by itself, so that a draft's row is what it would be without drafts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from plait.compute.device_memory import HOST, DeviceMemory
from plait.compute.kv import SessionKv
from plait.compute.linear import NARROW_ROWS

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Item:
    """Rows of one session, [rows, hidden], at ``first_position`` and behind it."""

    hidden: torch.Tensor
    first_position: int
    kv: SessionKv

    @property
    def rows(self) -> int:
        """How many."""
        return self.hidden.shape[0]  # ``len`` of a tensor takes microseconds


class Attention:
    """For ``items`` of one cache, those of few rows first; of so many query heads, which share
    the fewer heads of keys and values evenly."""

    def __init__(
        self, items: Sequence[Item], heads: int, kv_heads: int, memory: DeviceMemory = HOST
    ) -> None:
        self._heads = heads
        self._group = heads // kv_heads
        narrow = [item for item in items if item.rows <= NARROW_ROWS]
        self._wide = items[len(narrow) :]
        self._narrow = [_Reads(item) for item in narrow]
        self._narrow_rows = sum(item.rows for item in narrow)
        self._masks = [_mask(item, memory) for item in self._wide]
        slots = [item.kv.slots(item.first_position, item.rows) for item in items]
        self._slots = memory.carry(torch.cat(slots))
        self._cache = items[0].kv

    def of_layer(self, layer: int, projected: torch.Tensor) -> torch.Tensor:
        """[rows, heads, head size], queries, keys and values in the order of items ->
        [rows, query heads * head size]."""
        cached = self._cache.of_layer(layer)
        queries, written = projected.to(cached.dtype).split_with_sizes(
            [self._heads, projected.shape[1] - self._heads], 1
        )
        cached.index_copy_(1, self._slots, written.transpose(0, 1))
        results = self._of_narrow(layer, queries[: self._narrow_rows])
        at = self._narrow_rows
        for item, mask in zip(self._wide, self._masks, strict=True):
            results.append(self._of_wide(layer, item, mask, queries[at : at + item.rows]))
            at += item.rows
        return (torch.cat(results) if len(results) > 1 else results[0]).float()

    def _of_narrow(self, layer: int, queries: torch.Tensor) -> list[torch.Tensor]:
        """Everything in one piece, if there is anything."""
        rows, heads, size = queries.shape
        if not rows:
            return []
        # The query heads that share a key head stand in as rows: nothing is copied.
        grouped = queries.reshape(rows, 1, heads // self._group, self._group, size).unbind(0)
        reads = [pair for item in self._narrow for pair in item.of_layer(layer)]
        each = [
            functional.scaled_dot_product_attention(query, keys, values)
            for query, (keys, values) in zip(grouped, reads, strict=True)
        ]
        return [(torch.cat(each) if rows > 1 else each[0]).reshape(rows, heads * size)]

    def _of_wide(
        self, layer: int, item: Item, mask: torch.Tensor | None, queries: torch.Tensor
    ) -> torch.Tensor:
        rows, heads, size = queries.shape
        keys, values = item.kv.read(layer, item.first_position + rows)
        attended = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self._group > 1,
        )
        return attended[0].transpose(0, 1).reshape(rows, heads * size)


class _Reads:
    """What each row of an item of few rows sees."""

    def __init__(self, item: Item) -> None:
        self._kv = item.kv
        first = item.first_position + 1
        self._ends = range(first, first + item.rows)
        views = [item.kv.views(end) for end in self._ends]
        self._views = [one for one in views if one is not None]

    def of_layer(self, layer: int) -> list[KeysValues]:
        """Of each row, when all are written."""
        if self._views:
            return [(keys[layer], values[layer]) for keys, values in self._views]
        keys, values = self._kv.read(layer, self._ends[-1])
        return [(keys[:, :, :end], values[:, :, :end]) for end in self._ends]


def _mask(item: Item, memory: DeviceMemory) -> torch.Tensor | None:
    """[rows, keys], what each row may see; None if that is a plain causal triangle."""
    if item.first_position == 0:
        return None
    seen = torch.ones(item.rows, item.first_position + item.rows, dtype=torch.bool)
    return memory.carry(seen.tril(item.first_position))
