"""Draws with a history: penalties, biases, grammars, and a stage that takes over."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.compute.draw_state import DrawState
from plait.compute.grammar import JSON_OBJECT, Vocabulary, check_grammar
from plait.compute.load import load_stage
from plait.compute.port import Work
from plait.compute.sampling import draw
from plait.errors import LocalProtocolError, RemoteProtocolError
from plait.model import catalog
from plait.model.tokenizer import Tokenizer
from plait.types import MILLION, Grammar, Sampling, SessionId, Span

SIZE = 300
PERSON = Grammar(
    "json_schema",
    '{"type":"object","properties":{"name":{"type":"string","maxLength":9},'
    '"age":{"type":"integer","minimum":0,"maximum":120}},'
    '"required":["name","age"],"additionalProperties":false}',
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        yield Tokenizer.load(catalog.load("tiny-random"))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(lambda: tokenizer, SIZE)


def rows(seed: int, count: int) -> list[npt.NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return [random.normal(size=SIZE).astype(np.float32) for _ in range(count)]


def row(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def answer(state: DrawState, logits: list[npt.NDArray[np.float32]], position: int) -> list[int]:
    drawn: list[int] = []
    for index, line in enumerate(logits):
        drawn.append(state.draw(line, position + index).token_id)
        if drawn[-1] in state.sampling.end_ids:
            break
    return drawn


def test_without_history_it_draws_as_draw_does() -> None:
    sampling = Sampling(temperature_micros=MILLION, top_k=20, seed=9)
    for position, line in enumerate(rows(1, 20)):
        drawn = DrawState(sampling).draw(line, position)
        assert (drawn.token_id, drawn.logprob) == draw(line, sampling, position)


@pytest.mark.parametrize(
    ("sampling", "context", "expected"),
    [
        (Sampling(), [], 0),
        (Sampling(presence_penalty_micros=600_000), [3, 0], 1),  # 3, 2.5 → 2.4, 2.5
        (Sampling(presence_penalty_micros=600_000), [0, 3], 0),  # prompt ids do not count
        (Sampling(frequency_penalty_micros=300_000), [3, 0], 0),  # 2.7
        (Sampling(frequency_penalty_micros=300_000), [3, 0, 0], 1),  # 2.4
        (Sampling(repetition_penalty_micros=1_500_000), [0, 3], 1),  # 3 / 1.5; the prompt counts
        (Sampling(repetition_penalty_micros=500_000), [1], 1),  # 2.5 / 0.5
        (Sampling(logit_bias=((2, 3 * MILLION),)), [], 2),  # 1 + 3
        (Sampling(logit_bias=((0, -100 * MILLION),)), [], 1),
    ],
)
def test_penalties_and_biases(sampling: Sampling, context: list[int], expected: int) -> None:
    state = DrawState(sampling, context, prompt_tokens=1)
    drawn = state.draw(row(3, 2.5, 1, -2), len(context))
    assert drawn.token_id == expected
    assert drawn.logprob == pytest.approx(
        draw(row(3, 2.5, 1, -2), Sampling(), 0)[1] + row(3, 2.5, 1, -2)[expected] - 3
    )


def test_a_repetition_penalty_makes_negative_logits_smaller() -> None:
    sampling = Sampling(repetition_penalty_micros=2 * MILLION)
    assert DrawState(sampling, [0], 1).draw(row(-1, -1.5), 1).token_id == 1


def test_min_p_leaves_what_is_likely_enough() -> None:
    sampling = Sampling(temperature_micros=MILLION, min_p_micros=500_000, seed=4)
    line = np.log(np.array([0.4, 0.3, 0.19, 0.11], np.float32))
    assert {DrawState(sampling).draw(line, i).token_id for i in range(200)} == {0, 1}


def test_top_logprobs_are_sorted_and_the_models_own() -> None:
    sampling = Sampling(top_logprobs=3, logit_bias=((3, 90 * MILLION),))
    drawn = DrawState(sampling).draw(row(1, 3, 3, 0), 0)
    total = np.log(np.exp([1, 3, 3, 0]).sum())
    assert [token for token, _ in drawn.top] == [1, 2, 0]
    assert [value for _, value in drawn.top] == pytest.approx([3 - total, 3 - total, 1 - total])
    assert drawn.token_id == 3
    assert drawn.logprob == pytest.approx(-total)
    assert len(DrawState(Sampling(top_logprobs=20)).draw(row(1, 2), 0).top) == 2


def test_an_answer_follows_its_grammar(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    for seed in range(5):
        sampling = Sampling(
            temperature_micros=MILLION, seed=seed, end_ids=tokenizer.end_ids, grammar=PERSON
        )
        drawn = answer(DrawState(sampling, [5, 6], 2, vocabulary), rows(seed, 80), 2)
        assert drawn[-1] in tokenizer.end_ids
        text = tokenizer.decode(drawn)
        assert text.startswith('{"name": "')
        assert 0 <= int(text.rpartition(" ")[2].removesuffix("}")) <= 120
        assert DrawState(sampling, [5, 6], 2, vocabulary).draw(rows(seed, 1)[0], 2).logprob < 0


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 40))
def test_a_stage_that_takes_over_or_goes_back_draws_the_same(
    tokenizer: Tokenizer, vocabulary: Vocabulary, seed: int, cut: int, back: int
) -> None:
    sampling = Sampling(
        temperature_micros=MILLION,
        seed=seed,
        end_ids=tokenizer.end_ids,
        presence_penalty_micros=MILLION,
        repetition_penalty_micros=1_200_000,
        grammar=PERSON,
    )
    logits = rows(seed, 80)
    state = DrawState(sampling, [7, 8, 9], 3, vocabulary)
    whole = answer(state, logits, 3)
    cut, back = min(cut, len(whole) - 1), min(back, len(whole) - 1)
    other = DrawState(sampling, [7, 8, 9, *whole[:cut]], 3, vocabulary)
    assert answer(other, logits[cut:], 3 + cut) == whole[cut:]
    state.truncate(3 + back)
    assert answer(state, logits[back:], 3 + back) == whole[back:]
    assert answer(other, logits, 3) == whole


def test_a_history_that_is_too_short_is_refused(vocabulary: Vocabulary) -> None:
    state = DrawState(Sampling(grammar=JSON_OBJECT), [1, 2], 2, vocabulary)
    with pytest.raises(RemoteProtocolError, match="not known"):
        state.draw(rows(1, 1)[0], 4)
    with pytest.raises(RemoteProtocolError, match="not known"):
        DrawState(Sampling(presence_penalty_micros=5), (), 3).draw(row(1, 2), 3)


def test_a_history_that_breaks_its_grammar_is_refused(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    sampling = Sampling(grammar=JSON_OBJECT, end_ids=tokenizer.end_ids)
    ids = tokenizer.encode("no JSON")
    with pytest.raises(RemoteProtocolError, match="grammar"):
        DrawState(sampling, [1, *ids], 1, vocabulary).draw(rows(1, 1)[0], 1 + len(ids))


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="outside"):
        DrawState(Sampling(presence_penalty_micros=1), [9], 0).draw(row(1, 2), 1)
    with pytest.raises(RemoteProtocolError, match="outside"):
        DrawState(Sampling(logit_bias=((9, 1),))).draw(row(1, 2), 0)


def test_a_grammar_needs_a_vocabulary() -> None:
    with pytest.raises(LocalProtocolError):
        DrawState(Sampling(grammar=JSON_OBJECT), [1], 1).draw(row(1, 2), 1)


@pytest.mark.parametrize(
    "bad",
    [
        Grammar("regex", "a("),
        Grammar("json_schema", "nope"),
        Grammar("json_schema", '{"$ref":"http://example.com/x.json"}'),
        Grammar("lark", "start: missing"),
    ],
)
def test_a_bad_grammar_is_named_and_refused(vocabulary: Vocabulary, bad: Grammar) -> None:
    assert check_grammar(bad)
    with pytest.raises(RemoteProtocolError, match="grammar cannot be used"):
        DrawState(Sampling(grammar=bad), [1], 1, vocabulary).draw(rows(1, 1)[0], 1)


@pytest.mark.parametrize("good", [JSON_OBJECT, PERSON, Grammar("regex", "[a-z]{1,5}")])
def test_a_good_grammar_passes(good: Grammar) -> None:
    assert check_grammar(good) == ""


@pytest.mark.slow
def test_the_torch_stage_keeps_the_history_of_each_session(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path))
    stage = load_stage(catalog.load("tiny-random"), Span(0, 8))
    prompt = tuple(tokenizer.encode("Who?"))
    sampling = Sampling(
        temperature_micros=MILLION,
        seed=5,
        end_ids=tokenizer.end_ids,
        grammar=PERSON,
        top_logprobs=2,
    )

    def go_on(session: SessionId, known: tuple[int, ...]) -> list[int]:
        stage.reserve(session, 200, sampling, None, known, len(prompt))
        ids, drawn, position = known, list(known[len(prompt) :]), 0
        while not drawn or drawn[-1] not in sampling.end_ids:
            (done,) = stage.step([Work(session, position, ids, None, sample=True)])
            assert done.drawn is not None, done.error
            assert len(done.drawn.tops[0]) == 2
            position, ids = position + len(ids), done.drawn.ids
            drawn += ids
        return drawn

    whole = go_on(SessionId(b"1" * 16), prompt)
    assert tokenizer.decode(whole).startswith('{"name": "')
    assert go_on(SessionId(b"2" * 16), (*prompt, *whole[:7])) == whole
