"""Why an eligible offer lost: what it would change in the chosen route, in its own words.

The offer is put in place of the chosen stage it overlaps most, for the shared layers only;
the difference is the stage's time and price plus the hops that change.
"""

from plait.router import cost
from plait.router.cost import Stages, Totals
from plait.router.eligibility import Rejection
from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.types import ModelShape, PeerId, Span


def outclassed(
    offer: Offer,
    stages: Stages,
    view: View,
    model: ModelShape,
    request: RouteRequest,
    source: PeerId,
) -> Rejection:
    """Say what the route would lose with ``offer``, an eligible one that is not in it."""
    at, shared = _closest(offer, stages)
    rival = stages[at][0]
    if any(_covers(span, shared) and peer != offer.peer for span, peer in request.pin):
        return Rejection(offer.peer, "pinned", f"layers {shared} are pinned to another peer")
    old = _detour(view, stages, at, shared, rival, model, request, source)
    new = _detour(view, stages, at, shared, offer, model, request, source)
    slower_ms = (new.tpot_ns - old.tpot_ns) / 1e6
    first_ms = (new.ttft_ns - old.ttft_ns) / 1e6
    dearer = new.price - old.price
    changes = [
        _change(slower_ms, "slower", "faster", "{:.3f} ms per token"),
        _change(first_ms, "later", "sooner", "{:.1f} ms at the first token"),
        _change(dearer, "dearer", "cheaper", "{} microcredits"),
    ]
    text = ", ".join(change for change in changes if change) or "no better"
    reason = f"for layers {shared}: {text} than {rival.peer}"
    worse = [word for word, by in (("slower", slower_ms), ("dearer", dearer)) if by > 0]
    if not worse and first_ms > 0:
        worse = ["later"]
    if not worse:
        reason += "; no complete route through it is better within the bounds"
    return Rejection(offer.peer, "-and-".join(worse) or "outscored", reason)


def _change(by: float, worse: str, better: str, unit: str) -> str:
    return f"{worse if by > 0 else better} by {unit.format(abs(by))}" if by else ""


def _covers(span: Span, shared: Span) -> bool:
    return span.start < shared.end and shared.start < span.end


def _closest(offer: Offer, stages: Stages) -> tuple[int, Span]:
    """The stage that shares most layers with the offer (the first of equals), and those layers."""
    best: tuple[int, Span] | None = None
    for at, (_, span) in enumerate(stages):
        start, end = max(span.start, offer.span.start), min(span.end, offer.span.end)
        if start < end and (best is None or end - start > len(best[1])):
            best = at, Span(start, end)
    assert best is not None, "a route covers every layer"
    return best


def _detour(
    view: View,
    stages: Stages,
    at: int,
    shared: Span,
    offer: Offer,
    model: ModelShape,
    request: RouteRequest,
    source: PeerId,
) -> Totals:
    """Cost of ``shared`` on ``offer``, with the hops into and out of it."""
    chosen, span = stages[at]
    total = cost.stage(offer, shared, model, request)
    if shared.start > span.start:
        total += cost.hop_between(cost.link(view, chosen.peer, offer.peer), model, request)
    elif at:
        before = stages[at - 1][0].peer
        total += cost.hop_between(cost.link(view, before, offer.peer), model, request)
    else:
        total += cost.hop_out(cost.link(view, source, offer.peer), request)
    if shared.end < span.end:
        total += cost.hop_between(cost.link(view, offer.peer, chosen.peer), model, request)
    elif at + 1 < len(stages):
        after = stages[at + 1][0].peer
        total += cost.hop_between(cost.link(view, offer.peer, after), model, request)
    else:
        total += cost.hop_back(cost.link(view, offer.peer, source), request)
    return total
