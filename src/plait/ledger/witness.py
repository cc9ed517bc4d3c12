"""A witness of logs, by the rules of c2sp.org/tlog-witness.

It cosigns a checkpoint only with a proof that the tree grew from the last one it cosigned,
and only after the new one is durable. Refusals carry the HTTP status of the specification,
and, for two trees of one size, the proof that the log forked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from plait.errors import BadProof, BadSignature, LedgerError, VerificationError
from plait.identity import SigningKey
from plait.ledger.checkpoint import Checkpoint, open_checkpoint, parse_note
from plait.ledger.cosignature import cosign
from plait.ledger.fork import LogFork
from plait.ledger.merkle import verify_consistency

PROOF_HASHES_MAX = 63

BAD_REQUEST, FORBIDDEN, NOT_FOUND, CONFLICT, UNPROCESSABLE = 400, 403, 404, 409, 422


class WitnessMemory(Protocol):
    """Where a witness keeps the last checkpoint that it cosigned of each log."""

    def latest(self, origin: str) -> str | None:
        """The signed note, ``None`` if the log was never cosigned."""

    def advance(self, origin: str, previous: str | None, note: str) -> bool:
        """Replace ``previous`` by ``note`` atomically and durably before returning.

        Returns false, and changes nothing, if ``previous`` is no longer the latest.
        """


@dataclass(frozen=True, slots=True)
class WitnessRefusal:
    """Why a checkpoint was not cosigned.

    ``status`` is the specification's; ``size`` is that of the latest cosigned tree where a
    conflict tells it.
    """

    status: int
    reason: str
    size: int | None = None
    fork: LogFork | None = None


class LogWitness:
    """Cosigns checkpoints of the logs it knows, by origin and public key."""

    def __init__(
        self, name: str, key: SigningKey, logs: Mapping[str, bytes], memory: WitnessMemory
    ) -> None:
        self.name = name
        self._key = key
        self._logs = logs
        self._memory = memory

    def add_checkpoint(
        self, old_size: int, proof: Sequence[bytes], note: str, now_s: int
    ) -> str | WitnessRefusal:
        """Cosign a checkpoint that follows the tree of ``old_size``; returns the signature line.

        Raises ``LedgerError`` if the memory fails or holds what the log did not sign: then
        nothing has been, and nothing may be, cosigned.
        """
        submitted = self._opened(note)
        if isinstance(submitted, WitnessRefusal):
            return submitted
        if len(proof) > PROOF_HASHES_MAX or not 0 <= old_size <= submitted.size:
            return WitnessRefusal(BAD_REQUEST, "the old size or the proof is out of range")
        stored = self._memory.latest(submitted.origin)
        latest = self._remembered(submitted.origin, stored)
        if _forked(submitted, latest) and stored is not None:
            fork = LogFork(submitted.origin, (stored, note))
            return WitnessRefusal(CONFLICT, "the log forked", submitted.size, fork)
        refusal = _refusal(old_size, proof, submitted, latest)
        if refusal is not None:
            return refusal
        if submitted != latest and not self._memory.advance(submitted.origin, stored, note):
            now = self._remembered(submitted.origin, self._memory.latest(submitted.origin))
            return WitnessRefusal(
                CONFLICT, "another checkpoint came first", 0 if now is None else now.size
            )
        return cosign(self._key, self.name, note, now_s)

    def _opened(self, note: str) -> Checkpoint | WitnessRefusal:
        try:
            origin = parse_note(note)[0].partition("\n")[0]
            if origin not in self._logs:
                return WitnessRefusal(NOT_FOUND, "this witness does not know the log")
            return open_checkpoint(note, origin, self._logs[origin])
        except BadSignature as error:
            return WitnessRefusal(FORBIDDEN, str(error))
        except BadProof as error:
            return WitnessRefusal(BAD_REQUEST, str(error))

    def _remembered(self, origin: str, note: str | None) -> Checkpoint | None:
        if note is None:
            return None
        try:
            return open_checkpoint(note, origin, self._logs[origin])
        except VerificationError as error:
            raise LedgerError(f"the witness's memory of {origin} is damaged: {error}") from error


def _refusal(
    old_size: int, proof: Sequence[bytes], submitted: Checkpoint, latest: Checkpoint | None
) -> WitnessRefusal | None:
    latest_size = 0 if latest is None else latest.size
    if old_size != latest_size:
        return WitnessRefusal(CONFLICT, "the old size is not that of the latest", latest_size)
    if latest is None or latest.size == 0:
        # Everything follows the empty tree; there is nothing to prove.
        if proof:
            return WitnessRefusal(UNPROCESSABLE, "a proof from the empty tree is empty")
        return None
    try:
        verify_consistency(latest.size, submitted.size, latest.root, submitted.root, proof)
    except BadProof as error:
        return WitnessRefusal(UNPROCESSABLE, str(error))
    return None


def _forked(submitted: Checkpoint, latest: Checkpoint | None) -> bool:
    return latest is not None and latest.size == submitted.size and latest.root != submitted.root
