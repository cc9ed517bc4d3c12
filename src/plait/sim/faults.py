"""What goes wrong, drawn from the seed: when, to whom, for how long.

Every fault ends before the run does, so that what must hold at rest can be checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plait.sim.engine import MS, Engine, S
from plait.sim.network import Wires

Undo = Callable[[], None]

PREFERENCE = 0.8
"""The share of faults that hit a preferred host."""


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad it gets: mean time between faults, and the kinds with their weights."""

    between_us: int
    lasts_us: tuple[int, int]
    kinds: tuple[tuple[str, int], ...]


class Faults:
    """Schedules faults among hosts, by kind; ``special`` adds kinds of a scenario."""

    def __init__(
        self,
        engine: Engine,
        wires: Wires,
        mortal: Sequence[str],
        special: dict[str, Callable[[], Undo | None]] | None = None,
    ) -> None:
        self.count = 0
        self.preferred: Callable[[], Sequence[str]] = tuple
        """Hosts that matter most just now: most faults hit one of them, if any."""
        self._engine, self._wires, self._mortal = engine, wires, tuple(mortal)
        self._special = special or {}
        self._expected = 0
        self._undos: list[Undo] = []
        self._troubled: set[str] = set()
        self._jumped: set[str] = set()

    def schedule(self, weather: Weather, from_us: int, until_us: int) -> None:
        """Draw every fault of a span of time."""
        chance = self._engine.random
        at_us = from_us
        kinds, weights = zip(*weather.kinds, strict=True)
        while True:
            at_us += round(chance.expovariate(1 / weather.between_us))
            if at_us >= until_us:
                return
            kind = chance.choices(kinds, weights)[0]
            self._expect(kind, at_us, chance.randrange(*weather.lasts_us))

    def begin(self, kind: str, lasts_us: int) -> None:
        """Let one fault happen now."""
        self._begin(kind, lasts_us)

    @property
    def pending(self) -> bool:
        """Whether faults are still to come, or to be mended."""
        return bool(self._expected or self._undos)

    def _expect(self, kind: str, at_us: int, lasts_us: int) -> None:
        self._expected += 1

        def begin() -> None:
            self._expected -= 1
            self._begin(kind, lasts_us)

        self._engine.at(at_us, "", begin)

    def end_all(self) -> None:
        """Mend everything that is still broken."""
        while self._undos:
            self._undos[-1]()

    def _begin(self, kind: str, lasts_us: int) -> None:
        start = self._special.get(kind) or getattr(self, f"_{kind}")
        mend = start()
        if mend is None:
            return
        self.count += 1

        def undo() -> None:
            if undo in self._undos:
                self._undos.remove(undo)
                mend()

        self._undos.append(undo)
        self._engine.after(lasts_us, "", undo)

    def victim(self) -> str | None:
        """A mortal host that is well, from now on in trouble until ``recovered``."""
        chance = self._engine.random
        well = [name for name in self._mortal if name not in self._troubled]
        preferred = [name for name in self.preferred() if name in well]
        if preferred and chance.random() < PREFERENCE:
            well = preferred
        if not well:
            return None
        name = chance.choice(well)
        self._troubled.add(name)
        return name

    def recovered(self, name: str) -> None:
        """A victim is well again."""
        self._troubled.discard(name)

    # Kinds ----------------------------------------------------------------------------

    def _crash(self) -> Undo | None:
        name = self.victim()
        if name is None:
            return None
        self._engine.note(f"FAULT {name} crashes")
        self._wires.crash(name)

        def restart() -> None:
            self._engine.note(f"FAULT {name} starts again")
            self.recovered(name)
            self._wires.hosts[name].start()

        return restart

    def _hang(self) -> Undo | None:
        name = self.victim()
        if name is None:
            return None
        self._engine.note(f"FAULT {name} hangs")
        self._wires.hang(name)

        def resume() -> None:
            self._engine.note(f"FAULT {name} goes on")
            self.recovered(name)
            self._wires.resume(name)

        return resume

    def _cut(self) -> Undo | None:
        """One line, one way or both ways."""
        chance, names = self._engine.random, sorted(self._wires.hosts)
        source, target = chance.sample(names, k=2)
        pairs = [(source, target)]
        if chance.random() < 0.5:
            pairs.append((target, source))
        return self._cut_pairs(pairs, f"line {source} to {target}, {len(pairs)} ways")

    def _partition(self) -> Undo | None:
        """One mortal host from everybody, one way or both ways."""
        chance, name = self._engine.random, self.victim()
        if name is None:
            return None
        others = [other for other in sorted(self._wires.hosts) if other != name]
        ways = chance.choice(["in", "out", "both"])
        pairs = [(other, name) for other in others if ways != "out"]
        pairs += [(name, other) for other in others if ways != "in"]
        mend = self._cut_pairs(pairs, f"{name} from everybody, {ways}")

        def heal() -> None:
            self.recovered(name)
            mend()

        return heal

    def _cut_pairs(self, pairs: Sequence[tuple[str, str]], what: str) -> Undo:
        fresh = [pair for pair in pairs if not self._wires.line(*pair).cut]
        self._engine.note(f"FAULT cut: {what}")
        for pair in fresh:
            self._wires.set_cut(*pair, True)

        def heal() -> None:
            self._engine.note(f"FAULT healed: {what}")
            for pair in fresh:
                self._wires.set_cut(*pair, False)

        return heal

    def _slow_line(self) -> Undo:
        """Delay and loss on one direction."""
        chance, names = self._engine.random, sorted(self._wires.hosts)
        source, target = chance.sample(names, k=2)
        line = self._wires.line(source, target)
        before = (line.delay_us, line.jitter_us, line.loss)
        line.delay_us, line.jitter_us = chance.randrange(20, 150) * MS, 20 * MS
        line.loss = chance.choice([0.0, 0.05, 0.3])
        self._engine.note(f"FAULT slow line {source} to {target}: {line}")

        def mend() -> None:
            line.delay_us, line.jitter_us, line.loss = before

        return mend

    def _clock(self) -> Undo | None:
        """A wall clock jumps, by less than what peers tolerate."""
        chance = self._engine.random
        steady = sorted(self._wires.hosts.keys() - self._jumped)
        if not steady:
            return None
        host = self._wires.hosts[chance.choice(steady)]
        self._jumped.add(host.name)
        host.skew_ms = chance.randrange(-45 * S // MS, 45 * S // MS)
        self._engine.note(f"FAULT clock of {host.name} jumps by {host.skew_ms} ms")

        def mend() -> None:
            host.skew_ms = 0

        return mend
