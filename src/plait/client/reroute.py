"""Where a session goes after a failure, and on which terms. Pure.

Stages that answered keep their span, so that their cache stays; the router fills the gap.
If it cannot, the whole route is planned anew, and a stage that happens to serve the same
span again is kept all the same. Payment terms follow the cut: see ``ledger.terms``.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from plait.client.prefix import Warm
from plait.errors import NoRoute
from plait.ledger.terms import SessionTerms, StageTerms
from plait.router.eligibility import rules_in_the_way
from plait.router.plan import Plan, PlannedStage, plan
from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.types import Microcredits, ModelShape, PeerId, Span, TokenCounts

_AMPLE_KV_TOKENS = 2**40
_NEVER_MS = 2**60


@dataclass(frozen=True, slots=True)
class Survivor:
    """A stage that froze the epoch: its terms, its offer, and what it still holds."""

    terms: StageTerms
    offer: Offer
    positions: int
    retained: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What does not change in a session: the model, the request, who asks."""

    model: ModelShape
    request: RouteRequest
    source: PeerId


def plan_first(
    asked: Asked, view: View, avoid: Collection[PeerId], now_ms: int, warm: Warm | None = None
) -> Plan:
    """The best route for a new session; raises ``NoRoute``.

    The route of ``warm`` stages is taken if it is better by what need not be computed there
    once more. What is predicted for it still assumes that everything is.
    """
    request = replace(asked.request, ignore=asked.request.ignore | frozenset(avoid))

    def best(request: RouteRequest) -> Plan:
        return plan(view, asked.model, request, source=asked.source, now_ms=now_ms, alternates=0)

    try:
        cold = best(request)
    except NoRoute as error:
        if error.missing:
            # Whom we avoid ourselves is no rule of the request's.
            error.options = rules_in_the_way(view, asked.model, asked.request)
        raise
    if warm is None or _stages(cold) == frozenset(warm.stages):
        return cold
    same = replace(request, pin=request.pin + warm.stages)
    left = max(1, request.prompt_tokens - warm.tokens)
    try:
        hot = best(replace(same, prompt_tokens=left))
        return best(same) if _cost(hot) <= _cost(cold) else cold
    except NoRoute:
        return cold


def _stages(chosen: Plan) -> frozenset[tuple[Span, PeerId]]:
    return frozenset((stage.span, stage.offer.peer) for stage in chosen.stages)


def _cost(chosen: Plan) -> float:
    """What a request wants least of: credit, or time."""
    predicted, request = chosen.predicted, chosen.request
    if request.sort == "price":
        return predicted.price_microcredits
    return predicted.ttft_s + predicted.tpot_s * request.max_tokens


def plan_again(
    asked: Asked,
    view: View,
    survivors: Sequence[Survivor],
    avoid: Collection[PeerId],
    numeric_class: str,
    now_ms: int,
) -> Plan:
    """The best route that goes on with a session; raises ``NoRoute``.

    New stages are of ``numeric_class``. Bounds on times are dropped: late is better than
    not at all. The price bound stays.
    """
    request = replace(
        asked.request,
        ignore=asked.request.ignore | frozenset(avoid),
        numeric_class=numeric_class,
        ttft_s=None,
        tpot_s=None,
    )
    kept = {one.terms.peer: one for one in survivors}
    pins = tuple((one.terms.span, one.terms.peer) for one in survivors)
    try:
        return plan(
            _view_with(
                view, {peer: _pinned(one, asked.model, numeric_class) for peer, one in kept.items()}
            ),
            asked.model,
            replace(request, pin=request.pin + pins),
            source=asked.source,
            now_ms=now_ms,
            alternates=0,
        )
    except NoRoute:
        # They hold pages for this very session, which do not count against it.
        roomy = {
            peer: replace(view.offers[peer], kv_tokens_free=_AMPLE_KV_TOKENS)
            for peer in kept
            if peer in view.offers
        }
        return plan(
            _view_with(view, roomy),
            asked.model,
            request,
            source=asked.source,
            now_ms=now_ms,
            alternates=0,
        )


def next_terms(
    before: SessionTerms,
    stages: Sequence[PlannedStage],
    survivors: Sequence[Survivor],
    *,
    position: int,
    counts: TokenCounts,
    promised: Callable[[PeerId], Microcredits],
    salt: bytes,
) -> SessionTerms:
    """The terms of the epoch that goes on at ``position`` with these session counts."""
    epoch = before.epoch + 1
    kept = {(one.terms.peer, one.terms.span): one for one in survivors}
    chosen = [kept.get((stage.offer.peer, stage.span)) for stage in stages]
    rebuilt = _rebuilt(chosen, position)
    return replace(
        before,
        epoch=epoch,
        handoff_salt=salt,
        resume_position=position,
        start=counts,
        stages=tuple(
            replace(survivor.terms, rebuilt=again)
            if survivor is not None
            else replace(
                stage_terms(stage),
                entered_epoch=epoch,
                base=counts,
                carried=promised(stage.offer.peer),
                replayed=position,
                rebuilt=True,
            )
            for stage, survivor, again in zip(stages, chosen, rebuilt, strict=True)
        ),
    )


def stage_terms(stage: PlannedStage) -> StageTerms:
    """A planned stage as it is agreed; its ledger key comes with its answer."""
    return StageTerms(
        peer=stage.offer.peer,
        ledger_key=b"",
        span=stage.span,
        priced_layers=stage.priced_layers,
        prices=stage.offer.prices,
        numeric_class=stage.offer.numeric_class,
        offer_digest=stage.offer.digest,
    )


def _rebuilt(chosen: Sequence[Survivor | None], position: int) -> list[bool]:
    """Which stages must be fed everything before ``position`` once more.

    A stage is fed by the one before it: from what that retains, or, where it retains too
    little, by computing it again.
    """
    rebuilt = [one is None or one.positions < position for one in chosen]
    for index in range(len(chosen) - 1, 0, -1):
        upstream = chosen[index - 1]
        if rebuilt[index] and (upstream is None or upstream.retained < position):
            rebuilt[index - 1] = True
    return rebuilt


def _pinned(survivor: Survivor, model: ModelShape, numeric_class: str) -> Offer:
    offer, span = survivor.offer, survivor.terms.span
    share, whole = model.priced_layers(span), model.priced_layers(offer.span)
    return replace(
        offer,
        span=span,
        decode_us=offer.decode_us * share // whole,
        prefill_us_per_token=offer.prefill_us_per_token * share // whole,
        kv_tokens_free=_AMPLE_KV_TOKENS,
        state="ready",
        expires_ms=_NEVER_MS,
        numeric_class=numeric_class,
    )


def _view_with(view: View, offers: Mapping[PeerId, Offer]) -> View:
    return View({**view.offers, **offers}, view.rtt_us, view.bandwidth)
