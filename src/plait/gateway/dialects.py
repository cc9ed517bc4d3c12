"""The two shapes of a completion, whole and in chunks, as OpenAI's clients expect them."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from plait.gateway.orders import Job
from plait.gateway.running import Outcome
from plait.gateway.shelf import Shelved


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one response repeats."""

    id: str
    created: int
    model: str

    def of(self, kind: str) -> dict[str, Any]:
        """The members common to a response and its chunks."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class Dialect(Protocol):
    """Builds JSON-ready values; ``extra`` is Plait's account of one answer."""

    prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the first chunk, if there is one before the text."""
        ...

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """The choice of a chunk with text."""
        ...

    def closing(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """The choice of an answer's last chunk."""
        ...

    def choice(self, job: Job, text: str, outcome: Outcome) -> dict[str, Any]:
        """The choice of a whole response."""
        ...


@dataclass(frozen=True, slots=True)
class ChatDialect:
    """``/v1/chat/completions``."""

    logprobs: bool = False
    prefix: ClassVar[str] = "chatcmpl-"
    whole_kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role."""
        return _delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A delta."""
        return _delta(index, {"content": text})

    def closing(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """An empty delta with the reason, and all log-probabilities."""
        choice = _delta(job.index, {}, outcome.finish_reason)
        return choice | {"logprobs": self._logprobs(job, outcome)}

    def choice(self, job: Job, text: str, outcome: Outcome) -> dict[str, Any]:
        """A message."""
        return {
            "index": job.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(job, outcome),
            "finish_reason": outcome.finish_reason,
        }

    def _logprobs(self, job: Job, outcome: Outcome) -> dict[str, Any] | None:
        if not self.logprobs or outcome.answer is None:
            return None
        content = [
            {
                "token": raw.decode("utf-8", "replace"),
                "logprob": logprob,
                "bytes": list(raw),
                "top_logprobs": [],
            }
            for raw, logprob in _drawn(job.model, outcome)
        ]
        return {"content": content, "refusal": None}


@dataclass(frozen=True, slots=True)
class TextDialect:
    """``/v1/completions``."""

    logprobs: bool = False
    prefix: ClassVar[str] = "cmpl-"
    whole_kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Text has no role."""
        return None

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A piece of text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def closing(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """No text, and the reason."""
        return self.choice(job, "", outcome)

    def choice(self, job: Job, text: str, outcome: Outcome) -> dict[str, Any]:
        """The whole text."""
        return {
            "index": job.index,
            "text": text,
            "logprobs": self._logprobs(job, outcome),
            "finish_reason": outcome.finish_reason,
        }

    def _logprobs(self, job: Job, outcome: Outcome) -> dict[str, Any] | None:
        if not self.logprobs or outcome.answer is None:
            return None
        tokens, offsets, offset = [], [], 0
        for raw, _ in _drawn(job.model, outcome):
            tokens.append(raw.decode("utf-8", "replace"))
            offsets.append(offset)
            offset += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": list(outcome.answer.logprobs),
            "top_logprobs": None,
            "text_offset": offsets,
        }


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _drawn(model: Shelved, outcome: Outcome) -> list[tuple[bytes, float]]:
    answer = outcome.answer
    assert answer is not None
    pairs = zip(answer.token_ids, answer.logprobs, strict=False)
    return [(model.tokenizer.token_bytes(token), logprob) for token, logprob in pairs]
