"""py-libp2p's gossipsub, guarded: a stranger's bytes stop nothing, and gossip with a peer begins
and ends with its connection."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import trio
from libp2p.abc import IHost, INetStream
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.pubsub_notifee import PubsubNotifee
from libp2p.utils import encode_varint_prefixed

from plait.logs import get_logger
from plait.net.bridge import describe

log = get_logger(__name__)

MESSAGE_BYTES_MAX = 4096
RPC_BYTES_MAX = 64 * 1024
TOPICS_PER_PEER_MAX = 64
CONTROL_IDS_MAX = 512
PRUNE_BACKOFF_S_MAX = 120


class GuardedRouter(GossipSub):
    """GossipSub that takes nothing on trust from a control message."""

    async def heartbeat(self) -> None:
        """Beat on: one bad beat must not stop the host."""
        while True:
            with guarded("heartbeat"):
                await super().heartbeat()
            await trio.sleep(self.heartbeat_interval)

    async def on_peer_subscribed(self, peer_id: ID, topic: str) -> None:
        with guarded("on_peer_subscribed"):
            await super().on_peer_subscribed(peer_id, topic)

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """Send a new neighbour the newest message of each author, in few writes.

        All recent messages, each in a write with a freshly signed address of ours, as libp2p
        does it, take longer than a ping may when links are made again after a hang.
        """
        newest: dict[bytes, rpc_pb2.Message] = {}
        for name in self.mcache.window(topic):
            message = self.mcache.get(name)
            if message is not None:
                known = newest.setdefault(message.from_id, message)
                newest[message.from_id] = max(known, message, key=lambda m: m.seqno)
        pubsub = self.pubsub
        stream = pubsub.peers.get(peer_id) if pubsub else None
        if pubsub and stream and newest:
            messages, step = list(newest.values()), RPC_BYTES_MAX // MESSAGE_BYTES_MAX // 2
            for start in range(0, len(messages), step):
                rpc = rpc_pb2.RPC(publish=messages[start : start + step])
                await pubsub.write_msg(stream, rpc)

    async def flush_pending_messages(self, peer_id: ID) -> None:
        with guarded("flush_pending_messages"):
            await super().flush_pending_messages(peer_id)

    async def handle_ihave(self, ihave_msg: rpc_pb2.ControlIHave, sender_peer_id: ID) -> None:
        if ihave_msg.topicID in self.mesh:
            del ihave_msg.messageIDs[CONTROL_IDS_MAX:]
            await super().handle_ihave(ihave_msg, sender_peer_id)

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        del iwant_msg.messageIDs[CONTROL_IDS_MAX:]
        await super().handle_iwant(iwant_msg, sender_peer_id)

    async def handle_graft(self, graft_msg: rpc_pb2.ControlGraft, sender_peer_id: ID) -> None:
        if graft_msg.topicID in self.mesh:  # topics we never joined would only fill memory
            await super().handle_graft(graft_msg, sender_peer_id)

    async def handle_prune(self, prune_msg: rpc_pb2.ControlPrune, sender_peer_id: ID) -> None:
        if prune_msg.topicID in self.mesh:
            prune_msg.backoff = min(prune_msg.backoff, PRUNE_BACKOFF_S_MAX)
            del prune_msg.peers[:]  # addresses a stranger wants us to dial
            await super().handle_prune(prune_msg, sender_peer_id)


class GuardedPubsub(Pubsub):
    """Pubsub that survives any message and looks at each only once at a time.

    Gossip with a peer begins and ends when its owner says so, with the connection; a stream
    that fails is told to ``stream_failed`` with its connection, and that is all.
    """

    stream_failed: Callable[[Any], None]

    def __init__(self, host: IHost, router: GossipSub) -> None:
        super().__init__(
            host,
            router,
            max_concurrent_validator_count=64,
            max_subscriptions_per_rpc=TOPICS_PER_PEER_MAX,
            max_subscriptions_per_peer=TOPICS_PER_PEER_MAX,
            max_inbound_rpc_size=RPC_BYTES_MAX,
        )
        # Seconds, the default, repeat after a restart and lose messages to others' caches.
        self.counter = time.time_ns()
        self._in_flight: set[bytes] = set()
        network: Any = host.get_network()
        for notifee in [n for n in network.notifees if isinstance(n, PubsubNotifee)]:
            network.remove_notifee(notifee)

    async def begin(self, peer: ID) -> None:
        """Open the stream to a peer and say what we subscribe to.

        Raises any of libp2p's errors, or ``ConnectionError`` when gossip did not begin.
        """
        await self._handle_new_peer(peer)
        if peer not in self.peers:
            raise ConnectionError("gossip was refused")

    def end(self, peer: ID) -> None:
        """Forget a peer whose connection is gone from the host."""
        self._handle_dead_peer(peer)

    def _schedule_peer_stream_retry(self, peer_id: ID) -> None:
        """Begin nothing by itself: two beginnings at once would leave a sender for ever."""

    async def stream_handler(self, stream: INetStream) -> None:
        """Read what a peer sends until its stream ends, for whatever reason."""
        try:
            await self.continuously_read_stream(stream)
        except Exception as error:  # noqa: BLE001 - a task boundary
            log.debug("libp2p.refused", what="gossip", error=describe(error))
        with contextlib.suppress(Exception):
            await stream.reset()
        self.stream_failed(stream.muxed_conn)

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        """Send to a peer; False if its stream is broken."""
        try:
            await stream.write(encode_varint_prefixed(rpc_msg.SerializeToString()))
        except Exception as error:  # noqa: BLE001 - a task boundary
            log.debug("libp2p.unsent", error=describe(error))
            self.stream_failed(stream.muxed_conn)
            return False
        return True

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        name = msg.from_id + msg.seqno
        if name in self._in_flight or len(msg.topicIDs) != 1 or len(msg.data) > MESSAGE_BYTES_MAX:
            return
        self._in_flight.add(name)
        try:
            with guarded("message"):
                await super().push_msg(msg_forwarder, msg)
        finally:
            self._in_flight.discard(name)


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """Log an exception instead of letting it cancel the host: a task boundary."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        log.debug("libp2p.refused", what=what, error=describe(error))
