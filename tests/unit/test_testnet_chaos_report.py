"""What a chaos report says of what was recorded."""

from typing import Any

import pytest

from plait.testnet.chaos_plan import Fault
from plait.testnet.chaos_report import gaps_report, quantile, requests_report, verdict
from plait.testnet.load import Outcome

CALM = Outcome(100.0, 110.0, [101.0, 102.0, 103.5], tokens=3)
HIT = Outcome(0.0, 20.0, [1.0, 2.0, 6.0, 6.5, 16.0], tokens=5, epochs=2)
LOST = Outcome(0.0, 4.0, [1.0, 2.0], tokens=2, wrong=1, code="session-lost", failure="a")
ALSO_LOST = Outcome(5.0, 9.0, [], code="session-lost", failure="b")


def test_requests_are_counted_with_the_first_failure_of_a_kind() -> None:
    assert requests_report([CALM, HIT, LOST, ALSO_LOST]) == {
        "ok": 2,
        "failed": 2,
        "failures": [{"code": "session-lost", "count": 2, "example": "a"}],
        "rerouted": 1,
        "tokens_delivered": 10,
        "tokens_wrong": 1,
    }


def test_a_pause_is_put_down_to_the_fault_before_it() -> None:
    kill = (Fault(3.0, "kill", "node-1"), 3.0, "applied")
    gaps = gaps_report([CALM, HIT, LOST], [kill])
    assert gaps["around_faults"] == {"count": 1, "p50": 9.5, "p99": 9.5, "max": 9.5}
    assert gaps["rerouted"]["max"] == 9.5
    assert gaps["calm"]["max"] == 1.5


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (Fault(3.0, "restart", "node-1"), "applied"),
        (Fault(3.0, "fill", "node-1"), "skipped: no disk"),
    ],
)
def test_what_is_no_blow_explains_no_pause(fault: Fault, how: str) -> None:
    assert gaps_report([HIT], [(fault, 3.0, how)])["around_faults"]["count"] == 0


def test_a_pause_that_ended_before_the_fault_is_not_its_doing() -> None:
    kill = (Fault(17.0, "kill", "node-1"), 17.0, "applied")
    assert gaps_report([HIT], [kill])["around_faults"]["count"] == 0


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0)) == (50, 99, 100)
    assert quantile([], 0.5) is None


def told(kind: str, how: str) -> dict[str, Any]:
    return {"kind": kind, "node": "node-1", "outcome": how}


def report(**changes: Any) -> dict[str, Any]:
    fine: dict[str, Any] = {
        "faults": [told("kill", "applied"), told("restart", "applied")],
        "requests": {"ok": 3, "failed": 0, "tokens_wrong": 0},
        "ledger": {"balanced": True, "violations": []},
        "leaks": {"pages_and_sessions": {}, "processes": 0},
    }
    return fine | changes


def test_all_is_well_only_if_nothing_is_wrong() -> None:
    assert verdict(report()) == []
    assert verdict(report(requests={"ok": 2, "failed": 1, "tokens_wrong": 4})) == [
        "1 requests failed",
        "4 tokens are wrong",
    ]
    assert verdict(report(requests={"ok": 0, "failed": 0, "tokens_wrong": 0}))
    assert verdict(report(ledger={"balanced": True, "violations": ["root"]}))
    assert verdict(report(ledger={"balanced": False, "violations": []}))
    assert verdict(report(leaks={"processes": 1})) == ["leaked processes: 1"]


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [told("fill", "skipped: no disks"), told("cut", "skipped: no WAN")],
        [told("fill", "skipped: no disks"), told("heal", "applied")],
    ],
    ids=["none planned", "all skipped", "only an end"],
)
def test_a_run_without_a_fault_shows_nothing(faults: list[dict[str, Any]]) -> None:
    assert verdict(report(faults=faults)) == ["no fault was applied: the run shows nothing"]


def test_a_fault_that_failed_is_wrong_and_one_that_was_skipped_is_not() -> None:
    applied = told("hang", "applied by a CPU quota")
    assert verdict(report(faults=[applied, told("fill", "skipped: no disks")])) == []
    assert verdict(
        report(faults=[applied, told("kill", "failed: no node"), told("cut", "failed: x")])
    ) == ["2 faults could not be applied, first: kill of node-1: failed: no node"]
