"""The audit lottery: which chunks are replayed, and by whom, so that nobody can choose. Pure.

The seed hashes three things: the tree head of the log at the very entry that paid the
stage (so that receipts were fixed before, and there is one such head, not many to pick
from), the session, and a nonce. The client commits to the nonce when it opens the session
and reveals it afterwards: a stage that computes cannot know whether it will be looked at,
an authority that orders the log cannot either, and only a client can ask for an audit.

Each chunk of each stage is drawn on its own, at the network's rate. The auditor is the
eligible peer with the lowest hash, so that whoever sees more peers can name a better one.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, log

from plait.errors import BadProof
from plait.identity import SigningKey
from plait.ledger.checkpoint import Checkpoint
from plait.ledger.merkle import leaf_hash, node_hash, verify_consistency, verify_inclusion
from plait.types import Digest, PeerId, SessionId

NONCE_BYTES = 32
_NONCE = b"plait.audit.nonce.v1\0"
_SEED = b"plait.audit.seed.v1\0"
_CHUNK = b"plait.audit.chunk.v1\0"
_AUDITOR = b"plait.audit.auditor.v1\0"


@dataclass(frozen=True, slots=True, order=True)
class Lot:
    """One stage's work on one chunk of one epoch; chunks count from 0."""

    epoch: int
    chunk: int
    stage_index: int


@dataclass(frozen=True, slots=True)
class Anchor:
    """The log's tree head just behind an entry: ``size`` is the entry's index plus one."""

    size: int
    root: Digest


def session_nonce(key: SigningKey, session: SessionId) -> bytes:
    """A client's nonce for a session: it follows from its ledger key, so nothing is stored.

    Ed25519 signatures are deterministic (RFC 8032), and nobody else can make this one; what
    is signed here is no envelope's encoding, so it can be taken for nothing else.
    """
    return hashlib.sha256(key.sign(_NONCE + session)).digest()


def nonce_commitment(nonce: bytes) -> Digest:
    """What the client signs at the opening for a nonce that it keeps to itself."""
    return Digest(hashlib.sha256(_NONCE + nonce).digest())


def check_nonce(nonce: bytes, commitment: bytes) -> None:
    """Raise ``BadProof`` unless the nonce is the one that was committed to."""
    matches = hmac.compare_digest(nonce_commitment(nonce), commitment)
    if len(nonce) != NONCE_BYTES or not matches:
        raise BadProof("the nonce is not the one that the client committed to")


def anchor_of(
    entry: bytes,
    index: int,
    path: Sequence[bytes],
    growth: Sequence[bytes],
    checkpoint: Checkpoint,
) -> Anchor:
    """The tree head behind an entry, proven against a checkpoint that the caller trusts.

    ``path`` is the entry's inclusion proof at size ``index + 1``, ``growth`` the consistency
    proof from there to the checkpoint. Raises ``BadProof``.
    """
    size, root = index + 1, leaf_hash(entry)
    for left in path:  # whatever stands beside the last leaf stands to its left
        root = node_hash(left, root)
    verify_inclusion(leaf_hash(entry), index, size, path, root)
    verify_consistency(size, checkpoint.size, root, checkpoint.root, growth)
    return Anchor(size, root)


def audit_seed(anchor: Anchor, session: SessionId, nonce: bytes) -> Digest:
    """The lottery's seed for one session; the caller has checked the nonce."""
    head = anchor.size.to_bytes(8, "big") + anchor.root
    return Digest(hashlib.sha256(_SEED + head + session + nonce).digest())


def is_drawn(seed: Digest, lot: Lot, rate_percent: int) -> bool:
    """Whether a lot is drawn, as ``rate_percent`` of all are."""
    number = int.from_bytes(_hash(_CHUNK, seed, lot)[:8], "big")
    return number * 100 < rate_percent << 64


def drawn_lots(seed: Digest, lots: Iterable[Lot], rate_percent: int) -> tuple[Lot, ...]:
    """The lots that are drawn, in order."""
    return tuple(lot for lot in sorted(lots) if is_drawn(seed, lot, rate_percent))


def auditor_of(seed: Digest, lot: Lot, eligible: Iterable[PeerId]) -> PeerId | None:
    """Who replays a lot among the eligible peers; None if there are none."""
    return min(
        eligible,
        key=lambda peer: (_hash(_AUDITOR, seed, lot, peer.encode()), peer),
        default=None,
    )


def chunks_to_exposure(rate: float, share: float, detection: float, confidence: float) -> float:
    """Chunks after which a cheat is exposed with ``confidence``.

    ``rate`` of its chunks are audited, it cheats on ``share`` of them, and an audit of such a
    chunk exposes it with probability ``detection``: 1 - (1 - rate * share * detection)^n.
    """
    exposed = rate * share * detection
    if exposed <= 0.0:
        return inf
    return 1.0 if exposed >= 1.0 else log(1.0 - confidence) / log(1.0 - exposed)


def _hash(domain: bytes, seed: Digest, lot: Lot, tail: bytes = b"") -> bytes:
    place = b"".join(part.to_bytes(4, "big") for part in (lot.epoch, lot.chunk, lot.stage_index))
    return hashlib.sha256(domain + seed + place + tail).digest()
