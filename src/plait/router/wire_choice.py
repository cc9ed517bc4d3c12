"""What crosses the hops of a session: fp32, bf16 or int8. Pure.

Stages that compute in fp32 promise exactness and get fp32. Others round to bf16 inside, so
bf16 on the wire costs little more. int8 costs more, about as much as 8-bit weights, and is
chosen only where the cost model says that the bytes it saves are a good part of the time.
"""

from itertools import pairwise
from typing import get_args

from plait.errors import ConfigError
from plait.router.cost import link
from plait.router.plan import Plan
from plait.types import WireDtype

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


def choose_wire(plan: Plan, wanted: WireDtype | None) -> WireDtype:
    """What the route's hops carry; ``wanted`` None leaves it to the route.

    Raises ``ConfigError`` if the stages do not take what is wanted.
    """
    width = plan.model.bytes_per_row // 4
    groups = width > 0 and width % _GROUP == 0
    if not _all_round(plan):
        if wanted not in (None, "fp32"):
            raise ConfigError(
                f"these stages compute in fp32, which {wanted} on the wire would undo",
                remedy="leave the wire dtype out, or ask for stages of another numeric class",
            )
        return "fp32"
    if wanted == "int8" and not groups:
        raise ConfigError(f"activations of {width} numbers do not divide into groups of {_GROUP}")
    if wanted is not None:
        return wanted
    return "int8" if groups and _slow(plan, width) else "bf16"


def _all_round(plan: Plan) -> bool:
    """Whether every stage states that it computes in something less than fp32."""
    classes = [stage.offer.numeric_class.split("/") for stage in plan.stages]
    return all(len(parts) > 1 and parts[1] in _ROUNDING for parts in classes)


def _slow(plan: Plan, width: int) -> bool:
    """Whether int8 instead of bf16 saves enough, by the links as the plan saw them."""
    peers = [stage.offer.peer for stage in plan.stages]
    hops = [link(plan.view, one, other) for one, other in pairwise(peers)]
    fp32_s, bf16_s, int8_s = (
        sum(hop.transfer_ns(row_bytes(width, one)) for hop in hops) / 1e9
        for one in get_args(WireDtype)
    )
    # Predictions are made for fp32.
    tpot_s = plan.predicted.tpot_s - (fp32_s - bf16_s)
    prompt = plan.request.prompt_tokens
    ttft_s = plan.predicted.ttft_s - (fp32_s - bf16_s) * prompt
    share, saved_s = SAVING_PERCENT_MIN / 100, bf16_s - int8_s
    return saved_s > share * tpot_s or saved_s * prompt > share * ttft_s
