"""The architecture of a model, read from GGUF metadata and checked.

Llama and qwen2 exist: qwen2 is a llama with biases on queries, keys and values, whose file
keeps the rows of queries and keys in another order.
"""

from dataclasses import dataclass

from plait.errors import ModelError
from plait.model.gguf_reader import GgufFile
from plait.types import Span

LAYERS_MAX = 1_024
WIDTH_MAX = 1 << 17
VOCABULARY_MAX = 1 << 21

EMBEDDING, FINAL_NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
ROTARY_FACTORS = "rope_freqs.weight"
BIASED = ("attn_q", "attn_k", "attn_v")
LAYER_PARTS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's name says beyond its sizes.

    ``rotary_halves``: row i of a head turns with row i + head size / 2, not with its
    neighbour; ``biases``: queries, keys and values have one.
    """

    rotary_halves: bool = False
    biases: bool = False


FAMILIES = {"llama": Family(), "qwen2": Family(rotary_halves=True, biases=True)}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a model.

    ``tied_head``: the head is the embedding; ``rotary_factors``: a tensor divides the
    frequencies of the rotary embedding, as Llama 3.1 and later have it.
    """

    architecture: str
    layers: int
    hidden_size: int
    feed_forward_size: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    context_length: int
    rope_base: float
    norm_epsilon: float
    tied_head: bool
    rotary_factors: bool

    @property
    def family(self) -> Family:
        """What the architecture implies."""
        return FAMILIES[self.architecture]

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer, norms included."""
        attention = 2 * self.hidden_size * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden_size * self.feed_forward_size + 2 * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Weights of the head, tied or not."""
        return self.hidden_size * self.vocabulary_size

    @property
    def head_tensor(self) -> str:
        """The tensor the head multiplies with."""
        return EMBEDDING if self.tied_head else HEAD

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """GGUF tensor names of one layer and the shapes they must have."""
        width, ffn = self.hidden_size, self.feed_forward_size
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,),
            "attn_q": (queries, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, queries),
            "ffn_norm": (width,),
            "ffn_gate": (ffn, width),
            "ffn_up": (ffn, width),
            "ffn_down": (width, ffn),
        }
        found = {f"blk.{layer}.{part}.weight": shape for part, shape in shapes.items()}
        if self.family.biases:
            found |= {f"blk.{layer}.{part}.bias": shapes[part][:1] for part in BIASED}
        return found

    def span_shapes(self, span: Span) -> dict[str, tuple[int, ...]]:
        """Every tensor the host of ``span`` needs, with its shape."""
        table = (self.vocabulary_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table} if span.start == 0 else {}
        if self.rotary_factors:
            shapes[ROTARY_FACTORS] = (self.head_size // 2,)
        for layer in range(span.start, span.end):
            shapes |= self.layer_shapes(layer)
        if span.end == self.layers:
            shapes |= {FINAL_NORM: (self.hidden_size,), self.head_tensor: table}
        return shapes


def read_config(gguf: GgufFile) -> ModelConfig:
    """Read and check the architecture, and that exactly its tensors are there.

    Raises ``ModelError`` for another family, sizes that contradict each other, or tensors
    and settings whose effect is not implemented.
    """
    family = gguf.text("general.architecture")
    if family not in FAMILIES:
        known = " and ".join(FAMILIES)
        raise ModelError(f"{gguf.path} is a {family!r} model; {known} exist")
    heads = _size(gguf, f"{family}.attention.head_count", WIDTH_MAX)
    hidden = _size(gguf, f"{family}.embedding_length", WIDTH_MAX)
    head_size = gguf.integer(f"{family}.attention.key_length", hidden // heads)
    config = ModelConfig(
        architecture=family,
        layers=_size(gguf, f"{family}.block_count", LAYERS_MAX),
        hidden_size=hidden,
        feed_forward_size=_size(gguf, f"{family}.feed_forward_length", 8 * WIDTH_MAX),
        heads=heads,
        kv_heads=gguf.integer(f"{family}.attention.head_count_kv", heads),
        head_size=head_size,
        vocabulary_size=_vocabulary_size(gguf),
        context_length=_size(gguf, f"{family}.context_length", 1 << 30),
        rope_base=gguf.number(f"{family}.rope.freq_base", 10_000.0),
        norm_epsilon=gguf.number(f"{family}.attention.layer_norm_rms_epsilon"),
        tied_head=HEAD not in gguf.tensors,
        rotary_factors=ROTARY_FACTORS in gguf.tensors,
    )
    _check(gguf, config)
    return config


def _size(gguf: GgufFile, key: str, limit: int) -> int:
    value = gguf.integer(key)
    if not 0 < value <= limit:
        raise ModelError(f"{gguf.path}: {key} is {value}, not in 1…{limit}")
    return value


def _vocabulary_size(gguf: GgufFile) -> int:
    table = gguf.tensors.get(EMBEDDING)
    if table is None or len(table.shape) != 2 or table.shape[0] > VOCABULARY_MAX:
        raise ModelError(f"{gguf.path} has no usable {EMBEDDING}")
    return table.shape[0]


def _check(gguf: GgufFile, config: ModelConfig) -> None:
    family = config.architecture
    if not 0 < config.kv_heads <= config.heads or config.heads % config.kv_heads:
        raise ModelError(f"{gguf.path}: {config.heads} heads over {config.kv_heads} kv heads")
    if not 0 < config.head_size <= WIDTH_MAX or config.head_size % 2:
        raise ModelError(f"{gguf.path}: heads of size {config.head_size}")
    if gguf.integer(f"{family}.rope.dimension_count", config.head_size) != config.head_size:
        raise ModelError(f"{gguf.path}: partial rotary embedding is not implemented")
    if gguf.text(f"{family}.rope.scaling.type", "none") != "none":
        raise ModelError(f"{gguf.path}: rotary scaling is not implemented")
    if not config.rope_base > 1 or not 0 < config.norm_epsilon < 1:
        raise ModelError(f"{gguf.path}: impossible rotary base or norm epsilon")
    expected = config.span_shapes(Span(0, config.layers))
    for name, shape in expected.items():
        entry = gguf.tensors.get(name)
        if entry is None or entry.shape != shape:
            found = "missing" if entry is None else f"of shape {entry.shape}"
            raise ModelError(f"{gguf.path}: tensor {name} is {found}, not {shape}")
    unknown = sorted(gguf.tensors.keys() - expected.keys())
    if unknown:
        raise ModelError(f"{gguf.path}: tensors not implemented: {', '.join(unknown[:3])}")
