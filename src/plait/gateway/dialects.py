"""OpenAI's completions and chat completions, whole and in chunks, as its clients expect them."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from plait.gateway.failure import ApiError
from plait.gateway.frames import DONE, Result, Usage, data, encode
from plait.gateway.running import Piece, Token
from plait.gateway.shelf import Shelved
from plait.gateway.tools import ToolCall

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one response repeats."""

    id: str
    created: int
    model: Shelved

    def of(self, kind: str) -> dict[str, Any]:
        """The members common to a response and its chunks."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}


class _Completions:
    """What chat and text completions share: chunks of choices, usage, [DONE]."""

    chunk_kind = ""
    whole_kind = ""

    def __init__(self, head: Head, *, include_usage: bool) -> None:
        self._head = head
        self._include_usage = include_usage

    def failed(self, problem: ApiError) -> list[bytes]:
        """An error event, and no [DONE]."""
        return [data(problem.body())]

    def end(self, results: list[Result], usage: Usage) -> list[bytes]:
        """Usage if it was asked for, and [DONE]."""
        if not self._include_usage:
            return [DONE]
        last = self._head.of(self.chunk_kind) | {"choices": [], "usage": usage.to_json()}
        return [data(last), DONE]

    def _chunk(self, choice: dict[str, Any], plait: dict[str, Any] | None = None) -> bytes:
        chunk = self._head.of(self.chunk_kind) | {"choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        if plait is not None:
            chunk["plait"] = plait
        return data(chunk)

    def _whole(
        self, choices: list[dict[str, Any]], usage: Usage, plait: dict[str, Any]
    ) -> dict[str, Any]:
        members = {"choices": choices, "usage": usage.to_json(), "plait": plait}
        return self._head.of(self.whole_kind) | members


class ChatDialect(_Completions):
    """``/v1/chat/completions``."""

    chunk_kind = "chat.completion.chunk"
    whole_kind = "chat.completion"

    def __init__(self, head: Head, *, include_usage: bool = False, logprobs: bool = False) -> None:
        super().__init__(head, include_usage=include_usage)
        self._logprobs = logprobs
        self._calls: dict[int, int] = {}
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def begin(self, results: list[Result]) -> list[bytes]:
        """The roles."""
        first = {"role": "assistant", "content": ""}
        return [self._chunk(_delta(result.job.index, first)) for result in results]

    def piece(self, piece: Piece) -> list[bytes]:
        """Deltas of text and of calls."""
        frames = []
        if self._logprobs and (piece.text or piece.tokens):
            choice = _delta(piece.index, {"content": piece.text})
            choice["logprobs"] = chat_logprobs(self._head.model, piece.tokens)
            frames.append(self._chunk(choice))
        elif piece.text:
            before, after = self._around(piece.index)
            frames.append(before + encode(piece.text) + after)
        for call in piece.calls:
            number = self._calls.get(piece.index, 0)
            self._calls[piece.index] = number + 1
            delta = {"tool_calls": [{"index": number} | _call(call)]}
            frames.append(self._chunk(_delta(piece.index, delta)))
        return frames

    def _around(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text of every plain delta of a choice: to encode
        it once is a good part of what the gateway would add to a token."""
        if index not in self._frames:
            whole = self._chunk(_delta(index, {"content": ""}))
            before, _, after = whole.partition(b'"content":""')
            self._frames[index] = before + b'"content":', after
        return self._frames[index]

    def finish(self, result: Result, plait: dict[str, Any]) -> list[bytes]:
        """An empty delta with the reason."""
        choice = _delta(result.job.index, {}, result.finished.finish_reason)
        return [self._chunk(choice, plait)]

    def whole(self, results: list[Result], usage: Usage, plait: dict[str, Any]) -> dict[str, Any]:
        """Messages."""
        return self._whole([self._choice(result) for result in results], usage, plait)

    def _choice(self, result: Result) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        if result.calls:
            message["content"] = result.text or None
            message["tool_calls"] = [_call(call) for call in result.calls]
        tokens = chat_logprobs(self._head.model, result.tokens) if self._logprobs else None
        return {
            "index": result.job.index,
            "message": message,
            "logprobs": tokens,
            "finish_reason": result.finished.finish_reason,
        }


class TextDialect(_Completions):
    """``/v1/completions``."""

    chunk_kind = whole_kind = "text_completion"

    def __init__(
        self, head: Head, *, include_usage: bool = False, logprobs: int | None = None
    ) -> None:
        super().__init__(head, include_usage=include_usage)
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def begin(self, results: list[Result]) -> list[bytes]:
        """Text has no role."""
        for result in results:
            self._offsets[result.job.index] = _first_offset(result)
        return []

    def piece(self, piece: Piece) -> list[bytes]:
        """A piece of text."""
        if not piece.text and self._logprobs is None:
            return []
        offset = self._offsets[piece.index]
        choice = self._choice(piece.index, piece.text, piece.tokens, offset, None)
        self._offsets[piece.index] += sum(self._lengths(piece.tokens))
        return [self._chunk(choice)]

    def finish(self, result: Result, plait: dict[str, Any]) -> list[bytes]:
        """No text, and the reason."""
        reason = result.finished.finish_reason
        return [self._chunk(self._choice(result.job.index, "", (), 0, reason), plait)]

    def whole(self, results: list[Result], usage: Usage, plait: dict[str, Any]) -> dict[str, Any]:
        """The texts."""
        choices = [
            self._choice(
                result.job.index,
                result.text,
                tuple(result.tokens),
                _first_offset(result),
                result.finished.finish_reason,
            )
            for result in results
        ]
        return self._whole(choices, usage, plait)

    def _choice(
        self, index: int, text: str, tokens: tuple[Token, ...], offset: int, reason: str | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if self._logprobs is not None and tokens:
            choice["logprobs"] = self._text_logprobs(tokens, offset)
        return choice | {"finish_reason": reason}

    def _text_logprobs(self, tokens: tuple[Token, ...], offset: int) -> dict[str, Any]:
        model = self._head.model
        ends = accumulate(self._lengths(tokens), initial=offset)
        return {
            "tokens": [_bytes_of(model, token).decode("utf-8", "replace") for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self._logprobs else None,
            "text_offset": list(ends)[: len(tokens)],
        }

    def _lengths(self, tokens: Sequence[Token]) -> list[int]:
        """Characters of each token; one that has several is where its last one completes it."""
        decoder = _UTF8(errors="replace")
        return [len(decoder.decode(_bytes_of(self._head.model, token))) for token in tokens]

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the one itself; None for the first of a prompt."""
        if token.logprob is None:
            return None
        found = dict[str, float]()
        # Tokens that are no text of their own may look alike: the likeliest of them counts.
        for other, value in (*token.top, (token.id, token.logprob)):
            raw = _bytes_of(self._head.model, token, other)
            text = raw.decode("utf-8", "replace")
            found[text] = max(value, found.get(text, value))
        return found


def chat_logprobs(model: Shelved, tokens: "list[Token] | tuple[Token, ...]") -> dict[str, Any]:
    """The ``logprobs`` member of a chat's choice."""
    content = [
        _logprob(_bytes_of(model, token), token.logprob)
        | {
            "top_logprobs": [
                _logprob(_bytes_of(model, token, other), value) for other, value in token.top
            ]
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _first_offset(result: Result) -> int:
    """Where the first token with a log-probability stands."""
    return 0 if result.job.ask.options.score_prompt else len(result.job.echo)


def _bytes_of(model: Shelved, token: Token, other: int | None = None) -> bytes:
    """What was delivered of a token, or another one that could have stood in its place."""
    if other is not None and other != token.id:
        return model.tokenizer.token_bytes(other)
    raw = model.tokenizer.token_bytes(token.id)
    return raw[: len(raw) - token.cut]


def _logprob(raw: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
