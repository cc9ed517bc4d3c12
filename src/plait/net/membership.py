"""Who is in the swarm: decides on each gossiped offer and link report. Pure; no clock.

Messages are checked from cheap to dear. *Reject* is for what no honest peer forwards
(malformed, forged, of another network), *ignore* for what an honest peer may (late, early,
repeated, too many). A restarted peer outranks its ghost by its incarnation, a later message
of one incarnation outranks an earlier one by its sequence. Everything kept is bounded.
"""

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Literal

from google.protobuf.message import DecodeError

from plait.envelope import decode, open_envelope, payload_type
from plait.errors import BadSignature, RemoteProtocolError
from plait.identity import peer_id_of
from plait.network_file import NetworkFile
from plait.router.view import LinkReport, Offer, View
from plait.router.wire import links_from_message, offer_from_message
from plait.types import Digest, PeerId
from plait.v1 import offer_pb2
from plait.v1.identity_pb2 import SignedEnvelope

OFFER_BYTES_MAX = 1024
LINK_REPORT_BYTES_MAX = 2048
FUTURE_MS_MAX = 120_000
LIFETIME_MS_MAX = 600_000
GHOST_GRACE_MS = 2_000
"""A message of an old incarnation issued this long after the new one started proves that
both live. Less could be the last word of a process that was being replaced."""

_OFFER_TYPE = payload_type(offer_pb2.Offer)
_LINKS_TYPE = payload_type(offer_pb2.LinkReport)
_CLASSES: dict[str, type[offer_pb2.Offer] | type[offer_pb2.LinkReport]] = {
    _OFFER_TYPE: offer_pb2.Offer,
    _LINKS_TYPE: offer_pb2.LinkReport,
}
_BYTES_MAX = {_OFFER_TYPE: OFFER_BYTES_MAX, _LINKS_TYPE: LINK_REPORT_BYTES_MAX}

Statement = Offer | LinkReport
_Slot = Literal["offer", "links"]
_Decoded = tuple[Statement, SignedEnvelope]


def next_incarnation(now_ns: int, last: int, issued_ms: int) -> int:
    """For a peer that starts now: above its ``last``, and above all it has ``issued``."""
    return max(now_ns, last + 1, issued_ms * 1_000_000 + 1)


@dataclass(frozen=True, slots=True)
class MembershipLimits:
    """Bounds on memory and rates. Rates are messages per second, bursts are messages."""

    peers_per_model_max: int = 4096
    peers_remembered_max: int = 16_384
    verified_remembered_max: int = 16_384
    decoded_remembered_max: int = 1_024
    author_rate: float = 1.0
    author_burst: int = 20
    forwarder_rate: float = 500.0
    forwarder_burst: int = 4096


@dataclass(frozen=True, slots=True)
class Change:
    """What a message or the passing of time did to the view.

    ``offer``: a new or newer offer of the peer. ``links``: a newer link report. ``gone``: the
    peer's offer and report left the view; ``reason`` is withdrawn, expired, unreachable or
    restarted. ``envelope`` is what to tell watchers, None when no message says so.
    """

    kind: Literal["offer", "links", "gone"]
    peer: PeerId
    reason: str = ""
    offer: Offer | None = None
    envelope: SignedEnvelope | None = None


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two live processes sign as one peer: a copied identity folder."""

    peer: PeerId
    incarnations: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"two running nodes share the identity {self.peer} (started at "
            f"{self.incarnations[0]} and {self.incarnations[1]} ns); "
            "its data folder was copied: give one of them a folder of its own"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a message: accept and forward, ignore, or reject and blame the forwarder."""

    outcome: Literal["accept", "ignore", "reject"]
    reason: str = ""
    change: Change | None = None
    conflict: Conflict | None = None


@dataclass(slots=True)
class Bucket:
    """A token bucket in virtual time. ``rate`` is per second."""

    tokens: float
    updated_ms: int

    def take(self, now_ms: int, rate: float, burst: int) -> bool:
        """Whether one more is within the rate; then it counts."""
        elapsed_ms = max(0, now_ms - self.updated_ms)
        self.tokens = min(float(burst), self.tokens + elapsed_ms * rate / 1000)
        self.updated_ms = max(self.updated_ms, now_ms)
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclass(slots=True)
class _Kept:
    """The newest statement of one kind; ``live`` None once it was withdrawn or lost."""

    sequence: int
    payload: bytes
    live: tuple[Statement, SignedEnvelope] | None


@dataclass(slots=True)
class _Peer:
    incarnation: int
    bucket: Bucket
    forget_ms: int
    """No message of this peer seen so far can be valid from then on."""
    offer: _Kept | None = None
    links: _Kept | None = None

    def live(self) -> list[tuple[Statement, SignedEnvelope]]:
        return [kept.live for kept in (self.offer, self.links) if kept and kept.live]


class Membership:
    """The offers and link reports of one network, as one node or client knows them."""

    def __init__(self, network: NetworkFile, limits: MembershipLimits | None = None) -> None:
        self._network = network
        self._limits = limits or MembershipLimits()
        self._peers: dict[PeerId, _Peer] = {}
        self._hosts: Counter[Digest] = Counter()
        self._forwarders: OrderedDict[str, Bucket] = OrderedDict()
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self._decoded: OrderedDict[bytes, _Decoded] = OrderedDict()
        """What was found well-formed and signed lately: it comes from every neighbour."""
        self._view: View | None = None

    def handle_envelope(
        self, envelope: SignedEnvelope | bytes, now_ms: int, forwarder: str | None = None
    ) -> Verdict:
        """Judge one message that ``forwarder`` (a peer id; None: ourselves) handed us."""
        if forwarder is not None and not self._forwarder_may(forwarder, now_ms):
            return _ignore("its forwarder sends too much")
        data = envelope if isinstance(envelope, bytes) else envelope.SerializeToString()
        decoded = self._decode(data)
        if isinstance(decoded, Verdict):
            return decoded
        statement, opened = decoded
        return _untimely(statement, now_ms) or self._judge(statement, opened, now_ms)

    def expire(self, now_ms: int) -> tuple[Change, ...]:
        """Drop what has expired, and forget peers nothing valid can come from any more."""
        changes: list[Change] = []
        for name, peer in list(self._peers.items()):
            links_went = self._drop_expired(peer, "links", now_ms)
            if self._drop_expired(peer, "offer", now_ms):
                changes.append(Change("gone", name, "expired"))
            elif links_went:
                changes.append(Change("links", name, "expired"))
            if not peer.live() and peer.forget_ms <= now_ms:
                del self._peers[name]
        return tuple(changes)

    def peer_down(self, name: PeerId, incarnation: int) -> Change | None:
        """Drop what this incarnation (or an earlier one) of a peer said, at once.

        Only a message with a newer sequence, or a newer incarnation, brings it back.
        """
        peer = self._peers.get(name)
        if peer is None or incarnation < peer.incarnation:
            return None
        went = bool(peer.live())
        self._clear(peer, "offer")
        self._clear(peer, "links")
        if incarnation > peer.incarnation:
            peer.incarnation, peer.offer, peer.links = incarnation, None, None
        return Change("gone", name, "unreachable") if went else None

    def view(self) -> View:
        """Offers and links as the router wants them. The same object until something changes."""
        if self._view is None:
            offers: dict[PeerId, Offer] = {}
            rtt_us: dict[tuple[PeerId, PeerId], int] = {}
            bandwidth: dict[tuple[PeerId, PeerId], int] = {}
            for statement, _ in self._live():
                if isinstance(statement, Offer):
                    offers[statement.peer] = statement
                    continue
                for link in statement.links:
                    rtt_us[statement.peer, link.peer] = link.rtt_us
                    if link.bandwidth:
                        bandwidth[statement.peer, link.peer] = link.bandwidth
            self._view = View(offers, rtt_us, bandwidth)
        return self._view

    def envelopes(self) -> tuple[SignedEnvelope, ...]:
        """Every signed message now in force."""
        return tuple(envelope for _, envelope in self._live())

    def next_expiry(self) -> int | None:
        """When ``expire`` will next have something to drop, milliseconds; None: never."""
        return min((statement.expires_ms for statement, _ in self._live()), default=None)

    def _live(self) -> list[tuple[Statement, SignedEnvelope]]:
        return [pair for peer in self._peers.values() for pair in peer.live()]

    def _forwarder_may(self, forwarder: str, now_ms: int) -> bool:
        limits = self._limits
        bucket = self._forwarders.pop(forwarder, None)
        if bucket is None:
            bucket = Bucket(limits.forwarder_burst, now_ms)
            if len(self._forwarders) >= limits.peers_remembered_max:
                self._forwarders.popitem(last=False)
        self._forwarders[forwarder] = bucket
        return bucket.take(now_ms, limits.forwarder_rate, limits.forwarder_burst)

    def _decode(self, data: bytes) -> _Decoded | Verdict:
        """Check and decode a message, without a look at the clock or at what is known."""
        key = hashlib.sha256(data).digest()
        known = self._decoded.get(key)
        if known is not None:
            return known
        envelope = _parse(data)
        if isinstance(envelope, Verdict):
            return envelope
        if not self._network.admits(peer_id_of(envelope.signer)):
            return _ignore("its author is not admitted to the network")
        try:
            statement = self._open(envelope, key)
        except (BadSignature, RemoteProtocolError) as error:
            return Verdict("reject", str(error))
        if len(self._decoded) >= self._limits.decoded_remembered_max:
            self._decoded.popitem(last=False)
        self._decoded[key] = statement, envelope
        return statement, envelope

    def _open(self, envelope: SignedEnvelope, key: bytes) -> Statement:
        """Verify (once per signed bytes) and decode; raises as the wire functions do."""
        message_class = _CLASSES[envelope.payload_type]
        if key in self._verified:
            self._verified.move_to_end(key)
            message = decode(envelope.payload, message_class)
        else:
            message = open_envelope(envelope, message_class)
            if len(self._verified) >= self._limits.verified_remembered_max:
                self._verified.popitem(last=False)
            self._verified[key] = None
        if isinstance(message, offer_pb2.Offer):
            return offer_from_message(message, envelope, self._network.network_id)
        return links_from_message(message, envelope, self._network.network_id)

    def _judge(self, statement: Statement, envelope: SignedEnvelope, now_ms: int) -> Verdict:
        """Order a valid message among what is known of its author."""
        limits = self._limits
        peer = self._peers.get(statement.peer)
        if peer is None:
            if len(self._peers) >= limits.peers_remembered_max:
                return _ignore("too many peers are known")
            peer = _Peer(statement.incarnation, Bucket(limits.author_burst, now_ms), 0)
        slot = _slot(statement)
        refusal = _outranked(peer, statement, envelope) or self._crowded(peer, statement)
        if refusal is not None:
            return refusal
        # Last, so that replayed messages cannot use up their author's rate.
        if not peer.bucket.take(now_ms, limits.author_rate, limits.author_burst):
            return _ignore("its author sends too much")
        self._peers[statement.peer] = peer
        restarted = statement.incarnation > peer.incarnation and peer.offer and peer.offer.live
        if statement.incarnation > peer.incarnation:
            self._clear(peer, "offer")
            peer.incarnation, peer.offer, peer.links = statement.incarnation, None, None
        self._clear(peer, slot)
        self._keep(peer, slot, statement, envelope)
        return Verdict("accept", "", _change(statement, envelope, bool(restarted)))

    def _crowded(self, peer: _Peer, statement: Statement) -> Verdict | None:
        if not isinstance(statement, Offer) or statement.state == "withdrawn":
            return None
        present = peer.offer.live[0] if peer.offer and peer.offer.live else None
        if isinstance(present, Offer) and present.model_digest == statement.model_digest:
            return None
        full = self._hosts[statement.model_digest] >= self._limits.peers_per_model_max
        return _ignore("too many peers serve its model") if full else None

    def _keep(
        self, peer: _Peer, slot: _Slot, statement: Statement, envelope: SignedEnvelope
    ) -> None:
        gone = isinstance(statement, Offer) and statement.state == "withdrawn"
        kept = _Kept(statement.sequence, envelope.payload, None if gone else (statement, envelope))
        setattr(peer, slot, kept)
        # What came before was issued before, so it will have expired by then.
        peer.forget_ms = max(peer.forget_ms, statement.issued_ms + LIFETIME_MS_MAX)
        if isinstance(statement, Offer) and not gone:
            self._hosts[statement.model_digest] += 1
        self._view = None

    def _clear(self, peer: _Peer, slot: _Slot) -> None:
        """Take the slot's statement out of the view, but remember its sequence."""
        kept: _Kept | None = getattr(peer, slot)
        if kept is None or kept.live is None:
            return
        statement, kept.live, self._view = kept.live[0], None, None
        if isinstance(statement, Offer):
            self._hosts[statement.model_digest] -= 1
            if not self._hosts[statement.model_digest]:
                del self._hosts[statement.model_digest]

    def _drop_expired(self, peer: _Peer, slot: _Slot, now_ms: int) -> bool:
        kept: _Kept | None = getattr(peer, slot)
        if kept is None or kept.live is None or kept.live[0].expires_ms > now_ms:
            return False
        self._clear(peer, slot)
        return True


def _ignore(reason: str, conflict: Conflict | None = None) -> Verdict:
    return Verdict("ignore", reason, conflict=conflict)


def _slot(statement: Statement) -> _Slot:
    return "offer" if isinstance(statement, Offer) else "links"


def _parse(data: bytes) -> SignedEnvelope | Verdict:
    """Check size, encoding and type: everything that needs no cryptography."""
    size = len(data)
    if size > LINK_REPORT_BYTES_MAX:
        return Verdict("reject", f"{size} bytes are too many")
    try:
        envelope = SignedEnvelope.FromString(data)
    except DecodeError:
        return Verdict("reject", "not an envelope")
    # Otherwise anyone could make many messages out of one signed by another.
    envelope.DiscardUnknownFields()
    if envelope.SerializeToString(deterministic=True) != data:
        return Verdict("reject", "the envelope is not canonically encoded")
    bytes_max = _BYTES_MAX.get(envelope.payload_type)
    if bytes_max is None:
        return Verdict("reject", f"{envelope.payload_type[:80]!r} is not gossiped")
    if size > bytes_max:
        return Verdict("reject", f"{size} bytes are too many")
    if len(envelope.signer) != 32:
        return Verdict("reject", "not signed")
    return envelope


def _untimely(statement: Statement, now_ms: int) -> Verdict | None:
    if statement.expires_ms - statement.issued_ms > LIFETIME_MS_MAX:
        return Verdict("reject", "it lives for more than ten minutes")
    if statement.issued_ms > now_ms + FUTURE_MS_MAX:
        return _ignore("it was issued in the future: compare the clocks")
    if statement.expires_ms <= now_ms:
        return _ignore("it has expired")
    return None


def _outranked(peer: _Peer, statement: Statement, envelope: SignedEnvelope) -> Verdict | None:
    """Refuse ghosts, duplicates and stale messages."""
    if statement.incarnation > peer.incarnation:
        return None
    if statement.incarnation < peer.incarnation:
        both_live = statement.issued_ms > peer.incarnation // 1_000_000 + GHOST_GRACE_MS
        pair = (statement.incarnation, peer.incarnation)
        return _ignore(
            "it is of an earlier incarnation", Conflict(statement.peer, pair) if both_live else None
        )
    kept: _Kept | None = getattr(peer, _slot(statement))
    if kept is None or statement.sequence > kept.sequence:
        return None
    if statement.sequence < kept.sequence:
        return _ignore("a later one is known")
    if envelope.payload == kept.payload:
        return _ignore("it is known")
    return _ignore("its author signed another with the same sequence")


def _change(statement: Statement, envelope: SignedEnvelope, restarted: bool) -> Change:
    if isinstance(statement, LinkReport):
        # A new incarnation that has not offered yet: the ghost's offer went.
        kind: Literal["gone", "links"] = "gone" if restarted else "links"
        reason = "restarted" if restarted else ""
        return Change(kind, statement.peer, reason, envelope=envelope)
    if statement.state == "withdrawn":
        return Change("gone", statement.peer, "withdrawn", envelope=envelope)
    return Change("offer", statement.peer, offer=statement, envelope=envelope)
