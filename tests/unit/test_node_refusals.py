"""A refusal for want of room comes before whatever an opening costs."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from plait.errors import BadSignature
from plait.node.audit_shell import Auditing
from plait.node.overload import Limits
from plait.node.recent import KEPT, RecentTimes
from plait.node.service import Context, StageServicer
from plait.node.stage_shell import StageShell
from plait.testing.compute import FAKE_SHAPE
from plait.testing.stages import CLIENT, PaperClient, PaperNode, PaperSwarm
from plait.types import PeerId, Span
from plait.v1 import session_pb2
from plait.v1.identity_pb2 import SignedEnvelope

PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def a_stage(sessions_max: int) -> tuple[PaperSwarm, PeerId, PaperNode]:
    swarm = PaperSwarm(limits=Limits(sessions_max=sessions_max))
    peer = swarm.add("node", Span(0, FAKE_SHAPE.layers))
    return swarm, peer, swarm.node(peer)


def opening(swarm: PaperSwarm, peer: PeerId, session: bytes) -> session_pb2.OpenRequest:
    client = PaperClient(swarm, (1, 2, 3), 4, session=session)
    return client.opening(client.first_terms(peer), 0)


def unsigned(request: session_pb2.OpenRequest) -> session_pb2.OpenRequest:
    """The same under a signature that nobody made."""
    request.session_open.signature = bytes(64)
    return request


def full() -> tuple[PaperSwarm, PeerId, PaperNode]:
    swarm, peer, node = a_stage(1)
    assert not node.stage.open(opening(swarm, peer, b"one"), CLIENT).HasField("refusal")
    return swarm, peer, node


def test_a_full_stage_says_no_without_verifying_anything() -> None:
    swarm, peer, node = full()
    request = unsigned(opening(swarm, peer, b"two"))
    refused = node.stage.refuse(request, CLIENT)
    assert refused is not None and refused.refusal.code == "capacity"
    assert refused.refusal.retry_after_ms > 0
    with pytest.raises(BadSignature):
        node.stage.open(request, CLIENT)


def test_where_there_is_room_only_the_whole_examination_says_yes() -> None:
    swarm, peer, node = a_stage(2)
    assert node.stage.refuse(unsigned(opening(swarm, peer, b"one")), CLIENT) is None
    assert len(node.stage.sessions) == 0


def test_a_session_that_is_known_here_is_not_refused_at_sight() -> None:
    swarm, peer, node = full()
    assert node.stage.refuse(opening(swarm, peer, b"one"), CLIENT) is None


def test_what_cannot_be_read_is_left_to_the_examination() -> None:
    swarm, peer, node = full()
    request = opening(swarm, peer, b"two")
    request.session_open.payload = b"\xff" * 9
    assert node.stage.refuse(request, CLIENT) is None


def test_a_node_that_leaves_says_that_and_not_that_it_is_full() -> None:
    swarm, peer, node = full()
    node.draining = True
    node.stage.drain()
    request = opening(swarm, peer, b"two")
    assert node.stage.refuse(request, CLIENT) is None
    assert node.stage.open(request, CLIENT).refusal.code == "draining"


def call_open(
    node: PaperNode, request: session_pb2.OpenRequest
) -> tuple[session_pb2.OpenResponse, list[SignedEnvelope]]:
    """The call through the peer port, and which offers it learnt."""
    learnt: list[SignedEnvelope] = []
    servicer = StageServicer(
        cast(StageShell, SimpleNamespace(core=node.stage, refusals=RecentTimes())),
        lambda certificate: CLIENT,
        learnt.append,
        cast(Auditing, None),
    )
    context: Any = SimpleNamespace(auth_context=lambda: {"x509_pem_cert": [PEM]})
    return asyncio.run(servicer.Open(request, cast(Context, context))), learnt


def test_the_peer_port_learns_no_offer_for_who_is_refused() -> None:
    swarm, peer, node = full()
    request = opening(swarm, peer, b"two")
    request.neighbour_offers.append(SignedEnvelope(payload=b"an offer"))
    response, learnt = call_open(node, request)
    assert response.refusal.code == "capacity"
    assert learnt == []


def test_the_peer_port_learns_the_offers_of_who_is_taken() -> None:
    swarm, peer, node = a_stage(1)
    request = opening(swarm, peer, b"one")
    request.neighbour_offers.append(SignedEnvelope(payload=b"an offer"))
    response, learnt = call_open(node, request)
    assert not response.HasField("refusal")
    assert len(learnt) == 1


def test_recent_times_are_bounded_and_ordered() -> None:
    times = RecentTimes()
    assert times.quantile_ms(0.99) is None
    for number in range(3 * KEPT):
        times.note(number / 1000)
    assert times.count == 3 * KEPT
    assert times.quantile_ms(0.0) == 2 * KEPT
    assert times.quantile_ms(0.5) == 2.5 * KEPT
    assert times.quantile_ms(1.0) == 3 * KEPT - 1
    times.note(-1.0)
    assert times.quantile_ms(0.0) == 0.0
