"""Which KV page belongs to whom: counted references, and prefixes that outlive their session.

Pure: it hands out page numbers, and whoever owns the memory keeps the contents. A page with
more than one holder is never written to; a session that must, copies it first.

Prefixes. A client names the full pages of a prompt by a hash chain over its token ids
(``prefix_hashes``), the same for every stage, since only the first one sees ids. A stage
files a page under a key made from that name, its tenant (the peer id of the authenticated
client) and a secret of its own (``prefix_key``). So a tenant finds only pages it published
itself, can learn nothing of others' prompts, and can mislead nobody but itself. A client
that serves several users begins each one's chain with another salt, which keeps them apart
in the same way.
"""

import hashlib
import hmac
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from plait.errors import CapacityError, LocalProtocolError
from plait.types import Span

PAGE_TOKENS = 16
HASH_BYTES = 16
_CHAIN_LABEL = b"plait/prefix/1"

Pages = tuple[int, ...]
"""Page numbers in the order of a session's positions."""


def pages_for(tokens: int) -> int:
    """Whole pages that hold ``tokens`` positions."""
    return -(-tokens // PAGE_TOKENS)


def prefix_hashes(ids: Sequence[int], salt: bytes = b"") -> tuple[bytes, ...]:
    """One hash per full page of ``ids``, each over ``salt`` and all ids up to that page's end."""
    hashes: list[bytes] = []
    chained = hashlib.sha256(_CHAIN_LABEL + salt).digest()[:HASH_BYTES]
    for end in range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS):
        page = b"".join(token.to_bytes(4, "big") for token in ids[end - PAGE_TOKENS : end])
        chained = hashlib.sha256(chained + page).digest()[:HASH_BYTES]
        hashes.append(chained)
    return tuple(hashes)


def prefix_key(secret: bytes, tenant: str, span: Span, name: bytes) -> bytes:
    """What a page is filed under at a node with that ``secret``, for one tenant and span."""
    told = f"{tenant}\n{span}\n".encode() + name
    return hmac.digest(secret, told, "sha256")[:HASH_BYTES]


class PageTable:
    """``total`` pages, each free or held one or more times; free ones are kept in runs.

    Pages of published prefixes are held by the table itself, one time each. When nothing
    else is free, those that nobody else holds are given up, the longest unused first.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._holders = [0] * total
        self._free = list(range(total))  # ascending
        self._filed: OrderedDict[bytes, int] = OrderedDict()
        """Key to page, the longest unused first."""
        self._used_ms: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle = 0
        """Filed pages that nobody but the table holds."""

    @property
    def available(self) -> int:
        """Pages that ``allocate`` could hand out."""
        return len(self._free) + self._idle

    @property
    def filed(self) -> int:
        """Pages of published prefixes."""
        return len(self._filed)

    def shared(self, page: int) -> bool:
        """Whether more than one holder, the table included, would see a write."""
        return self._holders[page] > 1

    def published_by_sole_holder(self, page: int) -> bool:
        """Whether one session holds the page and, besides it, only the table."""
        return self._holders[page] == 2 and page in self._keys

    def allocate(self, count: int) -> Pages:
        """Hand out ``count`` pages, next to each other if possible.

        Raises ``CapacityError`` when fewer are available.
        """
        if count > self.available:
            asked, free = count * PAGE_TOKENS, self.available * PAGE_TOKENS
            raise CapacityError(f"{asked} tokens of KV cache were asked for, {free} are free")
        self._evict(count - len(self._free))
        pages = self._run(count)
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            if not self._holders[page]:
                raise LocalProtocolError(f"KV page {page} is free")
            if self._only_filed(page):
                self._idle -= 1
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each; what nobody holds becomes free."""
        for page in pages:
            if not self._holders[page] or self._only_filed(page):
                raise LocalProtocolError(f"KV page {page} is not held")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.insert(bisect_left(self._free, page), page)
            elif self._only_filed(page):
                self._idle += 1

    def file(self, keys: Sequence[bytes], pages: Sequence[int], now_ms: int = 0) -> None:
        """Publish held pages under their keys, the first page of the prefix first.

        A key that is known keeps its page, and so does a page that has a key.
        """
        for key, page in zip(keys, pages, strict=True):
            if not self._holders[page]:
                raise LocalProtocolError(f"KV page {page} is free")
            if key not in self._filed and page not in self._keys:
                self._filed[key] = page
                self._keys[page] = key
                self._holders[page] += 1
        self.used(keys, now_ms)

    def page_of(self, key: bytes) -> int | None:
        """The page published under a key."""
        return self._filed.get(key)

    def used(self, keys: Sequence[bytes], now_ms: int = 0) -> None:
        """Note that a prefix was of use, so that others are given up before it."""
        # Last pages first: without its start, the end of a prefix is of no use.
        for key in reversed(keys):
            if key in self._filed:
                self._filed.move_to_end(key)
                self._used_ms[key] = now_ms

    def expire(self, before_ms: int) -> None:
        """Publish no more what was last of use before that time."""
        stale = []
        for key, page in self._filed.items():
            if self._used_ms[key] >= before_ms:
                break
            stale.append(page)
        for page in stale:
            self.withdraw(page)

    def withdraw(self, page: int) -> None:
        """Take a page out of the published ones; nothing happens if it is not there."""
        key = self._keys.get(page)
        if key is None:
            return
        if self._only_filed(page):
            self._idle -= 1
        del self._filed[key], self._keys[page]
        del self._used_ms[key]
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.insert(bisect_left(self._free, page), page)

    def _only_filed(self, page: int) -> bool:
        return self._holders[page] == 1 and page in self._keys

    def _evict(self, count: int) -> None:
        if count <= 0:
            return
        idle = (page for page in self._filed.values() if self._only_filed(page))
        for page in [next(idle) for _ in range(count)]:
            self.withdraw(page)

    def _run(self, count: int) -> Pages:
        """Take ``count`` free pages: from the first run that is long enough, or the first ones."""
        free = self._free
        start = 0
        while start + count <= len(free):
            end = start + 1
            while end < start + count and free[end] == free[end - 1] + 1:
                end += 1
            if end == start + count:
                break
            start = end
        else:
            start = 0
        pages = tuple(free[start : start + count])
        del free[start : start + count]
        return pages


def runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring pages in one: (first page, number of pages) of each run, in order."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if found and page == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return found
