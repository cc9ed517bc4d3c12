"""A llama layer around its attention, by torch; ``ort.py`` and ``ggml_layers.py`` have others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from plait.compute.device_memory import DeviceMemory
from plait.compute.linear import Linear
from plait.model.weights import Weights

Apply = Callable[[Linear, torch.Tensor], torch.Tensor]
"""Multiplies a step's rows with a matrix, those of items of many rows by themselves."""


class Layer(Protocol):
    """What a layer does to the rows of a step before and behind its attention."""

    @property
    def turns(self) -> bool:
        """Whether ``projected`` applies the rotary embedding."""

    @property
    def rounds(self) -> bool:
        """Whether ``ended`` rounds to bf16."""

    @property
    def norms(self) -> bool:
        """Whether ``ended`` applies the model's last norm, as only its last layer may."""

    def projected(
        self, hidden: torch.Tensor, positions: torch.Tensor, apply: Apply
    ) -> torch.Tensor:
        """[rows, hidden] and [rows] int32 -> queries, keys and values, [rows, all heads * head
        size]."""

    def ended(self, hidden: torch.Tensor, attended: torch.Tensor, apply: Apply) -> torch.Tensor:
        """[rows, hidden] behind the layer; ``attended`` is [rows, heads * head size]."""


class Half(Protocol):
    """What lies between two attentions, before or behind one, as one call."""

    def rows(self, *given: torch.Tensor) -> torch.Tensor:
        """[n, …] each -> [n, outputs]; each row's result is the same in any company."""


@dataclass(frozen=True, slots=True)
class HalvedLayer:
    """A layer by a library that computes all between two attentions in one call.

    It needs no ``apply``, as rows are the same in any company.
    """

    projection: Half
    """hidden -> queries, keys and values."""
    end: Half
    """(attended, hidden) -> hidden behind the layer."""
    turns: bool = False
    """Whether the projection takes positions, too, and applies the rotary embedding."""
    rounds: bool = False
    """See ``Layer.rounds``."""
    norms: bool = False
    """See ``Layer.norms``."""

    def projected(
        self, hidden: torch.Tensor, positions: torch.Tensor, apply: Apply
    ) -> torch.Tensor:
        """See ``Layer.projected``."""
        given = (hidden, positions) if self.turns else (hidden,)
        return self.projection.rows(*given)

    def ended(self, hidden: torch.Tensor, attended: torch.Tensor, apply: Apply) -> torch.Tensor:
        """See ``Layer.ended``."""
        return self.end.rows(attended, hidden)


@dataclass(frozen=True, slots=True)
class TorchLayer:
    """One layer's weights. ``queries_keys_values`` and ``gate_up`` are joined matrices.

    ``bias`` is that of queries, keys and values, one after the other, if there is one.
    """

    attention_norm: torch.Tensor
    queries_keys_values: Linear
    attention_output: Linear
    feed_forward_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    epsilon: torch.Tensor
    bias: torch.Tensor | None = None
    turns: bool = False
    rounds: bool = False
    norms: bool = False

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """All of them."""
        return self.queries_keys_values, self.attention_output, self.gate_up, self.down

    def projected(
        self, hidden: torch.Tensor, positions: torch.Tensor, apply: Apply
    ) -> torch.Tensor:
        """See ``Layer.projected``."""
        normed = norm(hidden, self.attention_norm, self.epsilon)
        projected = apply(self.queries_keys_values, normed)
        return projected if self.bias is None else projected + self.bias

    def ended(self, hidden: torch.Tensor, attended: torch.Tensor, apply: Apply) -> torch.Tensor:
        """See ``Layer.ended``."""
        hidden = hidden + apply(self.attention_output, attended)
        normed = norm(hidden, self.feed_forward_norm, self.epsilon)
        gate, up = apply(self.gate_up, normed).chunk(2, 1)
        return hidden + apply(self.down, functional.silu(gate) * up)


def norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """As ``functional.rms_norm``, in fewer calls: they take longer than the sums."""
    size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    mean = torch.addcmul(epsilon, size, size, value=1 / hidden.shape[-1])
    return hidden * torch.rsqrt(mean) * weight


def tensor_names(layer: int, *parts: str) -> list[str]:
    """GGUF's names of a layer's weights."""
    return [f"blk.{layer}.{part}.weight" for part in parts]


def load_torch_layer(
    weights: Weights, index: int, load: Callable[[Sequence[str]], Linear], memory: DeviceMemory
) -> TorchLayer:
    """Layer ``index``, its matrices by ``load``. Raises ``ModelError`` on a bad tensor."""

    def linear(*parts: str) -> Linear:
        return load(tensor_names(index, *parts))

    def table(part: str) -> torch.Tensor:
        return memory.put(torch.from_numpy(weights.fp32(*tensor_names(index, part))))

    bias = weights.bias(index)

    return TorchLayer(
        attention_norm=table("attn_norm"),
        queries_keys_values=linear("attn_q", "attn_k", "attn_v"),
        attention_output=linear("attn_output"),
        feed_forward_norm=table("ffn_norm"),
        gate_up=linear("ffn_gate", "ffn_up"),
        down=linear("ffn_down"),
        epsilon=memory.put(torch.tensor(weights.config.norm_epsilon)),
        bias=None if bias is None else memory.put(torch.from_numpy(bias)),
    )
