"""The torch stage over the tiny model: isolation, rewriting, bounds, and what it refuses.

All tests are marked slow because torch and transformers take seconds to import.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from plait.compute.load import load_stage
from plait.compute.port import Done, Hidden, Work
from plait.errors import (
    CapacityError,
    ConfigError,
    LocalProtocolError,
    ModelError,
    RemoteProtocolError,
)
from plait.model import catalog
from plait.model.local import LocalModel
from plait.types import Sampling, SessionId, Span

if TYPE_CHECKING:
    from plait.compute.stage import TorchStage

pytestmark = pytest.mark.slow

ONE, TWO = SessionId(b"1" * 16), SessionId(b"2" * 16)
PROMPT = tuple(range(40, 60))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        return catalog.load("tiny-random")


@pytest.fixture(scope="module")
def first(local: LocalModel) -> "TorchStage":
    return load_stage(local, Span(0, 3))


@pytest.fixture(scope="module")
def last(local: LocalModel) -> "TorchStage":
    return load_stage(local, Span(3, 8))


@pytest.fixture(autouse=True)
def sessions(first: "TorchStage", last: "TorchStage") -> None:
    for stage in (first, last):
        for session in (ONE, TWO):
            stage.free(session)
            stage.reserve(session, 48, Sampling())


def step(stage: "TorchStage", work: Work) -> Done:
    (done,) = stage.step([work])
    return done


def hidden_of(stage: "TorchStage", at: int, ids: tuple[int, ...] = PROMPT) -> Hidden:
    done = step(stage, Work(ONE, at, ids, None))
    assert done.error is None
    assert done.hidden is not None
    return done.hidden


def test_a_first_stage_gives_rows_and_a_last_stage_tokens(
    first: "TorchStage", last: "TorchStage"
) -> None:
    rows = hidden_of(first, 0)
    assert rows.dtype == np.float32
    assert rows.shape == (20, 64)
    assert step(last, Work(ONE, 0, None, rows)).drawn is None
    drawn = step(last, Work(ONE, 19, None, rows[19:], sample=True)).drawn
    assert drawn is not None
    assert 0 <= drawn.ids[0] < 300
    assert drawn.logprobs[0] < 0


def test_faults_stay_with_their_item_and_leave_the_cache_alone(last: "TorchStage") -> None:
    rows = np.ones((4, 64), np.float32)
    good, bad = Work(ONE, 0, None, rows, sample=True), Work(TWO, 0, None, rows * np.nan)
    huge = Work(TWO, 0, None, rows * np.float32(3e38), sample=True)
    alone = step(last, good)
    outcomes = last.step([bad, good, Work(SessionId(b"?" * 16), 0, None, rows), huge])
    assert outcomes[1].drawn == alone.drawn
    assert isinstance(outcomes[0].error, RemoteProtocolError)
    assert isinstance(outcomes[2].error, LocalProtocolError)
    assert outcomes[3].drawn is not None  # squares overflow, and the norm makes them 0
    last.free(TWO)
    last.reserve(TWO, 48, Sampling())
    assert isinstance(step(last, bad).error, RemoteProtocolError)
    beyond = Work(TWO, 1, None, rows)  # the bad rows were not cached
    assert isinstance(step(last, beyond).error, RemoteProtocolError)


def test_positions_continue_or_rewrite(first: "TorchStage") -> None:
    whole = hidden_of(first, 0)
    assert isinstance(step(first, Work(ONE, 21, (1,), None)).error, RemoteProtocolError)
    hidden_of(first, 10, (7,) * 10)
    assert isinstance(step(first, Work(ONE, 40, (1,), None)).error, RemoteProtocolError)
    again = hidden_of(first, 10, PROMPT[10:])
    np.testing.assert_allclose(again, whole[10:], rtol=1e-3, atol=1e-4)
    hidden_of(first, 5, (1,))
    assert isinstance(step(first, Work(ONE, 7, (1,), None)).error, RemoteProtocolError)
    assert np.array_equal(hidden_of(first, 0), whole)


def test_a_session_is_the_same_alone_and_in_company(first: "TorchStage") -> None:
    alone = hidden_of(first, 0)
    both = first.step([Work(TWO, 0, PROMPT[::-1], None), Work(ONE, 0, PROMPT, None)])
    assert both[1].hidden is not None
    assert np.array_equal(both[1].hidden, alone)


def test_bytes_off_the_wire_are_taken_and_left_alone(last: "TorchStage") -> None:
    rows = np.frombuffer(np.ones((2, 64), np.float32).tobytes(), np.float32).reshape(2, 64)
    assert step(last, Work(ONE, 0, None, rows)).error is None
    assert (rows == 1).all()


def test_a_session_may_run_a_part_of_the_layers(local: LocalModel, first: "TorchStage") -> None:
    whole = load_stage(local, Span(0, 8))
    whole.reserve(ONE, 48, Sampling(), Span(0, 3))
    whole.reserve(TWO, 48, Sampling(), Span(3, 8))
    rows = hidden_of(whole, 0)
    assert np.array_equal(rows, hidden_of(first, 0))
    drawn = step(whole, Work(TWO, 0, None, rows, sample=True)).drawn
    whole.free(ONE)
    whole.reserve(ONE, 48, Sampling())
    assert step(whole, Work(ONE, 0, PROMPT, None, sample=True)).drawn == drawn
    with pytest.raises(LocalProtocolError, match="not among 0:3"):
        first.reserve(ONE, 48, Sampling(), Span(2, 4))
    with pytest.raises(LocalProtocolError, match="cannot change its layers"):
        first.reserve(ONE, 48, Sampling(), Span(1, 3))


def test_kv_room_is_bounded_in_pages(local: LocalModel) -> None:
    stage = load_stage(local, Span(2, 3), kv_tokens_max=100)
    assert (stage.kv_tokens_total, stage.kv_tokens_free) == (96, 96)
    stage.reserve(ONE, 17, Sampling())
    assert stage.kv_tokens_free == 64
    with pytest.raises(CapacityError, match="64 are free"):
        stage.reserve(TWO, 65, Sampling())
    rows = np.ones((17, 64), np.float32)
    before = step(stage, Work(ONE, 0, None, rows))
    stage.reserve(ONE, 80, Sampling())
    assert stage.kv_tokens_free == 16
    after = step(stage, Work(ONE, 16, None, rows[16:]))
    assert before.hidden is not None
    assert after.hidden is not None
    np.testing.assert_allclose(after.hidden, before.hidden[16:], rtol=1e-4, atol=1e-5)
    stage.reserve(ONE, 10, Sampling(seed=1))
    assert stage.kv_tokens_free == 16
    stage.free(ONE)
    stage.free(ONE)
    assert stage.kv_tokens_free == 96
    for tokens in (0, 2049):
        with pytest.raises(RemoteProtocolError, match="the model takes 2048"):
            stage.reserve(ONE, tokens, Sampling())


def test_sampling_is_replayable(last: "TorchStage") -> None:
    rows = np.ones((3, 64), np.float32)

    def draws(seed: int) -> list[int]:
        last.reserve(ONE, 48, Sampling(temperature_micros=5_000_000, seed=seed))
        found: list[int] = []
        for length in (1, 2, 3):
            drawn = step(last, Work(ONE, 0, None, rows[:length], sample=True)).drawn
            assert drawn is not None
            found += drawn.ids
        return found

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_it_reports_what_an_offer_needs(first: "TorchStage", local: LocalModel) -> None:
    free = first.kv_tokens_free
    decode_us, prefill_us_per_token = first.measure()
    assert decode_us > 0
    assert prefill_us_per_token > 0
    assert first.kv_tokens_free == free
    digest = local.manifest.digest.hex()[:16]
    assert first.numeric_class() == f"{digest}/fp32/onednn-packed/f32/t1"
    assert (first.width, first.span, first.shape) == (64, Span(0, 3), local.manifest.shape)


def test_loading_tells_how_far_it_is(local: LocalModel) -> None:
    seen: list[tuple[int, int]] = []
    load_stage(local, Span(6, 8), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_what_cannot_be_is_refused(local: LocalModel) -> None:
    with pytest.raises(ConfigError, match="fp32, bf16, int4, int8"):
        load_stage(local, Span(0, 8), dtype="fp8")
    with pytest.raises(ConfigError, match="layers 0:8"):
        load_stage(local, Span(4, 9))
    with pytest.raises(ConfigError, match="at least 1"):
        load_stage(local, Span(0, 1), threads=0)


def test_a_corrupt_tensor_harms_only_the_spans_that_hold_it(
    local: LocalModel, tmp_path: Path
) -> None:
    from plait.model.gguf_reader import GgufFile

    with GgufFile.open(local.weights_path) as gguf:
        offset = gguf.tensors["blk.5.attn_k.weight"].offset
    data = bytearray(local.weights_path.read_bytes())
    data[offset] ^= 1
    path = tmp_path / "weights.gguf"
    path.write_bytes(data)
    damaged = dataclasses.replace(local, weights_path=path)
    load_stage(damaged, Span(0, 5))
    with pytest.raises(ModelError, match=r"tensor blk\.5\.attn_k\.weight"):
        load_stage(damaged, Span(4, 8))
