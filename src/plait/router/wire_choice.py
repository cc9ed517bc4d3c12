"""What crosses the hops of a session: fp32, bf16 or int8. Pure.

Stages that compute in fp32 promise exactness and get fp32. Others round to bf16 inside, so
bf16 on the wire costs little more. int8 costs more, about as much as 8-bit weights, and is
chosen only where the cost model says that the bytes it saves are a good part of the time.
Routes are searched for, and predicted, by the bytes that will cross.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from plait.errors import ConfigError
from plait.router import cost
from plait.router.cost import Stages
from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.types import ModelShape, PeerId, WireDtype

if TYPE_CHECKING:
    from plait.router.plan import Plan

SAVING_PERCENT_MIN = 20
"""int8 must save this much of the predicted time per token, or of that to the first one."""
_ROUNDING = ("bf16", "fp16", "int4", "int8")
_GROUP = 32
_SCALE_BYTES = 2


def row_bytes(width: int, wire_dtype: WireDtype) -> int:
    """Bytes of one row of activations on the wire."""
    match wire_dtype:
        case "fp32":
            return 4 * width
        case "bf16":
            return 2 * width
        case "int8":
            return width + width // _GROUP * _SCALE_BYTES


def rounds(offer: Offer) -> bool:
    """Whether a stage states that it computes in something less than fp32."""
    parts = offer.numeric_class.split("/")
    return len(parts) > 1 and parts[1] in _ROUNDING


def on_wire(model: ModelShape, wire_dtype: WireDtype) -> ModelShape:
    """The model with rows as long as they are on the wire, for the cost model."""
    if wire_dtype == "fp32":
        return model
    return replace(model, bytes_per_row=row_bytes(model.bytes_per_row // 4, wire_dtype))


def wire_of(
    view: View, stages: Stages, model: ModelShape, request: RouteRequest, source: PeerId
) -> WireDtype:
    """What the hops of a route carry, if the request leaves it to the route or can have it."""
    if not _all_round(offer for offer, _ in stages):
        return "fp32"
    if request.wire is not None:
        return request.wire
    if not _divides(model):
        return "bf16"
    bf16, int8 = (
        cost.totals(view, stages, on_wire(model, wire), request, source)
        for wire in ("bf16", "int8")
    )
    saves = (
        100 * (before - after) > SAVING_PERCENT_MIN * before
        for before, after in ((bf16.tpot_ns, int8.tpot_ns), (bf16.ttft_ns, int8.ttft_ns))
    )
    return "int8" if any(saves) else "bf16"


def choose_wire(plan: "Plan", wanted: WireDtype | None) -> WireDtype:
    """What the route's hops carry; ``wanted`` None leaves it to the route.

    Raises ``ConfigError`` if the stages do not take what is wanted.
    """
    if wanted is None:
        return plan.wire_dtype
    if wanted != "fp32" and not _all_round(stage.offer for stage in plan.stages):
        raise ConfigError(
            f"these stages compute in fp32, which {wanted} on the wire would undo",
            remedy="leave the wire dtype out, or ask for stages of another numeric class",
        )
    if wanted == "int8" and not _divides(plan.model):
        width = plan.model.bytes_per_row // 4
        raise ConfigError(f"activations of {width} numbers do not divide into groups of {_GROUP}")
    return wanted


def _all_round(offers: Iterable[Offer]) -> bool:
    return all(rounds(offer) for offer in offers)


def _divides(model: ModelShape) -> bool:
    width = model.bytes_per_row // 4
    return width > 0 and width % _GROUP == 0
