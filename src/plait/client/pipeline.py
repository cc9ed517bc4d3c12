"""Opening, feeding and closing a pipeline: all of it, or everything is released."""

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import grpc

from plait.client.dialer import Dialer
from plait.client.driver import SendFrame
from plait.errors import (
    CapacityError,
    NetworkError,
    PeerUnreachable,
    PlaitError,
    RemoteProtocolError,
    SessionLost,
)
from plait.ledger.terms import SessionTerms
from plait.logs import get_logger
from plait.net.link_stream import OutgoingLink
from plait.router.view import Offer
from plait.task_scope import TaskScope
from plait.types import PeerId
from plait.v1 import session_pb2, stage_pb2, stage_pb2_grpc
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)
ResultT = TypeVar("ResultT")

OPEN_TIMEOUT_S = 5.0
CONFIRM_TIMEOUT_S = 6.0
CLOSE_TIMEOUT_S = 6.0


class StageRefused(CapacityError):
    """A stage did not take the session; the route must avoid it."""

    def __init__(self, peer: PeerId, code: str, reason: str, retry_after_ms: int = 0) -> None:
        super().__init__(f"{peer} refused: {reason}", retry_after_s=retry_after_ms / 1000)
        self.peer = peer
        self.refusal_code = code


class StageUnreachable(PeerUnreachable):
    """A stage did not answer; the route must avoid it."""

    def __init__(self, peer: PeerId, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer


class Pipeline:
    """A route opened for one session's epoch. Use ``close`` in every case."""

    def __init__(
        self, terms: SessionTerms, offers: Sequence[Offer], dialer: Dialer, tasks: TaskScope
    ) -> None:
        self.terms = terms
        self.stage_certs: list[SignedEnvelope] = []
        self._offers = tuple(offers)
        self._held: set[PeerId] = set()
        self._dialer = dialer
        self._tasks = tasks
        self._results: asyncio.Queue[stage_pb2.TokenResult | PlaitError] = asyncio.Queue(64)
        # W3C trace context: one trace per session, sampled nowhere by default.
        self._traceparent = f"00-{terms.session_id.hex()}-{terms.session_id.hex()[:16]}-00"
        self._first: OutgoingLink | None = None
        self._last: OutgoingLink | None = None

    async def open(self, opening: SignedEnvelope, client_cert: SignedEnvelope) -> None:
        """Hold pages on every stage; raises ``StageRefused`` for the first that does not."""
        requests = [
            session_pb2.OpenRequest(
                session_open=opening, client_cert=client_cert, stage_index=index
            )
            for index in range(len(self._offers))
        ]
        self.stage_certs = await gather_whole(
            [self._open_one(*pair) for pair in zip(self._offers, requests, strict=True)]
        )

    async def confirm(self, reservation: SignedEnvelope, grant: SignedEnvelope) -> None:
        """Show the grant to every stage and link to the first and the last."""
        request = session_pb2.ConfirmRequest(
            session_id=self.terms.session_id,
            epoch=self.terms.epoch,
            reservation=reservation,
            grant=grant,
        )
        await gather_whole([self._confirm_one(offer, request) for offer in self._offers])
        self._first = self._link(self._offers[0])
        self._last = self._first if len(self._offers) == 1 else self._link(self._offers[-1])
        await self._first.wait_open()
        await self._last.wait_open()

    def send(self, frame: SendFrame, voucher: SignedEnvelope | None, deadline_ms: int) -> None:
        """Push a frame to the first stage; raises ``NetworkError`` when the link is down.

        No stage computes it after ``deadline_ms``.
        """
        message = stage_pb2.Frame(
            session_id=self.terms.session_id,
            epoch=self.terms.epoch,
            traversal=frame.traversal,
            first_position=frame.first_position,
            sample=frame.sample,
            close_chunk=frame.close_chunk,
            voucher=voucher,
            deadline_ms=deadline_ms,
            traceparent=self._traceparent,
        )
        if frame.ids:
            message.token_ids.ids.extend(frame.ids)
        if self._first is None:
            raise NetworkError("the pipeline is not open")
        self._first.outbox.put(stage_pb2.LinkRequest(frame=message))

    async def result(self, timeout_s: float) -> stage_pb2.TokenResult:
        """The next answer of the last stage; raises ``SessionLost`` on a fault or silence."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._results.get()
        except TimeoutError as error:
            raise SessionLost(f"the pipeline was silent for {timeout_s:.0f} s") from error
        if isinstance(answer, PlaitError):
            raise answer
        return answer

    async def close(self, voucher: SignedEnvelope | None, reason: str) -> bool:
        """End the session everywhere; True when every stage has settled."""
        request = session_pb2.CloseRequest(
            session_id=self.terms.session_id,
            epoch=self.terms.epoch,
            voucher=voucher,
            reason=reason,
        )
        # Whoever did not say yes holds nothing, or lets go of it within two seconds.
        held = [offer for offer in self._offers if offer.peer in self._held]
        settled = await asyncio.gather(*(self._close_one(offer, request) for offer in held))
        for link in (self._first, self._last):
            if link is not None:
                link.outbox.close()
        return all(settled)

    def _link(self, offer: Offer) -> OutgoingLink:
        link = OutgoingLink(offer.peer, self._dialer.link_channel(offer))
        self._tasks.create_task(self._pump(link), name=f"link to {offer.peer}")
        return link

    async def _pump(self, link: OutgoingLink) -> None:
        reason = await link.run(self._on_response)
        self._offer_result(SessionLost(f"the link to {link.peer} ended: {reason}"))

    def _on_response(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        kind = message.WhichOneof("kind")
        if kind == "result" and message.result.session_id == self.terms.session_id:
            if peer == self.terms.stages[-1].peer and message.result.epoch == self.terms.epoch:
                self._offer_result(message.result)
        elif kind == "fault" and message.fault.session_id == self.terms.session_id:
            self._offer_result(self._lost(peer, message.fault))

    def _lost(self, sender: PeerId, fault: stage_pb2.SessionFault) -> SessionLost:
        peers = [stage.peer for stage in self.terms.stages]
        # Only stages of the route can be to blame; a name from elsewhere is the sender's word.
        blamed = fault.peer_id if fault.peer_id in peers else sender
        return SessionLost(
            f"stage {peers.index(PeerId(blamed))} ({blamed}) failed: {fault.code}: {fault.reason}",
            remedy="run it again: the router avoids a dead node within seconds",
        )

    def _offer_result(self, answer: stage_pb2.TokenResult | PlaitError) -> None:
        # One traversal is in flight, so a full queue means a peer that floods.
        with contextlib.suppress(asyncio.QueueFull):
            self._results.put_nowait(answer)

    async def _open_one(self, offer: Offer, request: session_pb2.OpenRequest) -> SignedEnvelope:
        await self._dialer.greet(offer)
        stub = stage_pb2_grpc.StageServiceStub(self._dialer.peer_channel(offer))
        try:
            response = await _call(offer.peer, stub.Open(request, timeout=OPEN_TIMEOUT_S))
        except StageUnreachable:
            self._dialer.forget(offer.peer)
            raise
        if response.HasField("refusal"):
            raise _refused(offer.peer, response.refusal)
        self._held.add(offer.peer)
        cert: SignedEnvelope = response.stage_cert
        return cert

    async def _confirm_one(self, offer: Offer, request: session_pb2.ConfirmRequest) -> None:
        stub = stage_pb2_grpc.StageServiceStub(self._dialer.peer_channel(offer))
        response = await _call(offer.peer, stub.Confirm(request, timeout=CONFIRM_TIMEOUT_S))
        if response.HasField("refusal"):
            raise _refused(offer.peer, response.refusal)

    async def _close_one(self, offer: Offer, request: session_pb2.CloseRequest) -> bool:
        stub = stage_pb2_grpc.StageServiceStub(self._dialer.peer_channel(offer))
        try:
            response = await _call(offer.peer, stub.Close(request, timeout=CLOSE_TIMEOUT_S))
        except PlaitError as error:
            log.info("close not answered", peer=offer.peer, reason=str(error))
            return False
        return bool(response.settled)


def _refused(peer: PeerId, refusal: session_pb2.Refusal) -> StageRefused:
    return StageRefused(peer, refusal.code, refusal.reason, refusal.retry_after_ms)


async def _call(peer: PeerId, call: Awaitable[ResultT]) -> ResultT:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            raise RemoteProtocolError(f"{peer} refused our call: {error.details()}") from error
        raise StageUnreachable(peer, f"{error.code().name}: {error.details()}") from error


async def gather_whole(calls: Sequence[Awaitable[ResultT]]) -> list[ResultT]:
    """Wait for every call, then raise the first failure, if any: nothing is left running."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    answers: list[ResultT] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        answers.append(result)
    return answers
