"""The engine and the wires: order, cuts, keepalives, crashes, replay of a seed."""

from dataclasses import dataclass, field

import pytest

from plait.errors import DeadlineExceeded, NetworkError, PeerUnreachable
from plait.sim.engine import MS, Engine, S
from plait.sim.host import Host, Reply
from plait.sim.network import KEEPALIVE_US, Connection, Wires


def test_events_at_one_instant_happen_in_the_order_they_were_asked_for() -> None:
    engine, seen = Engine(1), list[str]()
    engine.after(5, "", lambda: seen.append("late"))
    for name in "abc":
        engine.after(3, "", lambda name=name: seen.append(name))  # type: ignore[misc]
    cancelled = engine.after(4, "", lambda: seen.append("never"))
    cancelled.cancel()
    engine.run(10)
    assert seen == ["a", "b", "c", "late"]
    assert engine.now_us == 10


def test_the_fingerprint_is_that_of_the_trace() -> None:
    prints = []
    for word in ("one", "one", "two"):
        engine = Engine(1)
        engine.after(3, word, lambda: None)
        engine.run(10)
        prints.append(engine.fingerprint)
    assert prints[0] == prints[1] != prints[2]


class Echo(Host):
    """Answers every call with its own name."""

    def on_call(self, caller: str, method: str, request: object, reply: Reply) -> None:
        """Answer, unless asked to be silent."""
        if method != "silence":
            reply((self.name, request))


@dataclass
class Ear:
    """Notes what comes on a connection."""

    heard: list[object] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def on_message(self, message: object) -> None:
        self.heard.append(message)

    def on_broken(self, reason: str) -> None:
        self.broken.append(reason)


class Pair:
    """Two hosts with a connection between them."""

    def __init__(self) -> None:
        self.engine = Engine(7)
        self.wires = Wires(self.engine, delay_us=10 * MS, jitter_us=0)
        self.one, self.two = Echo(self.engine, "one"), Echo(self.engine, "two")
        for host in (self.one, self.two):
            self.wires.add(host)
            host.start()
        self.near, self.far = Ear(), Ear()
        found: list[Connection | NetworkError] = []
        self.wires.connect(self.one, self.two, "link", lambda link: self.far, found.append)
        self.engine.run(30 * MS)
        (link,) = found
        assert isinstance(link, Connection)
        self.link = link
        link.sides["one"].end = self.near

    def later(self, delay_us: int) -> None:
        self.engine.run(self.engine.now_us + delay_us)

    def call(self, method: str = "echo", timeout_us: int = 5 * S) -> list[object]:
        answers: list[object] = []
        self.wires.call(self.one, self.two, method, "hello", timeout_us, answers.append)
        return answers


def test_messages_keep_their_order_through_loss_and_a_short_cut() -> None:
    pair = Pair()
    pair.wires.line("one", "two").loss = 0.5
    for number in range(20):
        pair.link.send("one", number)
    pair.later(50 * MS)
    pair.wires.set_cut("one", "two", True)
    pair.later(600 * MS)
    assert len(pair.far.heard) < 20
    pair.wires.set_cut("one", "two", False)
    pair.later(60 * S)
    assert pair.far.heard == list(range(20))
    assert not pair.far.broken


@pytest.mark.parametrize("way", [("one", "two"), ("two", "one")])
def test_a_cut_of_either_way_ends_a_connection_by_keepalive(way: tuple[str, str]) -> None:
    pair = Pair()
    pair.wires.set_cut(*way, True)
    pair.later(KEEPALIVE_US[0] - MS)
    assert not pair.near.broken + pair.far.broken
    pair.later(KEEPALIVE_US[1])
    assert pair.near.broken == pair.far.broken == ["no answer to keepalive"]
    with pytest.raises(NetworkError):
        pair.link.send("one", "too late")


def test_a_crash_is_seen_at_once_and_after_what_was_sent_before() -> None:
    pair = Pair()
    pair.link.send("two", "last word")
    pair.wires.crash("two")
    pair.later(11 * MS)
    assert pair.near.heard == ["last word"]
    assert pair.near.broken == ["reset by a dead peer"]
    assert pair.far.broken == []


def test_a_hung_host_reads_on_when_it_goes_on_although_it_was_given_up() -> None:
    pair = Pair()
    pair.wires.hang("two")
    pair.link.send("one", "to a stopped process")
    pair.later(3 * S)
    assert pair.near.broken and not pair.far.heard
    pair.wires.resume("two")
    pair.later(S)
    assert pair.far.heard == ["to a stopped process"]
    assert pair.far.broken


def test_nothing_of_an_earlier_life_reaches_the_next_one() -> None:
    pair = Pair()
    rung: list[int] = []
    pair.two.after(50 * MS, "", lambda: rung.append(1))
    pair.link.send("one", "for the first life")
    pair.wires.crash("two")
    pair.two.start()
    pair.later(S)
    assert not rung and not pair.far.heard


def test_calls_are_answered_or_fail_once() -> None:
    pair = Pair()
    answered = pair.call()
    pair.later(S)
    assert answered == [("two", "hello")]
    unanswered = pair.call("silence", timeout_us=2 * S)
    pair.later(3 * S)
    assert [type(answer) for answer in unanswered] == [DeadlineExceeded]
    pair.wires.set_cut("two", "one", True)
    cut = pair.call()
    pair.later(3 * S)
    pair.wires.set_cut("two", "one", False)
    pair.later(10 * S)
    assert [type(answer) for answer in cut] == [PeerUnreachable]
    reset = pair.call("silence")
    pair.later(20 * MS)
    pair.wires.crash("two")
    pair.later(20 * MS)
    assert [type(answer) for answer in reset] == [PeerUnreachable]
    refused = pair.call()
    pair.later(30 * MS)
    assert [type(answer) for answer in refused] == [PeerUnreachable]
