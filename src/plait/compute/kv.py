"""The KV cache: a bounded number of pages, and each session's keys and values.

Room is granted in whole pages when a session is reserved, so a session that was let in
never runs out. A session's storage is one tensor addressed by position; the operating
system commits its memory as positions are written.
"""

from dataclasses import dataclass

import torch

from plait.errors import CapacityError, LocalProtocolError
from plait.types import Sampling, SessionId, Span

PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What one position holds: per layer of ``span``, ``heads`` times ``head_size``, twice."""

    span: Span
    heads: int
    head_size: int


class SessionKv:
    """Keys and values of one session; the first ``length`` positions are valid.

    ``span`` is the part of the stage's layers that the session runs.
    """

    def __init__(self, layout: KvLayout, tokens: int, sampling: Sampling, span: Span) -> None:
        self.span = span
        self.tokens = tokens
        self.pages = pages_for(tokens)
        self.length = 0
        self.sampling = sampling
        room = self.pages * PAGE_TOKENS
        self._data = torch.empty(2, len(layout.span), 1, layout.heads, room, layout.head_size)

    def write(
        self, layer: int, first_position: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [1, heads, rows, head size] at ``first_position``; returns views of all
        keys and values up to the last row. ``length`` stays: a step that fails midway
        has changed nothing that counts."""
        end = first_position + keys.shape[2]
        stored_keys, stored_values = self._data[0, layer], self._data[1, layer]
        stored_keys[:, :, first_position:end] = keys
        stored_values[:, :, first_position:end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def take_over(self, earlier: "SessionKv") -> None:
        """Copy the valid positions of a smaller cache."""
        self._data[:, :, :, :, : earlier.length] = earlier._data[:, :, :, :, : earlier.length]
        self.length = earlier.length


class KvCache:
    """All sessions' caches, together at most ``tokens_max`` positions in whole pages."""

    def __init__(self, layout: KvLayout, tokens_max: int) -> None:
        self._layout = layout
        self._pages_total = tokens_max // PAGE_TOKENS
        self._pages_used = 0
        self._sessions: dict[SessionId, SessionKv] = {}

    @property
    def tokens_total(self) -> int:
        """Capacity in positions."""
        return self._pages_total * PAGE_TOKENS

    @property
    def tokens_free(self) -> int:
        """Positions that can still be reserved."""
        return (self._pages_total - self._pages_used) * PAGE_TOKENS

    def reserve(
        self, session: SessionId, tokens: int, sampling: Sampling, span: Span | None = None
    ) -> None:
        """Grant room for ``tokens`` positions; a known session keeps what it has cached.

        Raises ``CapacityError`` when not enough pages are free.
        """
        span = span or self._layout.span
        earlier = self._sessions.get(session)
        if earlier is not None and earlier.span != span:
            raise LocalProtocolError("a session cannot change its layers")
        if earlier is not None and tokens <= earlier.tokens:
            earlier.sampling = sampling
            return
        held = 0 if earlier is None else earlier.pages
        if pages_for(tokens) - held > self._pages_total - self._pages_used:
            raise CapacityError(
                f"{tokens} tokens of KV cache were asked for, {self.tokens_free} are free"
            )
        granted = SessionKv(self._layout, tokens, sampling, span)
        if earlier is not None:
            granted.take_over(earlier)
        self._sessions[session] = granted
        self._pages_used += granted.pages - held

    def get(self, session: SessionId) -> SessionKv | None:
        """A session's cache, None if it was never reserved or is freed."""
        return self._sessions.get(session)

    def free(self, session: SessionId) -> None:
        """Give a session's pages back; nothing happens if it is unknown."""
        gone = self._sessions.pop(session, None)
        if gone is not None:
            self._pages_used -= gone.pages


def pages_for(tokens: int) -> int:
    """Whole pages that hold ``tokens`` positions."""
    return -(-tokens // PAGE_TOKENS)
