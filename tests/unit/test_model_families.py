"""Families besides plain llama, against transformers on the same file: qwen2, whose queries,
keys and values have biases and whose rotary embedding turns halves, and llama with rotary
factors, as 3.1 and later have them.

Slow because torch and transformers take seconds to import.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from plait.errors import ModelError
from plait.model.config import read_config
from plait.model.gguf_reader import GgufFile
from plait.model.gguf_types import BY_NAME
from plait.model.gguf_writer import StoredTensor
from plait.model.local import LocalModel
from plait.model.manifest import build_manifest
from plait.model.tiny import HEAD_SIZE, write_tiny

pytestmark = pytest.mark.slow

PROMPT = tuple(range(5, 95))  # positions beyond what the factors leave alone
DTYPES = {
    "fp32": 1e-5,
    "bf16": 0.12,
    "int4/torch": 0.08,
    "int4/mlas-w4a8": 0.2,
    "int4/ggml-w4a8-v2": 0.2,
    "int8": 0.18,
}
"""Limit of the relative error of hidden rows behind half of the layers: about twice that of a
plain llama of the same random weights."""


def factors() -> list[float]:
    """What transformers divides the frequencies by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from plait.testing.reference import LLAMA3_ROPE

    rope = {**LLAMA3_ROPE, "rope_theta": 10_000.0}
    config = LlamaConfig(head_dim=HEAD_SIZE, rope_parameters=rope)
    (scaled, _) = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = [10_000.0 ** (-2 * pair / HEAD_SIZE) for pair in range(HEAD_SIZE // 2)]
    return [one / float(other) for one, other in zip(plain, scaled, strict=True)]


def rotary_factors(values: Sequence[float]) -> StoredTensor:
    raw = struct.pack(f"<{len(values)}f", *values)
    return StoredTensor("rope_freqs.weight", BY_NAME["F32"], (len(values),), raw)


@pytest.fixture(scope="module", params=["qwen2", "llama with factors"])
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    path = tmp_path_factory.mktemp("model") / "weights.gguf"
    if request.param == "qwen2":
        write_tiny(path, "qwen2")
    else:
        write_tiny(path, more=[rotary_factors(factors())])
    with GgufFile.open(path) as gguf:
        return LocalModel("tiny", build_manifest("tiny", gguf), path)


def test_the_manifest_names_the_family(local: LocalModel) -> None:
    biased = any(tensor.name.endswith("attn_q.bias") for tensor in local.manifest.tensors)
    assert local.manifest.architecture == ("qwen2" if biased else "llama")


def test_tokens_and_activations_are_transformers(local: LocalModel) -> None:
    from plait.compute.load import load_stage
    from plait.testing import reference

    wanted = reference.reference_run(reference.reference_model(local), PROMPT, 12)
    for number in (1, 3, 8):
        spans = reference.equal_spans(8, number)
        run = reference.run_pipeline([load_stage(local, span) for span in spans], PROMPT, 12)
        assert run.tokens == wanted.tokens
        assert reference.boundary_error(run, spans, wanted) < 1e-4


def test_the_slow_oracle_knows_the_family_too(local: LocalModel) -> None:
    import torch

    from plait.compute.attention import Item
    from plait.compute.hf import load_span
    from plait.compute.kv import KvCache
    from plait.model.weights import Weights
    from plait.testing import reference
    from plait.types import Sampling, Span

    with GgufFile.open(local.weights_path) as gguf:
        model = load_span(Weights(gguf, local.manifest), Span(0, 8), lambda done, total: None)
    untyped: Any = reference.reference_model(local)
    with torch.inference_mode():
        wanted = untyped.model(torch.tensor([PROMPT])).last_hidden_state[0]
        cache = KvCache(model.layout, 128)
        cache.reserve(reference.SESSION, 128, Sampling())
        kv = cache.get(reference.SESSION)
        assert kv is not None
        [found] = model.run([Item(model.embed(PROMPT), 0, kv)])
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_near(local: LocalModel, dtype: str) -> None:
    import torch

    from plait.compute import choice
    from plait.compute.load import load_stage
    from plait.compute.port import Work
    from plait.testing import reference
    from plait.types import Sampling, Span

    wanted = reference.reference_run(reference.reference_model(local), PROMPT, 1).hidden[0][3]
    name, _, kernel = dtype.partition("/")
    with pytest.MonkeyPatch.context() as patch:
        if kernel:
            patch.setattr(choice, "int4_kernel", lambda: kernel)
        stage = load_stage(local, Span(0, 4), name)
    stage.reserve(reference.SESSION, 128, Sampling())
    [done] = stage.step([Work(reference.SESSION, 0, PROMPT, None)])
    assert done.hidden is not None
    distance = (torch.from_numpy(done.hidden) - wanted).norm() / wanted.norm()
    assert float(distance) < DTYPES[dtype]


def test_factors_matter() -> None:
    """Else the tests above would not see them."""
    assert max(factors()) > 2


@pytest.mark.parametrize("values", [[1.0], [1.0] * HEAD_SIZE])
def test_factors_of_another_number_are_refused(tmp_path: Path, values: list[float]) -> None:
    path = tmp_path / "weights.gguf"
    write_tiny(path, more=[rotary_factors(values)])
    with GgufFile.open(path) as gguf, pytest.raises(ModelError, match="rope_freqs"):
        read_config(gguf)
