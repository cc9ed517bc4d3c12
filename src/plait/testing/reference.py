"""Oracles for computing: the unsplit transformers model, and stages run in one process.

The reference is put together on its own: a whole transformers model with transformers'
own cache, masks, generation loop and permutation of GGUF's queries and keys. Only the
expansion of packed weights is shared, which has its own tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from plait.compute.port import Hidden, StageCompute, Work
from plait.model.gguf_reader import GgufFile
from plait.model.local import LocalModel
from plait.types import Sampling, SessionId, Span

SESSION = SessionId(bytes(range(16)))
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Of models whose file has rotary factors: transformers calculates these from it."""
_FACTORS = "rope_freqs.weight"
_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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


def reference_model(local: LocalModel) -> PreTrainedModel:
    """The whole model in fp32, without any of ``plait.compute``."""
    with GgufFile.open(local.weights_path) as gguf:
        family = gguf.text("general.architecture")
        heads = gguf.integer(f"{family}.attention.head_count")
        kv_heads = gguf.integer(f"{family}.attention.head_count_kv")
        rope = {"rope_type": "default", "rope_theta": gguf.number(f"{family}.rope.freq_base")}
        if _FACTORS in gguf.tensors:
            rope |= LLAMA3_ROPE
        config_class, model_class = _CLASSES[family]
        config = config_class(
            vocab_size=gguf.tensors["token_embd.weight"].shape[0],
            hidden_size=gguf.integer(f"{family}.embedding_length"),
            intermediate_size=gguf.integer(f"{family}.feed_forward_length"),
            num_hidden_layers=gguf.integer(f"{family}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=gguf.integer(f"{family}.context_length"),
            rms_norm_eps=gguf.number(f"{family}.attention.layer_norm_rms_epsilon"),
            rope_parameters=rope,
            tie_word_embeddings="output.weight" not in gguf.tensors,
        )
        undo = LlamaTensorProcessor({"num_attention_heads": heads, "num_key_value_heads": kv_heads})
        tensors = {}
        for entry in gguf.tensors.values():
            if entry.name == _FACTORS:
                continue  # transformers calculates them
            weight = entry.type.to_fp32(gguf.read(entry.name), entry.shape)
            if family == "llama":
                weight = undo.process(weight, name=entry.name).weights
            tensors[_name(entry.name)] = torch.from_numpy(np.ascontiguousarray(weight))
    model: PreTrainedModel = model_class(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.train(False)
    return model


def _name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    return f"{_NAMES[parts[0]]}.{parts[1]}"


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """Greedy tokens, and per traversal the hidden rows after each layer but the last."""

    tokens: list[int]
    hidden: list[list[torch.Tensor]]


@torch.inference_mode()
def reference_run(model: PreTrainedModel, prompt_ids: Sequence[int], count: int) -> ReferenceRun:
    """``count`` greedy tokens by transformers' ``generate``, never ending early."""
    untyped: Any = model  # transformers' annotation of generate does not fit its own models
    output = untyped.generate(
        torch.tensor([list(prompt_ids)]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    # Per traversal: the embedding, each layer but the last, the final norm.
    hidden = [[rows[0] for rows in traversal[1:-1]] for traversal in output.hidden_states]
    return ReferenceRun([int(token) for token in output.sequences[0, len(prompt_ids) :]], hidden)


@dataclass(slots=True)
class PipelineRun:
    """What came out: drawn tokens, and per traversal the hidden rows of each boundary."""

    tokens: list[int] = field(default_factory=list)
    boundaries: list[list[Hidden]] = field(default_factory=list)


def run_pipeline(
    stages: Sequence[StageCompute],
    prompt_ids: Sequence[int],
    count: int,
    sampling: Sampling | None = None,
) -> PipelineRun:
    """Generate ``count`` tokens through stages of this process, in order of their spans.

    The prompt is one prefill. Raises a stage's error.
    """
    run = PipelineRun()
    for stage in stages:
        stage.reserve(SESSION, len(prompt_ids) + count, sampling or Sampling())
    ids, position = tuple(prompt_ids), 0
    while len(run.tokens) < count:
        run.tokens.append(_traverse(stages, ids, position, run))
        position += len(ids)
        ids = (run.tokens[-1],)
    for stage in stages:
        stage.free(SESSION)
    return run


def _traverse(
    stages: Sequence[StageCompute], ids: tuple[int, ...], position: int, run: PipelineRun
) -> int:
    work = Work(SESSION, position, ids, None, sample=True)
    run.boundaries.append([])
    for stage in stages:
        (done,) = stage.step([work])
        if done.error is not None:
            raise done.error
        if done.hidden is not None and stage is not stages[-1]:
            run.boundaries[-1].append(done.hidden)
            work = Work(SESSION, position, None, done.hidden, sample=True)
    assert done.drawn is not None
    return done.drawn.ids[0]


def boundary_error(run: PipelineRun, spans: Sequence[Span], reference: ReferenceRun) -> float:
    """The largest relative L2 distance of an activation payload from transformers' own."""
    return max(
        (
            float((torch.from_numpy(hidden) - wanted[span.end - 1]).norm())
            / float(wanted[span.end - 1].norm())
            for payloads, wanted in zip(run.boundaries, reference.hidden, strict=True)
            for hidden, span in zip(payloads, spans[:-1], strict=True)
        ),
        default=0.0,
    )


def unequal_boundaries(
    run: PipelineRun, spans: Sequence[Span], other: PipelineRun, other_spans: Sequence[Span]
) -> int:
    """How many activation payloads behind a layer where both runs are split differ by even
    one bit."""
    places = [span.end for span in other_spans[:-1]]
    return sum(
        not np.array_equal(hidden, theirs[places.index(span.end)])
        for payloads, theirs in zip(run.boundaries, other.boundaries, strict=True)
        for hidden, span in zip(payloads, spans[:-1], strict=True)
        if span.end in places
    )


def equal_spans(layers: int, count: int) -> list[Span]:
    """``count`` spans over all layers, the earlier ones longer by one if need be."""
    bounds = [-(-layers * stage // count) for stage in range(count + 1)]
    return [Span(start, end) for start, end in pairwise(bounds)]
