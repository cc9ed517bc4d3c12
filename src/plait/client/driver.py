"""The driver's decisions: which frame to send next, what to deliver, when to end.

Pure: no clock, no socket. One traversal is in flight at a time. A traversal number is
used once, so a late or repeated result is dropped. Positions are explicit: frame k of the
prompt starts where frame k-1 ended, and each drawn token is fed back at the next position.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from plait.errors import RemoteProtocolError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send these ids to the first stage; no ids closes the last chunk without computing."""

    traversal: int
    first_position: int
    ids: tuple[int, ...]
    sample: bool
    close_chunk: bool

    @property
    def rows(self) -> int:
        """Rows of the frame."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand a token to the user."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The answer is complete and every chunk is closed."""

    reason: FinishReason


Action = SendFrame | Deliver | Finish


@dataclass(frozen=True, slots=True)
class Accounting:
    """How many tokens are accounted together."""

    chunk_tokens: int = 32
    prefill_chunk_tokens: int = 256


class Driver:
    """One session's generation over one pipeline.

    ``prompt_ids`` must not be empty; ``max_tokens`` is at least 1. Call ``start`` once,
    then ``on_result`` for each result; perform the actions in order.
    """

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        max_tokens: int,
        end_ids: frozenset[int],
        accounting: Accounting,
        vocabulary_size: int,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.drawn: list[int] = []
        self.frames: list[SendFrame] = []
        self._max_tokens = max_tokens
        self._end_ids = end_ids
        self._accounting = accounting
        self._vocabulary_size = vocabulary_size
        self._prefill = self._prefill_frames()
        self._draws_in_chunk = 0
        self._finish: FinishReason | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The delivered tokens: what was drawn, without an end token."""
        if self.drawn and self.drawn[-1] in self._end_ids:
            return tuple(self.drawn[:-1])
        return tuple(self.drawn)

    @property
    def in_flight(self) -> SendFrame:
        """The frame whose result is awaited."""
        return self.frames[-1]

    def start(self) -> list[Action]:
        """Return the first frame."""
        return [self._send(next(self._prefill))]

    def on_result(self, traversal: int, ids: list[int], logprobs: list[float]) -> list[Action]:
        """Take the last stage's answer to the frame in flight.

        Raises ``RemoteProtocolError`` if it does not fit that frame. A result of an
        earlier traversal is a duplicate and gives no action.
        """
        sent = self.in_flight
        if traversal < sent.traversal:
            return []
        if traversal > sent.traversal or len(ids) != int(sent.sample) or len(logprobs) != len(ids):
            raise RemoteProtocolError("the last stage answered a frame that was not sent")
        if any(token_id >= self._vocabulary_size for token_id in ids):
            raise RemoteProtocolError("the last stage drew a token outside the vocabulary")
        if not all(math.isfinite(logprob) and logprob <= 0 for logprob in logprobs):
            raise RemoteProtocolError("the last stage gave an impossible log-probability")
        if self._finish is not None:
            return [Finish(self._finish)]
        if not sent.sample:
            return [self._send(next(self._prefill))]
        return self._on_draw(ids[0], logprobs[0], closed=sent.close_chunk)

    def _on_draw(self, token_id: int, logprob: float, *, closed: bool) -> list[Action]:
        self.drawn.append(token_id)
        self._draws_in_chunk = 0 if closed else self._draws_in_chunk + 1
        if token_id in self._end_ids:
            self._finish = "stop"
            return [Finish("stop")] if closed else [self._send(self._closing_frame())]
        actions: list[Action] = [Deliver(token_id, logprob)]
        if len(self.drawn) == self._max_tokens:
            self._finish = "length"
            return [*actions, Finish("length")]
        return [*actions, self._send(self._decode_frame(token_id))]

    def _send(self, frame: SendFrame) -> SendFrame:
        self.frames.append(frame)
        return frame

    def _prefill_frames(self) -> Iterator[SendFrame]:
        step, total = self._accounting.prefill_chunk_tokens, len(self.prompt_ids)
        for start in range(0, total, step):
            ids = self.prompt_ids[start : start + step]
            yield SendFrame(
                len(self.frames), start, ids, sample=start + len(ids) == total, close_chunk=True
            )

    def _decode_frame(self, token_id: int) -> SendFrame:
        last_in_chunk = self._draws_in_chunk + 1 == self._accounting.chunk_tokens
        last_of_all = len(self.drawn) + 1 == self._max_tokens
        return SendFrame(
            len(self.frames),
            self._next_position() - 1,
            (token_id,),
            sample=True,
            close_chunk=last_in_chunk or last_of_all,
        )

    def _closing_frame(self) -> SendFrame:
        # The end token is drawn but never fed back, so nothing stands at the next position.
        position = self._next_position() - 1
        return SendFrame(len(self.frames), position, (), sample=False, close_chunk=True)

    def _next_position(self) -> int:
        return len(self.prompt_ids) + len(self.drawn)
