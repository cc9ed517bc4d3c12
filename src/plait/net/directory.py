"""The public port: ``Watch`` (what we know, signed by others), ``Probe`` and ``Hello``.

Nothing here needs to be believed: a watcher checks every signature, a Hello is signed by
the caller's peer key, and a probe promises nothing.
"""

from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from plait.errors import PlaitError
from plait.net.gossip import Gossip
from plait.net.membership import Bucket, Change
from plait.net.tls import acceptable_certificate, check_channel_cert
from plait.network_file import NetworkFile
from plait.router.view import View
from plait.types import PeerId
from plait.v1 import offer_pb2, offer_pb2_grpc
from plait.v1.identity_pb2 import ChannelCert

CALLERS_MAX = 4096
WATCHERS_MAX = 512
WATCHERS_PER_HOST_MAX = 128
ENVELOPES_PER_MESSAGE = 256
HELLO_TTL_MS_MAX = 24 * 3_600_000
HELLOS_PER_S = 20.0
HELLOS_BURST = 100
"""Per host: each Hello costs two signature checks and a rebuilt root store."""
HELLO_HOSTS_MAX = 4096

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class TrustedCertificates:
    """Whose certificates the peer port takes: callers that said Hello, and peers with offers.

    One certificate per peer, the last it announced: a root store finds only one of a name.
    A certificate that is not of our shape, or names another peer, is left out. Bounded; the
    oldest caller goes first. ``certificates`` gives the same tuple until something changes,
    as the TLS layer wants.
    """

    _callers: OrderedDict[PeerId, tuple[bytes, int]] = field(default_factory=OrderedDict)
    _offered: dict[PeerId, bytes] = field(default_factory=dict)
    _owners: dict[bytes, PeerId] = field(default_factory=dict)
    _all: tuple[bytes, ...] = ()

    def greet(self, peer: PeerId, cert_der: bytes, expires_ms: int) -> None:
        """Trust a caller until then."""
        self._callers.pop(peer, None)
        self._callers[peer] = (cert_der, expires_ms)
        while len(self._callers) > CALLERS_MAX:
            self._callers.popitem(last=False)
        self._rebuild()

    def refresh(self, view: View, now_ms: int) -> None:
        """Trust exactly the offers of the view, and forget callers that have expired."""
        offered = {
            peer: offer.certificate
            for peer, offer in view.offers.items()
            if acceptable_certificate(offer.certificate, peer)
        }
        changed = {peer for peer, cert in offered.items() if self._offered.get(peer) != cert}
        dropped = [
            peer
            for peer, (_, until_ms) in self._callers.items()
            if until_ms <= now_ms or peer in changed
        ]
        for peer in dropped:
            del self._callers[peer]
        if dropped or offered != self._offered:
            self._offered = offered
            self._rebuild()

    def certificates(self) -> tuple[bytes, ...]:
        """All of them, DER."""
        return self._all

    def peer_of(self, cert_der: bytes) -> PeerId | None:
        """Whose certificate it is, if it is trusted."""
        return self._owners.get(cert_der)

    def _rebuild(self) -> None:
        greeted = {peer: cert_der for peer, (cert_der, _) in self._callers.items()}
        self._owners = {cert: peer for peer, cert in {**self._offered, **greeted}.items()}
        self._all = tuple(self._owners)


class HelloRates:
    """How often each host may say Hello. Bounded; who asked longest ago is forgotten first."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, host: str, now_ms: int) -> bool:
        """Whether one more is within the host's rate."""
        bucket = self._buckets.pop(host, None) or Bucket(float(HELLOS_BURST), now_ms)
        self._buckets[host] = bucket
        while len(self._buckets) > HELLO_HOSTS_MAX:
            self._buckets.popitem(last=False)
        return bucket.take(now_ms, HELLOS_PER_S, HELLOS_BURST)


class DirectoryServicer(offer_pb2_grpc.DirectoryServiceServicer):
    """``probe`` answers a probe; it must be quick, since it also serves as the ping."""

    def __init__(
        self,
        gossip: Gossip,
        network: NetworkFile,
        trusted: TrustedCertificates,
        probe: Callable[[offer_pb2.ProbeRequest], offer_pb2.ProbeResponse],
        clock_ms: Callable[[], int],
    ) -> None:
        self._gossip = gossip
        self._network = network
        self._trusted = trusted
        self._probe = probe
        self._clock_ms = clock_ms
        self._watchers: Counter[str] = Counter()
        self._hellos = HelloRates()

    async def Watch(
        self, request: offer_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[offer_pb2.WatchResponse]:
        """Send all that is valid, then every change."""
        host = _host_of(context)
        if self._watchers.total() >= WATCHERS_MAX or self._watchers[host] >= WATCHERS_PER_HOST_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers")
        self._watchers[host] += 1
        try:
            with self._gossip.subscription() as changes:
                known = self._gossip.envelopes()
                for start in range(0, max(1, len(known)), ENVELOPES_PER_MESSAGE):
                    page = known[start : start + ENVELOPES_PER_MESSAGE]
                    yield offer_pb2.WatchResponse(envelopes=page, snapshot=start == 0)
                while True:
                    yield _told(await changes.get())
        finally:
            self._watchers[host] -= 1
            self._watchers += Counter()  # drops what is zero

    async def Probe(
        self, request: offer_pb2.ProbeRequest, context: Context
    ) -> offer_pb2.ProbeResponse:
        """Say whether a session would be taken now."""
        return self._probe(request)

    async def Hello(
        self, request: offer_pb2.HelloRequest, context: Context
    ) -> offer_pb2.HelloResponse:
        """Trust the caller's certificate on the peer port."""
        now_ms = self._clock_ms()
        if not self._hellos.take(_host_of(context), now_ms):
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many Hellos; wait a second"
            )
        try:
            peer, cert_der = check_channel_cert(
                request.channel_cert, self._network.network_id, now_ms
            )
        except PlaitError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{error.code}: {error}")
            raise AssertionError("abort raises") from error
        if not self._network.admits(peer):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this network is closed to you")
        statement = ChannelCert.FromString(request.channel_cert.payload)
        expires_ms = min(statement.expires_ms, now_ms + HELLO_TTL_MS_MAX)
        self._trusted.greet(peer, cert_der, expires_ms)
        return offer_pb2.HelloResponse(expires_ms=expires_ms)


def _host_of(context: Context) -> str:
    return str(context.peer()).rpartition(":")[0]


def _told(change: Change) -> offer_pb2.WatchResponse:
    response = offer_pb2.WatchResponse()
    if change.envelope is not None:
        response.envelopes.append(change.envelope)
    elif change.kind == "gone":
        response.gone_peer_ids.append(change.peer)
    return response
