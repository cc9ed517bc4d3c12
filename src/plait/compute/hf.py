"""The one place that knows transformers' insides: a model cut to a span.

The whole model is built without memory (on the meta device), its layer list is cut and
renumbered, and verified weights are put in. Cutting, unlike building a shorter model,
keeps per-layer settings right. transformers' minor version is pinned for this file.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from plait.compute.attention import Item
from plait.compute.kv import KvLayout, SessionKv
from plait.compute.ragged import LayerProgress
from plait.errors import LocalProtocolError
from plait.model.config import EMBEDDING, FINAL_NORM, ModelConfig
from plait.model.weights import Rows, Weights
from plait.types import Span

_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


class SpanModel:
    """The layers of a span, with embedding rows if first and norm and head if last.

    In fp32, to the bit what transformers computes, so one item at a time. Nodes compute with
    ``ragged.py``; this is its oracle.
    """

    batches = False
    numerics = "fp32/torch-sdpa"

    def __init__(
        self, config: ModelConfig, span: Span, base: nn.Module, rows: Rows | None, head: nn.Module
    ) -> None:
        self.config = config
        self.span = span
        self.layout = KvLayout(span, config.kv_heads, config.head_size)
        self.base = base
        """The transformers base model: embedding-less, with ``layers`` cut to the span."""
        self._rows = rows
        self._head = head
        self._parts = {span: base}

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), hidden] for ids in range. Only the first stage can."""
        if self._rows is None:
            raise LocalProtocolError(f"span {self.span} has no embedding")
        return torch.from_numpy(self._rows.fp32(ids))

    def part(self, span: Span) -> nn.Module:
        """The base model of a part of the span; it shares every weight."""
        if span not in self._parts:
            self._parts[span] = _part(self.base, self.span, span)
        return self._parts[span]

    def run(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """[rows, hidden] of each item after its session's layers, normed after the last."""
        return [self._forward(item) for item in items]

    def _forward(self, item: Item) -> torch.Tensor:
        first, kv = item.first_position, item.kv
        output: torch.Tensor = self.part(kv.span)(
            inputs_embeds=item.hidden[None],
            position_ids=torch.arange(first, first + len(item.hidden))[None],
            past_key_values=_PositionCache(kv, first),
            use_cache=True,
        ).last_hidden_state
        return output[0]

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] for normed rows, [n, hidden]. Only the last stage can."""
        return torch.cat([self._head(row[None]) for row in normed])


class _PositionCache:
    """What transformers expects as ``past_key_values``, over a session's cache.

    It answers the questions from which transformers builds its own causal mask, so one
    session computes bit for bit what transformers' own generation loop computes.
    """

    def __init__(self, kv: SessionKv, first_position: int) -> None:
        self._kv = kv
        self._first_position = first_position

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kv.write(layer, self._first_position, keys, values)

    def get_seq_length(self, layer: int = 0) -> int:
        return self._first_position

    def get_query_offset(self, layer: int = 0) -> int:
        return self._first_position

    def get_mask_sizes(self, rows: int, layer: int) -> tuple[int, int]:
        """(how many keys the rows see, position of the first key)."""
        return self._first_position + rows, 0


def load_span(weights: Weights, span: Span, progress: LayerProgress) -> SpanModel:
    """Build and fill the cut model in fp32. Raises ``ModelError`` on a bad tensor."""
    config = weights.config
    factors = weights.rotary_factors()
    model = _cut(config, span, None if factors is None else torch.from_numpy(factors))
    for done, layer in enumerate(range(span.start, span.end)):
        tensors = {
            _layer_name(name, span): _tensor(weights, name) for name in config.layer_shapes(layer)
        }
        model.load_state_dict(tensors, strict=False, assign=True)
        progress(done + 1, len(span))
    head: nn.Module = nn.Identity()
    if span.end == config.layers:
        model.load_state_dict({"model.norm.weight": _tensor(weights, FINAL_NORM)}, False, True)
        head = nn.Linear(config.hidden_size, config.vocabulary_size, bias=False, device="meta")
        head.load_state_dict({"weight": _tensor(weights, config.head_tensor)}, assign=True)
    rows = weights.rows(EMBEDDING) if span.start == 0 else None
    base = model.model
    base.embed_tokens = nn.Identity()  # stages pass inputs_embeds
    base.requires_grad_(False).eval()
    head.requires_grad_(False)
    _check_filled(base)
    return SpanModel(config, span, base, rows, head)


def _cut(config: ModelConfig, span: Span, factors: torch.Tensor | None) -> Any:
    config_class, model_class = _CLASSES[config.architecture]
    sizes = {"head_dim": config.head_size} if config_class is LlamaConfig else {}
    hf_config = config_class(
        vocab_size=config.vocabulary_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.feed_forward_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tied_head,
        **sizes,
    )
    hf_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = model_class(hf_config)
    base = model.model
    base.layers = nn.ModuleList(list(base.layers)[span.start : span.end])
    for module in base.layers.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx -= span.start
    base.config.num_hidden_layers = len(span)
    if span.end != config.layers:
        base.norm = nn.Identity()
    base.rotary_emb = type(base.rotary_emb)(base.config)  # its buffers were built on meta
    if factors is not None:
        base.rotary_emb.inv_freq /= factors
    return model


def _part(base: nn.Module, whole: Span, span: Span) -> nn.Module:
    """A shallow copy of ``base`` that runs only the layers of ``span``."""
    part = copy.copy(base)
    part._modules = dict(base._modules)
    config: Any = copy.copy(base.config)
    assert isinstance(base.layers, nn.ModuleList)
    part.layers = base.layers[span.start - whole.start : span.end - whole.start]
    if span.end != whole.end:
        part.norm = nn.Identity()
    config.num_hidden_layers = len(span)
    part.config = config
    return part


def _layer_name(name: str, span: Span) -> str:
    """``blk.<layer>.<part>.weight`` as transformers calls it in the cut model."""
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{int(layer) - span.start}.{_PARTS[part]}.{suffix}"


def _tensor(weights: Weights, name: str) -> torch.Tensor:
    tensor = torch.from_numpy(weights.fp32(name))
    if ".attn_q." in name:
        return _unpermute(tensor, weights.config.heads)
    if ".attn_k." in name:
        return _unpermute(tensor, weights.config.kv_heads)
    return tensor


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the order of rows that ``Weights`` gives queries and keys, and their biases.

    It interleaves the two halves of each head, as its rotary embedding rotates
    neighbouring rows; transformers' rotates row i with row i + head size / 2.
    """
    pairs = weight.view(heads, len(weight) // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _check_filled(base: nn.Module) -> None:
    """Every parameter and buffer left must hold numbers."""
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        if tensor.device.type == "meta":
            raise LocalProtocolError(f"no weights were loaded for {name}")
