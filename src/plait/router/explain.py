"""A route decision in words and as JSON: what was chosen, what it should do, who lost and why."""

from typing import Any

from plait.errors import NoRoute
from plait.router import cost
from plait.router.cost import Prediction
from plait.router.eligibility import Rejection, sift
from plait.router.plan import Plan, PlannedStage
from plait.router.request import RouteRequest
from plait.router.view import View
from plait.types import ModelShape, PeerId


def explain(decision: Plan) -> dict[str, Any]:
    """A JSON-ready account of a plan: route, predicted, alternates, rejected."""
    return {
        "model": decision.model.name,
        "sort": decision.request.sort,
        "wire_dtype": decision.wire_dtype,
        "route": _stages(decision),
        "predicted": _prediction(decision.predicted),
        "alternates": [
            {
                "route": [_stage(stage) for stage in spare.stages],
                "predicted": _prediction(spare.predicted),
                "shared": list(spare.shared),
            }
            for spare in decision.alternates
        ],
        "rejected": _rejected(decision.rejections),
    }


def explain_failure(
    error: NoRoute, view: View, model: ModelShape, request: RouteRequest, now_ms: int
) -> dict[str, Any]:
    """A JSON-ready account of a failed plan: error, and who could not serve and why.

    ``eligible`` lists the peers that could, with their spans.
    """
    eligible, rejections = sift(view, model, request, now_ms)
    return {
        "model": model.name,
        "sort": request.sort,
        "route": [],
        "error": {
            "code": error.code,
            "message": str(error),
            "remedy": error.remedy,
            "missing": [list(layers) for layers in error.missing],
            "cheapest_microcredits": error.cheapest,
        },
        "eligible": [
            {"peer": offer.peer, "start": offer.span.start, "end": offer.span.end}
            for offer in eligible
        ],
        "rejected": _rejected(rejections),
    }


def explain_lines(account: dict[str, Any]) -> list[str]:
    """The account as lines of text for a terminal."""
    lines: list[str] = []
    if "error" in account:
        lines.append(f"no route for {account['model']}: {account['error']['message']}")
        if account["error"]["remedy"]:
            lines.append(f"  try: {account['error']['remedy']}")
        lines += [
            f"  able  {p['peer']}  layers {p['start']}:{p['end']}" for p in account["eligible"]
        ]
    else:
        lines.append(f"route for {account['model']}, best by {account['sort']}:")
        lines += [_stage_line(stage) for stage in account["route"]]
        lines.append(f"  predicted: {_prediction_line(account['predicted'])}")
    for number, spare in enumerate(account.get("alternates", []), 1):
        path = " → ".join(f"{s['peer']}[{s['start']}:{s['end']}]" for s in spare["route"])
        lines.append(f"  alternate {number}: {path}: {_prediction_line(spare['predicted'])}")
    lines += [f"  rejected  {r['peer']}  {r['code']}: {r['reason']}" for r in account["rejected"]]
    return lines


def _stages(decision: Plan) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    model, request = decision.costed, decision.request
    before: PeerId = decision.source
    for stage in decision.stages:
        peer = stage.offer.peer
        link = cost.link(decision.view, before, peer)
        hop = cost.hop_between(link, model, request) if entries else cost.hop_out(link, request)
        work = cost.stage(stage.offer, stage.span, model, request)
        measured = decision.view.link_rtt_us(before, peer) is not None
        entries.append(
            _stage(stage)
            | {
                "hop_ms": hop.tpot_ns / 1e6,
                "hop_measured": measured,
                "compute_ms_per_token": work.tpot_ns / 1e6,
                "prefill_ms": work.ttft_ns / 1e6,
                "price_microcredits": work.price,
            }
        )
        before = peer
    return entries


def _stage(stage: PlannedStage) -> dict[str, Any]:
    return {
        "peer": stage.offer.peer,
        "start": stage.span.start,
        "end": stage.span.end,
        "priced_layers": stage.priced_layers,
        "region": stage.offer.region,
        "numeric_class": stage.offer.numeric_class,
        "sessions_active": stage.offer.sessions_active,
    }


def _prediction(predicted: Prediction) -> dict[str, Any]:
    return {
        "ttft_s": predicted.ttft_s,
        "tpot_s": predicted.tpot_s,
        "price_microcredits": predicted.price_microcredits,
        "energy_joules_declared": predicted.energy_joules_declared,
        "carbon_grams_declared": predicted.carbon_grams_declared,
    }


def _rejected(rejections: tuple[Rejection, ...]) -> list[dict[str, str]]:
    return [{"peer": r.peer, "code": r.code, "reason": r.reason} for r in rejections]


def _stage_line(stage: dict[str, Any]) -> str:
    link = "" if stage["hop_measured"] else " (link not measured)"
    return (
        f"  {stage['peer']}  layers {stage['start']}:{stage['end']}  "
        f"hop {stage['hop_ms']:.2f} ms{link}, "
        f"compute {stage['compute_ms_per_token']:.2f} ms per token, "
        f"{stage['price_microcredits']} microcredits"
    )


def _prediction_line(predicted: dict[str, Any]) -> str:
    return (
        f"first token after {predicted['ttft_s']:.3f} s, "
        f"{predicted['tpot_s'] * 1000:.2f} ms per token, "
        f"{predicted['price_microcredits']} microcredits"
    )
