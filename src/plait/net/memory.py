"""A gossip network in memory: instant, ordered, and its links can be cut. For tests."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from plait.errors import NetworkError, PeerUnreachable
from plait.net.port import (
    QUEUE_LENGTH,
    Message,
    PeerEvent,
    Validator,
    peer_of_multiaddr,
    put_latest,
)
from plait.types import PeerId


@dataclass(slots=True)
class MemoryNetwork:
    """The wires between peers. A message reaches everybody it can before ``publish`` returns."""

    running: dict[PeerId, "MemoryControlPlane"] = field(default_factory=dict)
    links: set[frozenset[PeerId]] = field(default_factory=set)
    broken: set[frozenset[PeerId]] = field(default_factory=set)

    def plane(self, peer: PeerId, bootstrap: Iterable[str] = ()) -> "MemoryControlPlane":
        """Make a peer's view of this network; it runs inside ``async with``."""
        return MemoryControlPlane(self, peer, tuple(bootstrap))

    def cut(self, first: PeerId, second: PeerId) -> None:
        """Break the link between two peers and keep it from coming back."""
        self.broken.add(frozenset((first, second)))
        self._unlink(frozenset((first, second)))

    def heal(self, first: PeerId, second: PeerId) -> None:
        """Let two peers reach each other again, and link them."""
        self.broken.discard(frozenset((first, second)))
        self.link(first, second)

    def link(self, first: PeerId, second: PeerId) -> None:
        """Link two peers; raises ``PeerUnreachable`` when one is down or the wire is cut."""
        pair = frozenset((first, second))
        if pair in self.broken or not pair <= self.running.keys():
            raise PeerUnreachable(f"nobody answers between {first} and {second}")
        if pair not in self.links and len(pair) == 2:
            self.links.add(pair)
            self._tell(pair, "connected")

    def neighbours(self, peer: PeerId) -> frozenset[PeerId]:
        """Peers linked to a peer."""
        return frozenset(other for pair in self.links if peer in pair for other in pair - {peer})

    def leave(self, peer: PeerId) -> None:
        """Take a peer off the network, as a crash would."""
        for pair in [pair for pair in self.links if peer in pair]:
            self._unlink(pair)
        self.running.pop(peer, None)

    def flood(self, author: PeerId, topic: str, data: bytes) -> None:
        """Pass a message on from link to link, as far as validators let it."""
        seen, reached = {author}, [author]
        while reached:
            forwarder = reached.pop(0)
            for peer in sorted(self.neighbours(forwarder) - seen):
                seen.add(peer)
                if self.running[peer].receive(topic, Message(data, forwarder)):
                    reached.append(peer)

    def _unlink(self, pair: frozenset[PeerId]) -> None:
        if pair in self.links:
            self.links.discard(pair)
            self._tell(pair, "disconnected")

    def _tell(self, pair: frozenset[PeerId], kind: str) -> None:
        for peer in pair:
            (other,) = pair - {peer}
            event = PeerEvent("connected" if kind == "connected" else "disconnected", other)
            put_latest(self.running[peer].events, event)


@dataclass(slots=True)
class MemoryControlPlane:
    """One peer's end of a ``MemoryNetwork``; a ``ControlPlane``."""

    network: MemoryNetwork
    peer: PeerId
    bootstrap: tuple[str, ...] = ()
    events: "asyncio.Queue[PeerEvent]" = field(default_factory=lambda: asyncio.Queue(QUEUE_LENGTH))
    learned: list[str] = field(default_factory=list)
    _topics: dict[str, tuple[Validator, "asyncio.Queue[Message]"]] = field(default_factory=dict)

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """One made-up address."""
        return (f"/memory/p2p/{self.peer}",)

    async def __aenter__(self) -> Self:
        """Come up and link to the bootstrap peers that are up."""
        self.network.running[self.peer] = self
        for multiaddr in self.bootstrap:
            if peer_of_multiaddr(multiaddr) in self.network.running:
                await self.connect(multiaddr)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave; the neighbours see their links go down."""
        self.network.leave(self.peer)

    async def subscribe(self, topic: str, validator: Validator) -> "asyncio.Queue[Message]":
        """Join a topic."""
        queue: asyncio.Queue[Message] = asyncio.Queue(QUEUE_LENGTH)
        self._topics[topic] = (validator, queue)
        return queue

    async def publish(self, topic: str, data: bytes) -> None:
        """Deliver to everybody in reach, at once."""
        if self.peer not in self.network.running:
            raise NetworkError("the gossip network is down")
        self.network.flood(self.peer, topic, data)

    async def connect(self, multiaddr: str) -> None:
        """Link to a peer by its made-up address."""
        self.network.link(self.peer, peer_of_multiaddr(multiaddr))

    def learn(self, multiaddrs: Iterable[str]) -> None:
        """Keep the addresses for the test to look at."""
        self.learned.extend(multiaddrs)

    def peers(self) -> frozenset[PeerId]:
        """Peers linked to us."""
        return self.network.neighbours(self.peer)

    def tasks(self) -> int:
        """None: all happens in the caller's calls."""
        return 0

    def unreachable(self) -> Mapping[str, str]:
        """Bootstrap peers we are not linked to."""
        linked = self.peers()
        return {m: "no link" for m in self.bootstrap if peer_of_multiaddr(m) not in linked}

    def receive(self, topic: str, message: Message) -> bool:
        """Take a message from a neighbour; True passes it on."""
        if topic not in self._topics:
            return False
        validator, queue = self._topics[topic]
        if validator(message.data, message.forwarder) is not True:
            return False
        put_latest(queue, message)
        return True
