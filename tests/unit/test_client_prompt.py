"""Prompts: what is asked as token ids, and what is refused before anything is sent."""

from typing import Any

import pytest

from plait.client import Options
from plait.client.client import _given
from plait.client.prompt import check_ids, check_lengths, prompt_ids
from plait.errors import ConfigError
from plait.model import catalog
from plait.model.tokenizer import Tokenizer
from plait.types import Sampling


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        return Tokenizer.load(catalog.load("tiny-random"))


def test_ids_are_taken_as_they_are(tokenizer: Tokenizer) -> None:
    for raw in (False, True):
        assert prompt_ids(tokenizer, [7, 0, 300], raw=raw) == (7, 0, 300)
    text = prompt_ids(tokenizer, "a word", raw=True)
    assert prompt_ids(tokenizer, text, raw=True) == text
    message = [{"role": "user", "content": "a word"}]
    assert prompt_ids(tokenizer, message, raw=False) == prompt_ids(tokenizer, "a word", raw=False)


@pytest.mark.parametrize("prompt", ["", " ", [], (), [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_refused(tokenizer: Tokenizer, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="empty"):
        prompt_ids(tokenizer, prompt, raw=False)


def test_a_mixture_and_raw_messages_are_refused(tokenizer: Tokenizer) -> None:
    message = {"role": "user", "content": "a"}
    mixed: Any = [message, 5]
    with pytest.raises(ConfigError, match="mixes"):
        prompt_ids(tokenizer, mixed, raw=False)
    with pytest.raises(ConfigError, match="raw"):
        prompt_ids(tokenizer, [message], raw=True)


def test_ids_and_lengths_that_cannot_be() -> None:
    check_ids((0, 9), 10)
    for unknown in (-1, 10):
        with pytest.raises(ConfigError, match=f"no token {unknown}"):
            check_ids((1, unknown), 10)
    check_lengths(6, 4, 10)
    with pytest.raises(ConfigError, match="context ends at 10"):
        check_lengths(6, 5, 10)


def test_a_whole_sampling_replaces_the_single_settings() -> None:
    sampling = Sampling(temperature_micros=5, seed=9, top_logprobs=3)
    options = Options(temperature=1.0, seed=1, sampling=sampling)
    drawn = options.drawing((2,))
    assert (drawn.seed, drawn.temperature_micros, drawn.end_ids) == (9, 5, (2,))
    kept = Options(sampling=Sampling(end_ids=(4,))).drawing((2,))
    assert kept.end_ids == (4,)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (None, "not None"),
        (5, "of type int"),
        (b"abc", "of type bytes"),
        ({"role": "user", "content": "a"}, "of type dict"),
        ([None], "not None"),
        ([1.5], "of type float"),
        ([[1, 2]], "of type list"),
        ([{"rol": "user"}], "message 0 has no 'role'"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "message 1 has no 'content'"),
        ([{"role": "user", "content": None}], "message 0 has no 'content'"),
    ],
)
def test_what_is_no_prompt_is_named(tokenizer: Tokenizer, prompt: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        prompt_ids(tokenizer, prompt, raw=False)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens is a whole number, not None"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature is a number"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": "7"}, "seed"),
        ({"sampling": {"seed": 7}}, "sampling is a Sampling"),
        ({"sort": "fastest"}, "there is no sort 'fastest'"),
        ({"qos": "urgent"}, "there is no qos"),
        ({"wire": "fp64"}, "there is no wire"),
        ({"max_price": 1.5}, "max_price"),
        ({"max_price": -1}, "max_price"),
        ({"ttft_s": float("nan")}, "ttft_s"),
        ({"only": "12D3Koo"}, "only is a set of peer ids"),
        ({"ignore": ["12D3Koo"]}, "ignore is a set of peer ids"),
        ({"hedge_share": 2}, "hedge_share"),
        ({"replica_wait_s": float("inf")}, "replica_wait_s"),
        ({"keep_alive_s": -1}, "keep_alive_s"),
    ],
)
def test_an_option_that_cannot_be_is_refused_where_it_is_written(
    values: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Options(**values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature_micros": -1}, "temperature"),
        ({"temperature_micros": 0.8}, "temperature_micros is an integer, not 0.8"),
        ({"seed": None}, "seed"),
        ({"top_p_micros": 0}, "top_p"),
    ],
)
def test_sampling_that_cannot_be_is_one_of_our_errors_and_a_value_error(
    values: dict[str, Any], named: str
) -> None:
    for kind in (ConfigError, ValueError):
        with pytest.raises(kind, match=named):
            Sampling(**values)


def test_what_is_no_options_is_named() -> None:
    given: Any = {"max_tokens": 5}
    with pytest.raises(ConfigError, match="not of type dict"):
        _given(given)
    assert _given(None) == Options()
