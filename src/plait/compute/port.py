"""What a node asks of a compute backend. A backend is driven from one compute thread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from plait.types import ModelShape, Sampling, SessionId, Span

Hidden = npt.NDArray[np.float32]
"""Activations, [rows, width]."""


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of one session at positions ``first_position``, ``first_position + 1``, ….

    The first stage is given ``ids``, every other stage ``hidden``. Writing at positions
    that were already written overwrites them and forgets what lay behind. ``sample`` makes
    the last stage draw the token that follows the last row; other stages ignore it.

    ``drafts`` are guesses, the ids of the last ``len(drafts)`` rows. The last stage then
    draws after the row before them, and goes on to the next row while what it drew is the
    draft there and no end token. So it draws 1 to ``len(drafts) + 1`` tokens, the same ones
    as without drafts. Rows of drafts that were not drawn stay in the cache; whoever sends
    the next work starts at the position of the last drawn token, which overwrites them.

    ``claimed`` is for audits: ids that are said to have been drawn by this work. They are
    taken for drawn, whatever the logits say, and ``Drawn.margins`` tells how far off each is.
    There may be one more of them than drafts, whose ids do not matter then.

    ``embedding`` makes a last stage that draws give the final hidden state of the last row.

    ``scored`` are the ids behind the first ``len(scored)`` rows: the last stage gives the
    log-probability of each, whatever it draws.
    """

    session: SessionId
    first_position: int
    ids: tuple[int, ...] | None
    hidden: Hidden | None
    sample: bool = False
    drafts: tuple[int, ...] = ()
    claimed: tuple[int, ...] = ()
    embedding: bool = False
    scored: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """How many positions this work covers."""
        return len(self.ids or ()) if self.hidden is None else len(self.hidden)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Drawn tokens and the log-probability the model gave each, before any temperature.

    ``tops``, if the sampling asks for it, has for each the likeliest tokens: (id,
    log-probability), most likely first.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()
    totals: tuple[float, ...] = ()
    """Of each one's logits, the logarithm of the sum of exponentials."""
    margins: tuple[float, ...] = ()
    """Of claimed ids: see ``judging.draw_margin``; 0 is the right one."""
    embedding: tuple[float, ...] = ()
    """The last row after the model's last norm, if the work asks for it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the model gave to ids that were not drawn: the log-probability of each, before
    any temperature, and the likeliest tokens in its place, if the sampling asks for them."""

    logprobs: tuple[float, ...] = ()
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()

    def then(self, later: "Scored") -> "Scored":
        """These and later ones."""
        return Scored(self.logprobs + later.logprobs, self.tops + later.tops)


NOT_SCORED = Scored()


@dataclass(frozen=True, slots=True)
class Done:
    """Outcome of one ``Work``: ``hidden`` (from the last stage, after the model's last norm),
    ``drawn`` and ``scored`` from the last one if it sampled and scored, or ``error``."""

    hidden: Hidden | None = None
    drawn: Drawn | None = None
    error: Exception | None = None
    scored: Scored = NOT_SCORED


@dataclass(frozen=True, slots=True)
class PrefixUse:
    """Tokens of published prefixes in memory, whose room any session may take, and on disk."""

    cached_tokens: int = 0
    parked_tokens: int = 0
    parked_bytes: int = 0


def draw_with_drafts(
    drafts: Sequence[int], end_ids: Sequence[int], draw: Callable[[int], int]
) -> int:
    """Draw token 0, 1, …, by ``draw``, while each is the draft of its place and no end token.

    Returns how many were drawn: 1 to ``len(drafts) + 1``.
    """
    for index, draft in enumerate(drafts):
        token = draw(index)
        if token != draft or token in end_ids:
            return index + 1
    draw(len(drafts))
    return len(drafts) + 1


class StageCompute(Protocol):
    """A span of a model's layers with its KV cache.

    ``reserve`` and ``free`` may be called from another thread while ``step`` runs.
    """

    @property
    def span(self) -> Span:
        """The layers this stage computes."""

    @property
    def shape(self) -> ModelShape:
        """The whole model's shape."""

    @property
    def width(self) -> int:
        """Length of one activation row."""

    @property
    def device(self) -> str:
        """Where it computes: ``cpu``, ``cuda:0``, ``mps``."""

    @property
    def kv_tokens_total(self) -> int:
        """Capacity of the KV cache, in tokens of all sessions together."""

    @property
    def kv_bytes_total(self) -> int:
        """Memory that the whole KV cache takes once it was full."""

    @property
    def kv_tokens_free(self) -> int:
        """What is not reserved of it."""

    def reserve(
        self,
        session: SessionId,
        tokens: int,
        sampling: Sampling,
        span: Span | None = None,
        context_ids: Sequence[int] = (),
        prompt_tokens: int = 0,
    ) -> None:
        """Hold KV pages for ``tokens`` positions. Doing it again for the same session keeps
        what is cached, takes the new sampling and grows the room if needed.

        ``span`` is the part of this stage's layers that the session runs; None is all.
        It takes ids if it starts at layer 0 and draws tokens if it ends at the last layer.
        Where ``sampling.needs_history``, a stage that draws is given all ids known so far,
        of which the first ``prompt_tokens`` are the prompt.

        Raises ``CapacityError`` when the pages are not free, ``RemoteProtocolError`` when
        the session is longer than the model's context.
        """

    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Compute; one outcome per item, in order. A fault in one item becomes its
        ``error`` (``RemoteProtocolError`` when the input is to blame) and leaves its
        session's cache as it was before."""

    def free(self, session: SessionId) -> None:
        """Forget a session and its cache; nothing happens if it is unknown."""

    def adopt_prefix(self, session: SessionId, tenant: str, hashes: Sequence[bytes]) -> int:
        """Let a session that has nothing cached start with pages the tenant published.

        ``hashes`` name the pages of its prompt (``pages.prefix_hashes``). Returns how many
        tokens are cached so; the session's first work may start there or earlier, and what
        lies behind its start is given up. Nobody else's pages are ever found.
        """

    def publish_prefix(
        self, session: SessionId, tenant: str, hashes: Sequence[bytes], keep_ms: int = 0
    ) -> None:
        """Keep the session's first ``len(hashes)`` pages, which are cached, for the tenant,
        beyond the session's end and until their room is needed; with ``keep_ms`` also on
        disk, for so long. Not while a work of the session is under way."""

    def park_prefixes(self) -> None:
        """Write to disk what ``publish_prefix`` was told to keep, and forget what is past
        its time. Takes as long as the disk: call it now and then, off the event loop."""

    @property
    def prefixes(self) -> PrefixUse:
        """What published prefixes take."""

    def numeric_class(self) -> str:
        """Weights, precision, kernels and threads: equal classes agree to rounding."""

    def measure(self) -> tuple[int, int]:
        """(microseconds of one decode step, microseconds per prompt token) through the
        whole span, for the offer. Takes up to a second; needs 80 free KV tokens."""
