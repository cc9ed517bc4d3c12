"""What the client reads out of the stages' messages: who is to blame for a fault."""

import pytest

from plait.client.messages import faulted, is_our_link
from plait.types import PeerId
from plait.v1.stage_pb2 import SessionFault

FIRST, MIDDLE, LAST, CLIENT = (PeerId(name) for name in ("first", "middle", "last", "client"))
PEERS = (FIRST, MIDDLE, LAST)


def fault(code: str, peer: str) -> SessionFault:
    """A fault of epoch 2 that names ``peer``."""
    return SessionFault(session_id=b"s", epoch=2, code=code, reason="why", peer_id=peer)


@pytest.mark.parametrize(
    ("code", "named", "sender", "blamed"),
    [
        # A stage that cannot reach the next one names it, and the next one is to blame.
        ("peer-unreachable", MIDDLE, FIRST, MIDDLE),
        # No stage is named: it is the last one's link to us, whoever passed the fault on.
        ("peer-unreachable", CLIENT, FIRST, LAST),
        ("peer-unreachable", "", LAST, LAST),
        # Of anything else a stranger's name is its sender's own fault.
        ("compute-failed", CLIENT, FIRST, FIRST),
        ("compute-failed", LAST, FIRST, LAST),
    ],
)
def test_the_blame_falls_on_a_stage_of_the_route(
    code: str, named: str, sender: PeerId, blamed: PeerId
) -> None:
    told = faulted(fault(code, named), sender, PEERS)
    assert (told.epoch, told.sender, told.blamed, told.code) == (2, sender, blamed, code)


def test_only_an_unreachable_client_means_that_our_link_is_broken() -> None:
    assert is_our_link(fault("peer-unreachable", CLIENT), PEERS)
    assert not is_our_link(fault("peer-unreachable", MIDDLE), PEERS)
    assert not is_our_link(fault("compute-failed", CLIENT), PEERS)
