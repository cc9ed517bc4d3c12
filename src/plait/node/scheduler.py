"""Which queued frames a stage computes together. Pure.

A step takes the oldest frame of each session: first those of few rows (decoding, drafts),
up to ``rows_max`` rows, then one piece of one frame of many (prefill), so that decoding
waits for a piece at most. Frames are always cut into the same pieces, whoever else is there:
results must not depend on that. Frames of one session stay in order because a later one
depends on the cache of the earlier.

Among clients, whoever has had least goes first: each is charged the rows computed
for it, in each class on its own, a class of lower priority four times as much (start-time
fair queueing: Goyal et al., SIGCOMM 1996). Nobody waits for ever, and who was away has
saved up nothing. While several clients decode, a step is cut so that each gets its share of
the stage's time (``shares``); who is alone is never held back.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import islice
from typing import Generic, TypeVar

from plait.node.shares import StepLine, level_of, rows_allowed

T = TypeVar("T")

NARROW_ROWS_MAX = 32
"""Frames of at most that many rows count as decoding."""
PIECE_ROWS = 128
"""Rows of a piece of prefill: long enough for full speed, short enough to wait for."""
ABSENT_STEPS = 8
"""A client that had rows so few steps ago is still decoding: its next ones are in other stages."""
_CLASS_STEP = 4.0
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


_Lanes = dict[Lane, deque[tuple[Hashable, _Line[T]]]]


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
    _steps: int = 0
    _step_line: StepLine = field(default_factory=StepLine)
    _decoding: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    """The step at which a client last had rows of decoding to compute, and how many."""

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
        self._steps += 1
        if (alone := self._taken_alone()) is not None:
            return [alone]
        parts: list[Part[T]] = []
        starts: list[float] = []
        narrow, wide = self._by_lane()
        total, level = 0, self._level(narrow)
        taken: Counter[Lane] = Counter()
        for key, line in self._in_turn(narrow):
            _, item = line.items[0]
            rows, lane = self.rows(item), self._lane(item)
            if taken[lane] >= level or (parts and total + rows > self.rows_max):
                continue
            starts.append(self._start(lane))
            parts.append(self._taken(key, line, rows))
            taken[lane] += rows
            total += rows
        for key, line in islice(self._in_turn(wide), 1):
            _, item = line.items[0]
            starts.append(self._start(self._lane(item)))
            parts.append(self._taken(key, line, self._next_rows(item, line.started)))
        self._wind_clock(starts)
        return parts

    def _taken_alone(self) -> Part[T] | None:
        """The one frame that is queued, if no other client decodes: what all the sums of
        ``take_parts`` come to then, and what one stream waits for in each stage."""
        if self._size != 1:
            return None
        [(key, line)] = self._lines.items()
        _, item = line.items[0]
        client = self.client(item)
        if self._is_cut(item) or not self._decoding.keys() <= {client}:
            return None
        rows = self.rows(item)
        self._decoding = {client: (self._steps, rows)}
        self._drop_first(key, line)
        self._wind_clock(())
        return Part(item, 0, rows, last=True)

    def stepped(self, parts: Sequence[Part[T]], took_us: float) -> None:
        """Note what computing the parts of a step took; pieces of long frames tell nothing here."""
        if parts and not any(self._is_cut(part.item) for part in parts):
            self._step_line.note(sum(part.rows for part in parts), took_us)

    def abandon(self, part: Part[T]) -> None:
        """Forget the rest of an item whose part failed."""
        key = self.key(part.item)
        line = self._lines.get(key)
        if line is not None and line.started and line.items[0][1] is part.item:
            self._drop_first(key, line)

    def _by_lane(self) -> tuple[_Lanes[T], _Lanes[T]]:
        """Whose first frame has few rows and whose has many, by lane, first come first."""
        narrow: _Lanes[T] = {}
        wide: _Lanes[T] = {}
        for key, line in sorted(self._lines.items(), key=lambda entry: entry[1].items[0][0]):
            item = line.items[0][1]
            lanes = wide if self._is_cut(item) else narrow
            lanes.setdefault(self._lane(item), deque()).append((key, line))
        return narrow, wide

    def _in_turn(self, lanes: _Lanes[T]) -> Iterator[tuple[Hashable, _Line[T]]]:
        """Sessions in the order in which their clients are due; each that is taken is charged."""

        def place(lane: Lane) -> tuple[float, int, Lane]:
            return self._start(lane), lanes[lane][0][1].items[0][0], lane

        due = [place(lane) for lane in lanes]
        heapify(due)
        while due:
            lane = due[0][2]
            yield lanes[lane].popleft()
            if lanes[lane]:
                heapreplace(due, place(lane))
            else:
                heappop(due)

    def _level(self, narrow: _Lanes[T]) -> int:
        """How many rows of decoding the next step takes of each client, in each class."""
        queued: Counter[Hashable] = Counter()
        for lane, lines in narrow.items():
            queued[lane[0]] += sum(self.rows(line.items[0][1]) for _, line in lines)
        lately = {
            client: (step, rows)
            for client, (step, rows) in self._decoding.items()
            if self._steps - step < ABSENT_STEPS
        }
        self._decoding = lately | {client: (self._steps, rows) for client, rows in queued.items()}
        wanted = [rows for _, rows in self._decoding.values()]
        return level_of(wanted, rows_allowed(self._step_line, wanted))

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
        self._charged[lane] = self._start(lane) + rows * self._price(lane)

    def _price(self, lane: Lane) -> float:
        return _CLASS_STEP ** lane[1]

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
