"""The peer port: gRPC calls in, ``StageShell`` methods out. The TLS session says who calls."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NoReturn

import grpc

from plait.errors import CapacityError, PlaitError
from plait.logs import get_logger
from plait.net.link_stream import SESSION_METADATA
from plait.net.tls import caller_certificate
from plait.node.audit_shell import Auditing
from plait.node.stage_shell import ResponseOutbox, StageShell
from plait.types import PeerId, SessionId
from plait.v1 import session_pb2, stage_pb2, stage_pb2_grpc
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

SESSION_BYTES = 16

Context = grpc.aio.ServicerContext[Any, Any]


NEIGHBOURS_MAX = 2


class StageServicer(stage_pb2_grpc.StageServiceServicer):
    """``peer_of`` maps a caller's DER certificate to its peer id, None when unknown.

    ``learn`` takes a signed offer that a client brings, by the rules of gossip.
    """

    def __init__(
        self,
        stage: StageShell,
        peer_of: Callable[[bytes], PeerId | None],
        learn: Callable[[SignedEnvelope], None],
        auditing: Auditing,
    ) -> None:
        self._auditing = auditing
        self._stage = stage
        self._peer_of = peer_of
        self._learn = learn

    async def Open(
        self, request: session_pb2.OpenRequest, context: Context
    ) -> session_pb2.OpenResponse:
        """Hold a session."""
        began_s = time.monotonic()
        caller = await self._caller(context)
        refusal = self._stage.core.refuse(request, caller)
        if refusal is not None:
            self._stage.refusals.note(time.monotonic() - began_s)
            return refusal
        # A client may know of a neighbour what gossip has not brought here yet.
        for offer in request.neighbour_offers[:NEIGHBOURS_MAX]:
            self._learn(offer)
        try:
            return self._stage.core.open(request, caller)
        except PlaitError as error:
            await _abort(context, error)

    async def Confirm(
        self, request: session_pb2.ConfirmRequest, context: Context
    ) -> session_pb2.ConfirmResponse:
        """Make it live."""
        caller = await self._caller(context)
        try:
            return await self._stage.confirm(request, caller)
        except PlaitError as error:
            await _abort(context, error)

    async def CloseEpoch(
        self, request: session_pb2.CloseEpochRequest, context: Context
    ) -> session_pb2.CloseEpochResponse:
        """Freeze an epoch."""
        caller = await self._caller(context)
        try:
            return self._stage.core.close_epoch(request, caller)
        except PlaitError as error:
            await _abort(context, error)

    async def Close(
        self, request: session_pb2.CloseRequest, context: Context
    ) -> session_pb2.CloseResponse:
        """End it."""
        caller = await self._caller(context)
        try:
            return await self._stage.close(request, caller)
        except PlaitError as error:
            await _abort(context, error)

    async def Audit(self, request: stage_pb2.AuditChallenge, context: Context) -> None:
        """Open what a chunk's receipts commit to."""
        await self._caller(context)
        try:
            for part in self._auditing.open(request):
                await context.write(part)
        except PlaitError as error:
            await _abort(context, error)

    async def Examine(self, request: stage_pb2.AuditChallenge, context: Context) -> None:
        """Audit another stage."""
        await self._caller(context)
        try:
            async for response in self._auditing.examine(request):
                await context.write(response)
        except PlaitError as error:
            await _abort(context, error)

    async def Link(
        self,
        request_iterator: object,
        context: Context,
    ) -> None:
        """Carry frames down and results back until either side ends."""
        caller = await self._caller(context)
        try:
            outbox = self._stage.attach(caller, _session_of(context))
        except CapacityError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            raise AssertionError("abort raises") from error
        log.info("link attached", peer=caller)
        try:
            await context.send_initial_metadata(())
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(_write(context, outbox))
                while (message := await context.read()) is not grpc.aio.EOF:
                    self._dispatch(message, caller, outbox)
                writer.cancel()
        except* (grpc.aio.AbortError, grpc.RpcError, asyncio.InvalidStateError) as group:
            log.debug("link broke", peer=caller, reason=repr(group.exceptions[0]))
        finally:
            self._stage.detach(caller, outbox)
            log.info("link detached", peer=caller)

    def _dispatch(
        self, message: stage_pb2.LinkRequest, caller: PeerId, outbox: ResponseOutbox
    ) -> None:
        match message.WhichOneof("kind"):
            case "frame":
                self._stage.core.on_frame(message.frame, caller, outbox)
            case "fault":
                self._stage.core.on_upstream_fault(message.fault, caller)

    async def _caller(self, context: Context) -> PeerId:
        certificate = caller_certificate(context)
        peer = self._peer_of(certificate) if certificate else None
        if peer is None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "say Hello first")
            raise AssertionError("abort raises")
        return peer


def _session_of(context: Context) -> SessionId | None:
    """The one session that a link is for, if it says so."""
    for key, value in context.invocation_metadata() or ():
        if key == SESSION_METADATA and isinstance(value, bytes) and len(value) == SESSION_BYTES:
            return SessionId(value)
    return None


async def _write(context: Context, outbox: ResponseOutbox) -> None:
    async for message in outbox.drain():
        await context.write(message)


async def _abort(context: Context, error: PlaitError) -> NoReturn:
    log.info("call refused", reason=str(error))
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{error.code}: {error}")
    raise AssertionError("abort raises")
