"""Which offers may serve a request at all, and why the others may not.

Every reason is a stable code for machines and a sentence for people.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from plait.router.cost import price_per_layer_millionths
from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.types import U64_MAX, ModelShape, PeerId

_RULES = {"not-in-only": "only", "ignored": "ignore", "region": "region"}
"""Codes of rejections by the request's rules on peers, and how its options spell these."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a candidate peer is not in the route."""

    peer: PeerId
    code: str
    reason: str


def sift(
    view: View, model: ModelShape, request: RouteRequest, now_ms: int
) -> tuple[tuple[Offer, ...], tuple[Rejection, ...]]:
    """Split the view into eligible offers and rejections, both in peer id order."""
    eligible: list[Offer] = []
    rejections: list[Rejection] = []
    for peer in sorted(view.offers):
        offer = view.offers[peer]
        fault = _fault(offer, model, request, now_ms)
        if fault is None:
            eligible.append(offer)
        else:
            rejections.append(Rejection(peer, *fault))
    return tuple(eligible), tuple(rejections)


def rules_in_the_way(view: View, model: ModelShape, request: RouteRequest) -> tuple[str, ...]:
    """The request's rules on peers without which every layer would have a host; often none.

    Only the rules count, not what will pass: a host that they allow is one even while it is
    full or draining. Where some layer has no host at all, no rule is in the way.
    """
    hosts = [
        (offer, _unwanted(offer, request))
        for offer in view.offers.values()
        if offer.model_digest == model.digest and offer.span.end <= model.layers
    ]
    every = _layers(offer for offer, _ in hosts)
    allowed = _layers(offer for offer, fault in hosts if fault is None)
    if len(every) < model.layers or every == allowed:
        return ()
    codes = {fault[0] for offer, fault in hosts if fault and not _layers((offer,)) <= allowed}
    return tuple(rule for code, rule in _RULES.items() if code in codes)


def _layers(offers: Iterable[Offer]) -> set[int]:
    return {layer for offer in offers for layer in range(offer.span.start, offer.span.end)}


def _fault(
    offer: Offer, model: ModelShape, request: RouteRequest, now_ms: int
) -> tuple[str, str] | None:
    if offer.model_digest != model.digest:
        return "wrong-model", "offers another model"
    if offer.expires_ms <= now_ms:
        return "expired", f"its offer expired {(now_ms - offer.expires_ms) / 1000:.1f} s ago"
    if offer.state != "ready":
        return offer.state, f"it is {offer.state}"
    if offer.span.end > model.layers:
        return "wrong-span", f"offers layers {offer.span} of a model with {model.layers}"
    layers = model.priced_layers(offer.span)
    if price_per_layer_millionths(offer, request) * layers > U64_MAX:
        return "price", "its price is beyond any account"
    return _unwanted(offer, request) or _unable(offer, request)


def _unwanted(offer: Offer, request: RouteRequest) -> tuple[str, str] | None:
    if offer.peer in request.ignore:
        return "ignored", "the request ignores it"
    if request.only and offer.peer not in request.only:
        return "not-in-only", "it is not among the peers the request allows"
    return _region_fault(offer.region, request)


def _region_fault(region: str, request: RouteRequest) -> tuple[str, str] | None:
    if not request.regions_allowed and not request.regions_denied:
        return None
    if not region:
        return "region", "it declares no region and the request has a region rule"
    if request.regions_allowed and not _within(region, request.regions_allowed):
        return "region", f"region {region} is not allowed"
    if _within(region, request.regions_denied):
        return "region", f"region {region} is denied"
    return None


def _within(region: str, areas: Iterable[str]) -> bool:
    return any(region == area or region.startswith(area + "-") for area in areas)


def _unable(offer: Offer, request: RouteRequest) -> tuple[str, str] | None:
    if request.numeric_class is not None and offer.numeric_class != request.numeric_class:
        return "numeric-class", f"numeric class {offer.numeric_class} is not the one asked for"
    if offer.evidence == "fronting-node" and not request.allow_fronting_node:
        return "evidence", "its only evidence is the fronting node's word"
    needed = request.prompt_tokens + request.max_tokens
    if offer.kv_tokens_free < needed:
        return "full", f"it is full: {offer.kv_tokens_free} KV tokens free, {needed} needed"
    return None
