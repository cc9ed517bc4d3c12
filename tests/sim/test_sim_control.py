"""Gossip and ledger under faults, and that a fault planted in them is found."""

import pytest

from plait.ledger.journal import Books
from plait.net.membership import Membership
from plait.sim.ledger import VirtualRecorder
from plait.sim.run import run_seed, run_seeds

SEEDS = range(12)


@pytest.mark.slow
def test_every_invariant_holds() -> None:
    broken = [outcome for outcome in run_seeds(("control", SEEDS)) if outcome.rule]
    assert not broken, "\n".join([*broken[0].recent, f"seed {broken[0].seed}: {broken[0].what}"])


@pytest.mark.slow
def test_a_seed_gives_the_same_run_again() -> None:
    first, second = (run_seed("control", 3, keep_trace=True) for _ in range(2))
    assert first == second
    assert first.recent and first.steps > 1_000
    assert first.fingerprint != run_seed("control", 4).fingerprint


def found(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, planted: object) -> set[str]:
    """The rules that are broken once something is planted."""
    monkeypatch.setattr(owner, name, planted)
    return {outcome.rule for outcome in run_seeds(("control", SEEDS))} - {""}


@pytest.mark.slow
def test_answering_before_the_commit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(recorder: VirtualRecorder) -> None:
        recorder._committed_size = recorder.tree.size

    assert "log" in found(monkeypatch, VirtualRecorder, "durable", at_once)


@pytest.mark.slow
def test_paying_a_voucher_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "money" in found(monkeypatch, Books, "paid", lambda books, session, payee: 0)


@pytest.mark.slow
def test_ignoring_every_forwarder_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def deaf(membership: Membership, *_: object) -> bool:
        return False

    assert "gossip" in found(monkeypatch, Membership, "_forwarder_may", deaf)
