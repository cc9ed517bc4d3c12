"""Telling a session's other stages and its client that something is wrong. Pure."""

from collections.abc import Callable

from plait.errors import CapacityError, NetworkError
from plait.logs import get_logger
from plait.node.ports import Links
from plait.node.sessions import StageSession
from plait.node.wire import fault_message
from plait.types import PeerId
from plait.v1 import stage_pb2

log = get_logger(__name__)

CLIENT_GONE = "client-gone"
"""One end of the pipeline misses the client; it is gone if the other end does too."""
DRAINING = "draining"
"""The peer named will stop: it serves on until the client has moved."""


def fault_of(session: StageSession, peer: PeerId, code: str, reason: str) -> stage_pb2.SessionFault:
    """A fault of the current epoch; ``peer`` is who is to blame or lost."""
    return fault_message(session.id, session.terms.epoch, peer, code, reason)


def tell(
    links: Links,
    session: StageSession,
    fault: stage_pb2.SessionFault,
    *,
    upstream: bool = True,
    downstream: bool = True,
) -> None:
    """Send a fault towards the client both ways, so that it hears although one may be cut."""
    response, request = stage_pb2.LinkResponse(fault=fault), stage_pb2.LinkRequest(fault=fault)
    client_is_told = upstream and session.is_first
    if upstream:
        _try(lambda: links.send_up(session.upstream, response))
    if downstream and not session.is_last:
        _try(lambda: links.send_down(session.downstream, request))
    elif downstream and not client_is_told:
        _try(lambda: links.send_up(session.terms.client, response))


def _try(send: Callable[[], None]) -> None:
    try:
        send()
    except (NetworkError, CapacityError) as error:
        log.debug("fault not passed on", reason=str(error))
