"""Audits at the peer port: opening our own tape, and examining another stage for a client."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import grpc.aio

from plait.compute.port import Done, StageCompute, Work
from plait.errors import BadProof, CapacityError, PlaitError
from plait.identity import SigningKey
from plait.ledger.audit_rules import Finding, Verdict
from plait.ledger.audit_wire import Challenge, read_challenge
from plait.logs import get_logger
from plait.network_file import NetworkFile
from plait.node.auditing import (
    open_tape,
    replay_sampling,
    sign_verdict,
    steps_of,
    verdict_on,
)
from plait.node.overload import REPLAY_PRIORITY
from plait.node.replaying import replay_steps
from plait.node.tape import Tape
from plait.types import PeerId, SessionId
from plait.v1 import stage_pb2, stage_pb2_grpc

log = get_logger(__name__)

OPENING_BYTES_MAX = 512 << 20
OPENING_TIMEOUT_S = 60.0
EXAMINATIONS_MAX = 2


@dataclass(frozen=True, slots=True)
class AuditJob:
    """One frame of a replay, among the jobs of the compute thread and behind all sessions'."""

    one: Work
    client: PeerId
    outcome: "asyncio.Future[Done]" = field(compare=False)

    @property
    def key(self) -> SessionId:
        """Jobs of one key are computed one after the other."""
        return self.one.session

    @property
    def rows(self) -> int:
        """Positions."""
        return self.one.rows

    @property
    def priority(self) -> int:
        """The last."""
        return REPLAY_PRIORITY

    def work(self) -> Work:
        """What the backend is given."""
        return self.one

    def finish(self, done: Done) -> None:
        """Hand the outcome to whoever waits, if anybody still does."""
        if not self.outcome.done():
            self.outcome.set_result(done)


class Auditing:
    """``submit`` queues a job for the compute thread; ``connect`` is a channel to a peer port."""

    def __init__(
        self,
        *,
        network: NetworkFile,
        me: PeerId,
        key: Callable[[], SigningKey],
        tape: Tape | None,
        compute: StageCompute,
        submit: Callable[[AuditJob], None],
        connect: Callable[[PeerId], Awaitable[grpc.aio.Channel]],
        clock_ms: Callable[[], int],
    ) -> None:
        self._network = network
        self._me = me
        self._key = key
        self._tape = tape
        self._compute = compute
        self._submit = submit
        self._connect = connect
        self._clock_ms = clock_ms
        self._examining = 0
        self._sessions = 0

    def open(self, request: stage_pb2.AuditChallenge) -> Iterator[stage_pb2.AuditOpening]:
        """Open what was committed to, for a challenge that holds; raises ``PlaitError``."""
        challenge = read_challenge(request, self._network)
        log.info("audit opened", session=challenge.terms.session_id.hex(), lot=str(challenge.lot))
        return open_tape(self._tape, challenge, self._me)

    async def examine(
        self, request: stage_pb2.AuditChallenge
    ) -> AsyncIterator[stage_pb2.ExamineResponse]:
        """Audit another stage: pass on what it opens, then the verdict.

        Raises ``BadProof`` for a challenge that does not hold or is not ours to examine, and
        ``CapacityError`` when too many are under way.
        """
        challenge = read_challenge(request, self._network)
        self._check_ours(challenge)
        if self._examining >= EXAMINATIONS_MAX:
            raise CapacityError("enough audits are under way here", retry_after_s=5.0)
        self._examining += 1
        try:
            parts: list[stage_pb2.AuditOpening] = []
            reason = ""
            try:
                async for part in self._ask(request, challenge.stage.peer):
                    parts.append(part)
                    yield stage_pb2.ExamineResponse(opening=part)
            except grpc.aio.AioRpcError as error:
                reason = error.details() or "it did not answer"
            except (PlaitError, TimeoutError) as error:
                reason = str(error) or "no answer in time"
            verdict, worst, why = await self._judged(challenge, parts, reason)
            log.info("audit", peer=challenge.stage.peer, verdict=verdict, reason=why)
            envelope = sign_verdict(
                self._key(), self._me, challenge, verdict, worst, why, self._clock_ms()
            )
            yield stage_pb2.ExamineResponse(verdict=envelope)
        finally:
            self._examining -= 1

    def _check_ours(self, challenge: Challenge) -> None:
        if challenge.numeric_class != self._compute.numeric_class():
            raise BadProof("this host is of another numeric class")
        if not self._compute.span.contains(challenge.stage.span):
            raise BadProof("this host does not have these layers")
        if self._me in {stage.peer for e in challenge.epochs for stage in e.terms.stages}:
            raise BadProof("a stage of the session does not audit it")

    async def _ask(
        self, request: stage_pb2.AuditChallenge, peer: PeerId
    ) -> AsyncIterator[stage_pb2.AuditOpening]:
        channel = await self._connect(peer)
        size = 0
        async with channel, asyncio.timeout(OPENING_TIMEOUT_S):
            stub = stage_pb2_grpc.StageServiceStub(channel)
            async for part in stub.Audit(request):
                size += part.ByteSize()
                if size > OPENING_BYTES_MAX:
                    raise BadProof("the opening is too long")
                yield part

    async def _judged(
        self, challenge: Challenge, parts: list[stage_pb2.AuditOpening], reason: str
    ) -> tuple[Verdict, Finding, str]:
        if reason:
            return "unresponsive", Finding(0), reason
        try:
            return verdict_on(challenge, await self._replayed(challenge, parts))
        except BadProof as error:
            # Anybody could have sent other bytes in its name: this proves nothing.
            return "unresponsive", Finding(0), str(error)

    async def _replayed(
        self, challenge: Challenge, parts: list[stage_pb2.AuditOpening]
    ) -> list[Finding]:
        steps = steps_of(challenge, parts)
        span, compute = challenge.stage.span, self._compute
        self._sessions += 1
        session = SessionId(b"audit/" + self._sessions.to_bytes(10, "big"))
        tokens = max(step.first_position + step.rows for step in steps)
        compute.reserve(session, tokens, replay_sampling(challenge), span)
        try:
            works = replay_steps(
                session,
                steps,
                first_stage=span.start == 0,
                last_stage=span.end == compute.shape.layers,
                width=compute.width,
                wire_dtype=challenge.terms.wire_dtype,
            )
            work = next(works)
            while True:
                work = works.send(await self._computed(work, challenge.terms.client))
        except StopIteration as end:
            findings: list[Finding] = end.value
            return findings
        finally:
            compute.free(session)

    async def _computed(self, work: Work, client: PeerId) -> Done:
        outcome: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._submit(AuditJob(work, client, outcome))
        return await outcome
