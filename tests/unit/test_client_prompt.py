"""Prompts: what is asked as token ids, and what is refused before anything is sent."""

from typing import Any

import pytest

from plait.client import Options
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
