"""A peer's part in the swarm: the production membership rules over modelled connections.

Publishing, forwarding and noticing dead peers follow ``plait.net.gossip``, ``net.watch`` and
``net.links``, whose timing they borrow; what is believed is decided by ``Membership`` alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from plait.errors import NetworkError
from plait.identity import SigningKey
from plait.net.gossip import (
    EXPIRY_PERIOD_S,
    OFFER_TTL_MS,
    PERIOD_S,
    PUBLISH_GAP_S,
    RECENT_OFFERS,
)
from plait.net.links import PERIOD_S as METER_PERIOD_S
from plait.net.links import REFUSALS_MAX, SILENCES_MAX
from plait.net.membership import Membership, next_incarnation
from plait.network_file import NetworkFile
from plait.router.view import Offer, View
from plait.router.wire import seal_offer
from plait.sim.engine import Engine, S, Violation
from plait.sim.host import Host
from plait.sim.network import Connection, Wires
from plait.types import Digest, PeerId
from plait.v1.identity_pb2 import SignedEnvelope

REDIAL_US = 1 * S


@dataclass(slots=True)
class IncarnationDisk:
    """What a host's disk keeps of its lives in the swarm."""

    incarnation: int = 0
    issued_ms: int = 0

    def next(self, now_ms: int) -> int:
        """The incarnation of the life that begins."""
        self.incarnation = next_incarnation(now_ms * 1_000_000, self.incarnation, self.issued_ms)
        return self.incarnation

    def note_issued(self, now_ms: int) -> None:
        """Something was said at this time."""
        self.issued_ms = max(self.issued_ms, now_ms)


class GossipPeer:
    """One life of one host in the swarm. ``publishes`` is false for one that only watches.

    ``addresses`` finds the host behind a peer id, for measuring links; ``on_change`` is told
    that the view may have changed.
    """

    def __init__(
        self,
        host: "Swarming",
        wires: Wires,
        network: NetworkFile,
        key: SigningKey,
        *,
        neighbours: Sequence[str],
        addresses: Mapping[PeerId, str],
        publishes: bool,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.membership = Membership(network)
        self.recent_offers: OrderedDict[Digest, Offer] = OrderedDict()
        """Our own last offers by digest."""
        self._host, self._wires, self._network, self._key = host, wires, network, key
        self._neighbours = neighbours
        self._addresses = addresses
        self._publishes = publishes
        self._on_change = on_change
        self._me = key.peer_id
        self._incarnation = host.incarnations.next(host.now_ms())
        self._sequence = 0
        self._offer: Offer | None = None
        self._published_us = -PERIOD_S * S
        self._hurry = False
        self._connections: dict[str, Connection] = {}
        self._dialling: set[str] = set()
        self._rtts_us: dict[PeerId, int] = {}
        self._failures: dict[PeerId, tuple[int, int]] = {}
        host.every(REDIAL_US, "", self._dial_all)
        host.every(round(EXPIRY_PERIOD_S * S), "", self._expire)
        host.every(round(METER_PERIOD_S * S), "", self.measure)
        self._dial_all()

    @property
    def incarnation(self) -> int:
        """When this life began, nanoseconds."""
        return self._incarnation

    def view(self) -> View:
        """Valid offers, and our own measurements of links."""
        known = self.membership.view()
        me = self._me
        ours = {(me, peer): rtt_us for peer, rtt_us in self._rtts_us.items()}
        return View(known.offers, {**known.rtt_us, **ours}, known.bandwidth)

    # Publishing -----------------------------------------------------------------------

    def set_offer(self, offer: Offer, *, at_once: bool) -> None:
        """Offer this from the next publication on."""
        self._offer = offer
        if at_once:
            self._hurry = True
            self._publish_when_due()

    def withdraw(self) -> None:
        """Tell everybody that we leave."""
        if self._offer is not None:
            self._offer = replace(self._offer, state="withdrawn")
            self._publish()

    def chores(self) -> None:
        """Publish when the period has passed; to be called now and then."""
        self._publish_when_due()

    def _publish_when_due(self) -> None:
        waited_s = (self._host.engine.now_us - self._published_us) / S
        if self._offer is not None and waited_s >= (PUBLISH_GAP_S if self._hurry else PERIOD_S):
            self._publish()

    def _publish(self) -> None:
        assert self._offer is not None
        self._hurry = False
        self._published_us = self._host.engine.now_us
        self._sequence += 1
        now_ms = self._host.now_ms()
        self._host.incarnations.note_issued(now_ms)
        offer = replace(
            self._offer,
            incarnation=self._incarnation,
            sequence=self._sequence,
            issued_ms=now_ms,
            expires_ms=now_ms + OFFER_TTL_MS,
        )
        envelope = seal_offer(self._key, offer, self._network.network_id)
        self._handle(envelope.SerializeToString(), None)

    # Hearing --------------------------------------------------------------------------

    def learn(self, envelopes: Sequence[SignedEnvelope]) -> None:
        """Take what is known at the start, as from a directory."""
        for envelope in envelopes:
            self.membership.handle_envelope(envelope, self._host.now_ms())
        self.measure()

    def _handle(self, data: bytes, source: str | None) -> None:
        verdict = self.membership.handle_envelope(data, self._host.now_ms(), source)
        if verdict.outcome == "reject":
            raise Violation("gossip", f"{self._host.name} rejects {source}: {verdict.reason}")
        if verdict.conflict is not None and verdict.conflict.peer == self._me:
            raise Violation("gossip", str(verdict.conflict))
        if verdict.outcome != "accept":
            return
        change = verdict.change
        if source is None and change is not None and change.offer is not None:
            self.recent_offers[change.offer.digest] = change.offer
            while len(self.recent_offers) > RECENT_OFFERS:
                self.recent_offers.popitem(last=False)
        for name in [name for name in self._connections if name != source]:
            self._tell(name, data)
        self._on_change()

    def _expire(self) -> None:
        if self.membership.expire(self._host.now_ms()):
            self._on_change()

    # Connections ----------------------------------------------------------------------

    def _dial_all(self) -> None:
        for name in self._neighbours:
            if name in self._connections or name in self._dialling:
                continue
            self._dialling.add(name)
            self._wires.connect(
                self._host,
                self._wires.hosts[name],
                "gossip",
                lambda connection: _gossip_of(connection, self._host.name),
                partial(self._dialled, name),
            )

    def _dialled(self, name: str, answer: Connection | NetworkError) -> None:
        self._dialling.discard(name)
        if isinstance(answer, Connection):
            answer.sides[self._host.name].end = _Neighbour(self, name, answer)
            self.joined(name, answer)

    def joined(self, name: str, connection: Connection) -> None:
        """A connection to a neighbour is up: greet it with all that is known."""
        self._connections[name] = connection
        for envelope in self.membership.envelopes():
            if self._connections.get(name) is connection:
                self._tell(name, envelope.SerializeToString())
        if self._publishes:
            self._hurry = True
            self._publish_when_due()

    def left(self, name: str, connection: Connection) -> None:
        """A connection ended; it may have been replaced before."""
        if self._connections.get(name) is connection:
            del self._connections[name]

    def heard(self, name: str, data: bytes) -> None:
        """A neighbour told us something."""
        self._handle(data, name)

    def _tell(self, name: str, data: bytes) -> None:
        connection = self._connections[name]
        try:
            connection.send(self._host.name, data)
        except NetworkError:
            self.left(name, connection)

    # Links ----------------------------------------------------------------------------

    def measure(self) -> None:
        """Ping everybody who offers; who does not answer for a while leaves the view."""
        me = self._host.name
        for peer, offer in list(self.membership.view().offers.items()):
            name = self._addresses[peer]
            if name == me:
                continue
            if self._wires.reachable(me, name):
                there, back = self._wires.delay_us(me, name), self._wires.delay_us(name, me)
                known_us = self._rtts_us.get(peer, there + back)
                self._rtts_us[peer] = max(1, min(known_us, there + back))
                self._failures.pop(peer, None)
                continue
            refusals, silences = self._failures.get(peer, (0, 0))
            refused = not self._wires.hosts[name].up and not self._wires.line(me, name).cut
            refusals, silences = refusals + refused, silences + (not refused)
            self._failures[peer] = refusals, silences
            if refusals >= REFUSALS_MAX or silences >= SILENCES_MAX:
                self.peer_down(peer, offer.incarnation)

    def peer_down(self, peer: PeerId, incarnation: int) -> None:
        """Somebody does not answer any more."""
        if self.membership.peer_down(peer, incarnation) is not None:
            self._host.engine.note(f"{self._host.name}: {self._addresses[peer]} is down")
            self._rtts_us.pop(peer, None)
            self._on_change()


class Swarming(Host):
    """A host that takes part in gossip."""

    gossip: GossipPeer

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__(engine, name)
        self.incarnations = IncarnationDisk()


@dataclass(frozen=True, slots=True)
class _Neighbour:
    """Our end of a gossip connection."""

    peer: GossipPeer
    name: str
    connection: Connection

    def on_message(self, message: object) -> None:
        """Judge what came."""
        assert isinstance(message, bytes)
        self.peer.heard(self.name, message)

    def on_broken(self, reason: str) -> None:
        """Redialled within a second."""
        self.peer.left(self.name, self.connection)


def _gossip_of(connection: Connection, dialler: str) -> _Neighbour:
    """The listener's end of a new connection."""
    listener = connection.other(dialler).host
    assert isinstance(listener, Swarming)
    neighbour = _Neighbour(listener.gossip, dialler, connection)
    # Greetings go out once the dialler's end exists.
    listener.after(1, "", lambda: listener.gossip.joined(dialler, connection))
    return neighbour
