"""What all dialects share: server-sent events, usage, and the result of one job."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from plait.client import RouteStep
from plait.gateway.failure import ApiError
from plait.gateway.orders import Job
from plait.gateway.running import Outcome, Piece, Token
from plait.gateway.tools import ToolCall

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode


def data(value: object) -> bytes:
    """An unnamed event."""
    return b"data: " + encode(value) + b"\n\n"


def named(name: str, value: object) -> bytes:
    """A named event."""
    return b"event: " + name.encode() + b"\n" + data(value)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and microcredits of a request."""

    prompt_tokens: int
    completion_tokens: int
    cost: int
    cached_tokens: int = 0
    """Of the prompt's tokens, those that every stage had cached for the same owner."""

    def to_json(self) -> dict[str, Any]:
        """As the completions have it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "cost": self.cost,
        }


@dataclass(slots=True)
class Result:
    """What one job has given so far; ``route`` and ``predicted_cost`` (microcredits) once its
    first token is there, ``outcome`` once it ended well, ``vouched`` once its
    session is closed: the microcredits that its vouchers promise, however it ended."""

    job: Job
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    outcome: Outcome | None = None
    vouched: int = 0
    route: tuple[RouteStep, ...] = ()
    predicted_cost: int | None = None

    @property
    def text(self) -> str:
        """All text."""
        return "".join(self.texts)

    @property
    def finished(self) -> Outcome:
        """The outcome of a job that is over."""
        assert self.outcome is not None, "the job is not over"
        return self.outcome

    def add(self, piece: Piece) -> None:
        """Note a piece."""
        self.texts.append(piece.text)
        self.tokens += piece.tokens
        self.calls += piece.calls


class Dialect(Protocol):
    """One API's words for an answer, whole or as frames of a stream; one per response.

    A ``plait`` argument is Plait's account of answers, JSON-ready.
    """

    def begin(self, results: list[Result]) -> list[bytes]:
        """Frames before anything else."""
        ...

    def piece(self, piece: Piece) -> list[bytes]:
        """Frames of a piece."""
        ...

    def finish(self, result: Result, plait: dict[str, Any]) -> list[bytes]:
        """Frames at the end of a job."""
        ...

    def end(self, results: list[Result], usage: Usage) -> list[bytes]:
        """Frames after all jobs."""
        ...

    def failed(self, problem: ApiError) -> list[bytes]:
        """Frames for what goes wrong in a stream; nothing follows."""
        ...

    def whole(self, results: list[Result], usage: Usage, plait: dict[str, Any]) -> dict[str, Any]:
        """The body of a whole response."""
        ...
