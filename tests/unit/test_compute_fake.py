"""The fake stage keeps the promises of the port that real stages are tested for, too."""

import numpy as np
import pytest

from plait.compute.port import Done, StageCompute, Work
from plait.errors import CapacityError, LocalProtocolError, RemoteProtocolError
from plait.testing.compute import FAKE_SHAPE, FakeStage
from plait.types import Sampling, SessionId, Span

ONE, TWO = SessionId(b"1" * 16), SessionId(b"2" * 16)
PROMPT = (5, 6, 7)


def opened(*spans: Span, sampling: Sampling | None = None) -> list[StageCompute]:
    stages: list[StageCompute] = [FakeStage(span) for span in spans]
    for stage in stages:
        for session in (ONE, TWO):
            stage.reserve(session, 64, sampling or Sampling())
    return stages


def through(stages: list[StageCompute], session: SessionId, ids: tuple[int, ...], at: int) -> int:
    work = Work(session, at, ids, None, sample=True)
    for stage in stages:
        (done,) = stage.step([work])
        assert done.error is None
        work = Work(session, at, None, done.hidden, sample=True)
    assert done.drawn is not None
    return done.drawn.ids[0]


def generated(stages: list[StageCompute], session: SessionId, count: int = 8) -> list[int]:
    tokens = [through(stages, session, PROMPT, 0)]
    while len(tokens) < count:
        tokens.append(through(stages, session, (tokens[-1],), len(PROMPT) + len(tokens) - 1))
    return tokens


def test_splitting_changes_nothing() -> None:
    whole = generated(opened(Span(0, 4)), ONE)
    assert generated(opened(Span(0, 1), Span(1, 4)), ONE) == whole
    assert generated(opened(*(Span(i, i + 1) for i in range(4))), ONE) == whole
    assert len(set(whole)) > 4


def test_sessions_are_apart_and_rewriting_overwrites() -> None:
    stages = opened(Span(0, 2), Span(2, 4))
    first = generated(stages, ONE)
    assert generated(stages, TWO) == first
    assert through(stages, ONE, (9,), 5) != first[3]
    assert generated(stages, ONE) == first


def test_only_sampled_draws_depend_on_the_seed() -> None:
    def tokens(temperature_micros: int, seed: int) -> list[int]:
        sampling = Sampling(temperature_micros=temperature_micros, seed=seed)
        return generated(opened(Span(0, 4), sampling=sampling), ONE)

    assert tokens(0, 1) == tokens(0, 2)
    assert tokens(1, 1) != tokens(1, 2)


def test_draws_can_be_forced() -> None:
    stage = FakeStage(Span(0, 4), draws={3: 42})
    stage.reserve(ONE, 16, Sampling())
    assert through([stage], ONE, PROMPT, 0) == 42


def test_a_fault_stays_with_its_item() -> None:
    (stage,) = opened(Span(0, 4))
    assert isinstance(stage, FakeStage)
    stage.fail_next(ONE, RuntimeError("out of luck"))
    batch = [Work(session, 0, PROMPT, None, sample=True) for session in (ONE, TWO)]
    failed, fine = stage.step(batch)
    assert str(failed.error) == "out of luck"
    assert fine.drawn is not None
    assert stage.step(batch[:1])[0].drawn == fine.drawn
    assert stage.batches == [2, 1]


HIDDEN = np.zeros((2, 16), np.float32)


@pytest.mark.parametrize(
    ("start", "work", "message"),
    [
        (0, Work(ONE, 0, (), None), "takes token ids"),
        (0, Work(ONE, 0, None, HIDDEN), "takes token ids"),
        (0, Work(ONE, 0, (256,), None), "token id outside"),
        (0, Work(ONE, 0, (-1,), None), "token id outside"),
        (0, Work(ONE, 1, (1,), None), "only 0 positions are cached"),
        (0, Work(ONE, -1, (1,), None), "only 0 positions"),
        (0, Work(ONE, 0, (1,) * 65, None), "64 are reserved"),
        (1, Work(ONE, 0, (1,), None), "takes activations"),
        (1, Work(ONE, 0, None, HIDDEN[:0]), "without rows"),
        (1, Work(ONE, 0, None, HIDDEN[:, :8]), "not float32"),
        (1, Work(ONE, 0, None, HIDDEN[0]), "not float32"),
        (1, Work(ONE, 0, None, HIDDEN.astype(np.float64)), "not float32"),
        (1, Work(ONE, 0, None, HIDDEN + np.nan), "not finite"),
        (1, Work(ONE, 0, None, HIDDEN - np.inf), "not finite"),
    ],
)
def test_malformed_work_is_the_peers_fault(start: int, work: Work, message: str) -> None:
    (stage,) = opened(Span(start, 4))
    (done,) = stage.step([work])
    assert isinstance(done.error, RemoteProtocolError)
    assert message in str(done.error)
    assert done == Done(error=done.error)


def test_room_is_bounded_and_comes_back() -> None:
    stage = FakeStage(Span(0, 4), FAKE_SHAPE, kv_tokens_total=100)
    stage.reserve(ONE, 60, Sampling())
    with pytest.raises(CapacityError):
        stage.reserve(TWO, 60, Sampling())
    stage.reserve(ONE, 100, Sampling())
    assert stage.kv_tokens_free == 0
    stage.free(ONE)
    stage.free(ONE)
    assert stage.kv_tokens_free == 100
    (done,) = stage.step([Work(ONE, 0, PROMPT, None)])
    assert isinstance(done.error, LocalProtocolError)


def test_it_reports_what_an_offer_needs() -> None:
    stage: StageCompute = FakeStage(Span(0, 2))
    assert stage.numeric_class().endswith("/fake")
    assert stage.measure() == (100, 10)
    assert (stage.width * 4, stage.shape) == (FAKE_SHAPE.bytes_per_row, FAKE_SHAPE)


@pytest.mark.parametrize("temperature", [0, 700_000])
def test_drafts_change_how_many_are_drawn_and_nothing_else(temperature: int) -> None:
    stages = opened(Span(0, 2), Span(2, 4), sampling=Sampling(temperature, seed=3))
    plain = generated(stages, ONE)

    def drawn(*drafts: int) -> tuple[int, ...]:
        work = Work(ONE, 3, (plain[0], *drafts), None, sample=True, drafts=drafts)
        for stage in stages:
            (done,) = stage.step([work])
            work = Work(ONE, 3, None, done.hidden, sample=True, drafts=drafts)
        assert done.drawn is not None, done.error
        return done.drawn.ids

    assert drawn() == tuple(plain[1:2])
    assert drawn(*plain[1:4]) == tuple(plain[1:5])
    assert drawn(*plain[1:3], plain[3] ^ 1, plain[4]) == tuple(plain[1:4])
    assert drawn(plain[1] ^ 1) == tuple(plain[1:2])
    assert generated(stages, ONE) == plain


def test_nothing_is_drawn_after_an_end_token() -> None:
    (stage,) = opened(Span(0, 4))
    plain = generated([stage], ONE)
    stage.reserve(ONE, 64, Sampling(end_ids=(plain[2],)))
    drafts = tuple(plain[1:5])
    (done,) = stage.step([Work(ONE, 3, tuple(plain[:5]), None, sample=True, drafts=drafts)])
    assert done.drawn is not None
    assert done.drawn.ids == tuple(plain[1:3])


@pytest.mark.parametrize(
    "work",
    [
        Work(ONE, 0, (1, 2), None, sample=True, drafts=(1, 2)),
        Work(ONE, 0, (1, 2), None, sample=False, drafts=(2,)),
        Work(ONE, 0, (1, 2), None, sample=True, drafts=(3,)),
        Work(ONE, 0, (1, 999), None, sample=True, drafts=(999,)),
    ],
)
def test_drafts_that_do_not_fit_their_rows_are_refused(work: Work) -> None:
    (stage,) = opened(Span(0, 4))
    (done,) = stage.step([work])
    assert isinstance(done.error, RemoteProtocolError)
