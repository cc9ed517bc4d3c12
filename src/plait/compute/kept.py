"""Which published pages are kept on disk, and until when: what ``keep_alive`` asks for.

A page is first only wished for; whoever has time writes it (``KvCache.park``). While it is
also in memory the copy on disk is not read; it is what is left once a session has needed
the room. A page that nobody uses is the first to go when the disk is full.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from plait.compute.spill import PageFile
from plait.types import Span


@dataclass(slots=True)
class _Wish:
    span: Span
    until_ms: int


@dataclass(slots=True)
class _Parked:
    slot: int
    until_ms: int


class KeptPages:
    """The pages' keys, with the slots of ``file`` that hold them."""

    def __init__(self, file: PageFile) -> None:
        self._file = file
        self._wishes: OrderedDict[bytes, _Wish] = OrderedDict()
        self._parked: OrderedDict[bytes, _Parked] = OrderedDict()
        """The longest unused first."""

    @property
    def parked(self) -> int:
        """Pages on disk."""
        return len(self._parked)

    def keep(self, keys: Sequence[bytes], span: Span, until_ms: int) -> None:
        """Keep the pages of a prefix, its first page first, at least until then."""
        for key in keys:
            parked = self._parked.get(key)
            if parked is not None:
                parked.until_ms = max(parked.until_ms, until_ms)
                continue
            wish = self._wishes.setdefault(key, _Wish(span, until_ms))
            wish.until_ms = max(wish.until_ms, until_ms)

    def wishes(self) -> list[tuple[bytes, Span]]:
        """What is to be written, in order, with the layers that it covers."""
        return [(key, wish.span) for key, wish in self._wishes.items()]

    def forget_wish(self, key: bytes) -> None:
        """A page is not to be had any more."""
        self._wishes.pop(key, None)

    def take_slot(self) -> int | None:
        """A slot to write to; gives up the longest unused page if all are taken.

        None if even so none is free. Raises ``CapacityError`` if there can be no file.
        """
        slot = self._file.take()
        if slot is None and self._parked:
            self.drop(next(iter(self._parked)))
            slot = self._file.take()
        return slot

    def written(self, key: bytes, slot: int) -> None:
        """A wish is fulfilled: its page is in that slot."""
        wish = self._wishes.pop(key, None)
        if wish is None or key in self._parked:
            self._file.release(slot)
            return
        self._parked[key] = _Parked(slot, wish.until_ms)

    def find(self, key: bytes) -> int | None:
        """The slot of a page, one holder more, or None."""
        parked = self._parked.get(key)
        if parked is None:
            return None
        self._parked.move_to_end(key)
        self._file.hold(parked.slot)
        return parked.slot

    def drop(self, key: bytes) -> None:
        """Keep a page no more; nothing happens if it is unknown."""
        self._wishes.pop(key, None)
        parked = self._parked.pop(key, None)
        if parked is not None:
            self._file.release(parked.slot)

    def expire(self, now_ms: int) -> None:
        """Drop what is past its time."""
        for pages in (self._wishes, self._parked):
            for key in [key for key, page in pages.items() if page.until_ms <= now_ms]:
                self.drop(key)
