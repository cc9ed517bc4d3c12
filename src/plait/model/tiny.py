"""A tiny llama with random weights: for tests, and for a network without a download.

Its text is noise, but everything else is real: a GGUF file with packed weights, a
byte-level BPE tokenizer and a chat template. The bytes come from SHAKE-256 of a fixed
seed, so the same file arises everywhere.
"""

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

from plait.model.byte_level import ALPHABET
from plait.model.config import FAMILIES
from plait.model.gguf_types import BY_NAME
from plait.model.gguf_writer import StoredTensor, Value, write_gguf

LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS = 8, 64, 128, 4, 2
HEAD_SIZE = HIDDEN // HEADS
CONTEXT = 2_048
SEED = b"plait tiny model 1"

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = (
    "Ġ_t Ġ_a h_e i_n r_e o_n Ġt_he e_r a_t e_n o_r e_s i_s i_t a_n Ġ_s Ġ_w Ġ_o Ġ_c o_u n_d "
    "a_l l_l Ġ_b Ġ_f in_g Ġ_p e_d Ġt_o Ġa_nd Ġ_m Ġo_f Ġ_in l_e o_m Ġ_d Ġ_h Ġ_n s_t e_l v_e"
)
MERGES = tuple(merge.replace("_", " ") for merge in _MERGES.split(" "))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny(path: Path, family: str = "llama", more: Sequence[StoredTensor] = ()) -> None:
    """Write the model's GGUF file, always the same bytes. Raises ``OSError``.

    ``family`` is an architecture of ``config.FAMILIES``; ``more`` are tensors besides.
    """
    vocabulary = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    tensors = [*_tensors(len(vocabulary), FAMILIES[family].biases), *more]
    write_gguf(path, _metadata(vocabulary, family), tensors)


def _metadata(vocabulary: list[str], family: str) -> dict[str, Value]:
    return {
        "general.architecture": family,
        "general.name": "tiny random (for tests)",
        f"{family}.block_count": LAYERS,
        f"{family}.context_length": CONTEXT,
        f"{family}.embedding_length": HIDDEN,
        f"{family}.feed_forward_length": FEED_FORWARD,
        f"{family}.attention.head_count": HEADS,
        f"{family}.attention.head_count_kv": KV_HEADS,
        f"{family}.rope.freq_base": 10_000.0,
        f"{family}.rope.dimension_count": HEAD_SIZE,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _tensors(vocabulary_size: int, biases: bool) -> list[StoredTensor]:
    queries, keys = (HEADS * HEAD_SIZE, HIDDEN), (KV_HEADS * HEAD_SIZE, HIDDEN)
    tensors = [
        _packed("token_embd.weight", "Q8_0", (vocabulary_size, HIDDEN), 0.3),
        _vector("output_norm.weight"),
    ]
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        tensors += [
            _vector(prefix + "attn_norm.weight"),
            _packed(prefix + "attn_q.weight", "Q4_1", queries, 0.3),
            _packed(prefix + "attn_k.weight", "Q4_1", keys, 0.3),
            _packed(prefix + "attn_v.weight", "Q8_0", keys, 0.3),
            _packed(prefix + "attn_output.weight", "Q4_1", (HIDDEN, HIDDEN), 0.3),
            _vector(prefix + "ffn_norm.weight"),
            _packed(prefix + "ffn_gate.weight", "Q4_1", (FEED_FORWARD, HIDDEN), 0.2),
            _packed(prefix + "ffn_up.weight", "Q4_0", (FEED_FORWARD, HIDDEN), 0.2),
            _packed(prefix + "ffn_down.weight", "Q4_1", (HIDDEN, FEED_FORWARD), 0.2),
        ]
        if biases:
            sizes = {"attn_q": queries[0], "attn_k": keys[0], "attn_v": keys[0]}
            tensors += [_vector(f"{prefix}{part}.bias", size) for part, size in sizes.items()]
    return tensors


def _vector(name: str, size: int = HIDDEN) -> StoredTensor:
    """Numbers between 0.5 and 1.5, in fp32."""
    noise = hashlib.shake_256(SEED + name.encode()).digest(size)
    numbers = [0.5 + byte / 255 for byte in noise]
    return StoredTensor(name, BY_NAME["F32"], (size,), struct.pack(f"<{size}f", *numbers))


def _packed(name: str, kind: str, shape: tuple[int, int], deviation: float) -> StoredTensor:
    """Uniform random weights of about the given standard deviation."""
    # The standard deviation of a uniform integer: 16 values 4.61, 256 values 73.9.
    scale = deviation / (73.9 if kind == "Q8_0" else 4.61)
    head = struct.pack("<e", scale)
    if kind == "Q4_1":
        head += struct.pack("<e", -7.5 * scale)
    storage = BY_NAME[kind]
    groups = shape[0] * shape[1] // storage.group
    count = storage.group_bytes - len(head)
    noise = hashlib.shake_256(SEED + name.encode()).digest(groups * count)
    raw = b"".join(head + noise[i * count : (i + 1) * count] for i in range(groups))
    return StoredTensor(name, storage, shape, raw)
