"""One generation: plan, open, reserve, drive, pay, close, collect the evidence.

The decisions are in ``driver`` (what to send), the router (where) and ``ClientBooks`` (what
to sign); this shell performs them. Whatever happens, the pipeline is closed.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from plait.client.account import Account
from plait.client.answer import Answer, RouteStep
from plait.client.dialer import Dialer
from plait.client.driver import Accounting, Deliver, Driver, Finish, FinishReason, SendFrame
from plait.client.pipeline import Pipeline, StageRefused, StageUnreachable
from plait.envelope import seal
from plait.errors import (
    CapacityError,
    LedgerError,
    LocalProtocolError,
    NetworkError,
    NoRoute,
    PlaitError,
    SessionLost,
    VerificationError,
)
from plait.ledger.bundle import BundleParts, build_bundle
from plait.ledger.certs import check_key_cert, make_key_cert
from plait.ledger.client_books import ClientBooks
from plait.ledger.opening import opening_to_message, route_digest
from plait.ledger.reserve import check_grant, make_reservation
from plait.ledger.service.remote import Evidence, RemoteLedger
from plait.ledger.terms import SessionTerms, StageTerms
from plait.logs import get_logger
from plait.network_file import NetworkFile
from plait.router.plan import Plan, PlannedStage, plan
from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.task_scope import TaskScope
from plait.types import ModelShape, Sampling, SessionId
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

ATTEMPTS_MAX = 4
STALL_TIMEOUT_S = 60.0
RESERVATION_TTL_MS_MIN = 300_000
RESERVATION_TTL_MS_MAX = 12 * 3_600_000
"""Credit stays set aside for as long, if a stage vanishes without releasing it."""
KEY_CERT_TTL_MS = 86_400_000
EVIDENCE_WAIT_S = 3.0
_EVIDENCE_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a generation needs of its client; ``view`` and the clocks are asked each time."""

    account: Account
    network: NetworkFile
    dialer: Dialer
    ledger: RemoteLedger
    tasks: TaskScope
    view: Callable[[], View]
    envelope_of: Callable[[Offer], SignedEnvelope | None]
    clock_ms: Callable[[], int]
    monotonic_s: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked: token ids in, at most ``route.max_tokens`` out."""

    model: ModelShape
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    route: RouteRequest
    vocabulary_size: int
    manifest: bytes
    want_bundle: bool


@dataclass(slots=True)
class _Opened:
    pipeline: Pipeline
    plan: Plan
    terms: SessionTerms
    opening: SignedEnvelope
    client_cert: SignedEnvelope
    offers: tuple[SignedEnvelope, ...]
    reservation: SignedEnvelope | None = None
    grant: SignedEnvelope | None = None


class Generation:
    """Runs one order; ``emit`` gets each token as it is delivered."""

    def __init__(
        self, order: Order, around: Surroundings, emit: Callable[[int, float], None]
    ) -> None:
        self._order = order
        self._around = around
        self._emit = emit
        self._token_times: list[float] = []
        self._logprobs: list[float] = []

    async def run(self, decode: Callable[[Sequence[int]], str]) -> Answer:
        """Generate; raises ``NoRoute``, ``CapacityError``, ``LedgerError``, ``SessionLost`` or
        ``VerificationError``. ``decode`` turns the delivered ids into text.
        """
        started_s = self._around.monotonic_s()
        opened = await self._open_some_pipeline()
        books = ClientBooks(opened.terms, self._around.account.ledger_key)
        driver = Driver(
            self._order.prompt_ids,
            self._order.route.max_tokens,
            frozenset(self._order.sampling.end_ids),
            Accounting(opened.terms.chunk_tokens, opened.terms.prefill_chunk_tokens),
            self._order.vocabulary_size,
        )
        reason = "aborted"
        try:
            finish = await self._drive(driver, books, opened.pipeline)
            reason = finish
        finally:
            closing = opened.pipeline.close(books.voucher, reason)
            settled = await asyncio.shield(self._around.tasks.create_task(closing))
        text = decode(driver.token_ids)
        bundle = None
        if self._order.want_bundle:
            bundle = await self._bundle(opened, books, driver, text, finish)
        answer = self._answer(opened, books, driver, text, finish, started_s)
        return replace(answer, settled=settled, bundle=bundle)

    # Opening ------------------------------------------------------------------------

    async def _open_some_pipeline(self) -> _Opened:
        ignore, refusals = self._order.route.ignore, list[PlaitError]()
        for _ in range(ATTEMPTS_MAX):
            request = replace(self._order.route, ignore=ignore)
            try:
                chosen = plan(
                    self._around.view(),
                    self._order.model,
                    request,
                    source=self._around.account.peer,
                    now_ms=self._around.clock_ms(),
                    alternates=0,
                )
            except NoRoute as error:
                if refusals:
                    raise CapacityError(
                        f"no pipeline took the session: {refusals[-1]}",
                        remedy="try again in a moment, or: plait route MODEL --explain",
                    ) from error
                raise
            try:
                return await self._open(chosen)
            except (StageRefused, StageUnreachable) as error:
                log.info("route refused", reason=str(error))
                refusals.append(error)
                ignore = ignore | {error.peer}
        raise CapacityError(f"{ATTEMPTS_MAX} routes were refused, the last because {refusals[-1]}")

    async def _open(self, chosen: Plan) -> _Opened:
        opened = self._prepare(chosen)
        try:
            await opened.pipeline.open(opened.opening, opened.client_cert)
            opened.terms = opened.pipeline.terms = self._with_keys(opened)
            await self._reserve(opened)
            assert opened.reservation is not None and opened.grant is not None
            await opened.pipeline.confirm(opened.reservation, opened.grant)
        except BaseException:
            closing = opened.pipeline.close(None, "not opened")
            await asyncio.shield(self._around.tasks.create_task(closing))
            raise
        return opened

    def _prepare(self, chosen: Plan) -> _Opened:
        around, now_ms = self._around, self._around.clock_ms()
        terms = SessionTerms(
            network_id=around.network.network_id,
            session_id=SessionId(secrets.token_bytes(16)),
            epoch=1,
            client=around.account.peer,
            client_ledger_key=around.account.ledger_key.public,
            model_digest=self._order.model.digest,
            stages=tuple(_stage_terms(stage) for stage in chosen.stages),
            prompt_tokens=len(self._order.prompt_ids),
            max_tokens=self._order.route.max_tokens,
            handoff_salt=secrets.token_bytes(32),
        )
        offers = tuple(_known(around.envelope_of(stage.offer)) for stage in chosen.stages)
        expires_ms = now_ms + _session_ms_max(chosen)
        opening = opening_to_message(terms, self._order.sampling, now_ms, expires_ms)
        return _Opened(
            pipeline=Pipeline(
                terms, [stage.offer for stage in chosen.stages], around.dialer, around.tasks
            ),
            plan=chosen,
            terms=terms,
            opening=seal(around.account.ledger_key, opening),
            client_cert=self._client_cert(now_ms),
            offers=offers,
        )

    def _client_cert(self, now_ms: int) -> SignedEnvelope:
        account = self._around.account
        return make_key_cert(
            account.peer_key,
            account.ledger_key.public,
            self._around.network.network_id,
            now_ms,
            KEY_CERT_TTL_MS,
            1,
        )

    def _with_keys(self, opened: _Opened) -> SessionTerms:
        network_id, now_ms = self._around.network.network_id, self._around.clock_ms()
        stages = []
        for stage, cert in zip(opened.terms.stages, opened.pipeline.stage_certs, strict=True):
            _, ledger_key = check_key_cert(cert, network_id, now_ms, peer=stage.peer)
            stages.append(replace(stage, ledger_key=ledger_key))
        return replace(opened.terms, stages=tuple(stages))

    async def _reserve(self, opened: _Opened) -> None:
        """Sign, make durable, send; an unanswered reservation of an earlier run goes first."""
        around = self._around
        with around.account.lane() as lane:
            sequence, pending = lane.load()
            if pending is not None:
                sequence = await self._resend(lane.number, sequence, pending, opened.client_cert)
            reservation = make_reservation(
                around.account.ledger_key,
                opened.terms,
                lane.number,
                sequence,
                around.clock_ms(),
                _session_ms_max(opened.plan),
                route_digest(opened.terms),
            )
            lane.save(sequence, reservation)
            try:
                grant = await around.ledger.reserve(reservation, opened.client_cert)
            except LedgerError:
                lane.save(sequence, None)
                raise
            lane.save(sequence + 1, None)
        check_grant(
            grant, reservation, around.network.authorities, opened.terms, None, around.clock_ms()
        )
        opened.reservation, opened.grant = reservation, grant

    async def _resend(
        self, lane: int, sequence: int, pending: SignedEnvelope, cert: SignedEnvelope
    ) -> int:
        try:
            await self._around.ledger.reserve(pending, cert)
        except LedgerError as error:
            log.info("an earlier reservation was refused", lane=lane, reason=str(error))
            return sequence
        return sequence + 1

    # Driving ------------------------------------------------------------------------

    async def _drive(self, driver: Driver, books: ClientBooks, pipeline: Pipeline) -> FinishReason:
        actions = driver.start()
        voucher: SignedEnvelope | None = None
        while True:
            for action in actions:
                match action:
                    case SendFrame():
                        books.sent(action.traversal, action.first_position, action.ids)
                        deadline_ms = self._around.clock_ms() + round(STALL_TIMEOUT_S * 1000)
                        pipeline.send(action, voucher, deadline_ms)
                        voucher = None
                    case Deliver():
                        self._token_times.append(self._around.monotonic_s())
                        self._logprobs.append(action.logprob)
                        self._emit(action.token_id, action.logprob)
                    case Finish():
                        return action.reason
            try:
                result = await pipeline.result(STALL_TIMEOUT_S)
            except SessionLost as error:
                delivered = len(driver.token_ids)
                raise SessionLost(
                    f"{error} ({delivered} tokens were delivered)",
                    resumable_from=delivered,
                    remedy=error.remedy,
                ) from error
            sent = driver.in_flight
            actions = driver.on_result(result.traversal, list(result.ids), list(result.logprobs))
            if not actions:
                continue
            books.drawn(sent.traversal, sent.first_position, tuple(result.ids))
            if sent.close_chunk:
                voucher = books.accept_receipts(
                    tuple(result.receipts), sent.traversal, self._around.clock_ms()
                )

    # Afterwards ---------------------------------------------------------------------

    async def _evidence(self, session_id: SessionId) -> Evidence | None:
        deadline_s = self._around.monotonic_s() + EVIDENCE_WAIT_S
        evidence: Evidence | None = None
        while self._around.monotonic_s() < deadline_s:
            try:
                evidence = await self._around.ledger.evidence(session_id)
            except (LedgerError, NetworkError) as error:
                log.info("no evidence yet", reason=str(error))
            if evidence is not None and evidence.settled:
                break
            await asyncio.sleep(_EVIDENCE_POLL_S)
        return evidence

    async def _bundle(
        self, opened: _Opened, books: ClientBooks, driver: Driver, text: str, finish: FinishReason
    ) -> bytes:
        evidence = await self._evidence(opened.terms.session_id)
        if opened.reservation is None or opened.grant is None or books.voucher is None:
            raise VerificationError("the session has no evidence to bundle")
        parts = BundleParts(
            network_id=opened.terms.network_id,
            terms=opened.terms,
            session_open=opened.opening,
            client_cert=opened.client_cert,
            stage_certs=tuple(opened.pipeline.stage_certs),
            offers=opened.offers,
            manifest=self._order.manifest,
            prompt_ids=self._order.prompt_ids,
            token_ids=tuple(driver.drawn),
            text=text,
            finish_reason=finish,
            frames=tuple(
                (f.traversal, f.first_position, f.rows, f.sample, f.close_chunk)
                for f in driver.frames
            ),
            reservation=opened.reservation,
            grant=opened.grant,
            receipts=books.receipts,
            voucher=books.voucher,
            entries=evidence.entries if evidence else (),
            proofs=evidence.proofs if evidence else (),
            checkpoint=evidence.checkpoint if evidence else None,
            sealed_ms=self._around.clock_ms(),
        )
        return build_bundle(parts, self._around.account.peer_key)

    def _answer(
        self,
        opened: _Opened,
        books: ClientBooks,
        driver: Driver,
        text: str,
        finish: FinishReason,
        started_s: float,
    ) -> Answer:
        times = self._token_times
        return Answer(
            text=text,
            token_ids=driver.token_ids,
            logprobs=tuple(self._logprobs),
            prompt_tokens=len(self._order.prompt_ids),
            finish_reason=finish,
            route=tuple(RouteStep(stage.peer, stage.span) for stage in opened.terms.stages),
            epochs=1,
            ttft_s=times[0] - started_s if times else 0.0,
            tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0,
            predicted=opened.plan.predicted,
            cost_microcredits=books.cost,
            receipts_verified=books.receipts_verified,
            seed=self._order.sampling.seed,
        )


def _session_ms_max(chosen: Plan) -> int:
    """How long the session may take: three times the prediction, and some minutes."""
    predicted = chosen.predicted
    predicted_s = predicted.ttft_s + predicted.tpot_s * chosen.request.max_tokens
    return min(RESERVATION_TTL_MS_MIN + round(3_000 * predicted_s), RESERVATION_TTL_MS_MAX)


def _known(envelope: SignedEnvelope | None) -> SignedEnvelope:
    if envelope is None:
        raise LocalProtocolError("an offer in the view has no envelope")
    return envelope


def _stage_terms(stage: PlannedStage) -> StageTerms:
    return StageTerms(
        peer=stage.offer.peer,
        ledger_key=b"",
        span=stage.span,
        priced_layers=stage.priced_layers,
        prices=stage.offer.prices,
        numeric_class=stage.offer.numeric_class,
        offer_digest=stage.offer.digest,
    )
