"""Prompts: messages, text or ids to token ids, and the checks before anything is sent."""

from collections.abc import Mapping, Sequence

from plait.errors import ConfigError
from plait.model.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""A user's words, chat messages with ``role`` and ``content``, or token ids as they are."""


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, *, raw: bool) -> tuple[int, ...]:
    """Token ids of a prompt through the chat template, or of raw text without it.

    Ids are taken as they are. Raises ``ConfigError`` for what is no prompt, or an empty one.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ConfigError("the prompt is empty")
        if raw:
            return tuple(tokenizer.encode(prompt))
        return tuple(tokenizer.chat([{"role": "user", "content": prompt}]))
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise ConfigError(f"a prompt is a text, messages or token ids, not {_named(prompt)}")
    for one in prompt:
        if not isinstance(one, int | Mapping):
            raise ConfigError(f"a prompt has messages or token ids, not {_named(one)}")
    ids = tuple(part for part in prompt if isinstance(part, int))
    messages = [dict(part) for part in prompt if isinstance(part, Mapping)]
    if ids and not messages:
        return ids
    if ids:
        raise ConfigError("the prompt mixes messages and token ids")
    if raw:
        raise ConfigError("raw takes text, not messages")
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ConfigError(f"message {number} has no {key!r} that is a text")
    if not any(message["content"].strip() for message in messages):
        raise ConfigError("the prompt is empty")
    return tuple(tokenizer.chat(messages))


def _named(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def check_ids(ids: Sequence[int], vocabulary_size: int) -> None:
    """Raise ``ConfigError`` for an id that the model does not have."""
    unknown = next((one for one in ids if not 0 <= one < vocabulary_size), None)
    if unknown is not None:
        raise ConfigError(f"the model has no token {unknown}: ids are below {vocabulary_size}")


def check_lengths(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raise ``ConfigError`` when prompt and answer do not fit the model's context."""
    if prompt_tokens + max_tokens > context_length:
        room = context_length - prompt_tokens
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens and {max_tokens} are asked for, "
            f"but the context ends at {context_length}",
            remedy=f"ask for at most {room}: `max_tokens`" if room > 0 else "shorten the prompt",
        )
