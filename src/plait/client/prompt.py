"""Prompts: messages or text to token ids, and the checks before anything is sent."""

from collections.abc import Mapping, Sequence

from plait.errors import ConfigError
from plait.model.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, str]]
"""A user's words, or chat messages with ``role`` and ``content``."""


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, *, raw: bool) -> tuple[int, ...]:
    """Token ids of a prompt through the chat template, or of raw text without it.

    Raises ``ConfigError`` for an empty prompt.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ConfigError("the prompt is empty")
        if raw:
            return tuple(tokenizer.encode(prompt))
        return tuple(tokenizer.chat([{"role": "user", "content": prompt}]))
    messages = [dict(message) for message in prompt]
    if raw:
        raise ConfigError("raw takes text, not messages")
    if not any(message.get("content", "").strip() for message in messages):
        raise ConfigError("the prompt is empty")
    return tuple(tokenizer.chat(messages))


def check_lengths(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raise ``ConfigError`` when prompt and answer do not fit the model's context."""
    if prompt_tokens + max_tokens > context_length:
        room = context_length - prompt_tokens
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens and {max_tokens} are asked for, "
            f"but the context ends at {context_length}",
            remedy=f"--max-tokens {room}" if room > 0 else "shorten the prompt",
        )
