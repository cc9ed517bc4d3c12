"""Which queued frames a stage computes together. Pure.

A batch takes the oldest frame of each session, up to ``rows_max`` rows, in arrival order.
Frames of one session stay in order because a later one depends on the cache of the earlier.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Scheduler(Generic[T]):
    """A queue of work, ``key`` naming the session and ``rows`` the size of an item.

    Whoever adds bounds it.
    """

    key: Callable[[T], Hashable]
    rows: Callable[[T], int]
    rows_max: int = 512
    _queue: deque[T] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, item: T) -> None:
        """Queue an item."""
        self._queue.append(item)

    def take(self) -> list[T]:
        """Remove and return the next batch; empty only when nothing is queued."""
        batch: list[T] = []
        later: deque[T] = deque()
        seen: set[Hashable] = set()
        total = 0
        while self._queue:
            item = self._queue.popleft()
            key, rows = self.key(item), self.rows(item)
            if key in seen or (batch and total + rows > self.rows_max):
                later.append(item)
            else:
                batch.append(item)
                total += rows
            seen.add(key)
        self._queue = later
        return batch
