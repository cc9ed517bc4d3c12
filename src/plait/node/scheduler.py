"""Which queued frames a stage computes together. Pure.

A step takes the oldest frame of each session: first those of few rows (decoding, drafts),
up to ``rows_max`` rows, then one piece of one frame of many (prefill), so that decoding
waits for a piece at most. Frames are always cut into the same pieces, whoever else is there:
results must not depend on that. Frames of one session stay in order because a later one
depends on the cache of the earlier.

Among sessions, whoever has had least goes first: each client is charged the rows computed
for it, in each class on its own, a class of lower priority four times as much (start-time
fair queueing: Goyal et al., SIGCOMM 1996). Nobody waits for ever, and who was away has
saved up nothing.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

NARROW_ROWS_MAX = 32
"""Frames of at most that many rows count as decoding."""
PIECE_ROWS = 128
"""Rows of a piece of prefill: long enough for full speed, short enough to wait for."""
_CLASS_STEP = 4
_CLIENTS_MAX = 1024

Lane = tuple[Hashable, int]
"""A client and a class of priority, charged together."""


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """Rows ``[start, start + rows)`` of an item; ``last`` if they are its last ones."""

    item: T
    start: int
    rows: int
    last: bool


@dataclass(slots=True)
class _Line(Generic[T]):
    """One session's items in order; of the first, ``started`` rows were taken."""

    items: deque[tuple[int, T]] = field(default_factory=deque)
    """With the number of their arrival."""
    started: int = 0


@dataclass(slots=True)
class Scheduler(Generic[T]):
    """A queue of work, ``key`` naming the session and ``rows`` the size of an item.

    ``client`` says who is charged, and ``priority`` how dear a row is: 0 for the most
    urgent class, 1 for the next. ``piece_rows`` is where frames of many rows are cut; None
    leaves them whole. Whoever adds bounds the queue.
    """

    key: Callable[[T], Hashable]
    rows: Callable[[T], int]
    rows_max: int = 512
    client: Callable[[T], Hashable] = lambda item: None
    priority: Callable[[T], int] = lambda item: 0
    piece_rows: int | None = None
    _lines: dict[Hashable, _Line[T]] = field(default_factory=dict)
    _charged: dict[Lane, float] = field(default_factory=dict)
    _clock: float = 0.0
    _arrivals: int = 0
    _size: int = 0

    def __len__(self) -> int:
        return self._size

    def add(self, item: T) -> None:
        """Queue an item."""
        self._lines.setdefault(self.key(item), _Line()).items.append((self._arrivals, item))
        self._arrivals += 1
        self._size += 1

    def take(self) -> list[T]:
        """Remove and return the next items, for who computes them whole; empty only when
        nothing is queued. ``piece_rows`` must be None."""
        assert self.piece_rows is None
        return [part.item for part in self.take_parts()]

    def take_parts(self) -> list[Part[T]]:
        """Remove and return the next step's parts; empty only when nothing is queued."""
        parts: list[Part[T]] = []
        starts: list[float] = []
        total, wide = 0, False
        for key, line in self._in_order():
            _, item = line.items[0]
            rows = self._next_rows(item, line.started)
            if self._is_cut(item):
                if wide:
                    break
                wide = True
            elif parts and total + rows > self.rows_max:
                continue
            starts.append(self._start(self._lane(item)))
            parts.append(self._taken(key, line, rows))
            total += rows
        self._wind_clock(starts)
        return parts

    def abandon(self, part: Part[T]) -> None:
        """Forget the rest of an item whose part failed."""
        key = self.key(part.item)
        line = self._lines.get(key)
        if line is not None and line.started and line.items[0][1] is part.item:
            self._drop_first(key, line)

    def _in_order(self) -> list[tuple[Hashable, _Line[T]]]:
        """Sessions by who comes first: few rows before many, then the least charged."""

        def place(entry: tuple[Hashable, _Line[T]]) -> tuple[bool, float, int]:
            arrival, item = entry[1].items[0]
            return self._is_cut(item), self._start(self._lane(item)), arrival

        return sorted(self._lines.items(), key=place)

    def _is_cut(self, item: T) -> bool:
        return self.piece_rows is not None and self.rows(item) > NARROW_ROWS_MAX

    def _next_rows(self, item: T, started: int) -> int:
        rows = self.rows(item)
        if self.piece_rows is None or not self._is_cut(item):
            return rows
        return min(self.piece_rows, rows - started)

    def _taken(self, key: Hashable, line: _Line[T], rows: int) -> Part[T]:
        _, item = line.items[0]
        self._charge(item, rows)
        last = line.started + rows >= self.rows(item)
        part = Part(item, line.started, rows, last)
        if last:
            self._drop_first(key, line)
        else:
            line.started += rows
        return part

    def _drop_first(self, key: Hashable, line: _Line[T]) -> None:
        line.items.popleft()
        line.started = 0
        self._size -= 1
        if not line.items:
            del self._lines[key]

    def _lane(self, item: T) -> Lane:
        return self.client(item), self.priority(item)

    def _start(self, lane: Lane) -> float:
        return max(self._charged.get(lane, 0.0), self._clock)

    def _charge(self, item: T, rows: int) -> None:
        lane = self._lane(item)
        self._charged[lane] = self._start(lane) + rows * float(_CLASS_STEP) ** lane[1]

    def _wind_clock(self, starts: Sequence[float]) -> None:
        """Time is when the least charged of those just served started."""
        if not self._lines:  # all were served: nobody is behind
            self._charged.clear()
            self._clock = 0.0
            return
        self._clock = min(starts)
        if len(self._charged) > _CLIENTS_MAX:
            self._charged = {
                lane: charged for lane, charged in self._charged.items() if charged > self._clock
            }
