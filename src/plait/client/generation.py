"""One generation: the shell around a session core.

It reports what happens to the core and performs what the core asks for, in order; then it
collects the evidence. Whatever happens, the session is closed on every stage.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from plait.client.account import Account
from plait.client.actions import (
    Action,
    AskView,
    Cancelled,
    CloseEpoch,
    CloseStages,
    ConfirmStage,
    Drafted,
    Event,
    Failed,
    Finished,
    LeaveStages,
    Note,
    OpenStages,
    Reserve,
    Send,
    SetTimer,
    ShowGrant,
    Started,
    Stopped,
    Ticked,
    Viewed,
)
from plait.client.answer import Answer, RouteStep, Score
from plait.client.demand import Demand
from plait.client.dialer import Dialer
from plait.client.driver import (
    Deliver,
    Drafter,
    Embedded,
    EndDrawn,
    FinishReason,
    PromptScored,
    SendFrame,
)
from plait.client.epoch import Epoch, Order, Party
from plait.client.pipeline import Pipeline
from plait.client.prefix import WarmRoutes
from plait.client.reserving import Reserving
from plait.client.session import SessionCore
from plait.envelope import digest
from plait.errors import LedgerError, LocalProtocolError, NetworkError
from plait.ledger.bundle import BundleParts, EpochParts, Frame, build_bundle
from plait.ledger.service.committee import Ledger
from plait.ledger.service.remote import Evidence
from plait.logs import get_logger
from plait.network_file import NetworkFile
from plait.router.cost import Prediction
from plait.router.view import View
from plait.task_scope import TaskScope
from plait.types import Digest, PeerId, SessionId
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

KEY_CERT_TTL_MS = 86_400_000
EVIDENCE_WAIT_S = 3.0
WIND_DOWN_S = 1.0
EVENTS_MAX = 4_096
"""Events that may wait; a peer that sends more is dropped with what it sends."""
_EVIDENCE_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a generation needs of its client; ``view`` and the clocks are asked each time."""

    account: Account
    network: NetworkFile
    dialer: Dialer
    ledger: Ledger
    tasks: TaskScope
    view: Callable[[], View]
    envelopes: Callable[[], Sequence[SignedEnvelope]]
    changed: Callable[[], Awaitable[None]]
    revoked: Callable[[], Mapping[PeerId, int]]
    demand: Demand
    clock_ms: Callable[[], int]
    monotonic_s: Callable[[], float]
    warm: WarmRoutes
    keep_for_audit: Callable[[SessionId, Callable[[], bytes]], None] | None = None
    """Takes a session that the lottery may draw from and what makes its bundle, which is done
    behind the answer; None: no lottery is held."""


class Generation:
    """Runs one order; ``emit`` gets each token as it is delivered.

    ``embedding`` is the prompt's final hidden state, once it is known, if it was ordered.
    """

    def __init__(
        self,
        order: Order,
        around: Surroundings,
        emit: Callable[[Deliver], None],
        drafter: Drafter | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._order = order
        self._around = around
        self._emit = emit
        self._ended = ended
        self.embedding: tuple[float, ...] = ()
        self._events: asyncio.Queue[Event] = asyncio.Queue(EVENTS_MAX)
        self._core = SessionCore(
            order,
            Party(
                network_id=around.network.network_id,
                authorities=around.network.authorities,
                peer=around.account.peer,
                ledger_key=around.account.ledger_key,
                revoked=around.revoked,
            ),
            secrets.token_bytes,
            drafter,
            around.demand,
        )
        network_id = around.network.network_id
        self._client_cert = around.account.certificate(network_id, around.clock_ms())
        self._reserving = Reserving(
            around.account, around.ledger, self._client_cert, around.clock_ms, order.sub_account
        )
        self._pipeline: Pipeline | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[bool] | None = None
        self._envelopes: dict[Digest, SignedEnvelope] = {}
        self._token_times: list[float] = []
        self._logprobs: list[float] = []
        self._scores: list[Score] = []
        self._end: Score | None = None
        self._outcome: Finished | Failed | None = None

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The stages of the pipeline that is open or being opened; empty before the first."""
        return self._pipeline.peers if self._pipeline is not None else ()

    @property
    def cost_microcredits(self) -> int:
        """What the session's vouchers promise by now; final once ``run`` has ended, however."""
        return self._core.cost_microcredits

    @property
    def route(self) -> tuple[RouteStep, ...]:
        """The stages at work; empty before the first epoch is confirmed."""
        return _steps(self._core.epochs[-1]) if self._core.epochs else ()

    @property
    def predicted(self) -> Prediction | None:
        """What was predicted of the first route; None before it is confirmed."""
        return self._core.epochs[0].plan.predicted if self._core.epochs else None

    def drafted(self) -> None:
        """The drafter may be ready."""
        self._report(Drafted())

    def stop(self) -> None:
        """End the answer with the token that is due; what was delivered is paid for."""
        self._report(Stopped())

    async def run(self, decode: Callable[[Sequence[int]], str]) -> Answer:
        """Generate; raises ``NoRoute``, ``CapacityError``, ``LedgerError`` or ``SessionLost``.

        ``decode`` turns the delivered ids into text.
        """
        started_s = self._around.monotonic_s()
        self._report(Started())
        try:
            outcome = await self._pump()
        except asyncio.CancelledError:
            await asyncio.shield(self._around.tasks.create_task(self._wind_down()))
            raise
        finally:
            self._set_timer(SetTimer(None))
            self._ended()
        settled = self._closing is not None and await asyncio.shield(self._closing)
        if isinstance(outcome, Failed):
            raise outcome.error
        text = decode(self._core.driver.token_ids)
        bundle = await self._bundle(text, outcome.reason) if self._order.want_bundle else None
        self._keep_for_audit(text, outcome.reason, bundle)
        return self._answer(text, outcome.reason, started_s, settled=settled, bundle=bundle)

    async def _pump(self) -> Finished | Failed:
        while self._outcome is None:
            event = await self._events.get()
            for action in self._core.handle(event, self._around.clock_ms()):
                self._perform(action)
        return self._outcome

    async def _wind_down(self) -> None:
        """The user is gone: let the core close the session, for a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WIND_DOWN_S):
                if self._outcome is None:
                    self._report(Cancelled())
                    await self._pump()
                if self._closing is not None:
                    # What takes longer than our patience is done all the same: holds wait for it.
                    await asyncio.shield(self._closing)

    def _report(self, event: Event) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._events.put_nowait(event)

    # Actions ------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        match action:
            case Deliver():
                self._token_times.append(self._around.monotonic_s())
                self._logprobs.append(action.logprob)
                self._emit(action)
            case Embedded():
                self.embedding = action.values
            case PromptScored():
                self._note_scores(action)
            case EndDrawn():
                self._end = Score(action.token_id, action.logprob, action.top)
            case SetTimer():
                self._set_timer(action)
            case AskView():
                self._ask_view(action)
            case Reserve():
                work = self._reserving.reserve(action, self._report)
                self._around.tasks.create_task(work, name="reserve")
            case Note():
                log.info(action.event, reason=action.reason, peers=action.peers)
            case Finished() | Failed():
                self._outcome = action
            case _:
                self._call(action)

    def _note_scores(self, scored: PromptScored) -> None:
        first = 1 + len(self._scores)
        ids = self._order.prompt_ids[first : first + len(scored.logprobs)]
        tops = scored.tops or ((),) * len(ids)
        self._scores += map(Score, ids, scored.logprobs, tops)

    def _call(
        self,
        action: OpenStages
        | ConfirmStage
        | ShowGrant
        | CloseEpoch
        | Send
        | LeaveStages
        | CloseStages,
    ) -> None:
        if isinstance(action, OpenStages):
            self._open(action)
            return
        pipeline = self._require_pipeline()
        match action:
            case Send():
                pipeline.send(action)
            case ConfirmStage():
                pipeline.confirm(action)
            case ShowGrant():
                pipeline.show_grant(action)
            case CloseEpoch():
                pipeline.close_epoch(action)
            case LeaveStages():
                pipeline.leave(action)
            case CloseStages():
                if action.prefix:
                    self._around.warm.note(action.prefix, self._core.epoch.stages)
                closing = self._around.tasks.create_task(pipeline.close(action))
                if not action.only_held:
                    self._closing = closing

    def _open(self, action: OpenStages) -> None:
        session_id = action.terms.session_id
        if self._pipeline is None or self._pipeline.session_id != session_id:
            self._pipeline = Pipeline(
                session_id,
                self._client_cert,
                self._around.dialer,
                self._around.tasks,
                self._report,
            )
        self._pipeline.open(action, lambda offer: self._envelopes.get(offer.digest))

    def _require_pipeline(self) -> Pipeline:
        if self._pipeline is None:
            raise LocalProtocolError("no pipeline was opened")
        return self._pipeline

    def _set_timer(self, action: SetTimer) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if action.at_ms is not None:
            delay_s = max(action.at_ms - self._around.clock_ms(), 0) / 1000
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(delay_s, self._report, Ticked())

    def _ask_view(self, action: AskView) -> None:
        if action.when_changed:
            self._around.tasks.create_task(self._view_after_change(), name="view")
        else:
            self._report_view()

    async def _view_after_change(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EVIDENCE_WAIT_S):
                await self._around.changed()
        self._report_view()

    def _report_view(self) -> None:
        # Offers are replaced while a session lasts; those that it uses stay evidence.
        for envelope in self._around.envelopes():
            self._envelopes[digest(envelope.payload)] = envelope
        self._report(Viewed(self._around.view()))

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

    def _keep_for_audit(self, text: str, finish: FinishReason, bundle: bytes | None) -> None:
        if self._around.keep_for_audit is None or not self._order.may_audit:
            return
        session = self._core.epoch.terms.session_id
        self._around.keep_for_audit(session, lambda: bundle or self._sealed(text, finish, None))

    async def _bundle(self, text: str, finish: FinishReason) -> bytes:
        evidence = await self._evidence(self._core.epoch.terms.session_id)
        return self._sealed(text, finish, evidence)

    def _sealed(self, text: str, finish: FinishReason, evidence: Evidence | None) -> bytes:
        parts = BundleParts(
            network_id=self._around.network.network_id,
            client_cert=self._client_cert,
            manifest=self._order.manifest,
            prompt_ids=self._order.prompt_ids,
            token_ids=tuple(self._core.driver.drawn),
            text=text,
            finish_reason=finish,
            epochs=tuple(self._epoch_parts(epoch) for epoch in self._core.epochs),
            entries=evidence.entries if evidence else (),
            proofs=evidence.proofs if evidence else (),
            checkpoint=evidence.checkpoint if evidence else None,
            sealed_ms=self._around.clock_ms(),
        )
        return build_bundle(parts, self._around.account.peer_key)

    def _epoch_parts(self, epoch: Epoch) -> EpochParts:
        evidence = epoch.evidence
        return EpochParts(
            terms=epoch.terms,
            session_open=epoch.opening,
            stage_certs=epoch.certs,
            offers=tuple(self._offer_envelope(offer.digest) for offer in epoch.offers),
            frames=tuple(_frame(frame) for frame in epoch.frames),
            reservation=epoch.reservation,
            grant=epoch.grant,
            receipts=evidence.receipts if evidence else (),
            cut=evidence.cut if evidence else None,
            voucher=evidence.voucher if evidence else None,
        )

    def _offer_envelope(self, offer_digest: Digest) -> SignedEnvelope:
        envelope = self._envelopes.get(offer_digest)
        if envelope is None:
            raise LocalProtocolError("an offer in the view has no envelope")
        return envelope

    def _answer(
        self,
        text: str,
        finish: FinishReason,
        started_s: float,
        *,
        settled: bool,
        bundle: bytes | None,
    ) -> Answer:
        core, times = self._core, self._token_times
        first = core.epochs[0]
        return Answer(
            text=text,
            token_ids=core.driver.token_ids,
            logprobs=tuple(self._logprobs),
            prompt_scores=tuple(self._scores),
            end=self._end,
            prompt_tokens=len(self._order.prompt_ids),
            finish_reason=finish,
            route=_steps(core.epoch),
            epochs=len(core.epochs),
            ttft_s=times[0] - started_s if times else 0.0,
            tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0,
            predicted=first.plan.predicted,
            cost_microcredits=core.books.cost,
            receipts_verified=core.books.receipts_verified,
            seed=self._order.sampling.seed,
            draft_counts=core.driver.draft_counts,
            cached_tokens=core.books.counts.cached_prompt,
            settled=settled,
            bundle=bundle,
        )


def _steps(epoch: Epoch) -> tuple[RouteStep, ...]:
    return tuple(RouteStep(stage.peer, stage.span) for stage in epoch.terms.stages)


def _frame(frame: SendFrame) -> Frame:
    return (
        frame.traversal,
        frame.first_position,
        frame.rows,
        frame.draft_ids,
        frame.sample,
        frame.close_chunk,
        frame.replay,
    )
