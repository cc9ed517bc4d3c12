"""The driver's decisions about tokens: which frame to send next, what to deliver, when to end.

Pure: no clock, no socket. One traversal is in flight at a time. A traversal number is used
once in an epoch, so a late or repeated result is dropped. Positions are explicit: a decode
frame feeds the token drawn last, then drafts of what may follow; where the draws left the
drafts, the next frame starts, and overwrites. A new epoch goes on where the last answer
ended: what was delivered is never drawn again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from plait.compute.drafts import Took
from plait.errors import RemoteProtocolError
from plait.ledger.terms import DRAFTS_MAX
from plait.replay_cuts import cuts

FinishReason = Literal["stop", "length", "ended"]
"""An end token, the limit of tokens, or the client's own wish."""

Top = tuple[tuple[int, float], ...]
"""(id, log-probability) of the likeliest tokens at a position, most likely first."""


class Drafter(Protocol):
    """Guesses how the sequence goes on; a wrong guess costs time, never changes a token."""

    def extend(self, ids: Sequence[int]) -> None:
        """Learn what was drawn."""

    def propose(self, most: int) -> tuple[int, ...] | None:
        """Up to ``most`` ids that may follow; None: ask again when they are thought of."""

    def late(self) -> tuple[int, ...]:
        """The same, when nobody can wait for more."""

    def observe(self, proposed: int, accepted: int, took: Took | None) -> None:
        """Learn how many of the last proposal were drawn, and how long the traversal took.

        The time is None where it says nothing: after a reroute.
        """


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send these ids to the first stage; no ids closes the last chunk without computing.

    The last ``drafts`` of the ids are guesses. A ``replay`` frame rebuilds the first stage
    and is not answered. ``embedding`` asks for the last row's final hidden state, too, and
    ``scored`` for the log-probability of the ids behind the rows.
    """

    traversal: int
    first_position: int
    ids: tuple[int, ...]
    sample: bool
    close_chunk: bool
    drafts: int = 0
    replay: bool = False
    embedding: bool = False
    scored: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the frame."""
        return len(self.ids)

    @property
    def draft_ids(self) -> tuple[int, ...]:
        """The guesses."""
        return self.ids[len(self.ids) - self.drafts :]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand a token to the user; ``top`` is empty unless the sampling asks for it."""

    token_id: int
    logprob: float
    top: Top = ()


@dataclass(frozen=True, slots=True)
class Embedded:
    """Hand the prompt's final hidden state to the user."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Hand log-probabilities of the prompt's next ids to the user; ``tops`` may be empty."""

    logprobs: tuple[float, ...]
    tops: tuple[Top, ...] = ()


@dataclass(frozen=True, slots=True)
class EndDrawn:
    """An end token was drawn, which is not delivered."""

    token_id: int
    logprob: float
    top: Top = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The answer is complete and every chunk is closed."""

    reason: FinishReason


Extra = Deliver | Embedded | PromptScored | EndDrawn
"""What is for the user."""

Action = SendFrame | Extra | Finish


@dataclass(frozen=True, slots=True)
class Extras:
    """What a result may hold besides ids: see ``Deliver``, ``Embedded``, ``PromptScored``."""

    tops: tuple[Top, ...] = ()
    embedding: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    score_tops: tuple[Top, ...] = ()


NO_EXTRAS = Extras()


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Answered frames that drew behind the prompt, their guesses, and those that were right."""

    traversals: int = 0
    drafted: int = 0
    accepted: int = 0

    def plus(self, drafted: int, accepted: int) -> "DraftCounts":
        """The counts after one more traversal."""
        return DraftCounts(self.traversals + 1, self.drafted + drafted, self.accepted + accepted)


NO_DRAFTS = DraftCounts()


@dataclass(frozen=True, slots=True)
class Accounting:
    """How many tokens are accounted together."""

    chunk_tokens: int = 32
    prefill_chunk_tokens: int = 256


class Driver:
    """One session's generation.

    ``prompt_ids`` must not be empty; ``max_tokens`` is at least 1. Call ``start`` once,
    ``on_result`` for each result and ``resume`` after each reroute; perform the actions in
    order. With ``embed`` the prompt's final hidden state comes with the first token, with
    ``score`` the log-probabilities of the prompt's ids but the first come before it; then
    no prefix of the prompt may be cached.
    """

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        max_tokens: int,
        end_ids: frozenset[int],
        accounting: Accounting,
        vocabulary_size: int,
        drafter: Drafter | None = None,
        *,
        embed: bool = False,
        score: bool = False,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.drawn: list[int] = []
        self.frames: list[SendFrame] = []
        """What was sent in this epoch."""
        self.answered: int | None = None
        """The last traversal of this epoch whose result was taken."""
        self.finish: FinishReason | None = None
        """Set once nothing more will be drawn; the last chunk may still be open."""
        self.may_draft = drafter is not None
        """Whether guesses may be sent: nobody on the route charges for wrong ones."""
        self.draft_counts = NO_DRAFTS
        """Of all epochs."""
        self._max_tokens = max_tokens
        self._end_ids = end_ids
        self._accounting = accounting
        self._vocabulary_size = vocabulary_size
        self._drafter = drafter
        self._embed = embed
        self._score = score
        self._traversal = 0
        self._prefilled = 0
        self._cached = 0
        self._draws_in_chunk = 0
        self._first_of_epoch = False
        self._stopping = False
        self.thinking = False
        """The next frame waits for the drafter: call ``drafted`` when it may be ready."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The delivered tokens: what was drawn, without an end token."""
        if self.drawn and self.drawn[-1] in self._end_ids:
            return tuple(self.drawn[:-1])
        return tuple(self.drawn)

    @property
    def position(self) -> int:
        """The next position to feed: all before it is known and was accepted."""
        if self.drawn:
            return len(self.prompt_ids) + len(self.drawn) - 1
        return self._prefilled

    @property
    def in_flight(self) -> SendFrame:
        """The frame whose result is awaited."""
        return self.frames[-1]

    @property
    def awaiting(self) -> bool:
        """Whether a frame is out and not answered."""
        return bool(self.frames) and self.answered != self.frames[-1].traversal

    def start(self, cached: int = 0) -> list[Action]:
        """Return the first frame; positions before ``cached`` are in every stage already."""
        self._prefilled = self._cached = cached
        return [self._send(self._prefill_frame())]

    def forget_cached(self) -> None:
        """No result came, and not every stage of the next epoch has the cached positions."""
        self._prefilled = self._cached = 0

    def resume(self, *, replay: bool) -> list[Action]:
        """Go on in a new epoch; ``replay`` feeds the first stage all ids before, too."""
        self.frames, self.answered, self.thinking = [], None, False
        self._draws_in_chunk = 0
        self._first_of_epoch = True
        actions: list[Action] = []
        self._traversal = 0
        if replay:
            actions += [self._send(frame) for frame in self._replay_frames()]
        # Above every replay frame's number on any hop, since each has a row at least.
        self._traversal = self.position
        frame = self._decode_frame(()) if self.drawn else self._prefill_frame()
        self._first_of_epoch = False
        return [*actions, self._send(frame)]

    def drafted(self, *, late: bool = False) -> list[Action]:
        """The drafter may be ready: send the frame that waits for it, ``late`` in any case."""
        return self._next_frame(late=late) if self.thinking else []

    def stop(self) -> None:
        """End the answer after the result that is due, with its last chunk closed."""
        self._stopping = True

    def is_due(
        self,
        traversal: int,
        ids: Sequence[int],
        logprobs: Sequence[float],
        extras: Extras = NO_EXTRAS,
    ) -> bool:
        """Whether this answers the frame in flight; a duplicate of an earlier one does not.

        Raises ``RemoteProtocolError`` if it fits no frame.
        """
        sent = self.in_flight
        if traversal < sent.traversal or not self.awaiting:
            return False
        if traversal > sent.traversal:
            raise RemoteProtocolError("the last stage answered a frame that was not sent")
        self._check_draws(sent, ids, logprobs)
        self._check_extras(sent, ids, extras)
        return True

    def on_result(
        self,
        traversal: int,
        ids: Sequence[int],
        logprobs: Sequence[float],
        took: Took | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> list[Action]:
        """Take the last stage's answer to the frame in flight, and how long that took.

        Raises ``RemoteProtocolError`` if it does not fit that frame. A result of an
        earlier traversal is a duplicate and gives no action.
        """
        if not self.is_due(traversal, ids, logprobs, extras):
            return []
        sent = self.in_flight
        self.answered = traversal
        if self.finish is not None:
            return [Finish(self.finish)]
        scored: list[Action] = (
            [PromptScored(extras.scores, extras.score_tops)] if sent.scored else []
        )
        if not sent.sample:
            self._prefilled = sent.first_position + sent.rows
            return [*scored, self._send(self._prefill_frame())]
        decoded = sent.first_position >= len(self.prompt_ids)
        if decoded:
            self.draft_counts = self.draft_counts.plus(sent.drafts, len(ids) - 1)
        if self._drafter is not None:
            self._drafter.extend(ids)
            if decoded:
                self._drafter.observe(sent.drafts, len(ids) - 1, took)
        return scored + self._on_draws(sent, ids, logprobs, extras)

    def _check_draws(self, sent: SendFrame, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        fewest, most = int(sent.sample), int(sent.sample) * (1 + sent.drafts)
        if not fewest <= len(ids) <= most or len(logprobs) != len(ids):
            raise RemoteProtocolError(f"the last stage drew {len(ids)} tokens, not {most} at most")
        if any(token_id >= self._vocabulary_size for token_id in ids):
            raise RemoteProtocolError("the last stage drew a token outside the vocabulary")
        if tuple(ids[:-1]) != sent.draft_ids[: max(len(ids) - 1, 0)]:
            raise RemoteProtocolError("the last stage went on after a draw that was not drafted")
        if self._end_ids.intersection(ids[:-1]):
            raise RemoteProtocolError("the last stage went on after an end token")
        if not all(math.isfinite(logprob) and logprob <= 0 for logprob in logprobs):
            raise RemoteProtocolError("the last stage gave an impossible log-probability")

    def _check_extras(self, sent: SendFrame, ids: Sequence[int], extras: Extras) -> None:
        if extras.tops and len(extras.tops) != len(ids):
            raise RemoteProtocolError("the last stage gave likeliest tokens for other draws")
        if len(extras.scores) != len(sent.scored) or (
            extras.score_tops and len(extras.score_tops) != len(sent.scored)
        ):
            raise RemoteProtocolError("the last stage scored other ids than asked")
        if not all(math.isfinite(score) and score <= 0 for score in extras.scores):
            raise RemoteProtocolError("the last stage gave an impossible log-probability")
        tops = (*extras.tops, *extras.score_tops)
        for token_id, logprob in (pair for top in tops for pair in top):
            if token_id >= self._vocabulary_size or not (math.isfinite(logprob) and logprob <= 0):
                raise RemoteProtocolError("the last stage gave an impossible likeliest token")
        if bool(extras.embedding) != sent.embedding:
            raise RemoteProtocolError("the last stage gave no embedding, or one that was not asked")
        if not all(map(math.isfinite, extras.embedding)):
            raise RemoteProtocolError("the last stage gave an impossible embedding")

    def _on_draws(
        self, sent: SendFrame, ids: Sequence[int], logprobs: Sequence[float], extras: Extras
    ) -> list[Action]:
        self.drawn += ids
        self._draws_in_chunk = 0 if sent.close_chunk else self._draws_in_chunk + len(ids)
        tops = extras.tops or ((),) * len(ids)
        actions: list[Action] = [Embedded(extras.embedding)] if extras.embedding else []
        actions += [
            (EndDrawn if token_id in self._end_ids else Deliver)(token_id, logprob, top)
            for token_id, logprob, top in zip(ids, logprobs, tops, strict=True)
        ]
        self.finish = self._finish_reason()
        if self.finish is None:
            return actions + self._next_frame()
        if sent.close_chunk:
            return [*actions, Finish(self.finish)]
        return [*actions, self._send(self._closing_frame())]

    def _next_frame(self, *, late: bool = False) -> list[Action]:
        drafts = self._drafts(late=late)
        self.thinking = drafts is None
        return [] if drafts is None else [self._send(self._decode_frame(drafts))]

    def _drafts(self, *, late: bool) -> tuple[int, ...] | None:
        """Guesses for the next frame; None if the drafter is not ready."""
        # A frame with drafts closes nothing: how many are accepted is known only afterwards.
        most = min(self._chunk_left - 2, self._answer_left - 2, DRAFTS_MAX)
        if self._drafter is None or not self.may_draft or most <= 0:
            return ()
        return self._drafter.late()[:most] if late else self._drafter.propose(most)

    @property
    def _chunk_left(self) -> int:
        return self._accounting.chunk_tokens - self._draws_in_chunk

    @property
    def _answer_left(self) -> int:
        return self._max_tokens - len(self.drawn)

    def _finish_reason(self) -> FinishReason | None:
        if self.drawn[-1] in self._end_ids:
            return "stop"
        if len(self.drawn) == self._max_tokens:
            return "length"
        return "ended" if self._stopping else None

    def _send(self, frame: SendFrame) -> SendFrame:
        self.frames.append(frame)
        self._traversal = frame.traversal + 1
        return frame

    def _prefill_frame(self) -> SendFrame:
        start = self._prefilled
        ids = self.prompt_ids[start : start + self._accounting.prefill_chunk_tokens]
        last = start + len(ids) == len(self.prompt_ids)
        return SendFrame(
            self._traversal,
            start,
            ids,
            sample=last,
            close_chunk=True,
            embedding=last and self._embed,
            scored=self.prompt_ids[start + 1 : start + 1 + len(ids)] if self._score else (),
        )

    def _replay_frames(self) -> list[SendFrame]:
        known = (*self.prompt_ids, *self.drawn)[: self.position]
        frames = cuts(len(known), len(self.prompt_ids), self._cached)
        return [
            SendFrame(
                number,
                start,
                known[start : start + rows],
                sample=False,
                close_chunk=False,
                replay=True,
            )
            for number, (start, rows) in enumerate(frames)
        ]

    def _decode_frame(self, drafts: tuple[int, ...]) -> SendFrame:
        # The first frame of an epoch closes its chunk, so that a replay is receipted at once.
        close = self._first_of_epoch or min(self._chunk_left, self._answer_left) == 1
        return SendFrame(
            self._traversal,
            self.position,
            (self.drawn[-1], *drafts),
            sample=True,
            close_chunk=close,
            drafts=len(drafts),
        )

    def _closing_frame(self) -> SendFrame:
        # The token drawn last is never fed, so nothing stands at the next position.
        return SendFrame(self._traversal, self.position, (), sample=False, close_chunk=True)
