"""The lottery: its rate, its anchor, its auditors, and that each ingredient of the seed counts."""

from dataclasses import replace

import pytest

from plait.errors import BadProof
from plait.ledger.checkpoint import Checkpoint
from plait.ledger.lottery import (
    Anchor,
    Lot,
    anchor_of,
    audit_seed,
    auditor_of,
    check_nonce,
    chunks_to_exposure,
    drawn_lots,
    is_drawn,
    nonce_commitment,
)
from plait.ledger.merkle import Tree, leaf_hash
from plait.types import Digest, PeerId, SessionId

NONCE = bytes(range(32))
ANCHOR = Anchor(7, Digest(bytes(32)))
SESSION = SessionId(bytes(16))
SEED = audit_seed(ANCHOR, SESSION, NONCE)


def test_every_ingredient_changes_the_seed() -> None:
    seeds = {
        SEED,
        audit_seed(replace(ANCHOR, size=8), SESSION, NONCE),
        audit_seed(replace(ANCHOR, root=Digest(b"\1" * 32)), SESSION, NONCE),
        audit_seed(ANCHOR, SessionId(b"\1" * 16), NONCE),
        audit_seed(ANCHOR, SESSION, NONCE[::-1]),
    }
    assert len(seeds) == 5


@pytest.mark.parametrize("rate", [0, 2, 50, 100])
def test_lots_are_drawn_at_the_rate_each_on_its_own(rate: int) -> None:
    lots = [
        Lot(epoch, chunk, stage) for epoch in (1, 2) for chunk in range(2000) for stage in (0, 1, 2)
    ]
    drawn = drawn_lots(SEED, lots, rate)
    assert abs(len(drawn) - len(lots) * rate / 100) < 4 * (len(lots) * 0.25) ** 0.5
    assert set(drawn) == {lot for lot in lots if is_drawn(SEED, lot, rate)}
    # A lot drawn at a rate is drawn at every higher one.
    assert set(drawn_lots(SEED, lots, rate // 2)) <= set(drawn)


def test_the_nonce_must_be_the_committed_one() -> None:
    check_nonce(NONCE, nonce_commitment(NONCE))
    for nonce, commitment in (
        (NONCE[::-1], nonce_commitment(NONCE)),
        (NONCE, b""),
        (b"short", nonce_commitment(b"short")),
    ):
        with pytest.raises(BadProof):
            check_nonce(nonce, commitment)


@pytest.mark.parametrize("size", range(1, 18))
def test_the_anchor_is_the_one_head_just_behind_the_entry(size: int) -> None:
    entries = [b"entry %d" % number for number in range(size)]
    tree = Tree(map(leaf_hash, entries))
    checkpoint = Checkpoint("log", size, tree.root())
    for index, entry in enumerate(entries):
        path = tree.inclusion_proof(index, index + 1)
        growth = tree.consistency_proof(index + 1, size)
        anchor = anchor_of(entry, index, path, growth, checkpoint)
        assert anchor == Anchor(index + 1, tree.root(index + 1))
        for bad_entry, bad_index in ((entry + b"!", index), (entry, index + 1)):
            with pytest.raises(BadProof):
                anchor_of(bad_entry, bad_index, path, growth, checkpoint)


def test_auditors_are_spread_evenly_and_a_wider_view_can_only_lower_the_choice() -> None:
    peers = [PeerId(f"peer {number}") for number in range(5)]
    chosen = [auditor_of(SEED, Lot(1, chunk, 0), peers) for chunk in range(1000)]
    assert min(chosen.count(peer) for peer in peers) > 140
    for chunk, winner in enumerate(chosen):
        others = [peer for peer in peers if peer != winner]
        assert auditor_of(SEED, Lot(1, chunk, 0), [*others, winner]) == winner  # type: ignore[list-item]
    assert auditor_of(SEED, Lot(1, 0, 0), []) is None


def test_the_formula_gives_the_published_figures() -> None:
    figures = [(1.0, 0.95), (1.0, 0.99), (0.1, 0.95), (0.1, 0.99)]
    chunks = [chunks_to_exposure(0.02, share, 1.0, sure) for share, sure in figures]
    assert [int(count) + 1 for count in chunks] == [149, 228, 1497, 2301]
    assert chunks_to_exposure(0.02, 0.0, 1.0, 0.95) == float("inf")
    assert chunks_to_exposure(1.0, 1.0, 1.0, 0.95) == 1.0
