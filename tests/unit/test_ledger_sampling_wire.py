"""Sampling on the wire: every field survives, and what is out of range does not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.ledger.sampling_wire import sampling_from_message, sampling_to_message
from plait.types import BIASES_MAX, MILLION, Grammar, Sampling
from plait.v1 import session_pb2

PENALTIES = st.integers(-2 * MILLION, 2 * MILLION)
GRAMMARS = st.none() | st.builds(
    Grammar, st.sampled_from(["json_schema", "regex", "lark"]), st.text(min_size=1, max_size=40)
)
BIASES = st.dictionaries(
    st.integers(0, 2**32 - 1), st.integers(-100 * MILLION, 100 * MILLION), max_size=5
)


@given(
    st.builds(
        Sampling,
        temperature_micros=st.integers(0, 100 * MILLION),
        top_p_micros=st.integers(1, MILLION),
        top_k=st.integers(0, 1000),
        seed=st.integers(0, 2**64 - 1),
        end_ids=st.lists(st.integers(0, 1000), max_size=4).map(tuple),
        min_p_micros=st.integers(0, MILLION),
        presence_penalty_micros=PENALTIES,
        frequency_penalty_micros=PENALTIES,
        repetition_penalty_micros=st.integers(1, 10 * MILLION),
        logit_bias=BIASES.map(lambda biases: tuple(sorted(biases.items()))),
        top_logprobs=st.integers(0, 20),
        grammar=GRAMMARS,
    )
)
def test_a_sampling_survives(sampling: Sampling) -> None:
    message = session_pb2.Sampling.FromString(sampling_to_message(sampling).SerializeToString())
    assert sampling_from_message(message) == sampling


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p_micros": 0},
        {"min_p_micros": MILLION + 1},
        {"presence_penalty_micros": 2 * MILLION + 1},
        {"frequency_penalty_micros": -2 * MILLION - 1},
        {"repetition_penalty_micros": 10 * MILLION + 1},
        {"top_logprobs": 21},
        {"logit_bias": [session_pb2.LogitBias(id=2), session_pb2.LogitBias(id=1)]},
        {"logit_bias": [session_pb2.LogitBias(id=2), session_pb2.LogitBias(id=2)]},
        {"logit_bias": [session_pb2.LogitBias(id=2, micros=100 * MILLION + 1)]},
        {"logit_bias": [session_pb2.LogitBias(id=i) for i in range(BIASES_MAX + 1)]},
        {"grammar": session_pb2.Grammar()},
        {"grammar": session_pb2.Grammar(regex="")},
        {"grammar": session_pb2.Grammar(regex="a" * 65_537)},
    ],
)
def test_what_is_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    message = session_pb2.Sampling(**({"top_p_micros": MILLION} | changes))
    with pytest.raises(ValueError):
        sampling_from_message(message)
