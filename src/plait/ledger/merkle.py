"""The Merkle tree of the log: RFC 6962 section 2.1 (SHA-256), proofs as in RFC 9162.

Leaf and inner hashes are domain-separated by a prefix byte. Proof lengths follow from
the sizes alone, so a truncated or padded proof is refused before any hashing. The empty
tree is consistent only with itself: from size 0 nothing can be proven (RFC 9162 section
2.1.4 requires 0 < first).
"""

import hashlib
from collections.abc import Iterable, Sequence

from plait.errors import BadProof
from plait.types import Digest

EMPTY_ROOT = Digest(hashlib.sha256(b"").digest())
"""Root of the tree without leaves."""


def leaf_hash(data: bytes) -> Digest:
    """Hash of one leaf's bytes: SHA-256(0x00 || data)."""
    return Digest(hashlib.sha256(b"\x00" + data).digest())


def node_hash(left: bytes, right: bytes) -> Digest:
    """Hash of an inner node: SHA-256(0x01 || left || right)."""
    return Digest(hashlib.sha256(b"\x01" + left + right).digest())


class Tree:
    """Append-only tree that keeps the hash of every complete subtree.

    Roots and proofs are available for the present and every earlier size.
    """

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels: list[list[Digest]] = [[]]
        for hashed in leaf_hashes:
            self.append(hashed)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._levels[0])

    def append(self, hashed: bytes) -> int:
        """Add a leaf by its 32-byte hash; returns its index."""
        index = self.size
        digest = Digest(hashed)
        for level in range(len(self._levels)):
            self._levels[level].append(digest)
            if len(self._levels[level]) % 2:
                return index
            digest = node_hash(*self._levels[level][-2:])
        self._levels.append([digest])
        return index

    def root(self, size: int | None = None) -> Digest:
        """Root of the first ``size`` leaves (default all); ``ValueError`` beyond the tree."""
        size = self.size if size is None else size
        self._check_size(size)
        return self._subtree(0, size) if size else EMPTY_ROOT

    def inclusion_proof(self, index: int, size: int) -> list[Digest]:
        """Audit path of a leaf in the tree of ``size``; ``ValueError`` if not in it."""
        self._check_size(size)
        if not 0 <= index < size:
            raise ValueError(f"leaf {index} is not in a tree of {size}")
        return self._path(index, 0, size)

    def consistency_proof(self, first: int, second: int) -> list[Digest]:
        """Proof that the tree of ``first`` leaves is a prefix of that of ``second``.

        ``ValueError`` unless ``0 < first <= second <= size``.
        """
        self._check_size(second)
        if not 0 < first <= second:
            raise ValueError(f"no consistency proof from {first} to {second} leaves")
        return self._subproof(first, 0, second, whole=True) if first < second else []

    def complete(self, level: int, first: int, end: int) -> list[Digest]:
        """Hashes of the complete subtrees of 2^level leaves, by index; ``ValueError``."""
        if not 0 <= first < end <= self.size >> level:
            raise ValueError(f"the tree has no complete subtrees {first} to {end} of level {level}")
        return [self._complete(level, index) for index in range(first, end)]

    def _check_size(self, size: int) -> None:
        if not 0 <= size <= self.size:
            raise ValueError(f"the tree has {self.size} leaves, not {size}")

    def _complete(self, level: int, index: int) -> Digest:
        return self._levels[level][index]

    def _subtree(self, start: int, end: int) -> Digest:
        # start is always a multiple of the largest power of two within the range.
        width = end - start
        if width & (width - 1) == 0:
            level = width.bit_length() - 1
            return self._complete(level, start >> level)
        middle = start + _split(width)
        return node_hash(self._subtree(start, middle), self._subtree(middle, end))

    def _path(self, index: int, start: int, end: int) -> list[Digest]:
        if end - start == 1:
            return []
        middle = start + _split(end - start)
        if index < middle:
            return [*self._path(index, start, middle), self._subtree(middle, end)]
        return [*self._path(index, middle, end), self._subtree(start, middle)]

    def _subproof(self, first: int, start: int, end: int, *, whole: bool) -> list[Digest]:
        if first == end:
            return [] if whole else [self._subtree(start, end)]
        middle = start + _split(end - start)
        if first <= middle:
            left = self._subproof(first, start, middle, whole=whole)
            return [*left, self._subtree(middle, end)]
        right = self._subproof(first, middle, end, whole=False)
        return [*right, self._subtree(start, middle)]


def root_of(leaf_hashes: Iterable[bytes]) -> Digest:
    """Root of a list of leaf hashes, in linear time and logarithmic memory."""
    stack: list[tuple[int, Digest]] = []
    for hashed in leaf_hashes:
        level, digest = 0, Digest(hashed)
        while stack and stack[-1][0] == level:
            digest = node_hash(stack.pop()[1], digest)
            level += 1
        stack.append((level, digest))
    if not stack:
        return EMPTY_ROOT
    digest = stack.pop()[1]
    while stack:
        digest = node_hash(stack.pop()[1], digest)
    return digest


def inclusion_proof(source: Sequence[bytes] | Tree, index: int, size: int) -> list[Digest]:
    """Audit path of leaf ``index`` among the first ``size`` leaf hashes; ``ValueError``."""
    return _tree(source).inclusion_proof(index, size)


def consistency_proof(source: Sequence[bytes] | Tree, first: int, second: int) -> list[Digest]:
    """Consistency proof between two sizes of the same leaves; ``ValueError``."""
    return _tree(source).consistency_proof(first, second)


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Check that a leaf hash stands at ``index`` of the tree of ``size`` with ``root``.

    Raises ``BadProof``.
    """
    if not 0 <= index < size:
        raise BadProof(f"leaf {index} is not in a tree of {size}")
    _check_hashes(leaf, root, *proof)
    inner, border = _proof_shape(index, size)
    if len(proof) != inner + border:
        raise BadProof(f"the inclusion proof has {len(proof)} hashes, not {inner + border}")
    digest = _chain(Digest(leaf), proof[:inner], index)
    if _chain_border(digest, proof[inner:]) != root:
        raise BadProof("the inclusion proof leads to another root")


def verify_consistency(
    first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the tree of ``first`` leaves is a prefix of the tree of ``second``.

    Equal sizes need equal roots and an empty proof; a proof from size 0 to a larger tree
    proves nothing and is refused. Raises ``BadProof``.
    """
    if not 0 <= first <= second:
        raise BadProof(f"a tree of {second} cannot follow one of {first}")
    if first == second:
        if proof:
            raise BadProof("equal sizes need an empty consistency proof")
        if first_root != second_root:
            raise BadProof("equal sizes have different roots")
        return
    if first == 0:
        raise BadProof("nothing can be proven from the empty tree")
    _check_hashes(first_root, second_root, *proof)
    _verify_growth(first, second, first_root, second_root, proof)


def _verify_growth(
    first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]
) -> None:
    inner, border = _proof_shape(first - 1, second)
    shift = (first & -first).bit_length() - 1  # height of the last complete subtree
    inner -= shift
    complete = first == 1 << shift
    expected = inner + border + (0 if complete else 1)
    if len(proof) != expected:
        raise BadProof(f"the consistency proof has {len(proof)} hashes, not {expected}")
    seed, rest = (first_root, proof) if complete else (proof[0], proof[1:])
    index = (first - 1) >> shift
    older = _chain(Digest(seed), rest[:inner], index, left_only=True)
    if _chain_border(older, rest[inner:]) != first_root:
        raise BadProof("the consistency proof leads to another first root")
    newer = _chain(Digest(seed), rest[:inner], index)
    if _chain_border(newer, rest[inner:]) != second_root:
        raise BadProof("the consistency proof leads to another second root")


def _tree(source: Sequence[bytes] | Tree) -> Tree:
    return source if isinstance(source, Tree) else Tree(source)


def _split(width: int) -> int:
    """The largest power of two smaller than ``width``."""
    return 1 << (width - 1).bit_length() - 1


def _proof_shape(index: int, size: int) -> tuple[int, int]:
    """Hashes below and above where the paths to ``index`` and to the last leaf part."""
    inner = (index ^ (size - 1)).bit_length()
    return inner, (index >> inner).bit_count()


def _chain(seed: Digest, proof: Sequence[bytes], index: int, *, left_only: bool = False) -> Digest:
    digest = seed
    for level, sibling in enumerate(proof):
        if index >> level & 1:
            digest = node_hash(sibling, digest)
        elif not left_only:
            digest = node_hash(digest, sibling)
    return digest


def _chain_border(seed: Digest, proof: Sequence[bytes]) -> Digest:
    digest = seed
    for sibling in proof:
        digest = node_hash(sibling, digest)
    return digest


def _check_hashes(*hashes: bytes) -> None:
    if any(len(item) != 32 for item in hashes):
        raise BadProof("a hash is not 32 bytes long")
