"""The in-memory gossip network, against what the port promises."""

import pytest

from plait.errors import NetworkError, PeerUnreachable
from plait.net.port import PeerEvent, Validation, peer_of_multiaddr
from plait.testing.net import MemoryControlPlane, MemoryNetwork
from plait.types import PeerId

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def accept(data: bytes, forwarder: PeerId) -> bool:
    return True


async def line(network: MemoryNetwork) -> list[MemoryControlPlane]:
    """Three running planes, linked in a line."""
    planes = [await network.plane(peer).__aenter__() for peer in (A, B, C)]
    network.link(A, B)
    network.link(B, C)
    return planes


async def test_a_message_reaches_everybody_once_over_several_links() -> None:
    network = MemoryNetwork()
    a, b, c = await line(network)
    queues = [await plane.subscribe("t", accept) for plane in (a, b, c)]
    network.link(A, C)
    await a.publish("t", b"x")
    assert [queue.qsize() for queue in queues] == [0, 1, 1]
    assert queues[2].get_nowait().forwarder == A


@pytest.mark.parametrize("verdict", [False, "ignore"])
async def test_what_a_validator_does_not_accept_goes_no_further(verdict: Validation) -> None:
    a, b, c = await line(MemoryNetwork())
    middle = await b.subscribe("t", lambda data, forwarder: verdict)
    end = await c.subscribe("t", accept)
    await a.publish("t", b"x")
    assert middle.empty()
    assert end.empty()


async def test_cut_links_stay_down_until_healed() -> None:
    network = MemoryNetwork()
    a, b, _ = await line(network)
    network.cut(A, B)
    assert a.peers() == frozenset()
    with pytest.raises(PeerUnreachable):
        await a.connect(b.multiaddrs[0])
    network.heal(A, B)
    events = [a.events.get_nowait() for _ in range(3)]
    assert events == [PeerEvent(kind, B) for kind in ("connected", "disconnected", "connected")]


async def test_a_peer_that_leaves_is_missed() -> None:
    network = MemoryNetwork()
    async with network.plane(A) as a, network.plane(B, a.multiaddrs) as b:
        assert b.peers() == {A}
        assert b.unreachable() == {}
        network.leave(A)
        assert b.unreachable() == {a.multiaddrs[0]: "no link"}
        with pytest.raises(NetworkError):
            await a.publish("t", b"x")
        a.learn(["/x"])
        assert a.learned == ["/x"]


def test_a_multiaddr_names_its_peer() -> None:
    assert peer_of_multiaddr("/ip4/1.2.3.4/tcp/1/p2p/Q") == "Q"
    for bad in ("", "/p2p/", "/ip4/1.2.3.4/tcp/1", "/p2p/Q/tcp/1"):
        with pytest.raises(ValueError, match="must end in"):
            peer_of_multiaddr(bad)
