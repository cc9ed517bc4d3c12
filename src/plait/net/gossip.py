"""Gossip of offers and link reports: the shell around ``Membership``.

Publishes our own offer every period and at once when it changes materially, feeds what
comes in to the membership rules before anything is forwarded, and tells watchers.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from plait.errors import ConfigError, NetworkError
from plait.identity import SigningKey
from plait.logs import get_logger
from plait.net.membership import Change, Conflict, Membership, Verdict
from plait.net.port import QUEUE_LENGTH, ControlPlane, Message, Validation, put_latest
from plait.network_file import NetworkFile
from plait.router.view import LinkReport, MeasuredLink, Offer, View
from plait.router.wire import seal_link_report, seal_offer
from plait.types import Digest, PeerId
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

PERIOD_S = 15.0
PUBLISH_GAP_S = 1.0
"""The least time between two publications, however often something changes."""
OFFER_TTL_MS = 60_000
EXPIRY_PERIOD_S = 1.0
RECENT_OFFERS = 16
LINKS_MAX = 16


def offers_topic(network_id: str, model_digest: bytes) -> str:
    """The gossip topic of one model's swarm."""
    return f"/plait/{network_id}/offers/{model_digest.hex()}/1"


class Gossip:
    """One peer's part in one model's swarm. Run ``run`` in a task of its own.

    ``on_issue`` is told the time of each message of ours before it is published.
    """

    def __init__(
        self,
        control: ControlPlane,
        membership: Membership,
        network: NetworkFile,
        key: SigningKey,
        model_digest: Digest,
        incarnation: int,
        clock_ms: Callable[[], int],
        on_issue: Callable[[int], None] = lambda issued_ms: None,
    ) -> None:
        self._control = control
        self._membership = membership
        self._network = network
        self._key = key
        self._incarnation = incarnation
        self._clock_ms = clock_ms
        self._on_issue = on_issue
        self._topic = offers_topic(network.network_id, model_digest)
        self._offer: Offer | None = None
        self._links: tuple[MeasuredLink, ...] = ()
        self._sequence = 0
        self._recent: OrderedDict[Digest, Offer] = OrderedDict()
        self._watchers: set[asyncio.Queue[Change]] = set()
        self._hurry = asyncio.Event()
        self._conflict: asyncio.Future[Conflict] = asyncio.get_running_loop().create_future()

    @property
    def recent_offers(self) -> Mapping[Digest, Offer]:
        """Our own last offers by digest: what a client may still hold us to."""
        return self._recent

    def network_tasks(self) -> int:
        """How many tasks run for the network below, outside our event loop."""
        return self._control.tasks()

    def view(self) -> View:
        """What is valid now."""
        return self._membership.view()

    def envelopes(self) -> list[SignedEnvelope]:
        """The signed envelopes behind the view."""
        return list(self._membership.envelopes())

    def set_offer(self, offer: Offer, *, at_once: bool) -> None:
        """Offer this from the next publication on; ``at_once`` publishes now."""
        self._offer = offer
        if at_once:
            self._hurry.set()

    def set_links(self, rtts_us: Mapping[PeerId, int]) -> None:
        """Report these round trips with the next publication; the shortest ones if too many."""
        nearest = sorted(rtts_us.items(), key=lambda item: (item[1], item[0]))[:LINKS_MAX]
        self._links = tuple(MeasuredLink(peer, rtt_us) for peer, rtt_us in nearest)

    @contextlib.contextmanager
    def subscription(self) -> "Iterator[asyncio.Queue[Change]]":
        """A queue of changes to the view from now on; the oldest are dropped by a slow reader."""
        queue: asyncio.Queue[Change] = asyncio.Queue(QUEUE_LENGTH)
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)

    def peer_down(self, peer: PeerId, incarnation: int, reason: str) -> None:
        """A peer stopped answering: its offer leaves the view until it speaks again."""
        log.info("peer down", peer=peer, reason=reason)
        change = self._membership.peer_down(peer, incarnation)
        if change is not None:
            self._tell(change)

    async def run(self) -> None:
        """Take part for ever; raises ``ConfigError`` when another node runs with our identity."""
        incoming = await self._control.subscribe(self._topic, self._validate)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._drain(incoming), name="gossip queue")
            tasks.create_task(self._publish_forever(), name="gossip publisher")
            tasks.create_task(self._expire_forever(), name="gossip expiry")
            tasks.create_task(self._greet_forever(), name="gossip greetings")
            conflict = await self._conflict
            raise ConfigError(str(conflict), remedy="plait node run --data-dir ANOTHER_FOLDER")

    async def withdraw(self) -> None:
        """Tell everybody that we leave."""
        if self._offer is None:
            return
        self._offer = replace(self._offer, state="withdrawn")
        await self._publish_offer()

    async def _publish_forever(self) -> None:
        while True:
            self._hurry.clear()
            await self._publish_offer()
            await self._publish_links()
            await asyncio.sleep(PUBLISH_GAP_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):
                    await self._hurry.wait()

    async def _publish_offer(self) -> None:
        if self._offer is None:
            return
        now_ms = self._issue()
        offer = replace(
            self._offer,
            incarnation=self._incarnation,
            sequence=self._next_sequence(),
            issued_ms=now_ms,
            expires_ms=now_ms + OFFER_TTL_MS,
        )
        await self._publish(seal_offer(self._key, offer, self._network.network_id))

    async def _publish_links(self) -> None:
        if not self._links:
            return
        now_ms = self._issue()
        report = LinkReport(
            peer=self._key.peer_id,
            incarnation=self._incarnation,
            sequence=self._next_sequence(),
            issued_ms=now_ms,
            expires_ms=now_ms + OFFER_TTL_MS,
            links=self._links,
        )
        await self._publish(seal_link_report(self._key, report, self._network.network_id))

    def _issue(self) -> int:
        """The time of the next message; it is noted before anybody sees it."""
        now_ms = self._clock_ms()
        self._on_issue(now_ms)
        return now_ms

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    async def _publish(self, envelope: SignedEnvelope) -> None:
        change = self._handle(envelope).change
        if change is not None and change.offer is not None:
            self._recent[change.offer.digest] = change.offer
            while len(self._recent) > RECENT_OFFERS:
                self._recent.popitem(last=False)
        try:
            await self._control.publish(self._topic, envelope.SerializeToString())
        except NetworkError as error:
            log.info("not published", reason=str(error))

    def learn(self, envelope: SignedEnvelope) -> None:
        """Take a message that came another way, by the same rules as gossip."""
        self._handle(envelope)

    def _validate(self, data: bytes, forwarder: PeerId) -> Validation:
        verdict = self._handle(data, forwarder)
        if verdict.outcome == "reject":
            log.debug("gossip rejected", forwarder=forwarder, reason=verdict.reason)
            return False
        return True if verdict.outcome == "accept" else "ignore"

    def _handle(self, data: bytes | SignedEnvelope, forwarder: PeerId | None = None) -> Verdict:
        verdict = self._membership.handle_envelope(data, self._clock_ms(), forwarder)
        if verdict.conflict is not None:
            log.error("identity conflict", reason=str(verdict.conflict))
            if verdict.conflict.peer == self._control.peer and not self._conflict.done():
                self._conflict.set_result(verdict.conflict)
        if verdict.change is not None:
            self._tell(verdict.change)
            if verdict.change.offer is not None:
                self._control.learn(_own_multiaddrs(verdict.change.offer))
        return verdict

    def _tell(self, change: Change) -> None:
        for queue in self._watchers:
            put_latest(queue, change)

    async def _greet_forever(self) -> None:
        # A new neighbour knows nothing of us yet, and need not wait for the period.
        while True:
            event = await self._control.events.get()
            if event.kind == "connected":
                self._hurry.set()

    async def _drain(self, incoming: "asyncio.Queue[Message]") -> None:
        # Every message was handled in the validator; the queue only has to stay empty.
        while True:
            await incoming.get()

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            for change in self._membership.expire(self._clock_ms()):
                self._tell(change)


def _own_multiaddrs(offer: Offer) -> list[str]:
    # A peer may tell us where to dial itself, nobody else.
    return [m for m in offer.multiaddrs if m.endswith(f"/p2p/{offer.peer}")]
