"""The KV cache: one tensor of a fixed number of pages, and each session's pages in it.

Room is granted in whole pages when a session is reserved, so a session that was let in
never runs out and the cache never grows. Prefixes are shared page by page and copied when
somebody writes to them (``pages.py``); those that are to be kept are also on disk
(``kept.py``). A session whose pages lie next to each other, as they mostly do, is read in
place; one that shares a prefix is put together for each layer of each step. So while there is
plenty of room a session copies the prefix once, into pages of its own, and shares it no more.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import token_bytes

import torch

from plait.compute.kept import KeptPages
from plait.compute.pages import PAGE_TOKENS, Pages, PageTable, pages_for, prefix_key, runs
from plait.compute.port import PrefixUse
from plait.compute.spill import DiskRoom, PageFile
from plait.errors import CapacityError, LocalProtocolError
from plait.types import Sampling, SessionId, Span

Views = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
"""Keys and values by layer, each [1, heads, positions, head size]."""

PREFIX_IDLE_MS = 900_000
"""A published prefix that was of no use for so long leaves the memory, needed or not."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What one position holds: per layer of ``span``, ``heads`` times ``head_size``, twice."""

    span: Span
    heads: int
    head_size: int
    number: torch.dtype = torch.float32

    @property
    def position_bytes(self) -> int:
        """Memory of one position."""
        return len(self.span) * 2 * self.heads * self.head_size * self.number.itemsize


@dataclass(frozen=True, slots=True)
class Adopted:
    """A page of a prefix: its number, or the slot on disk that holds it."""

    key: bytes
    page: int | None
    slot: int | None = None


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
        self.adopted: tuple[Adopted, ...] = ()
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
        for start, at, count in self._slices:
            low, high = max(first_position, start), min(end, start + count)
            if low < high:
                rows = slice(low - first_position, high - first_position)
                of_layer[0, :, at + low - start : at + high - start] = keys[0, :, rows]
                of_layer[1, :, at + low - start : at + high - start] = values[0, :, rows]
        return self.read(layer, end)

    def slots(self, first_position: int, rows: int) -> torch.Tensor:
        """Where rows at ``first_position``, which is prepared, lie among the cache's."""
        end = first_position + rows
        found = [
            torch.arange(
                at + max(first_position, start) - start, at + min(end, start + count) - start
            )
            for start, at, count in self._slices
            if start < end and first_position < start + count
        ]
        return torch.cat(found) if len(found) > 1 else found[0]

    def start(self, end: int) -> int | None:
        """Where position 0 lies among the cache's, if those up to ``end`` follow it; else None."""
        _, at, count = self._slices[0]
        return at if end <= count else None

    @property
    def cache_data(self) -> torch.Tensor:
        """The whole cache, [layers, 2, heads, slots, head size]."""
        return self._cache.data

    def views(self, end: int) -> Views | None:
        """What ``read`` gives, for every layer of the stage, as views that show what is written
        later; None where the session's pages are not next to each other."""
        if len(self._slices) > 1:
            return None
        at = self._slices[0][1]
        here = self._cache.data[:, :, None, :, at : at + end]
        return here[:, 0].unbind(0), here[:, 1].unbind(0)

    def read(self, layer: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, heads, end, head size] twice: the keys and values of positions up to ``end``."""
        parts = self._parts(self._cache.data[layer], end)
        here = (torch.cat(parts, 2) if len(parts) > 1 else parts[0])[:, None]
        return here[0], here[1]

    def of_layer(self, layer: int) -> torch.Tensor:
        """All sessions' keys, then values, [2 * heads, slots, head size]."""
        return self._cache.data[layer].flatten(0, 1)

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

    def __init__(
        self,
        layout: KvLayout,
        tokens_max: int,
        *,
        disk: DiskRoom = DiskRoom(),  # noqa: B008 - frozen
        clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
        device: torch.device | None = None,
    ) -> None:
        pages = tokens_max // PAGE_TOKENS
        self.layout = layout
        self.data = torch.empty(
            len(layout.span),
            2,
            layout.heads,
            pages * PAGE_TOKENS,
            layout.head_size,
            dtype=layout.number,
            device=device,
        )
        self._table = PageTable(pages)
        self._sessions: dict[SessionId, SessionKv] = {}
        self._file = PageFile(disk, layout.position_bytes * PAGE_TOKENS)
        self._kept = KeptPages(self._file)
        self._clock_ms = clock_ms
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
            known = self._sessions.get(session)
            if known is None:
                pages = self._table.allocate(pages_for(tokens))
                self._sessions[session] = SessionKv(self, tokens, sampling, span, pages)
                return
            if known.span != span:
                raise LocalProtocolError("a session cannot change its layers")
            if tokens > known.tokens:
                known.pages += self._table.allocate(pages_for(tokens) - len(known.pages))
                known.tokens = tokens
            known.sampling = sampling

    def get(self, session: SessionId) -> SessionKv | None:
        """A session's cache, None if it was never reserved or is freed."""
        return self._sessions.get(session)

    def free(self, session: SessionId) -> None:
        """Give a session's pages back; nothing happens if it is unknown."""
        with self._lock:
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
        self._let_go(gone.adopted)

    def _let_go(self, adopted: Iterable[Adopted]) -> None:
        for one in adopted:
            if one.page is not None:
                self._table.release([one.page])
            if one.slot is not None:
                self._file.release(one.slot)

    # Shared prefixes ----------------------------------------------------------------

    @property
    def prefixes(self) -> PrefixUse:
        """What published prefixes take in memory and on disk."""
        with self._lock:
            parked = self._kept.parked * PAGE_TOKENS
            return PrefixUse(self._table.filed * PAGE_TOKENS, parked, self._file.bytes_used)

    def adopt(self, session: SessionId, tenant: str, hashes: Sequence[bytes]) -> int:
        """Let a new session start with a prefix the tenant published; returns its tokens.

        The pages are held until the first write, which may begin at or before that
        position and uses the part up to there. Only then is the disk read.
        """
        with self._lock:
            kv = self._known(session)
            if kv.length or kv.adopted:
                raise LocalProtocolError("a session with tokens cannot adopt a prefix")
            keys = [prefix_key(self._secret, tenant, kv.span, name) for name in hashes]
            kv.adopted = tuple(self._found(keys[: len(kv.pages)]))
            kv.length = len(kv.adopted) * PAGE_TOKENS
            self._table.used([one.key for one in kv.adopted], self._clock_ms())
            return kv.length

    def _found(self, keys: Sequence[bytes]) -> Iterator[Adopted]:
        for key in keys:
            page, slot = self._table.page_of(key), None
            if page is not None:
                self._table.hold([page])
            else:
                slot = self._kept.find(key)
                if slot is None:
                    return
            yield Adopted(key, page, slot)

    def publish(
        self, session: SessionId, tenant: str, hashes: Sequence[bytes], keep_ms: int = 0
    ) -> None:
        """Keep the session's first pages for the tenant, one hash for each.

        They go when their room is needed; with ``keep_ms`` they are also put on disk, for
        so long.
        """
        with self._lock:
            kv = self._known(session)
            if len(hashes) * PAGE_TOKENS > kv.length or kv.adopted:
                raise LocalProtocolError("a prefix that is not cached cannot be published")
            keys = [prefix_key(self._secret, tenant, kv.span, name) for name in hashes]
            now_ms = self._clock_ms()
            self._table.file(keys, kv.pages[: len(hashes)], now_ms)
            if keep_ms > 0:
                self._kept.keep(keys, kv.span, now_ms + keep_ms)

    def make_writable(self, kv: SessionKv, first_position: int, end: int) -> None:
        """Settle which adopted pages are used, and copy shared ones in [first, end).

        Raises ``CapacityError`` if no page is free for a copy, or the disk fails.
        """
        if kv.adopted:
            self._settle(kv, pages_for(first_position))
        with self._lock:
            for index in range(first_position // PAGE_TOKENS, pages_for(end)):
                page = kv.pages[index]
                if self._table.published_by_sole_holder(page):
                    self._table.withdraw(page)
                elif self._table.shared(page):
                    self._copy(kv, index, kept=index * PAGE_TOKENS < first_position)

    def _settle(self, kv: SessionKv, used: int) -> None:
        """Take the pages in memory for the session's own, or copy them; read those on disk."""
        with self._lock:
            adopted, kv.adopted = kv.adopted, ()
            used = min(used, len(adopted))
            self._let_go(adopted[used:])
            pages = list(kv.pages)
            copies = self._is_roomy() and len(_slices(kv.pages)) == 1
            for index, one in enumerate(adopted[:used]):
                if one.page is not None and not copies:
                    self._table.release([pages[index]])
                    pages[index] = one.page
            kv.pages = tuple(pages)
        if copies:
            self._copy_all(kv, adopted[:used])
        on_disk = [
            (page, one)
            for page, one in zip(pages, adopted[:used], strict=False)
            if one.slot is not None
        ]
        try:
            for page, one in on_disk:
                self._read(kv.span, page, one)
        except CapacityError:
            kv.length = 0  # nothing of the prefix may be built upon
            raise
        finally:
            with self._lock:
                self._let_go(one for _, one in on_disk)
        with self._lock:
            self._table.file([one.key for _, one in on_disk], [page for page, _ in on_disk])
            self._table.used([one.key for one in adopted[:used]], self._clock_ms())

    def _is_roomy(self) -> bool:
        return 2 * self._table.available >= self._table.total

    def _copy_all(self, kv: SessionKv, adopted: Sequence[Adopted]) -> None:
        """Copy those in memory into the session's first pages, and let go of them."""
        shared = [
            (one.page, own)
            for one, own in zip(adopted, kv.pages, strict=False)
            if one.page is not None
        ]
        for page, own in shared:
            self._page(kv.span, own).copy_(self._page(kv.span, page))
        with self._lock:
            self._table.release([page for page, _ in shared])

    def _copy(self, kv: SessionKv, index: int, *, kept: bool) -> None:
        shared = kv.pages[index]
        (page,) = self._table.allocate(1)
        if kept:
            at, to = shared * PAGE_TOKENS, page * PAGE_TOKENS
            self.data[..., to : to + PAGE_TOKENS, :] = self.data[..., at : at + PAGE_TOKENS, :]
        kv.pages = (*kv.pages[:index], page, *kv.pages[index + 1 :])
        self._table.release([shared])

    # Prefixes on disk ---------------------------------------------------------------

    def park(self) -> None:
        """Write to disk what is to be kept, and forget what is past its time.

        Takes as long as the disk does: call it from a thread that nobody waits for.
        """
        with self._lock:
            now_ms = self._clock_ms()
            self._kept.expire(now_ms)
            self._table.expire(now_ms - PREFIX_IDLE_MS)
            wishes = self._kept.wishes()
        for key, span in wishes:
            self._park_page(key, span)

    def _park_page(self, key: bytes, span: Span) -> None:
        with self._lock:
            page, slot = self._table.page_of(key), None
            if page is not None:
                slot = self._taken_slot()
            if page is None or slot is None:
                self._kept.forget_wish(key)
                return
            self._table.hold([page])
        try:
            self._file.write(slot, _bytes_of(self._page(span, page).cpu().contiguous()))
        except CapacityError:
            with self._lock:
                self._kept.forget_wish(key)
                self._file.release(slot)
        else:
            with self._lock:
                self._kept.written(key, slot)
        finally:
            with self._lock:
                self._table.release([page])

    def _taken_slot(self) -> int | None:
        try:
            return self._kept.take_slot()
        except CapacityError:
            return None

    def _read(self, span: Span, page: int, one: Adopted) -> None:
        assert one.slot is not None
        here = self._page(span, page)
        there = torch.empty(here.shape, dtype=here.dtype)
        try:
            self._file.read(one.slot, _bytes_of(there))
        except CapacityError:
            with self._lock:
                self._kept.drop(one.key)
            raise
        here.copy_(there)

    def _page(self, span: Span, page: int) -> torch.Tensor:
        """One page's numbers in the layers of a span."""
        first, at = self.layout.span.start, page * PAGE_TOKENS
        return self.data[span.start - first : span.end - first, ..., at : at + PAGE_TOKENS, :]

    def _known(self, session: SessionId) -> SessionKv:
        kv = self._sessions.get(session)
        if kv is None:
            raise LocalProtocolError(f"session {session.hex()} holds no KV pages")
        return kv


def _bytes_of(numbers: torch.Tensor) -> memoryview:
    return numbers.view(torch.uint8).numpy().data.cast("B")
