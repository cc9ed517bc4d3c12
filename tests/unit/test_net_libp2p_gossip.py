"""What a new neighbour is sent of the recent messages."""

from dataclasses import dataclass, field
from typing import Any, cast

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from plait.net.libp2p import MESHSUB
from plait.net.libp2p_gossip import RPC_BYTES_MAX, GuardedRouter

NEIGHBOUR = ID.from_pubkey(create_new_key_pair(bytes(32)).public_key)
TOPIC = "/plait/test/offers/1"


@dataclass
class FakePubsub:
    peers: dict[ID, str] = field(default_factory=lambda: {NEIGHBOUR: "stream"})
    sent: list[rpc_pb2.RPC] = field(default_factory=list)

    async def write_msg(self, stream: str, rpc: rpc_pb2.RPC) -> bool:
        self.sent.append(rpc)
        return True


def router_with(*messages: rpc_pb2.Message) -> tuple[GuardedRouter, FakePubsub]:
    router = GuardedRouter(protocols=[MESHSUB], degree=6, degree_low=4, degree_high=12)
    pubsub = FakePubsub()
    router.pubsub = cast(Any, pubsub)
    for message in messages:
        router.mcache.put(message)
    return router, pubsub


def message(author: int, number: int, size: int = 10) -> rpc_pb2.Message:
    return rpc_pb2.Message(
        from_id=b"author %d" % author,
        seqno=number.to_bytes(8, "big"),
        data=bytes(size),
        topicIDs=[TOPIC],
    )


def test_only_the_newest_of_each_author_in_one_write() -> None:
    storm = [message(author, number) for number in (3, 250, 256, 1) for author in range(5)]
    router, pubsub = router_with(*storm)
    trio.run(router.send_recent_messages, NEIGHBOUR, TOPIC)
    (rpc,) = pubsub.sent
    assert sorted(m.from_id for m in rpc.publish) == [b"author %d" % n for n in range(5)]
    assert {m.seqno for m in rpc.publish} == {(256).to_bytes(8, "big")}


def test_each_write_is_one_that_the_neighbour_takes() -> None:
    router, pubsub = router_with(*(message(author, 1, size=4000) for author in range(40)))
    trio.run(router.send_recent_messages, NEIGHBOUR, TOPIC)
    assert sum(len(rpc.publish) for rpc in pubsub.sent) == 40
    assert max(rpc.ByteSize() for rpc in pubsub.sent) <= RPC_BYTES_MAX


def test_nothing_is_sent_of_nothing_or_to_nobody() -> None:
    router, pubsub = router_with()
    trio.run(router.send_recent_messages, NEIGHBOUR, TOPIC)
    router, pubsub = router_with(message(1, 1))
    pubsub.peers.clear()
    trio.run(router.send_recent_messages, NEIGHBOUR, TOPIC)
    assert pubsub.sent == []
