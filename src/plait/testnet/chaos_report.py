"""What a chaos run shows, from what was recorded. Pure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plait.testnet.chaos_plan import DISRUPTIVE, Fault
from plait.testnet.load import Outcome

AFTERMATH_S = 15.0
"""How long after a fault a pause is put down to it."""

_HARMFUL = (*DISRUPTIVE, "restart")

Applied = tuple[Fault, float, str]
"""A fault, when it was applied (monotonic), and how that went."""


def requests_report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts of requests and tokens, and the first failure of each kind."""
    examples = {o.code: o.failure for o in reversed(outcomes) if o.code}
    return {
        "ok": sum(not o.failure for o in outcomes),
        "failed": sum(bool(o.failure) for o in outcomes),
        "failures": [
            {"code": code, "count": count, "example": examples[code]}
            for code, count in Counter(o.code for o in outcomes if o.code).most_common()
        ],
        "rerouted": sum(o.epochs > 1 for o in outcomes),
        "tokens_delivered": sum(o.tokens for o in outcomes),
        "tokens_wrong": sum(o.wrong for o in outcomes),
    }


def gaps_report(outcomes: Sequence[Outcome], applied: Sequence[Applied]) -> dict[str, Any]:
    """Longest pauses between tokens: near faults, of rerouted requests, and of the calm ones."""
    times = [at_s for fault, at_s, how in applied if _counts(fault, how)]
    around, calm = list[float](), list[float]()
    for outcome in outcomes:
        met = [t for t in times if outcome.started_s - AFTERMATH_S < t < outcome.ended_s]
        for at_s in met:
            gap_s = outcome.longest_gap_s(at_s, at_s + AFTERMATH_S)
            if gap_s is not None and outcome.started_s < at_s:
                around.append(gap_s)
        gap_s = outcome.longest_gap_s(-math.inf, math.inf)
        if not met and gap_s is not None:
            calm.append(gap_s)
    rerouted = [
        gap_s
        for o in outcomes
        if o.epochs > 1 and (gap_s := o.longest_gap_s(-math.inf, math.inf)) is not None
    ]
    return {
        "around_faults": distribution(around),
        "rerouted": distribution(rerouted),
        "calm": distribution(calm),
    }


def faults_report(applied: Sequence[Applied], started_s: float) -> list[dict[str, Any]]:
    """Every fault with the moment it was really applied."""
    return [
        asdict(fault) | {"applied_at_s": round(at_s - started_s, 3), "outcome": how}
        for fault, at_s, how in applied
    ]


def distribution(values_s: Sequence[float]) -> dict[str, Any]:
    """Count, median, 99th percentile and maximum; None for none."""
    return {
        "count": len(values_s),
        "p50": quantile(values_s, 0.5),
        "p99": quantile(values_s, 0.99),
        "max": quantile(values_s, 1.0),
    }


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of them do not exceed; None for none."""
    if not values:
        return None
    return round(sorted(values)[max(0, math.ceil(share * len(values)) - 1)], 4)


def verdict(report: Mapping[str, Any]) -> list[str]:
    """What a run must not show; empty when all is well."""
    requests, ledger, leaks = report["requests"], report["ledger"], report["leaks"]
    wrong = _wrong_with(report["faults"])
    if requests["failed"]:
        wrong.append(f"{requests['failed']} requests failed")
    if requests["tokens_wrong"]:
        wrong.append(f"{requests['tokens_wrong']} tokens are wrong")
    if not requests["ok"]:
        wrong.append("no request ended well")
    if not ledger.get("balanced") or ledger.get("violations"):
        wrong.append("the ledger does not hold")
    wrong += [f"leaked {what}: {found}" for what, found in leaks.items() if found]
    return wrong


def _wrong_with(faults: Sequence[Mapping[str, Any]]) -> list[str]:
    """A run that did not do what it planned, or did no harm at all, has shown nothing."""
    failed = [fault for fault in faults if fault["outcome"].startswith("failed")]
    harm = [
        fault
        for fault in faults
        if fault["kind"] in _HARMFUL and fault["outcome"].startswith("applied")
    ]
    wrong = []
    if failed:
        first = failed[0]
        wrong.append(
            f"{len(failed)} faults could not be applied, first: "
            f"{first['kind']} of {first['node']}: {first['outcome']}"
        )
    if not harm:
        wrong.append("no fault was applied: the run shows nothing")
    return wrong


def _counts(fault: Fault, how: str) -> bool:
    return fault.kind in DISRUPTIVE and how.startswith("applied")
