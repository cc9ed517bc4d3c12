"""The stages of one session as the core sees them: calls go out, events come back.

No decisions here. Every call has a timeout and becomes one event, whatever happens; a Link
lives as long as its session and is shared by its epochs.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence

import grpc

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
from plait.client.dialer import Dialer
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
from plait.errors import NetworkError, PeerUnreachable, PlaitError
from plait.logs import get_logger
from plait.net.link_stream import OutgoingLink
from plait.router.view import Offer
from plait.task_scope import TaskScope
from plait.types import PeerId, SessionId
from plait.v1 import session_pb2, stage_pb2, stage_pb2_grpc
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

OPEN_TIMEOUT_S = 2.0
"""Of a stage we are connected to: those that were quick hold their pages no longer."""
CONFIRM_TIMEOUT_S = 6.0
CLOSE_TIMEOUT_S = 6.0


class Pipeline:
    """One session's stages. ``report`` takes each event; ``end`` stops all reports."""

    def __init__(
        self,
        session_id: SessionId,
        client_cert: SignedEnvelope,
        dialer: Dialer,
        tasks: TaskScope,
        report: Callable[[Event], None],
    ) -> None:
        self.session_id = session_id
        self._client_cert = client_cert
        self._dialer = dialer
        self._tasks = tasks
        self._report = report
        self._offers: dict[PeerId, Offer] = {}
        self.peers: tuple[PeerId, ...] = ()
        self._links: dict[PeerId, OutgoingLink] = {}
        self._epoch = 0
        self._over = False
        # W3C trace context: one trace per session, sampled nowhere by default.
        self._traceparent = f"00-{session_id.hex()}-{session_id.hex()[:16]}-00"

    # Calls --------------------------------------------------------------------------

    def open(
        self, action: OpenStages, envelope_of: Callable[[Offer], SignedEnvelope | None]
    ) -> None:
        """Ask every stage to hold the session; it also gets its neighbours' signed offers."""
        terms = action.terms
        self._epoch, self.peers = terms.epoch, tuple(stage.peer for stage in terms.stages)
        for index, offer in enumerate(action.offers):
            self._offers[offer.peer] = offer
            request = open_request(action, index, self._client_cert)
            known = map(envelope_of, action.neighbours(index))
            request.neighbour_offers.extend(one for one in known if one is not None)
            self._spawn(
                self._open_one(terms.epoch, offer, request, action.timeout_ms / 1000),
                f"open on {offer.peer}",
            )

    def confirm(self, action: ConfirmStage) -> None:
        """Make a stage ready, with our own link to it where it is an end of the pipeline."""
        request = confirm_request(self.session_id, action)
        self._spawn(self._confirm_one(action, request), f"confirm on {action.peer}")

    def show_grant(self, action: ShowGrant) -> None:
        """Show a stage the grant for the reservation that it started on."""
        request = grant_request(self.session_id, action)
        self._spawn(self._show_one(action, request), f"grant to {action.peer}")

    def close_epoch(self, action: CloseEpoch) -> None:
        """Freeze the epoch on these stages."""
        request = close_epoch_request(self.session_id, action)
        for peer in action.peers:
            self._spawn(self._close_epoch_one(action, peer, request), f"close epoch on {peer}")

    def send(self, action: Send) -> None:
        """Push a frame to the first stage."""
        peer, request = self.peers[0], frame_request(self.session_id, action, self._traceparent)
        try:
            self._linked(peer).outbox.put(request)
        except PlaitError as error:
            self._tell(LinkLost(action.epoch, peer, str(error)))

    def leave(self, action: LeaveStages) -> None:
        """End the session on stages that are in it no more."""
        request = leave_request(self.session_id, action)
        self._spawn(self._leave(action.peers, request), "leave stages")

    async def _leave(self, peers: Sequence[PeerId], request: session_pb2.CloseRequest) -> None:
        await self._end(peers, request)

    async def close(self, action: CloseStages) -> bool:
        """End the session on these stages; True when every stage has settled."""
        self._over = True
        settled = await self._end(action.peers, close_request(self.session_id, action))
        for link in self._links.values():
            link.outbox.close()
        return settled

    async def _end(self, peers: Sequence[PeerId], request: session_pb2.CloseRequest) -> bool:
        known = [self._offers[peer] for peer in peers if peer in self._offers]
        return all(await asyncio.gather(*(self._close_one(offer, request) for offer in known)))

    # One stage ----------------------------------------------------------------------

    async def _open_one(
        self, epoch: int, offer: Offer, request: session_pb2.OpenRequest, timeout_s: float
    ) -> None:
        peer = offer.peer
        if self._dialer.is_connected(offer):
            timeout_s = min(timeout_s, OPEN_TIMEOUT_S)
        try:
            async with asyncio.timeout(timeout_s):
                await self._dialer.greet(offer)
                response = await self._stub(peer).Open(request, timeout=timeout_s)
        except (grpc.aio.AioRpcError, NetworkError, TimeoutError) as error:
            self._failed(epoch, peer, "open", error)
            return
        if response.HasField("refusal"):
            self._tell(refused(epoch, peer, "open", response.refusal))
            return
        self._tell(StageOpened(epoch, peer, response.stage_cert, response.reusable_tokens))

    async def _confirm_one(self, action: ConfirmStage, request: session_pb2.ConfirmRequest) -> None:
        peer = action.peer
        try:
            response = await self._stub(peer).Confirm(request, timeout=CONFIRM_TIMEOUT_S)
            if action.link and not response.HasField("refusal"):
                await self._link(peer)
        except (grpc.aio.AioRpcError, NetworkError) as error:
            self._failed(action.epoch, peer, "confirm", error)
            return
        if response.HasField("refusal"):
            self._tell(refused(action.epoch, peer, "confirm", response.refusal))
            return
        self._tell(StageConfirmed(action.epoch, peer))

    async def _show_one(self, action: ShowGrant, request: session_pb2.ConfirmRequest) -> None:
        peer = action.peer
        try:
            response = await self._stub(peer).Confirm(request, timeout=CONFIRM_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self._failed(action.epoch, peer, "grant", error)
            return
        if response.HasField("refusal"):
            self._tell(refused(action.epoch, peer, "grant", response.refusal))
            return
        self._tell(GrantShown(action.epoch, peer))

    async def _close_epoch_one(
        self, action: CloseEpoch, peer: PeerId, request: session_pb2.CloseEpochRequest
    ) -> None:
        timeout_s = action.timeout_ms / 1000
        try:
            response = await self._stub(peer).CloseEpoch(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            self._failed(action.epoch, peer, "close-epoch", error)
            return
        self._tell(epoch_closed(action, peer, response))

    async def _close_one(self, offer: Offer, request: session_pb2.CloseRequest) -> bool:
        try:
            response = await self._stub(offer.peer).Close(request, timeout=CLOSE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.info("close not answered", peer=offer.peer, reason=error.details())
            return False
        return bool(response.settled)

    # Links --------------------------------------------------------------------------

    async def _link(self, peer: PeerId) -> None:
        """Return once our stream to a stage is up; raises ``PeerUnreachable``."""
        link = self._links.get(peer)
        if link is None or link.outbox.closed:
            channel = self._dialer.link_channel(self._offers[peer])
            link = OutgoingLink(peer, channel, session=self.session_id)
            self._links[peer] = link
            self._spawn(self._pump(link), f"link to {peer}")
        await link.wait_open()

    async def _pump(self, link: OutgoingLink) -> None:
        reason = await link.run(self._on_response)
        if self._links.get(link.peer) is link and link.peer in (self.peers[0], self.peers[-1]):
            self._tell(LinkLost(self._epoch, link.peer, reason))

    def _on_response(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        match message.WhichOneof("kind"):
            case "result" if message.result.session_id == self.session_id:
                if peer == self.peers[-1]:
                    self._tell(resulted(message.result))
            case "fault" if message.fault.session_id == self.session_id:
                if message.fault.epoch == self._epoch and is_our_link(message.fault, self.peers):
                    self._drop_link(self.peers[-1])
                self._tell(faulted(message.fault, peer, self.peers))

    def _linked(self, peer: PeerId) -> OutgoingLink:
        """Our link to a stage; raises ``PeerUnreachable`` if we dropped it."""
        link = self._links.get(peer)
        if link is None:
            raise PeerUnreachable("the link is down")
        return link

    def _drop_link(self, peer: PeerId) -> None:
        """The next call that needs a link to this stage makes one."""
        link = self._links.pop(peer, None)
        if link is not None:
            link.outbox.close()

    # Small things -------------------------------------------------------------------

    def _stub(self, peer: PeerId) -> stage_pb2_grpc.StageServiceStub:
        return stage_pb2_grpc.StageServiceStub(self._dialer.peer_channel(self._offers[peer]))

    def _spawn(self, call: Coroutine[None, None, None], name: str) -> None:
        self._tasks.create_task(call, name=name)

    def _tell(self, event: Event) -> None:
        if not self._over:
            self._report(event)

    def _failed(
        self,
        epoch: int,
        peer: PeerId,
        call: Call,
        error: grpc.aio.AioRpcError | PlaitError | TimeoutError,
    ) -> None:
        self._dialer.forget(peer)
        code, reason = "peer-unreachable", str(error) or "no answer in time"
        if isinstance(error, grpc.aio.AioRpcError):
            reason = f"{error.code().name}: {error.details()}"
        self._tell(StageFailed(epoch, peer, call, code, reason, gone=True))
