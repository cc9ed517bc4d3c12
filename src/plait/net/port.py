"""What Plait needs of a gossip network. ``net.libp2p`` is one, ``net.memory`` another.

Everything runs on the caller's event loop; queues are bounded and drop the oldest item.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self, TypeVar

from plait.types import PeerId

Validation = bool | Literal["ignore"]
"""True forwards a message, "ignore" drops it in silence, False blames who forwarded it."""

Validator = Callable[[bytes, PeerId], Validation]
"""Called with the data and the peer that forwarded it; must be quick."""

QUEUE_LENGTH = 1024

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class Message:
    """A valid message and the peer it came from (not its author)."""

    data: bytes
    forwarder: PeerId


@dataclass(frozen=True, slots=True)
class PeerEvent:
    """A link to a peer came up, or the last one to it went down."""

    kind: Literal["connected", "disconnected"]
    peer: PeerId


class ControlPlane(Protocol):
    """A gossip network as one peer sees it; an async context manager that runs it."""

    @property
    def peer(self) -> PeerId:
        """Our own peer id."""

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Where others reach us, ending in ``/p2p/<peer id>``."""

    @property
    def events(self) -> "asyncio.Queue[PeerEvent]":
        """Links that came and went; for one reader."""

    async def __aenter__(self) -> Self:
        """Start; bootstrap peers may still be out of reach afterwards."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop and free everything."""

    async def subscribe(self, topic: str, validator: Validator) -> "asyncio.Queue[Message]":
        """Join a topic. Every message of others is validated before it is queued and forwarded."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Send to all subscribers of a topic; raises ``NetworkError`` while the network is down."""

    async def connect(self, multiaddr: str) -> None:
        """Connect to ``…/p2p/<peer id>``; raises ``PeerUnreachable``."""

    def learn(self, multiaddrs: Iterable[str]) -> None:
        """Note addresses of members, to be dialled when there are too few links."""

    def peers(self) -> frozenset[PeerId]:
        """Peers with a live link."""

    def tasks(self) -> int:
        """How many tasks of its own run for it, outside the caller's event loop."""

    def unreachable(self) -> Mapping[str, str]:
        """Bootstrap multiaddrs without a link, and why the last dial failed."""


def put_latest(queue: "asyncio.Queue[ItemT]", item: ItemT) -> None:
    """Append to a bounded queue, dropping the oldest item when it is full."""
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(item)


def peer_of_multiaddr(multiaddr: str) -> PeerId:
    """Return the peer id at the end of a multiaddr; raises ``ValueError`` if there is none."""
    _, marker, peer = multiaddr.rpartition("/p2p/")
    if not marker or not peer or "/" in peer:
        raise ValueError(f"a multiaddr must end in /p2p/<peer id>, not {multiaddr[:200]!r}")
    return PeerId(peer)
