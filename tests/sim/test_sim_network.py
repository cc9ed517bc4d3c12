"""The whole network under faults: a thousand seeds, and bugs planted to see them found."""

from typing import Any

import pytest

from plait.cli.sim import _outcomes
from plait.client import session_reroute
from plait.client.reroute import next_terms
from plait.ledger.client_books import ClientBooks
from plait.ledger.journal import Books
from plait.ledger.stage_books import StageBooks
from plait.ledger.terms import SessionTerms
from plait.node.ports import Job
from plait.node.retained import Key, Retained
from plait.node.sessions import StageSession
from plait.node.stage import Stage
from plait.sim.run import Outcome, run_seed

SEEDS = 1_000
FEW_SEEDS = 200
ONCE_BROKEN = [1406, 5038, 41258, 43891, 103328, 109696]
"""Seeds beyond the first thousand that found a bug."""


def told(outcome: Outcome) -> str:
    """A violation with its last events."""
    return "\n".join([*outcome.recent, f"seed {outcome.seed}: {outcome.what}"])


@pytest.mark.slow
def test_every_invariant_holds() -> None:
    for outcome in _outcomes("network", range(SEEDS), 0, False):
        assert not outcome.rule, told(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ONCE_BROKEN)
def test_what_once_broke_holds(seed: int) -> None:
    outcome = run_seed("network", seed)
    assert not outcome.rule, told(outcome)


@pytest.mark.slow
def test_a_seed_gives_the_same_run_again() -> None:
    first, second = (run_seed("network", 5, keep_trace=True) for _ in range(2))
    assert first == second
    assert any("rerouted" in line for line in first.recent)


def rules_broken() -> set[str]:
    """What the first seed that finds anything finds."""
    for seed in range(FEW_SEEDS):
        outcome = run_seed("network", seed)
        if outcome.rule:
            return {outcome.rule}
    return set()


@pytest.mark.slow
def test_a_replay_that_is_off_by_one_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Retained.read

    def shifted(retained: Retained, key: Key, first_position: int, rows: int) -> bytes:
        return read(retained, key, max(first_position - 1, 0), rows - 1) + read(
            retained, key, first_position, 1
        )

    monkeypatch.setattr(Retained, "read", shifted)
    assert rules_broken() == {"tokens"}


@pytest.mark.slow
def test_resuming_one_position_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def early(*args: Any, position: int, **others: Any) -> SessionTerms:
        return next_terms(*args, position=max(position - 1, 0), **others)

    monkeypatch.setattr(session_reroute, "next_terms", early)
    assert rules_broken()


@pytest.mark.slow
def test_a_missing_epoch_check_at_the_stage_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # What was computed for an epoch that is over goes on to the next stage.
    monkeypatch.setattr(Job, "live", property(lambda job: True))
    assert rules_broken() == {"protocol"}


@pytest.mark.slow
def test_paying_a_voucher_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Books, "paid", lambda books, session, payee: 0)
    assert rules_broken() <= {"money", "bundle", "books"} != set()


@pytest.mark.slow
def test_paying_a_dead_stage_for_the_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    amount: Any = ClientBooks._amount_before

    def generous(books: ClientBooks, index: int) -> int:
        paid: int = amount(books, index)
        return paid + 1

    monkeypatch.setattr(ClientBooks, "_amount_before", generous)
    assert rules_broken() == {"bundle"}


@pytest.mark.slow
def test_working_without_being_paid_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageBooks, "accept_voucher", lambda books, envelope: None)
    monkeypatch.setattr(StageBooks, "admit", lambda books, counts: None)
    assert rules_broken() == {"work"}


@pytest.mark.slow
def test_keeping_an_ended_session_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Stage._free

    def forgetful(stage: Stage, session: StageSession) -> None:
        retained = stage.retained
        stage.retained = Retained(retained._spill, memory_bytes_max=0, spill_bytes_max=0)
        free(stage, session)
        stage.retained = retained

    monkeypatch.setattr(Stage, "_free", forgetful)
    assert rules_broken() == {"leak"}
