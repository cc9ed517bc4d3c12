"""Outgoing links to the stages downstream, one per peer, made on first need."""

from collections.abc import Callable

import grpc

from plait.errors import PeerUnreachable
from plait.logs import get_logger
from plait.net.link_stream import OutgoingLink
from plait.task_scope import TaskScope
from plait.types import PeerId
from plait.v1 import stage_pb2

log = get_logger(__name__)


def _ignore_response(peer: PeerId, message: stage_pb2.LinkResponse) -> None:
    """Until a stage listens."""


def _ignore_break(peer: PeerId, reason: str) -> None:
    """Until a stage listens."""


def _ignore_room(peer: PeerId) -> None:
    """Until a stage listens."""


class Neighbours:
    """Links by peer. ``dial`` opens a pinned channel or raises ``PeerUnreachable``."""

    def __init__(self, tasks: TaskScope, dial: Callable[[PeerId], grpc.aio.Channel]) -> None:
        self.on_response: Callable[[PeerId, stage_pb2.LinkResponse], None] = _ignore_response
        self.on_broken: Callable[[PeerId, str], None] = _ignore_break
        self.on_room: Callable[[PeerId], None] = _ignore_room
        self._tasks = tasks
        self._dial = dial
        self._links: dict[PeerId, OutgoingLink] = {}

    def __len__(self) -> int:
        return len(self._links)

    async def ensure(self, peer: PeerId) -> None:
        """Return once a link to ``peer`` is up; raises ``PeerUnreachable``."""
        link = self._links.get(peer)
        if link is None or link.outbox.closed:
            link = OutgoingLink(peer, self._dial(peer), lambda: self.on_room(peer))
            self._links[peer] = link
            self._tasks.create_task(self._run(link), name=f"link to {peer}")
        await link.wait_open()

    def send(self, peer: PeerId, message: stage_pb2.LinkRequest) -> None:
        """Queue a message; raises ``PeerUnreachable`` or ``CapacityError``."""
        link = self._links.get(peer)
        if link is None:
            raise PeerUnreachable(f"no link to {peer}")
        link.outbox.put(message)

    def has_room(self, peer: PeerId) -> bool:
        """Whether the link is not congested; True without one: sending then says so."""
        link = self._links.get(peer)
        return link is None or not link.outbox.congested

    async def _run(self, link: OutgoingLink) -> None:
        reason = await link.run(self.on_response)
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        log.info("link ended", peer=link.peer, reason=reason)
        self.on_broken(link.peer, reason)

    def close(self) -> None:
        """End every link after what is queued."""
        for link in self._links.values():
            link.outbox.close()
