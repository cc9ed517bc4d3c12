"""The notice board: what it believes, what it asks, what it passes on, and its bounds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.envelope import seal
from plait.errors import BadSignature, VerificationError
from plait.ledger.certs import check_key_cert, check_revocation, make_key_cert, make_revocation
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.fork import (
    GrowthFork,
    LogFork,
    check_fork_proof,
    read_fork_proof,
    write_fork_proof,
)
from plait.ledger.merkle import Tree, leaf_hash
from plait.ledger.notices import (
    CHECKPOINTS_PER_LOG_MAX,
    REVOCATIONS_MAX,
    TOLD_BYTES_MAX,
    UNRESOLVED_MAX,
    Compare,
    Frozen,
    NoticeBoard,
    Revoked,
    Told,
)
from plait.testing.accounting import NOW_MS, key_of, paper_network
from plait.v1.identity_pb2 import KeyRevocation

NETWORK = paper_network()
AUTHORITY = NETWORK.authorities[0]
ORIGIN, LOG_KEY = AUTHORITY.log_origin, key_of("authority log")
HONEST = Tree(leaf_hash(f"{number}".encode()) for number in range(40))
FORKED = Tree(leaf_hash(f"{number // 3}".encode()) for number in range(40))


def note(size: int, tree: Tree = HONEST) -> str:
    return sign_checkpoint(LOG_KEY, ORIGIN, size, tree.root(size))


def revocation(name: str, serial_min: int = 2) -> object:
    return make_revocation(key_of(name), NETWORK.network_id, serial_min, NOW_MS)


def test_two_trees_of_one_size_freeze_the_log() -> None:
    board = NoticeBoard(NETWORK)
    assert board.handle(Told(checkpoints=(note(7),))) == []
    (action,) = board.handle(Told(checkpoints=(note(7, FORKED),)))
    assert isinstance(action, Frozen) and action.culprit == AUTHORITY.peer
    assert board.trusted() == ()
    proof = board.proof_against(AUTHORITY.peer)
    assert proof is not None
    assert check_fork_proof(read_fork_proof(proof), NETWORK).culprit == AUTHORITY.peer
    stranger = NoticeBoard(NETWORK)
    assert stranger.handle(board.tell()) == [action]
    assert stranger.handle(board.tell()) == []


@given(st.integers(1, 39), st.data())
def test_a_larger_tree_that_lacks_the_smaller_freezes_the_log(
    smaller: int, data: st.DataObject
) -> None:
    larger = data.draw(st.integers(smaller + 1, 40))
    for tree in (HONEST, FORKED):
        board = NoticeBoard(NETWORK)
        board.handle_checkpoint(note(smaller))
        (question,) = board.handle_checkpoint(note(larger, tree))
        assert question == Compare(ORIGIN, note(smaller), note(larger, tree))
        actions = board.compared(question, tree)
        forked = tree.root(smaller) != HONEST.root(smaller)
        assert [type(action) for action in actions] == ([Frozen] if forked else [])
        if forked:
            proof = board.proof_against(AUTHORITY.peer)
            assert proof is not None
            read = read_fork_proof(proof)
            assert isinstance(read, GrowthFork)
            assert write_fork_proof(read) == proof
            assert check_fork_proof(read, NETWORK).culprit == AUTHORITY.peer


def test_a_tree_that_is_not_the_checkpoints_answers_nothing() -> None:
    board = NoticeBoard(NETWORK)
    board.handle_checkpoint(note(5))
    (question,) = board.handle_checkpoint(note(9, FORKED))
    assert isinstance(question, Compare)
    with pytest.raises(VerificationError, match="another tree"):
        board.compared(question, HONEST)
    assert not board.frozen


@pytest.mark.parametrize(
    "change",
    [
        {"prefix_root": HONEST.root(5)},
        {"prefix_root": b"x" * 32},
        {"hashes": ()},
        {"checkpoints": (note(9, FORKED), note(5))},
        {"checkpoints": (note(5), note(5, FORKED))},
        {"checkpoints": (note(0), note(9, FORKED))},
        {"origin": "another"},
    ],
)
def test_a_growth_proof_that_proves_nothing(change: dict[str, object]) -> None:
    proof = GrowthFork(
        ORIGIN,
        (note(5), note(9, FORKED)),
        FORKED.root(5),
        tuple(FORKED.consistency_proof(5, 9)),
    )
    check_fork_proof(proof, NETWORK)
    with pytest.raises(VerificationError):
        check_fork_proof(replace(proof, **change), NETWORK)  # type: ignore[arg-type]


def test_growth_is_no_fork() -> None:
    hashes = tuple(HONEST.consistency_proof(5, 9))
    grown = GrowthFork(ORIGIN, (note(5), note(9)), HONEST.root(5), hashes)
    with pytest.raises(VerificationError, match="contains the smaller"):
        check_fork_proof(grown, NETWORK)


def test_an_honest_log_is_never_frozen() -> None:
    board, told = NoticeBoard(NETWORK), []
    for size in (3, 30, 7, 7, 12, 40, 1, 0, 39):
        for action in board.handle(Told(checkpoints=(note(size),))):
            assert isinstance(action, Compare)
            told.append(action)
            assert board.compared(action, HONEST) == []
    assert len(told) == 6
    assert board.trusted() == NETWORK.authorities
    assert board.checkpoint_of(ORIGIN) == note(40)


def test_what_nobody_signed_is_forgotten() -> None:
    board = NoticeBoard(NETWORK)
    forged = sign_checkpoint(key_of("somebody"), ORIGIN, 7, FORKED.root(7))
    proof = write_fork_proof(LogFork(ORIGIN, (note(7), note(7))))
    theirs = seal(
        key_of("thief"),
        KeyRevocation(
            network_id=NETWORK.network_id, peer_id=key_of("victim").peer_id, serial_min=9
        ),
    )
    elsewhere = make_revocation(key_of("victim"), "another", 2, NOW_MS)
    nothing = make_revocation(key_of("victim"), NETWORK.network_id, 0, NOW_MS)
    told = Told(
        (forged, "no note", "\ud800"),
        (proof, b"{}", b"\xff", b"x" * 100_000),
        (theirs, elsewhere, nothing),
    )
    assert board.handle(told) == board.handle(told) == []
    assert not board.frozen and not board.revoked


def test_revocations_rise_and_are_passed_on() -> None:
    board = NoticeBoard(NETWORK)
    peer = key_of("peer").peer_id
    assert board.handle_revocation(revocation("peer", 3)) == [Revoked(peer, 3)]  # type: ignore[arg-type]
    assert board.handle_revocation(revocation("peer", 3)) == []  # type: ignore[arg-type]
    assert board.handle_revocation(revocation("peer", 2)) == []  # type: ignore[arg-type]
    assert board.revoked == {peer: 3}
    other = NoticeBoard(NETWORK)
    assert other.handle(board.tell()) == [Revoked(peer, 3)]
    restored = NoticeBoard(NETWORK)
    restored.restore(other.stored())
    assert restored.revoked == {peer: 3}


def test_a_revoked_certificate_counts_no_more() -> None:
    peer, ledger = key_of("peer"), key_of("peer ledger")
    old, new = (
        make_key_cert(peer, ledger.public, NETWORK.network_id, NOW_MS, 10**6, serial)
        for serial in (1, 2)
    )
    revoked = {peer.peer_id: 2}
    assert check_key_cert(new, NETWORK.network_id, NOW_MS, None, revoked)
    with pytest.raises(BadSignature, match="revoked"):
        check_key_cert(old, NETWORK.network_id, NOW_MS, None, revoked)
    made = make_revocation(peer, NETWORK.network_id, 2, NOW_MS)
    assert check_revocation(made, NETWORK.network_id) == (peer.peer_id, 2)


def test_the_board_is_bounded() -> None:
    board = NoticeBoard(NETWORK)
    for size in range(1, 41):
        board.handle_checkpoint(note(size))
    assert len(board.stored().checkpoints) == CHECKPOINTS_PER_LOG_MAX
    assert len(board.unresolved()) == UNRESOLVED_MAX
    envelopes = [revocation(f"peer {number}") for number in range(300)]
    for envelope in envelopes:
        board.handle_revocation(envelope)  # type: ignore[arg-type]
    told = [board.tell() for _ in range(4)]
    for one in told:
        size = sum(map(len, one.checkpoints)) + sum(e.ByteSize() for e in one.revocations)
        assert size <= TOLD_BYTES_MAX
    assert len({e.signer for one in told for e in one.revocations}) == 300
    assert REVOCATIONS_MAX >= 300
