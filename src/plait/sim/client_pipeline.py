"""Modelled calls and links between a client's session and its stages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from plait.client.actions import (
    Call,
    CloseEpoch,
    CloseStages,
    ConfirmStage,
    Event,
    GrantShown,
    LeaveStages,
    LinkLost,
    OpenStages,
    Send,
    ShowGrant,
    StageConfirmed,
    StageFailed,
    StageOpened,
)
from plait.client.messages import (
    close_epoch_request,
    close_request,
    confirm_request,
    epoch_closed,
    faulted,
    frame_request,
    grant_request,
    is_our_link,
    leave_request,
    open_request,
    refused,
    resulted,
)
from plait.errors import NetworkError, PeerUnreachable, PlaitError, RemoteProtocolError
from plait.sim.engine import MS, S, Violation
from plait.sim.host import Host
from plait.sim.keys import cert_of
from plait.sim.network import Connection, Wires
from plait.sim.stage import DISHONEST, accept_link, check_fault
from plait.types import PeerId, SessionId
from plait.v1 import session_pb2, stage_pb2

CONFIRM_TIMEOUT_US = 6 * S
CLOSE_TIMEOUT_US = 6 * S


class Pipeline:
    """One session's stages, as ``plait.client.pipeline``. ``report`` takes each event."""

    def __init__(
        self,
        host: Host,
        wires: Wires,
        addresses: Mapping[PeerId, str],
        report: Callable[[Event], None],
    ) -> None:
        self._host, self._wires, self._addresses = host, wires, addresses
        self._report = report
        self.peers: tuple[PeerId, ...] = ()
        self._session_id = SessionId(b"")
        self._links: dict[PeerId, Connection] = {}
        self._epoch = 0

    # Calls ----------------------------------------------------------------------------

    def _call(
        self,
        epoch: int,
        peer: PeerId,
        call: Call,
        request: session_pb2.OpenRequest
        | session_pb2.ConfirmRequest
        | session_pb2.CloseEpochRequest,
        timeout_us: int,
        done: Callable[[object], None],
    ) -> None:
        session_id = self._session_id

        def answered(answer: object) -> None:
            if session_id != self._session_id:
                return
            if isinstance(answer, RemoteProtocolError) and call == "open":
                raise Violation("protocol", f"{self._addresses[peer]}: {answer}")
            if isinstance(answer, PlaitError):
                failed = StageFailed(epoch, peer, call, "peer-unreachable", str(answer), gone=True)
                self._report(failed)
            elif isinstance(
                answer, session_pb2.OpenResponse | session_pb2.ConfirmResponse
            ) and answer.HasField("refusal"):
                refusal = answer.refusal
                if refusal.code in DISHONEST:
                    raise Violation("protocol", f"{self._addresses[peer]}: {refusal.reason}")
                self._report(refused(epoch, peer, call, refusal))
            else:
                done(answer)

        self._wires.call(
            self._host,
            self._wires.hosts[self._addresses[peer]],
            f"{call} e{epoch}",
            request,
            timeout_us,
            answered,
        )

    def open(self, action: OpenStages) -> None:
        """Ask every stage to hold the session."""
        terms = action.terms
        self._session_id, self._epoch = terms.session_id, terms.epoch
        self.peers = tuple(stage.peer for stage in terms.stages)
        for index, offer in enumerate(action.offers):
            request = open_request(action, index, cert_of(self._host.name))
            peer = offer.peer

            def opened(answer: object, peer: PeerId = peer) -> None:
                assert isinstance(answer, session_pb2.OpenResponse)
                self._report(
                    StageOpened(terms.epoch, peer, answer.stage_cert, answer.reusable_tokens)
                )

            self._call(terms.epoch, peer, "open", request, action.timeout_ms * MS, opened)

    def confirm(self, action: ConfirmStage) -> None:
        """Make a stage ready, with our own link to it where it is an end of the pipeline."""
        request = confirm_request(self._session_id, action)

        def confirmed(answer: object) -> None:
            if action.link:
                self._link(action)
            else:
                self._report(StageConfirmed(action.epoch, action.peer))

        self._call(action.epoch, action.peer, "confirm", request, CONFIRM_TIMEOUT_US, confirmed)

    def show(self, action: ShowGrant) -> None:
        """Show a stage the grant for the reservation that it started on."""
        request = grant_request(self._session_id, action)
        self._call(
            action.epoch,
            action.peer,
            "grant",
            request,
            CONFIRM_TIMEOUT_US,
            lambda answer: self._report(GrantShown(action.epoch, action.peer)),
        )

    def close_epoch(self, action: CloseEpoch) -> None:
        """Freeze the epoch on these stages."""
        request = close_epoch_request(self._session_id, action)
        for peer in action.peers:

            def closed(answer: object, peer: PeerId = peer) -> None:
                assert isinstance(answer, session_pb2.CloseEpochResponse)
                self._report(epoch_closed(action, peer, answer))

            timeout_us = action.timeout_ms * MS
            self._call(action.epoch, peer, "close-epoch", request, timeout_us, closed)

    def close(self, action: CloseStages) -> None:
        """Nothing of this session is reported any more; the next one may have another id."""
        self._end(action.epoch, action.peers, close_request(self._session_id, action))
        self._session_id = SessionId(b"")
        links, self._links = self._links, {}
        for link in links.values():
            link.close(self._host.name)

    def leave(self, action: LeaveStages) -> None:
        """End the session on stages that are in it no more."""
        self._end(action.epoch, action.peers, leave_request(self._session_id, action))

    def _end(
        self, epoch: int, peers: tuple[PeerId, ...], request: session_pb2.CloseRequest
    ) -> None:
        for peer in peers:
            self._wires.call(
                self._host,
                self._wires.hosts[self._addresses[peer]],
                f"close e{epoch}",
                request,
                CLOSE_TIMEOUT_US,
                lambda answer: None,
            )

    # Links ----------------------------------------------------------------------------

    def _link(self, action: ConfirmStage) -> None:
        peer, name = action.peer, self._host.name
        link = self._links.get(peer)
        confirmed, session_id = StageConfirmed(action.epoch, peer), self._session_id
        if link is not None and link.is_open(name):
            self._report(confirmed)
            return

        def dialled(answer: Connection | NetworkError) -> None:
            if isinstance(answer, NetworkError):
                if session_id != self._session_id:
                    return
                self._report(
                    StageFailed(
                        action.epoch, peer, "confirm", "peer-unreachable", str(answer), gone=True
                    )
                )
                return
            answer.sides[name].end = _ClientEnd(self, peer, answer)
            if session_id != self._session_id:
                answer.close(name)
                return
            self._links[peer] = answer
            self._report(confirmed)

        listener = self._wires.hosts[self._addresses[peer]]
        self._wires.connect(
            self._host, listener, "link", lambda link: accept_link(link, name), dialled
        )

    def send(self, action: Send) -> None:
        """Push a frame to the first stage."""
        peer, request = self.peers[0], frame_request(self._session_id, action)
        try:
            self._linked(peer).send(self._host.name, request)
        except NetworkError as error:
            self._report(LinkLost(action.epoch, peer, str(error)))

    def received(self, peer: PeerId, message: object) -> None:
        """Something came on one of our links."""
        assert isinstance(message, stage_pb2.LinkResponse)
        if message.WhichOneof("kind") == "result":
            result = message.result
            if result.session_id == self._session_id and peer == self.peers[-1]:
                self._report(resulted(result))
        else:
            fault = message.fault
            if fault.session_id == self._session_id:
                check_fault(fault, self._addresses)
                if fault.epoch == self._epoch and is_our_link(fault, self.peers):
                    self._drop_link(self.peers[-1])
                self._report(faulted(fault, peer, self.peers))

    def _linked(self, peer: PeerId) -> Connection:
        link = self._links.get(peer)
        if link is None:
            raise PeerUnreachable("the link is down")
        return link

    def _drop_link(self, peer: PeerId) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            link.close(self._host.name)

    def lost(self, peer: PeerId, connection: Connection, reason: str) -> None:
        """One of our links ended."""
        if self._links.get(peer) is connection and peer in (self.peers[0], self.peers[-1]):
            self._report(LinkLost(self._epoch, peer, reason))


@dataclass(frozen=True, slots=True)
class _ClientEnd:
    """Our end of a link to a stage."""

    pipeline: "Pipeline"
    peer: PeerId
    connection: Connection

    def on_message(self, message: object) -> None:
        """A result or a fault."""
        self.pipeline.received(self.peer, message)

    def on_broken(self, reason: str) -> None:
        """The stage is gone."""
        self.pipeline.lost(self.peer, self.connection, reason)
