"""The KV cache: one tensor of a fixed number of pages, and each session's pages in it.

Room is granted in whole pages when a session is reserved, so a session that was let in
never runs out and the cache never grows. Prefixes are shared page by page and copied when
somebody writes to them (``pages.py``). A session whose pages lie next to each other, as they
mostly do, is read in place; one that shares a prefix is put together for each layer.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import token_bytes

import torch

from plait.compute.pages import PAGE_TOKENS, Pages, PageTable, pages_for, prefix_key, runs
from plait.compute.spill import Spill
from plait.errors import LocalProtocolError
from plait.types import Sampling, SessionId, Span


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What one position holds: per layer of ``span``, ``heads`` times ``head_size``, twice."""

    span: Span
    heads: int
    head_size: int

    @property
    def position_bytes(self) -> int:
        """Memory of one position, in fp32."""
        return len(self.span) * 2 * self.heads * self.head_size * 4


class SessionKv:
    """Keys and values of one session; the first ``length`` positions are valid.

    ``span`` is the part of the stage's layers that the session runs. Layers are counted
    from the stage's first.
    """

    def __init__(
        self, cache: "KvCache", tokens: int, sampling: Sampling, span: Span, pages: Pages
    ) -> None:
        self.span = span
        self.tokens = tokens
        self.length = 0
        self.sampling = sampling
        self.pages = pages
        self.adopted: Pages = ()
        """Pages of a published prefix, until the first write shows how many are used."""
        self._cache = cache
        self._slices = _slices(pages)

    def prepare(self, first_position: int, rows: int) -> None:
        """Make sure that nobody else sees rows written there.

        Raises ``CapacityError`` if a shared page cannot be copied for want of a free one.
        """
        self._cache.make_writable(self, first_position, first_position + rows)
        self._slices = _slices(self.pages)

    def write(
        self, layer: int, first_position: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [1, heads, rows, head size] at ``first_position``, which is prepared;
        returns all keys and values up to the last row. ``length`` stays: a step that
        fails midway has changed nothing that counts."""
        end = first_position + keys.shape[2]
        of_layer = self._cache.data[layer]
        if len(self._slices) == 1:
            at = self._slices[0][1]
            of_layer[0, :, at + first_position : at + end] = keys[0]
            of_layer[1, :, at + first_position : at + end] = values[0]
            here = of_layer[:, None, :, at : at + end]
            return here[0], here[1]
        for start, at, count in self._slices:
            low, high = max(first_position, start), min(end, start + count)
            if low < high:
                rows = slice(low - first_position, high - first_position)
                of_layer[0, :, at + low - start : at + high - start] = keys[0, :, rows]
                of_layer[1, :, at + low - start : at + high - start] = values[0, :, rows]
        here = torch.cat(self._parts(of_layer, end), 2)[:, None]
        return here[0], here[1]

    def save(self, spill: Spill, session: SessionId) -> None:
        """Write what is valid to disk. Raises ``CapacityError``."""
        spill.write(session, self._strips())

    def load(self, spill: Spill, session: SessionId, length: int) -> None:
        """Read back what ``save`` wrote, into pages that nobody shares."""
        self.length = length
        spill.read(session, self._strips())

    def _strips(self) -> list[torch.Tensor]:
        """What is valid, in pieces that lie in one place of memory each."""
        parts = self._parts(self._of_span(), self.length)
        return [
            part[layer, which, head]
            for layer in range(len(self.span))
            for which in range(2)
            for head in range(self._cache.layout.heads)
            for part in parts
        ]

    def _of_span(self) -> torch.Tensor:
        first = self._cache.layout.span.start
        return self._cache.data[self.span.start - first : self.span.end - first]

    def _parts(self, data: torch.Tensor, end: int) -> list[torch.Tensor]:
        """Views of the positions up to ``end``, of data whose last but one are positions."""
        return [
            data[..., at : at + min(count, end - start), :]
            for start, at, count in self._slices
            if start < end
        ]


def _slices(pages: Pages) -> list[tuple[int, int, int]]:
    """(session's position, position in the cache, positions) of each run of pages."""
    found, start = [], 0
    for page, count in runs(pages):
        found.append((start, page * PAGE_TOKENS, count * PAGE_TOKENS))
        start += count * PAGE_TOKENS
    return found


class KvCache:
    """All sessions' caches, together at most ``tokens_max`` positions in whole pages.

    Calls may come from other threads than the one that computes; ``computing`` keeps the
    pages of what is computed from being given away meanwhile.
    """

    def __init__(self, layout: KvLayout, tokens_max: int, *, spill: Spill | None = None) -> None:
        pages = tokens_max // PAGE_TOKENS
        self.layout = layout
        self.data = torch.empty(
            len(layout.span),
            2,
            layout.heads,
            pages * PAGE_TOKENS,
            layout.head_size,
        )
        self._table = PageTable(pages)
        self._sessions: dict[SessionId, SessionKv] = {}
        self._parked: dict[SessionId, SessionKv] = {}
        self._spill = spill or Spill()
        self._computing: set[SessionId] = set()
        self._late: list[SessionKv] = []
        self._secret = token_bytes(32)
        self._lock = threading.RLock()

    @property
    def tokens_total(self) -> int:
        """Capacity in positions."""
        return self._table.total * PAGE_TOKENS

    @property
    def tokens_free(self) -> int:
        """Positions that can still be reserved."""
        return self._table.available * PAGE_TOKENS

    def reserve(
        self, session: SessionId, tokens: int, sampling: Sampling, span: Span | None = None
    ) -> None:
        """Grant room for ``tokens`` positions; a known session keeps what it has cached.

        Raises ``CapacityError`` when not enough pages are free.
        """
        span = span or self.layout.span
        with self._lock:
            known = self._sessions.get(session) or self._parked.get(session)
            if known is None:
                pages = self._table.allocate(pages_for(tokens))
                self._sessions[session] = SessionKv(self, tokens, sampling, span, pages)
                return
            if known.span != span:
                raise LocalProtocolError("a session cannot change its layers")
            if tokens > known.tokens:
                if session in self._sessions:
                    more = pages_for(tokens) - len(known.pages)
                    known.pages += self._table.allocate(more)
                known.tokens = tokens
            known.sampling = sampling

    def get(self, session: SessionId) -> SessionKv | None:
        """A session's cache, None if it was never reserved, is parked or is freed."""
        return self._sessions.get(session)

    def free(self, session: SessionId) -> None:
        """Give a session's pages back; nothing happens if it is unknown."""
        with self._lock:
            self._spill.drop(session)
            self._parked.pop(session, None)
            gone = self._sessions.pop(session, None)
            if gone is None:
                return
            if session in self._computing:
                self._late.append(gone)
            else:
                self._release(gone)

    @contextmanager
    def computing(self, sessions: Iterable[SessionId]) -> Iterator[None]:
        """Pages of these sessions are given back only afterwards, if freed meanwhile."""
        with self._lock:
            self._computing = set(sessions)
        try:
            yield
        finally:
            with self._lock:
                self._computing = set()
                for gone in self._late:
                    self._release(gone)
                self._late.clear()

    def _release(self, gone: SessionKv) -> None:
        self._table.release(gone.pages)
        self._table.release(gone.adopted)

    # Shared prefixes ----------------------------------------------------------------

    def adopt(self, session: SessionId, tenant: str, hashes: Sequence[bytes]) -> int:
        """Let a new session start with a prefix the tenant published; returns its tokens.

        The pages are held until the first write, which may begin at or before that
        position and uses the part up to there.
        """
        with self._lock:
            kv = self._known(session)
            if kv.length or kv.adopted:
                raise LocalProtocolError("a session with tokens cannot adopt a prefix")
            keys = [prefix_key(self._secret, tenant, kv.span, name) for name in hashes]
            kv.adopted = self._table.find(keys)[: len(kv.pages)]
            self._table.hold(kv.adopted)
            kv.length = len(kv.adopted) * PAGE_TOKENS
            return kv.length

    def publish(self, session: SessionId, tenant: str, hashes: Sequence[bytes]) -> None:
        """Keep the session's first pages for the tenant, one hash for each."""
        with self._lock:
            kv = self._known(session)
            if len(hashes) * PAGE_TOKENS > kv.length or kv.adopted:
                raise LocalProtocolError("a prefix that is not cached cannot be published")
            keys = [prefix_key(self._secret, tenant, kv.span, name) for name in hashes]
            self._table.file(keys, kv.pages[: len(hashes)])

    def make_writable(self, kv: SessionKv, first_position: int, end: int) -> None:
        """Settle which adopted pages are used, and copy shared ones in [first, end)."""
        with self._lock:
            if kv.adopted:
                self._settle(kv, pages_for(first_position))
            for index in range(first_position // PAGE_TOKENS, pages_for(end)):
                page = kv.pages[index]
                if self._table.published_by_sole_holder(page):
                    self._table.withdraw(page)
                elif self._table.shared(page):
                    self._copy(kv, index, kept=index * PAGE_TOKENS < first_position)

    def _settle(self, kv: SessionKv, used: int) -> None:
        used = min(used, len(kv.adopted))
        unused, spare = kv.adopted[used:], kv.pages[:used]
        kv.pages = kv.adopted[:used] + kv.pages[used:]
        kv.adopted = ()
        self._table.release(unused)
        self._table.release(spare)

    def _copy(self, kv: SessionKv, index: int, *, kept: bool) -> None:
        shared = kv.pages[index]
        (page,) = self._table.allocate(1)
        if kept:
            at, to = shared * PAGE_TOKENS, page * PAGE_TOKENS
            self.data[..., to : to + PAGE_TOKENS, :] = self.data[..., at : at + PAGE_TOKENS, :]
        kv.pages = (*kv.pages[:index], page, *kv.pages[index + 1 :])
        self._table.release([shared])

    # Parking ------------------------------------------------------------------------

    def park(self, session: SessionId) -> None:
        """Write a session that is not computed to disk and give its pages back.

        Raises ``CapacityError`` when the disk space for that is used up.
        """
        with self._lock:
            kv = self._known(session)
            if session in self._computing or kv.adopted:
                raise LocalProtocolError("a session at work cannot be parked")
            kv.save(self._spill, session)
            del self._sessions[session]
            self._table.release(kv.pages)
            kv.pages = ()
            self._parked[session] = kv

    def resume(self, session: SessionId) -> None:
        """Bring a parked session back; nothing happens if it is not parked.

        Raises ``CapacityError``, and leaves it parked, when too few pages are free.
        """
        with self._lock:
            kv = self._parked.get(session)
            if kv is None:
                return
            pages = self._table.allocate(pages_for(kv.tokens))
            granted = SessionKv(self, kv.tokens, kv.sampling, kv.span, pages)
            try:
                granted.load(self._spill, session, kv.length)
            except Exception:
                self._table.release(pages)
                raise
            self._spill.drop(session)
            del self._parked[session]
            self._sessions[session] = granted

    def _known(self, session: SessionId) -> SessionKv:
        kv = self._sessions.get(session)
        if kv is None:
            raise LocalProtocolError(f"session {session.hex()} holds no KV pages")
        return kv
