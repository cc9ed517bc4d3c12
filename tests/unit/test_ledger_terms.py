from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import Overspend, RemoteProtocolError
from plait.ledger.terms import CHUNK_TOKENS_MAX, class_on_wire
from plait.testing.accounting import Plot, terms_of
from plait.types import U64_MAX, Prices, SessionId, TokenCounts

TERMS = terms_of(Plot())


@pytest.mark.parametrize(
    "changes",
    [
        {"session_id": SessionId(b"short")},
        {"handoff_salt": b""},
        {"stages": ()},
        {"stages": (TERMS.stages[0], TERMS.stages[0])},
        {"prompt_tokens": 0},
        {"max_tokens": 0},
        {"chunk_tokens": 0},
        {"chunk_tokens": CHUNK_TOKENS_MAX + 1},
        {"prefill_chunk_tokens": CHUNK_TOKENS_MAX + 1},
        {"wire_dtype": "bf16"},  # these stages compute in fp32
    ],
)
def test_impossible_terms_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        replace(TERMS, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first_position", "rows", "sample", "prompt", "output"),
    [
        (0, 3, False, 3, 0),
        (3, 2, True, 5, 1),
        (0, 5, True, 5, 1),
        (5, 1, True, 5, 2),
        (23, 1, True, 5, 20),
        (5, 0, False, 5, 1),
        (12, 0, False, 5, 8),
    ],
)
def test_counts_follow_from_a_frame(
    first_position: int, rows: int, sample: bool, prompt: int, output: int
) -> None:
    counts = TERMS.counts_after(first_position, rows, sample)
    assert counts == TokenCounts(prompt=prompt, output=output)


@pytest.mark.parametrize(
    ("first_position", "rows", "sample"),
    [
        (0, 3, True),  # samples inside the prompt
        (0, 5, False),  # ends the prompt without a draw
        (5, 1, False),  # decodes without a draw
        (24, 1, True),  # beyond max_tokens
        (5, 0, True),  # draws from nothing
        (3, 0, False),  # closes inside the prompt
        (-1, 3, False),
        (0, -1, False),
    ],
)
def test_impossible_frames_are_refused(first_position: int, rows: int, sample: bool) -> None:
    with pytest.raises(RemoteProtocolError):
        TERMS.counts_after(first_position, rows, sample)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_counts_of_a_whole_session_rise_by_one(prompt: int, max_tokens: int) -> None:
    terms = replace(TERMS, prompt_tokens=prompt, max_tokens=max_tokens)
    assert terms.counts_after(0, prompt, True) == TokenCounts(prompt=prompt, output=1)
    for draw in range(2, max_tokens + 1):
        assert terms.counts_after(prompt + draw - 2, 1, True).output == draw


def test_the_highest_price_is_that_of_prompt_and_all_outputs() -> None:
    # 3 layers at 0.5 per prompt and 2 per output token.
    assert TERMS.price_max(0) == -(-3 * (500_000 * 5 + 2_000_000 * 20) // 1_000_000)
    # The last span is charged two more layers for the head.
    assert TERMS.stages[2].priced_layers == 6


def test_a_price_beyond_64_bits_is_an_overspend() -> None:
    dear = replace(TERMS.stages[0], prices=Prices(output=U64_MAX), priced_layers=2**32 - 1)
    with pytest.raises(Overspend):
        replace(TERMS, stages=(dear,)).price_max(0)


def test_the_numeric_class_of_a_session_names_what_is_on_its_wire() -> None:
    offered = "0011223344556677/int4/torch-int4pack32/f32/t1"
    assert class_on_wire(offered, "fp32") == offered
    assert class_on_wire(offered, "int8") == "0011223344556677/int4/torch-int4pack32/int8/t1"
    assert class_on_wire("short/class", "bf16") == "short/class"
