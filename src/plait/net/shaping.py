"""When what enters a shaped link comes out again. Pure: time and randomness are passed in.

One ``Pipe`` is one direction between two peers. Packets can be lost; a byte stream cannot,
so there a loss is the time its repetition would take. Nothing overtakes: jitter stretches
the order of arrival but never breaks it, as on one path through a queue. Times are seconds
of the caller's monotonic clock, rates bits per second.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from plait.errors import ConfigError

QUEUE_S = 0.2
"""How much a rate-limited link may hold before it drops: a router's drop-tail buffer."""

SEGMENT_BYTES = 1448
"""What one TCP segment carries over Ethernet; decides how likely a chunk meets a loss."""

RETRANSMIT_S_MIN = 0.2
"""The least time until TCP repeats a lost tail: Linux's minimum, above RFC 6298's estimate."""

_DELAY_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What one direction of a link does to traffic; the default is nothing.

    ``jitter_s`` is the half width of a uniform deviation from ``delay_s``; ``rate_bps`` 0 is
    unlimited; ``loss`` is the share of packets lost. Raises ``ConfigError`` out of range.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    rate_bps: float = 0.0
    loss: float = 0.0
    cut: bool = False

    def __post_init__(self) -> None:
        figures = (self.delay_s, self.jitter_s, self.rate_bps, self.loss)
        if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
            raise ConfigError("delay, jitter, rate and loss must be finite and not negative")
        if self.delay_s > _DELAY_S_MAX or self.jitter_s > self.delay_s:
            raise ConfigError(f"a delay is at most {_DELAY_S_MAX:g} s and jitter at most the delay")
        if self.loss >= 1:
            raise ConfigError("a loss is less than 1", remedy="a cut lets nothing through")


class Pipe:
    """One direction of one link. ``draw`` returns values in [0, 1)."""

    def __init__(self, shape: Shape, draw: Callable[[], float]) -> None:
        self.shape = shape
        self.passed = self.dropped = 0
        self._draw = draw
        self._busy_until_s = -math.inf
        self._last_s = -math.inf

    def packet(self, now_s: float, size_bytes: int) -> float | None:
        """When a packet arrives; None if it never does (cut, lost, or the queue is full)."""
        shape = self.shape
        if shape.cut or (shape.loss and self._draw() < shape.loss):
            self.dropped += 1
            return None
        sent_s = self._sent_s(now_s, size_bytes)
        if sent_s - now_s > QUEUE_S:
            self.dropped += 1
            return None
        self._busy_until_s = sent_s
        return self._arrival_s(sent_s)

    def chunk(self, now_s: float, size_bytes: int) -> float | None:
        """When the last byte of a stream's chunk arrives; None while the link is cut.

        The caller bounds what it keeps waiting: a stream is slowed, never dropped.
        """
        shape = self.shape
        if shape.cut:
            return None
        sent_s = self._busy_until_s = self._sent_s(now_s, size_bytes)
        if shape.loss:
            intact = (1 - shape.loss) ** math.ceil(size_bytes / SEGMENT_BYTES)
            while self._draw() >= intact:
                sent_s += RETRANSMIT_S_MIN + 2 * shape.delay_s
        return self._arrival_s(sent_s)

    def _sent_s(self, now_s: float, size_bytes: int) -> float:
        rate_bps = self.shape.rate_bps
        return max(now_s, self._busy_until_s) + (size_bytes * 8 / rate_bps if rate_bps else 0.0)

    def _arrival_s(self, sent_s: float) -> float:
        shape = self.shape
        deviation_s = (2 * self._draw() - 1) * shape.jitter_s if shape.jitter_s else 0.0
        self._last_s = max(self._last_s, sent_s + shape.delay_s + deviation_s)
        self.passed += 1
        return self._last_s


@dataclass(frozen=True, slots=True)
class Change:
    """New figures for every link from one of ``sources`` to one of ``targets``.

    An empty tuple is everybody; None leaves a figure as it is.
    """

    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    delay_s: float | None = None
    jitter_s: float | None = None
    rate_bps: float | None = None
    loss: float | None = None
    cut: bool | None = None

    def applied(self, shape: Shape) -> Shape:
        """The shape after the change; raises ``ConfigError`` if it cannot be."""
        named = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("sources", "targets") and value is not None
        }
        return replace(shape, **named)


class LinkTable:
    """The pipes between named ends, one per ordered pair."""

    def __init__(
        self,
        names: Sequence[str],
        shape: Shape,
        draw: Callable[[], float],
        special: Mapping[tuple[str, str], Shape] | None = None,
    ) -> None:
        special = special or {}
        self._pipes = {
            (source, target): Pipe(special.get((source, target), shape), draw)
            for source in names
            for target in names
            if source != target
        }
        self._names = frozenset(names)

    def pipe(self, source: str, target: str) -> Pipe | None:
        """The pipe of a pair; None for an unknown one or an end and itself."""
        return self._pipes.get((source, target))

    def apply(self, change: Change) -> int:
        """Change what it names, all or nothing; returns how many links it concerned.

        Raises ``ConfigError`` for an unknown name or impossible figures.
        """
        self._check(change.sources)
        self._check(change.targets)
        changed = [
            (pipe, change.applied(pipe.shape))
            for (source, target), pipe in self._pipes.items()
            if (not change.sources or source in change.sources)
            and (not change.targets or target in change.targets)
        ]
        for pipe, shape in changed:
            pipe.shape = shape
        return len(changed)

    def describe(self) -> list[dict[str, object]]:
        """Every link and what it does now, JSON-ready."""
        return [
            {"source": source, "target": target, **asdict(pipe.shape)}
            | {"passed": pipe.passed, "dropped": pipe.dropped}
            for (source, target), pipe in self._pipes.items()
        ]

    def _check(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._names:
                raise ConfigError(
                    f"there is no end {name!r}; there are {', '.join(sorted(self._names))}"
                )
