"""A split model is the unsplit one: to the bit wherever two ways to split meet, and to the
token and to rounding what transformers computes.

The oracle is transformers' own model, cache, masks and ``generate``. ``benchmarks/oracle.py``
runs the full matrix on the real model.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from plait.model import catalog
from plait.model.local import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.types import Sampling

pytestmark = pytest.mark.slow

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Explain why the sky is blue in two sentences.",
    "List five fruits and their colours.",
    "Translate 'good morning' into Spanish and German.",
    "What is 17 times 23? Think step by step.",
    "Write a short poem about autumn leaves.",
    "Summarise: The quick brown fox jumps over the lazy dog.",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        return catalog.load("tiny-random")


@pytest.fixture(scope="module")
def smollm2() -> LocalModel:
    if not catalog.installed("smollm2-135m"):
        pytest.skip("smollm2-135m is not on this machine")
    return catalog.load("smollm2-135m")


def prompt_ids(local: LocalModel, prompts: Sequence[str]) -> list[list[int]]:
    tokenizer = Tokenizer.load(local)
    return [tokenizer.chat([{"role": "user", "content": text}]) for text in prompts]


def check_split(
    local: LocalModel, prompts: Sequence[str], count: int, stage_counts: Sequence[int]
) -> None:
    from plait.compute.load import load_stage
    from plait.testing import reference

    model = reference.reference_model(local)
    stages = {
        number: [
            load_stage(local, span) for span in reference.equal_spans(local.manifest.layers, number)
        ]
        for number in stage_counts
    }
    for ids in prompt_ids(local, prompts):
        wanted = reference.reference_run(model, ids, count)
        finest = stages[max(stage_counts)]
        most = reference.run_pipeline(finest, ids, count)
        for loaded in stages.values():
            run = reference.run_pipeline(loaded, ids, count)
            spans = [stage.span for stage in loaded]
            assert run.tokens == wanted.tokens
            assert reference.boundary_error(run, spans, wanted) < 1e-4
            assert not reference.unequal_boundaries(
                run, spans, most, [stage.span for stage in finest]
            )


def test_every_way_to_split_the_tiny_model(tiny: LocalModel) -> None:
    check_split(tiny, PROMPTS[:2], 16, (1, 2, 3, 4, 8))


def test_the_real_model_in_three_stages(smollm2: LocalModel) -> None:
    check_split(smollm2, PROMPTS, 24, (3,))


def test_the_real_model_split_otherwise(smollm2: LocalModel) -> None:
    check_split(smollm2, PROMPTS[:1], 8, (1, 2, 4))


def test_sampled_tokens_do_not_depend_on_the_split(tiny: LocalModel) -> None:
    from plait.compute.load import load_stage
    from plait.testing import reference

    (ids,) = prompt_ids(tiny, PROMPTS[:1])
    sampling = Sampling(temperature_micros=1_500_000, top_p_micros=950_000, seed=99)
    runs = [
        reference.run_pipeline(
            [load_stage(tiny, span) for span in reference.equal_spans(8, number)], ids, 24, sampling
        ).tokens
        for number in (1, 2, 4)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert (
        runs[0]
        != reference.run_pipeline(
            [load_stage(tiny, reference.equal_spans(8, 1)[0])], ids, 24
        ).tokens
    )


def test_chunked_prefill_agrees_to_rounding(tiny: LocalModel) -> None:
    import numpy as np

    from plait.compute.load import load_stage
    from plait.compute.port import Work
    from plait.testing.reference import SESSION
    from plait.types import Span

    (ids,) = prompt_ids(tiny, PROMPTS[:1])
    stage = load_stage(tiny, Span(0, 4))
    stage.reserve(SESSION, 128, Sampling())
    (whole,) = stage.step([Work(SESSION, 0, tuple(ids), None)])
    pieces = []
    for start in range(0, len(ids), 7):
        (done,) = stage.step([Work(SESSION, start, tuple(ids[start : start + 7]), None)])
        assert done.hidden is not None
        pieces.append(done.hidden)
    assert whole.hidden is not None
    error = np.linalg.norm(np.concatenate(pieces) - whole.hidden) / np.linalg.norm(whole.hidden)
    assert error < 1e-5


def test_dequantised_weights_equal_transformers_own(smollm2: LocalModel) -> None:
    gguf = pytest.importorskip("gguf", reason="transformers reads GGUF through the gguf package")
    import numpy as np

    from plait.model.gguf_reader import GgufFile

    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2.weights_path).tensors}
    with GgufFile.open(smollm2.weights_path) as ours:
        for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight"):
            entry, other = ours.tensors[name], theirs[name]
            found = entry.type.to_fp32(ours.read(name), entry.shape)
            assert np.array_equal(found, gguf.dequantize(other.data, other.tensor_type))


def test_an_embedding_is_transformers_last_hidden_state(tiny: LocalModel) -> None:
    import torch

    from plait.compute.load import load_stage
    from plait.compute.port import Hidden, Work
    from plait.testing import reference
    from plait.testing.reference import SESSION

    (ids,) = prompt_ids(tiny, PROMPTS[:1])
    base: Any = reference.reference_model(tiny).model
    with torch.inference_mode():
        wanted = base(torch.tensor([ids])).last_hidden_state[0, -1].tolist()
    for number in (1, 3):
        row: Hidden | None = None
        for span in reference.equal_spans(tiny.manifest.layers, number):
            stage = load_stage(tiny, span)
            stage.reserve(SESSION, len(ids) + 1, Sampling())
            fed = tuple(ids) if row is None else None
            [done] = stage.step([Work(SESSION, 0, fed, row, sample=True, embedding=True)])
            row = done.hidden
        assert done.drawn is not None
        assert list(done.drawn.embedding) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert len(done.drawn.ids) == 1


def test_scores_are_transformers_log_probabilities(tiny: LocalModel) -> None:
    import torch

    from plait.compute.load import load_stage
    from plait.compute.port import Hidden, Work
    from plait.testing import reference
    from plait.testing.reference import SESSION

    ids = tuple(token for one in prompt_ids(tiny, PROMPTS[:3]) for token in one)[:75]
    model: Any = reference.reference_model(tiny)
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    row: Hidden | None = None
    for span in reference.equal_spans(tiny.manifest.layers, 2):
        stage = load_stage(tiny, span)
        stage.reserve(SESSION, len(ids) + 1, Sampling(top_logprobs=2))
        fed = ids if row is None else None
        [done] = stage.step([Work(SESSION, 0, fed, row, sample=True, scored=ids[1:])])
        row = done.hidden
    assert done.drawn is not None
    assert len(done.scored.logprobs) == len(done.scored.tops) == len(ids) - 1
    for position, (logprob, top) in enumerate(
        zip(done.scored.logprobs, done.scored.tops, strict=True)
    ):
        assert logprob == pytest.approx(float(wanted[position, ids[position + 1]]), abs=1e-4)
        assert [token for token, _ in top] == wanted[position].topk(2).indices.tolist()
