"""Wires between hosts: delay, loss, cuts, connections that break, calls.

The transport under a connection is TCP: what is sent arrives once, whole and in order, or
the connection ends. A lost packet is a delay. A crash is seen at once by whoever can be
reached; silence ends a connection after its keepalive, on each side for itself, and who held on
learns it when the silence is over.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from google.protobuf.message import Message

from plait.errors import DeadlineExceeded, NetworkError, PeerUnreachable, PlaitError
from plait.sim.engine import MS, Engine
from plait.sim.host import Host, Reply

KEEPALIVE_US = (950 * MS, 2_050 * MS)
"""When a silent connection is given up: a ping after half a second, 1.5 for the answer."""
RETRANSMIT_US = 200 * MS


def packed(payload: object) -> Callable[[], object]:
    """What the receiver gets: a message is written and read again, a value is itself."""
    if isinstance(payload, Message):
        data, kind = payload.SerializeToString(), type(payload)
        return lambda: kind.FromString(data)
    return lambda: payload


@dataclass(slots=True)
class Line:
    """One direction between two hosts."""

    delay_us: int
    jitter_us: int
    loss: float = 0.0
    cut: bool = False


class End(Protocol):
    """Who holds one end of a connection."""

    def on_message(self, message: object) -> None:
        """Something arrived."""

    def on_broken(self, reason: str) -> None:
        """The connection has ended, and not by us. Nothing comes any more."""


@dataclass(slots=True)
class _Side:
    host: Host
    life: int
    end: End | None = None
    open: bool = True
    last_at_us: int = 0
    """When the last message towards this side arrives."""
    stalled: list[object] = field(default_factory=list)


class Connection:
    """A stream of messages between two hosts, from ``dialler`` to ``listener`` and back."""

    def __init__(self, wires: "Wires", dialler: Host, listener: Host, what: str) -> None:
        self._wires = wires
        self._engine = wires.engine
        self.what = what
        self.sides = {
            dialler.name: _Side(dialler, dialler.life),
            listener.name: _Side(listener, listener.life),
        }
        self._across = {
            dialler.name: self.sides[listener.name],
            listener.name: self.sides[dialler.name],
        }
        self._silences = 0

    def other(self, name: str) -> _Side:
        """The side across from a host's."""
        return self._across[name]

    def is_open(self, name: str) -> bool:
        """Whether a host's end is open."""
        return self.sides[name].open

    def send(self, sender: str, message: object) -> None:
        """Send; raises ``NetworkError`` once this end is closed."""
        if not self.sides[sender].open:
            raise NetworkError(f"the link between {' and '.join(self.sides)} is down")
        receiver = self.other(sender)
        delay_us = self._wires.delay_us(sender, receiver.host.name)
        receiver.last_at_us = max(receiver.last_at_us, self._engine.now_us + delay_us)
        unpack = packed(message)
        self._engine.at(receiver.last_at_us, "", lambda: self._arrive(sender, receiver, unpack()))

    def close(self, name: str, reason: str = "closed by the other side") -> None:
        """Close a host's end; the other side learns it after what was sent before."""
        side = self.sides[name]
        if not side.open:
            return
        side.open = False
        other = self.other(name)
        self._wires.forget(self)
        delay_us = self._wires.delay_us(name, other.host.name)
        at_us = max(other.last_at_us, self._engine.now_us + delay_us)
        self._engine.at(at_us, "", lambda: self._told(name, other, reason))

    def check_silence(self) -> None:
        """Begin to wait for keepalives if the two sides cannot hear each other."""
        self._silences += 1
        if not self._silent():
            self._reset()
            for name, side in self.sides.items():
                self._flush(self.other(name).host.name, side)
            return
        silence = self._silences
        for side in self.sides.values():
            wait_us = self._engine.random.randrange(*KEEPALIVE_US)
            self._engine.after(wait_us, "", partial(self._give_up, side, silence))

    def _reset(self) -> None:
        """Who can hear again learns that the other side has given the connection up meanwhile."""
        gone = [name for name, side in self.sides.items() if not side.open]
        if len(gone) == 1:
            other = self.other(gone[0])
            delay_us = self._wires.delay_us(gone[0], other.host.name)
            told = partial(self._told, gone[0], other, "reset by the other side")
            self._engine.after(delay_us, "", told)

    def _silent(self) -> bool:
        (first, one), (second, two) = self.sides.items()
        cut = self._wires.line(first, second).cut or self._wires.line(second, first).cut
        return cut or one.host.hung or two.host.hung

    def _give_up(self, side: _Side, silence: int) -> None:
        if silence == self._silences and self._silent():
            self._break(side, "no answer to keepalive")

    def _told(self, closer: str, side: _Side, reason: str) -> None:
        if not self._wires.line(closer, side.host.name).cut:
            self._break(side, reason)

    def _break(self, side: _Side, reason: str) -> None:
        if not side.open or side.life != side.host.life:
            return
        side.open = False
        side.stalled.clear()
        end, what = side.end, f"{side.host.name}: {self.what} broke: {reason}"
        if end is not None:
            side.host.take(what, lambda: end.on_broken(reason))

    def _arrive(self, sender: str, side: _Side, message: object) -> None:
        if not side.open:
            return
        if side.stalled or self._wires.line(sender, side.host.name).cut:
            side.stalled.append(message)
            return
        self._hand_over(side, message)

    def _flush(self, sender: str, side: _Side) -> None:
        if not side.stalled:
            return

        def flush() -> None:
            if side.open and not self._wires.line(sender, side.host.name).cut:
                messages, side.stalled = side.stalled, []
                for message in messages:
                    self._hand_over(side, message)

        self._engine.after(self._engine.random.randrange(RETRANSMIT_US), "", flush)

    def _hand_over(self, side: _Side, message: object) -> None:
        # What reached a stopped process is read when it goes on, even if the connection
        # was given up meanwhile by the other side: so the host's life counts, not ``open``.
        end, life = side.end, side.life
        if end is not None and life == side.host.life:
            side.host.take("", lambda: end.on_message(message))


class Wires:
    """All hosts and the lines between them."""

    def __init__(self, engine: Engine, *, delay_us: int, jitter_us: int) -> None:
        self.engine = engine
        self.hosts: dict[str, Host] = {}
        self._default = (delay_us, jitter_us)
        self._lines: dict[tuple[str, str], Line] = {}
        self._connections: dict[int, Connection] = {}
        self.calls: dict[int, _Call] = {}
        """Calls that wait for their answer."""

    def add(self, host: Host) -> None:
        """Put a host on the network."""
        self.hosts[host.name] = host

    def line(self, source: str, target: str) -> Line:
        """One direction between two hosts."""
        line = self._lines.get((source, target))
        if line is None:
            line = self._lines[source, target] = Line(*self._default)
        return line

    def delay_us(self, source: str, target: str) -> int:
        """How long the next message takes, retransmissions included."""
        line, chance = self.line(source, target), self.engine.random
        delay_us = line.delay_us + (chance.randrange(line.jitter_us) if line.jitter_us else 0)
        wait_us = RETRANSMIT_US
        while line.loss and chance.random() < line.loss:
            delay_us += wait_us
            wait_us *= 2
        return delay_us

    def reachable(self, source: str, target: str) -> bool:
        """Whether a ping would be answered now."""
        there, back = self.line(source, target), self.line(target, source)
        return self.hosts[target].running and not (there.cut or back.cut)

    # Connections ----------------------------------------------------------------------

    def connect(
        self,
        dialler: Host,
        listener: Host,
        what: str,
        accept: Callable[[Connection], End],
        done: Callable[[Connection | NetworkError], None],
    ) -> None:
        """Open a connection; ``accept`` makes the listener's end. Takes one round trip."""
        name, life = listener.name, dialler.life

        def fail(reason: str) -> None:
            error = PeerUnreachable(f"{name}: {reason}")
            if dialler.life == life:
                dialler.take("", lambda: done(error))

        def reach() -> None:
            if self.line(dialler.name, name).cut or self.line(name, dialler.name).cut:
                self.engine.after(KEEPALIVE_US[1], "", lambda: fail("no answer"))
            elif not listener.up:
                self.engine.after(self.delay_us(name, dialler.name), "", lambda: fail("refused"))
            else:
                listener.take("", meet)

        def meet() -> None:
            connection = Connection(self, dialler, listener, what)
            connection.sides[name].end = accept(connection)
            self._connections[id(connection)] = connection
            # Nothing overtakes the handshake.
            at_us = self.engine.now_us + self.delay_us(name, dialler.name)
            connection.sides[dialler.name].last_at_us = at_us
            self.engine.at(at_us, "", lambda: finish(connection))

        def finish(connection: Connection) -> None:
            if dialler.life != life or not dialler.up:
                connection.sides[dialler.name].open = True
                connection.close(dialler.name, "the dialler is gone")
            elif connection.is_open(dialler.name):
                dialler.take("", lambda: done(connection))

        self.engine.after(self.delay_us(dialler.name, name), "", reach)

    def forget(self, connection: Connection) -> None:
        """Drop a connection that has a closed end from what faults look at."""
        if not any(side.open for side in connection.sides.values()):
            self._connections.pop(id(connection), None)

    # Calls ----------------------------------------------------------------------------

    def call(
        self,
        caller: Host,
        callee: Host,
        method: str,
        request: object,
        timeout_us: int,
        done: Reply,
    ) -> None:
        """Call a method; ``done`` gets the answer or an error, once, while the caller lives.

        The errors are ``PeerUnreachable``, ``DeadlineExceeded``, and what the callee raises.
        """
        call = _Call(self, caller, callee, method, done)
        self.calls[id(call)] = call
        call.begin(request, timeout_us)

    # Faults ---------------------------------------------------------------------------

    def set_cut(self, source: str, target: str, cut: bool) -> None:
        """Cut or heal one direction."""
        self.line(source, target).cut = cut
        self._heed({source, target})

    def crash(self, name: str) -> None:
        """A host dies, and its kernel resets every connection."""
        self.hosts[name].crash()
        for connection in list(self._connections.values()):
            if name in connection.sides:
                connection.close(name, "reset by a dead peer")
        for call in list(self.calls.values()):
            call.callee_died(name)

    def hang(self, name: str) -> None:
        """A host stops as by SIGSTOP; its kernel still takes what is sent to it."""
        self.hosts[name].hang()
        self._heed({name})

    def resume(self, name: str) -> None:
        """A stopped host goes on."""
        self.hosts[name].resume()
        self._heed({name})

    def _heed(self, names: set[str]) -> None:
        """Connections notice a change at these hosts, or between them: now, or by keepalive."""
        for connection in list(self._connections.values()):
            if names <= connection.sides.keys():
                connection.check_silence()


class _Call:
    """One call under way."""

    def __init__(
        self,
        wires: Wires,
        caller: Host,
        callee: Host,
        method: str,
        done: Reply,
    ) -> None:
        self._wires, self._engine = wires, wires.engine
        self._caller, self._callee = caller, callee
        self._method = method
        self._done: Reply | None = done
        self._life = caller.life

    def begin(self, request: object, timeout_us: int) -> None:
        """Send the request and watch over it."""
        unpack = packed(request)
        self._travel(self._caller.name, self._callee.name, lambda: self._reach(unpack()))
        error = DeadlineExceeded(f"{self._callee.name} did not answer {self._method} in time")
        self._engine.after(timeout_us, "", lambda: self._finish(error))
        wait_us = self._engine.random.randrange(*KEEPALIVE_US)
        self._engine.after(wait_us, "", self._ping)

    def _travel(self, source: str, target: str, arrive: Callable[[], None]) -> None:
        """Arrive after the line's delay, and not before a cut is healed."""

        def attempt() -> None:
            if self._wires.line(source, target).cut:
                if self._done is not None:
                    self._engine.after(RETRANSMIT_US, "", attempt)
                return
            arrive()

        self._engine.after(self._wires.delay_us(source, target), "", attempt)

    def _ping(self) -> None:
        """End the call of a peer that is silent; look again later otherwise."""
        if self._done is None:
            return
        if not self._wires.reachable(self._caller.name, self._callee.name):
            self._finish(PeerUnreachable(f"{self._callee.name}: no answer to keepalive"))
            return
        self._engine.after(self._engine.random.randrange(*KEEPALIVE_US), "", self._ping)

    def _reach(self, request: object) -> None:
        callee = self._callee
        if not callee.up:
            self._answer(PeerUnreachable(f"{callee.name} refused the connection"))
            return
        answered = False

        def reply(answer: object) -> None:
            nonlocal answered
            if answered:
                raise AssertionError(f"{callee.name} answered {self._method} twice")
            answered = True
            self._answer(answer)

        what = f"{callee.name}: {self._method} from {self._caller.name}"
        callee.take(what, lambda: callee.on_call(self._caller.name, self._method, request, reply))

    def _answer(self, answer: object) -> None:
        unpack = packed(answer)
        self._travel(self._callee.name, self._caller.name, lambda: self._finish(unpack()))

    def callee_died(self, name: str) -> None:
        """The callee's kernel resets the connection."""
        if name == self._callee.name:
            self._answer(PeerUnreachable(f"{name}: reset by a dead peer"))

    def _finish(self, answer: object) -> None:
        done, self._done = self._done, None
        self._wires.calls.pop(id(self), None)
        if done is None or self._life != self._caller.life:
            return
        outcome = type(answer).__name__ + (f": {answer}" if isinstance(answer, PlaitError) else "")
        what = f"{self._caller.name}: {self._method} at {self._callee.name}: {outcome}"
        self._caller.take(what, lambda: done(answer))
