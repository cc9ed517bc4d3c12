"""Proofs that a log holds an entry, as text that anybody can keep (c2sp.org/tlog-proof).

A proof names an index, the audit path and a checkpoint with its cosignatures. ``extra`` is
not authenticated; Plait puts the entry itself there, whose hash the path then proves.
"""

import base64
from dataclasses import dataclass

from plait.errors import BadProof
from plait.ledger.checkpoint import NOTE_SIZE_MAX, Checkpoint, canonical_base64
from plait.ledger.merkle import leaf_hash, verify_inclusion
from plait.ledger.policy import Policy, check_policy
from plait.types import Digest

PROOF_HEADER = "c2sp.org/tlog-proof@v1"
PROOF_HASHES_MAX = 63
EXTRA_BYTES_MAX = 2**16
PROOF_LENGTH_MAX = NOTE_SIZE_MAX + 2 * EXTRA_BYTES_MAX


@dataclass(frozen=True, slots=True)
class LogProof:
    """An inclusion proof with the checkpoint that it leads to; ``extra`` None is absent."""

    index: int
    hashes: tuple[Digest, ...]
    checkpoint: str
    extra: bytes | None = None


def write_log_proof(proof: LogProof) -> str:
    """The proof as text."""
    lines = [PROOF_HEADER]
    if proof.extra is not None:
        lines.append(f"extra {base64.b64encode(proof.extra).decode()}")
    lines.append(f"index {proof.index}")
    lines += [base64.b64encode(hashed).decode() for hashed in proof.hashes]
    return "\n".join(lines) + f"\n\n{proof.checkpoint}"


def read_log_proof(text: str) -> LogProof:
    """Read a proof strictly, judging nothing; raises ``BadProof``."""
    if len(text) > PROOF_LENGTH_MAX:
        raise BadProof(f"a proof is at most {PROOF_LENGTH_MAX} characters long")
    head, separator, checkpoint = text.partition("\n\n")
    first, *lines = head.split("\n")
    if first != PROOF_HEADER or not separator or not checkpoint:
        raise BadProof(f"it is no proof: it does not begin with {PROOF_HEADER}, or is cut")
    try:
        extra = None
        if lines and lines[0].startswith("extra "):
            extra = canonical_base64(lines.pop(0).removeprefix("extra "))
        name, _, number = lines.pop(0).partition(" ")
        hashes = tuple(Digest(canonical_base64(line)) for line in lines)
    except (ValueError, IndexError) as error:
        raise BadProof("a line of the proof is malformed") from error
    if name != "index" or not number.isascii() or not number.isdigit() or len(number) > 19:
        raise BadProof("the proof has no index")
    if str(int(number)) != number or any(len(hashed) != 32 for hashed in hashes):
        raise BadProof("the index or a hash of the proof is not written as it must be")
    if len(hashes) > PROOF_HASHES_MAX or len(extra or b"") > EXTRA_BYTES_MAX:
        raise BadProof("the proof has too many hashes or too much extra data")
    return LogProof(int(number), hashes, checkpoint, extra)


def check_log_proof(proof: LogProof, entry: bytes, policy: Policy) -> Checkpoint:
    """Check that a log of the policy holds the entry, under a checkpoint with its quorum.

    Raises ``BadProof`` or ``BadSignature``.
    """
    checkpoint = check_policy(proof.checkpoint, policy)
    verify_inclusion(leaf_hash(entry), proof.index, checkpoint.size, proof.hashes, checkpoint.root)
    return checkpoint
