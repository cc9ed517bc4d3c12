"""Many sessions in one step: each gets, to the bit, what it would get alone.

Slow because torch takes seconds to import.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from plait.compute.load import load_stage
from plait.compute.port import Done, Hidden, Work
from plait.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from plait.model import catalog
from plait.model.local import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.node.scheduler import PIECE_ROWS
from plait.replay_cuts import cuts
from plait.types import Sampling, SessionId, Span, WireDtype

if TYPE_CHECKING:
    import torch

    from plait.compute.stage import SpanCompute, TorchStage

pytestmark = pytest.mark.slow

SESSIONS = [SessionId(bytes([65 + index]) * 16) for index in range(6)]
DTYPES = ("fp32", "bf16", "int4/torch", "int4/mlas-w4a8", "int4/ggml-w4a8-v2", "int8")
"""int4 has three kernels; which one a node takes follows from its processor."""
PROSE = """The sky looks blue because the air scatters short waves of light more than long
ones. Sunlight holds all colours; on its way through the air, blue light is thrown from
molecule to molecule and reaches the eye from every side, while red light passes almost
straight. At sunset the path through the air is longer: most of the blue has been scattered
out of it before it arrives, and what is left is orange and red. On the Moon there is no air,
so the sky is black even at noon. Under water everything turns green, since water swallows
red light within a few metres. Here is a function in Python that adds up a list:

def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result

It starts from zero and adds one number after another. For a list without numbers it returns
zero. The built-in function sum does the same. To find the mean, divide the total by the
length of the list, but check first that the list is not empty."""
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        return catalog.load("tiny-random")


@pytest.fixture(scope="module")
def smollm2() -> LocalModel:
    if not catalog.installed("smollm2-135m"):
        pytest.skip("smollm2-135m is not on this machine")
    return catalog.load("smollm2-135m")


def stage_of(local: LocalModel, dtype: str, span: Span | None = None) -> "TorchStage":
    return loaded(local, span or Span(0, local.manifest.layers), dtype)


def loaded(local: LocalModel, span: Span, dtype: str, threads: int = 1) -> "TorchStage":
    from plait.compute import choice

    dtype, _, kernel = dtype.partition("/")
    with pytest.MonkeyPatch.context() as patch:
        if kernel:
            patch.setattr(choice, "int4_kernel", lambda: kernel)
        return load_stage(local, span, dtype, threads)


def reserve(stage: "TorchStage", spans: Sequence[Span | None] = (None,) * 6) -> None:
    for session, span in zip(SESSIONS, spans, strict=True):
        stage.free(session)
        stage.reserve(session, 400, Sampling(), span)


def ids(index: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(index).integers(3, 290, count).tolist())


def mixed_steps() -> list[list[Work]]:
    """Prefills of different lengths, then decoding, one of them by several rows, next to
    a prefill that goes on: narrow and wide items in every order."""
    lengths = (5, 140, 1, 33, 20, 64)
    first = [Work(SESSIONS[i], 0, ids(i, n), None, sample=True) for i, n in enumerate(lengths)]
    then = [
        Work(SESSIONS[0], 5, ids(10, 1), None, sample=True),
        Work(SESSIONS[1], 140, ids(11, 70), None, sample=True),
        Work(SESSIONS[2], 1, ids(12, 4), None, sample=True),
        Work(SESSIONS[3], 33, ids(13, 1), None, sample=True),
        Work(SESSIONS[4], 20, ids(14, 40), None, sample=False),
        Work(SESSIONS[5], 60, ids(15, 9), None, sample=True),
    ]
    return [first, then]


def same(one: Done, other: Done) -> bool:
    if one.hidden is None or other.hidden is None:
        alike = one.hidden is other.hidden
    else:
        alike = np.array_equal(one.hidden, other.hidden)
    return alike and (one.drawn, type(one.error)) == (other.drawn, type(other.error))


@every_dtype
@pytest.mark.parametrize("span", [Span(0, 3), Span(0, 8)])
def test_a_step_of_many_is_each_of_them_alone(local: LocalModel, dtype: str, span: Span) -> None:
    stage = stage_of(local, dtype, span)
    reserve(stage)
    alone = [[stage.step([work])[0] for work in works] for works in mixed_steps()]
    for order in (1, -1):
        reserve(stage)
        for works, wanted in zip(mixed_steps(), alone, strict=True):
            together = stage.step(works[::order])[::order]
            assert all(done.error is None for done in together)
            assert all(map(same, together, wanted))


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_of_many_real_sessions(smollm2: LocalModel, dtype: str, threads: int) -> None:
    """At the sizes of a real model kernels divide their work in other ways."""
    stage = loaded(smollm2, Span(28, 30), dtype, threads)
    chance = np.random.default_rng(4)
    lengths = (1, 40, 3, 17, 130, 9)
    works = [
        Work(session, 0, None, chance.normal(size=(rows, 576)).astype(np.float32), sample=True)
        for session, rows in zip(SESSIONS, lengths, strict=True)
    ]
    reserve(stage)
    alone = [stage.step([work])[0] for work in works]
    reserve(stage)
    assert all(map(same, stage.step(works), alone))
    inner = loaded(smollm2, Span(0, 2), dtype, threads)
    reserve(inner)
    prompts = [
        Work(session, 0, ids(rows, rows), None)
        for session, rows in zip(SESSIONS, lengths, strict=True)
    ]
    alone = [inner.step([work])[0] for work in prompts]
    reserve(inner)
    assert all(map(same, inner.step(prompts), alone))


def pieces(first: int, rows: int) -> list[tuple[int, int]]:
    """A frame as the scheduler cuts it."""
    starts = range(first, first + rows, PIECE_ROWS)
    return [(start, min(PIECE_ROWS, first + rows - start)) for start in starts]


@every_dtype
def test_what_is_rebuilt_from_replayed_frames_is_to_the_bit_what_was(
    smollm2: LocalModel, dtype: str
) -> None:
    """A prompt, then rows one by one; and the same rows as a replay brings them."""
    stage = loaded(smollm2, Span(0, 2), dtype)
    reserve(stage)
    prompt, known = 150, ids(1, 191)

    def computed(session: SessionId, parts: list[tuple[int, int]]) -> np.ndarray:
        found = [
            stage.step([Work(session, first, known[first : first + rows], None)])[0].hidden
            for first, rows in parts
        ]
        return np.concatenate([rows for rows in found if rows is not None])

    first = computed(SESSIONS[0], pieces(0, prompt) + [(at, 1) for at in range(prompt, 191)])
    replayed = [piece for frame in cuts(190, prompt) for piece in pieces(*frame)]
    again = computed(SESSIONS[1], [*replayed, (190, 1)])
    assert np.array_equal(first, again)


@every_dtype
def test_two_works_of_one_session_happen_one_after_the_other(local: LocalModel, dtype: str) -> None:
    stage = stage_of(local, dtype)
    reserve(stage)
    works = [Work(SESSIONS[0], at, ids(at, 7), None, sample=True) for at in (0, 7, 14)]
    alone = [stage.step([work])[0] for work in works]
    reserve(stage)
    together = stage.step([works[0], Work(SESSIONS[1], 0, (9,), None), *works[1:]])
    assert all(map(same, together[2:], alone[1:]))


def test_sessions_of_different_layers_share_a_step(local: LocalModel) -> None:
    stage, first = stage_of(local, "int4/mlas-w4a8"), stage_of(local, "int4/mlas-w4a8", Span(0, 3))
    reserve(first)
    (wanted,) = first.step([Work(SESSIONS[0], 0, ids(0, 9), None)])
    reserve(stage, [Span(0, 3), Span(3, 8), *[None] * 4])
    (whole,) = stage.step([Work(SESSIONS[2], 0, ids(0, 9), None, sample=True)])
    done = stage.step(
        [
            Work(SESSIONS[1], 0, None, wanted.hidden, sample=True),
            Work(SESSIONS[0], 0, ids(0, 9), None),
        ]
    )
    assert same(done[1], wanted)
    assert same(done[0], whole)


@every_dtype
def test_faults_stay_with_their_item(local: LocalModel, dtype: str) -> None:
    stage = stage_of(local, dtype, Span(3, 8))
    reserve(stage)
    rows = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    good = Work(SESSIONS[0], 0, None, rows, sample=True)
    (alone,) = stage.step([good])
    outcomes = stage.step(
        [
            Work(SESSIONS[1], 0, None, rows * np.nan),
            Work(SESSIONS[2], 0, None, np.full_like(rows, 3e38), sample=True),
            good,
            Work(SessionId(b"?" * 16), 0, None, rows),
            Work(SESSIONS[3], 3, None, rows),
        ]
    )
    assert same(outcomes[2], alone)
    kinds = [RemoteProtocolError, LocalProtocolError, RemoteProtocolError]
    assert [type(outcomes[index].error) for index in (0, 3, 4)] == kinds


def test_a_fault_of_the_backend_finds_its_item(
    local: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.compute.kv import SessionKv

    stage = stage_of(local, "int4/mlas-w4a8", Span(0, 3))
    reserve(stage)
    works = [Work(session, 0, ids(3, 5), None) for session in SESSIONS[:3]]
    wanted = stage.step(works[:1])[0]
    reserve(stage)
    whole, tokens = SessionKv.slots, iter((400, 123, 400))

    def failing(kv: SessionKv, first: int, rows: int) -> "torch.Tensor":
        if kv.tokens == 123:
            raise RuntimeError("out of something")
        return whole(kv, first, rows)

    for session in SESSIONS[:3]:
        stage.free(session)
        stage.reserve(session, next(tokens), Sampling())
    monkeypatch.setattr(SessionKv, "slots", failing)
    first, second, third = stage.step(works)
    assert isinstance(second.error, RuntimeError)
    assert same(first, wanted)
    assert same(third, wanted)


def log_probabilities(
    model: "SpanCompute", kv_tokens: int, prompt: Sequence[int], rows: int
) -> "torch.Tensor":
    """Of every next token, [len(prompt), vocabulary], ``rows`` at a time."""
    import torch

    from plait.compute.attention import Item
    from plait.compute.kv import KvCache

    cache = KvCache(model.layout, kv_tokens + 16)
    cache.reserve(SESSIONS[0], kv_tokens, Sampling())
    kv = cache.get(SESSIONS[0])
    assert kv is not None
    found = []
    with torch.inference_mode():
        for start in range(0, len(prompt), rows):
            (normed,) = model.run([Item(model.embed(prompt[start : start + rows]), start, kv)])
            found.append(model.logits(normed).log_softmax(-1))
    return torch.cat(found)


def divergence(local: LocalModel, dtype: str, prompt: Sequence[int], rows: int) -> float:
    """Mean KL of a dtype's next-token distribution from fp32's."""
    from plait.compute.hf import load_span
    from plait.compute.ragged import load_ragged
    from plait.model.gguf_reader import GgufFile
    from plait.model.weights import Weights

    span = Span(0, local.manifest.layers)
    dtype, _, kernel = dtype.partition("/")
    with GgufFile.open(local.weights_path) as gguf:
        weights = Weights(gguf, local.manifest)
        exact = load_span(weights, span, lambda done, total: None)
        rough = load_ragged(weights, span, dtype, lambda done, total: None, kernel=kernel)
    wanted = log_probabilities(exact, len(prompt), prompt, rows)
    found = log_probabilities(rough, len(prompt), prompt, rows)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("rows", [1, 16, 150])
def test_in_fp32_it_computes_what_transformers_computes(local: LocalModel, rows: int) -> None:
    """The same forward pass, but for how matrices are multiplied."""
    assert divergence(local, "fp32", ids(1, 150), rows) < 1e-7


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        ("int4", 0.005),
        ("int4/mlas-w4a8", 0.01),
        ("int4/ggml-w4a8-v2", 0.01),
        ("bf16", 0.005),
        ("int8", 0.01),
    ],
)
def test_real_distributions_are_close_to_fp32s(
    smollm2: LocalModel, dtype: str, limit: float
) -> None:
    prompt = Tokenizer.load(smollm2).encode(PROSE)
    assert len(prompt) > 200
    assert divergence(smollm2, dtype, prompt, 16) < limit


@every_dtype
def test_a_split_changes_nothing(local: LocalModel, dtype: str) -> None:
    from plait.testing.reference import equal_spans, run_pipeline

    runs = [
        run_pipeline([stage_of(local, dtype, s) for s in equal_spans(8, count)], ids(2, 20), 12)
        for count in (1, 3)
    ]
    assert runs[0].tokens == runs[1].tokens


@every_dtype
def test_an_answer_does_not_depend_on_where_the_pipeline_is_cut(
    local: LocalModel, dtype: str
) -> None:
    from plait.compute.wire_formats import rounded
    from plait.testing.reference import equal_spans

    wire: WireDtype = "fp32" if dtype == "fp32" else "bf16"
    given = [Work(SESSIONS[index], 0, ids(3, rows), None) for index, rows in enumerate((1, 40))]

    def outcomes(stages: int) -> list[Hidden]:
        works = given
        for span in equal_spans(8, stages):
            stage = stage_of(local, dtype, span)
            reserve(stage)
            found = [done.hidden for done in stage.step(works) if done.hidden is not None]
            works = [
                replace(work, ids=None, hidden=rounded(hidden, wire))
                for work, hidden in zip(given, found, strict=True)
            ]
        return found

    whole = outcomes(1)
    for stages in (3, 8):
        assert all(map(np.array_equal, whole, outcomes(stages)))


@every_dtype
def test_the_numeric_class_names_dtype_and_kernel(local: LocalModel, dtype: str) -> None:
    from plait.compute.linear import has_bf16

    stage = stage_of(local, dtype, Span(0, 1))
    kernel = {
        "fp32": "onednn-packed",
        "bf16": "onednn-bf16",
        "int4/torch": "torch-int4pack32" if has_bf16() else "torch-int4pack32+onednn-packed",
        "int4/mlas-w4a8": "mlas-w4a8",
        "int4/ggml-w4a8-v2": "ggml-w4a8-v2",
        "int8": "torch-int8pack",
    }[dtype]
    digest = local.manifest.digest.hex()[:16]
    assert stage.numeric_class() == f"{digest}/{dtype.split('/')[0]}/{kernel}/f32/t1"
    assert all(figure > 0 for figure in stage.measure())


def test_an_unknown_dtype_is_refused(local: LocalModel) -> None:
    with pytest.raises(ConfigError, match="no dtype 'fp8'"):
        stage_of(local, "fp8")


def generated(
    stage: "TorchStage", sampling: Sampling, drafts_of: Callable[[list[int]], tuple[int, ...]]
) -> list[int]:
    """30 tokens of one session, with whatever drafts are made of those before."""
    session, prompt = SESSIONS[0], ids(3, 40)
    stage.free(session)
    stage.reserve(session, 120, sampling)
    (done,) = stage.step([Work(session, 0, prompt, None, sample=True)])
    tokens: list[int] = []
    while len(tokens) < 30:
        assert done.drawn is not None, done.error
        tokens += done.drawn.ids
        drafts = drafts_of(tokens)
        at = len(prompt) + len(tokens) - 1
        work = Work(session, at, (tokens[-1], *drafts), None, sample=True, drafts=drafts)
        (done,) = stage.step([work])
    return tokens[:30]


@every_dtype
@pytest.mark.parametrize("temperature", [0, 900_000])
def test_no_draft_changes_the_tokens(local: LocalModel, dtype: str, temperature: int) -> None:
    stage = stage_of(local, dtype)
    sampling = Sampling(temperature_micros=temperature, seed=7)
    plain = generated(stage, sampling, lambda tokens: ())
    assert len(set(plain)) > 3
    right = generated(stage, sampling, lambda tokens: tuple(plain[len(tokens) :][:7]))
    half = generated(stage, sampling, lambda tokens: (*plain[len(tokens) :][:3], 5, 6))
    wrong = generated(stage, sampling, lambda tokens: (1, 2, 1))
    assert plain == right == half == wrong


@every_dtype
def test_few_rows_at_once_are_those_rows_one_at_a_time(local: LocalModel, dtype: str) -> None:
    stage = stage_of(local, dtype, Span(0, 3))
    reserve(stage)
    tokens = ids(8, 72)
    (prompt,) = stage.step([Work(SESSIONS[0], 0, tokens[:40], None)])
    singles = [
        stage.step([Work(SESSIONS[0], at, (tokens[at],), None)])[0].hidden for at in range(40, 72)
    ]
    (together,) = stage.step([Work(SESSIONS[0], 40, tokens[40:], None)])
    assert prompt.hidden is not None
    assert together.hidden is not None
    assert np.array_equal(
        together.hidden, np.concatenate([rows for rows in singles if rows is not None])
    )
