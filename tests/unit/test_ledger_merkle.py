"""The tree against RFC 6962 vectors, a naive recursive oracle, and damaged proofs."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadProof
from plait.ledger.merkle import (
    EMPTY_ROOT,
    Tree,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)

# The leaves and roots that Certificate Transparency implementations share.
LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
LEAVES.append("606162636465666768696a6b6c6d6e6f")
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
HASHES = [leaf_hash(bytes.fromhex(leaf)) for leaf in LEAVES]
PROOF_2_TO_5 = [
    bytes.fromhex("5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"),
    bytes.fromhex("bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"),
]

forests = st.integers(1, 70).map(lambda n: [leaf_hash(b"%d" % i) for i in range(n)])


def naive_root(hashes: Sequence[bytes]) -> bytes:
    if len(hashes) < 2:
        return hashes[0] if hashes else EMPTY_ROOT
    k = naive_split(len(hashes))
    return node_hash(naive_root(hashes[:k]), naive_root(hashes[k:]))


def naive_split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def naive_path(m: int, hashes: Sequence[bytes]) -> list[bytes]:
    """PATH(m, D[n]) of RFC 6962 section 2.1.1."""
    if len(hashes) == 1:
        return []
    k = naive_split(len(hashes))
    if m < k:
        return [*naive_path(m, hashes[:k]), naive_root(hashes[k:])]
    return [*naive_path(m - k, hashes[k:]), naive_root(hashes[:k])]


def naive_subproof(m: int, hashes: Sequence[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF(m, D[n], b) of RFC 6962 section 2.1.2."""
    if m == len(hashes):
        return [] if whole else [naive_root(hashes)]
    k = naive_split(len(hashes))
    if m <= k:
        return [*naive_subproof(m, hashes[:k], whole), naive_root(hashes[k:])]
    return [*naive_subproof(m - k, hashes[k:], False), naive_root(hashes[:k])]


def test_shared_vectors() -> None:
    tree = Tree(HASHES)
    for size, root in enumerate(ROOTS):
        assert root_of(HASHES[:size]).hex() == root == tree.root(size).hex()
    assert consistency_proof(HASHES, 2, 5) == PROOF_2_TO_5
    verify_consistency(2, 5, tree.root(2), tree.root(5), PROOF_2_TO_5)


@given(forests, st.data())
def test_inclusion_agrees_with_the_oracle(hashes: list[bytes], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(hashes)))
    index = data.draw(st.integers(0, size - 1))
    proof = inclusion_proof(Tree(hashes), index, size)
    root = naive_root(hashes[:size])
    assert proof == naive_path(index, hashes[:size])
    assert root == root_of(hashes[:size]) == Tree(hashes).root(size)
    verify_inclusion(hashes[index], index, size, proof, root)
    # Trees of other sizes may have the same path shape; the leaf must still not move.
    for other in {index - 1, index + 1, index ^ 1} - {index}:
        with pytest.raises(BadProof):
            verify_inclusion(hashes[index], other, size, proof, root)
    with pytest.raises(BadProof):
        verify_inclusion(hashes[index], index, size, [*proof, root], root)
    if proof:
        with pytest.raises(BadProof):
            verify_inclusion(hashes[index], index, size, proof[:-1], root)
        damaged = flip(proof, data)
        with pytest.raises(BadProof):
            verify_inclusion(hashes[index], index, size, damaged, root)


@given(forests, st.data())
def test_consistency_agrees_with_the_oracle(hashes: list[bytes], data: st.DataObject) -> None:
    second = data.draw(st.integers(1, len(hashes)))
    first = data.draw(st.integers(1, second))
    old, new = naive_root(hashes[:first]), naive_root(hashes[:second])
    proof = consistency_proof(Tree(hashes), first, second)
    assert proof == naive_subproof(first, hashes[:second], True)
    verify_consistency(first, second, old, new, proof)
    for wrong in ([*proof, new], proof[:-1] if proof else [old], flip([*proof, old], data)):
        with pytest.raises(BadProof):
            verify_consistency(first, second, old, new, wrong)
    with pytest.raises(BadProof):
        verify_consistency(first, second, leaf_hash(old), new, proof)
    with pytest.raises(BadProof):
        verify_consistency(first, second, old, leaf_hash(new), proof)


def flip(proof: Sequence[bytes], data: st.DataObject) -> list[bytes]:
    damaged = [bytearray(item) for item in proof]
    chosen = data.draw(st.integers(0, len(proof) - 1))
    damaged[chosen][data.draw(st.integers(0, 31))] ^= 1 << data.draw(st.integers(0, 7))
    return [bytes(item) for item in damaged]


@pytest.mark.parametrize(
    ("first", "second", "first_root", "second_root", "proof"),
    [
        (0, 1, EMPTY_ROOT, HASHES[0], []),  # from nothing, nothing is proven
        (0, 2, EMPTY_ROOT, EMPTY_ROOT, [HASHES[0]]),
        (0, 0, EMPTY_ROOT, EMPTY_ROOT, [HASHES[0]]),
        (0, 0, EMPTY_ROOT, HASHES[0], []),
        (1, 1, HASHES[0], HASHES[1], []),
        (1, 1, HASHES[0], HASHES[0], [HASHES[0]]),
        (1, 0, HASHES[0], EMPTY_ROOT, []),
        (2, 1, HASHES[0], HASHES[0], [HASHES[0]]),
        (-1, 1, EMPTY_ROOT, HASHES[0], []),
        (1, 2, HASHES[0], root_of(HASHES[:2]), []),
        (1, 2, HASHES[0][:31], root_of(HASHES[:2]), [HASHES[1]]),
        (1, 2, HASHES[0], root_of(HASHES[:2]), [HASHES[1] + b"\x00"]),
    ],
)
def test_consistency_edges_are_refused(
    first: int, second: int, first_root: bytes, second_root: bytes, proof: list[bytes]
) -> None:
    with pytest.raises(BadProof):
        verify_consistency(first, second, first_root, second_root, proof)


def test_consistency_edges_that_hold() -> None:
    verify_consistency(0, 0, EMPTY_ROOT, EMPTY_ROOT, [])
    verify_consistency(1, 1, HASHES[0], HASHES[0], [])
    # Equal heads are consistent whatever they are (transparency-dev's vector): what an
    # empty tree's root must be is the checkpoint's business.
    verify_consistency(0, 0, b"don't care 1", b"don't care 1", [])
    verify_inclusion(HASHES[0], 0, 1, [], HASHES[0])


def test_an_inner_node_is_no_leaf() -> None:
    root = root_of(HASHES[:4])
    inner = HASHES[0] + HASHES[1]
    with pytest.raises(BadProof):
        verify_inclusion(leaf_hash(inner), 0, 2, [root_of(HASHES[2:4])], root)


def test_sizes_beyond_the_tree_are_our_own_bug() -> None:
    tree = Tree(HASHES)
    with pytest.raises(ValueError):
        tree.root(9)
    with pytest.raises(ValueError):
        tree.inclusion_proof(4, 4)
    with pytest.raises(ValueError):
        tree.consistency_proof(0, 4)
