"""What a payee keeps until witnesses have seen it: settlements that an authority acknowledged.

An authority can answer "paid" and forget it. So a payee keeps its evidence until a checkpoint
with the quorum of the network file proves that the log holds the credit, and takes no new
sessions while too much of what it was told was paid stays unproven for too long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from plait.errors import BadProof
from plait.ledger.balances import EntryKind, entry_from_payload
from plait.ledger.bundle import InclusionProof
from plait.ledger.log_proof import LogProof, check_log_proof
from plait.ledger.policy import Policy
from plait.ledger.voucher import amount_for
from plait.types import AccountId, Digest, Microcredits, SessionId
from plait.v1.ledger_pb2 import SessionVoucher, SettlementRequest, SettleRequest

ASKED_AT_ONCE_MAX = 16
AWAITING_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Claim:
    """A payee's settlement that the ledger acknowledged, made at ``since_ms``."""

    session: SessionId
    payee: AccountId
    amount: Microcredits
    """What the voucher promises the payee in the whole session."""
    since_ms: int


@dataclass(frozen=True, slots=True)
class Patience:
    """How much acknowledged credit may be unproven for longer than ``wait_ms``."""

    credit_max: Microcredits
    wait_ms: int


def claim_of(message: SettleRequest) -> Claim:
    """What a settlement of our own claims; raises ``DecodeError`` or ``RemoteProtocolError``."""
    request = SettlementRequest.FromString(message.request.payload)
    voucher = SessionVoucher.FromString(message.voucher.payload)
    return Claim(
        SessionId(request.session_id),
        AccountId(request.payee),
        amount_for(voucher, request.payee),
        request.issued_ms,
    )


def check_claim(
    claim: Claim,
    entries: Sequence[bytes],
    proofs: Sequence[InclusionProof],
    checkpoint: str,
    policy: Policy,
) -> None:
    """Check that the log holds what was claimed, under a checkpoint with the policy's quorum.

    The entries' credit counts, not their causes: another stage may have brought the same
    voucher first. Raises ``BadProof``, ``BadSignature`` or ``RemoteProtocolError``.
    """
    if len(entries) != len(proofs):
        raise BadProof("an entry has no proof, or a proof no entry")
    paid, seen = 0, set()
    for payload, (index, hashes) in zip(entries, proofs, strict=True):
        entry = entry_from_payload(payload)
        if entry.kind is not EntryKind.SETTLE or entry.session_id != claim.session:
            continue
        if index in seen or index != entry.index:
            raise BadProof(f"entry {entry.index} is proven at {index}, or shown twice")
        seen.add(index)
        proof = LogProof(index, tuple(map(Digest, hashes)), checkpoint)
        check_log_proof(proof, payload, policy)
        paid += sum(line.credit for line in entry.lines if line.account == claim.payee)
    if paid < claim.amount:
        raise BadProof(f"the log proves {paid} of {claim.amount} microcredits")


class Awaiting:
    """Claims by name that wait for witnesses. Changed only by its methods."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}

    def __len__(self) -> int:
        return len(self._claims)

    @property
    def credit(self) -> Microcredits:
        """The most that all claims together may be: sessions are counted once."""
        return self._credit(list(self._claims.values()))

    def add(self, name: str, claim: Claim) -> None:
        """A settlement was acknowledged."""
        self._claims[name] = claim

    def drop(self, name: str) -> None:
        """It is proven, or no longer there."""
        self._claims.pop(name, None)

    def next(self) -> list[tuple[str, Claim]]:
        """Whom to ask for now: those asked longest ago, bounded; they go to the end."""
        due = list(self._claims.items())[:ASKED_AT_ONCE_MAX]
        for name, claim in due:
            del self._claims[name]
            self._claims[name] = claim
        return due

    def refusal(self, now_ms: int, patience: Patience) -> str:
        """Why no new session is taken; empty: they are."""
        if len(self._claims) >= AWAITING_MAX:
            return f"{len(self._claims)} settlements wait for the ledger's witnesses"
        old = [one for one in self._claims.values() if now_ms - one.since_ms > patience.wait_ms]
        credit = self._credit(old)
        if credit <= patience.credit_max:
            return ""
        return (
            f"{credit} microcredits were settled over {patience.wait_ms // 1000} s ago and the "
            f"ledger's witnesses have not seen it; at most {patience.credit_max} may be so"
        )

    def _credit(self, claims: Sequence[Claim]) -> Microcredits:
        # Amounts are cumulative in a session: an earlier epoch's is within a later one's.
        highest: dict[SessionId, int] = {}
        for one in claims:
            highest[one.session] = max(highest.get(one.session, 0), one.amount)
        return Microcredits(sum(highest.values()))
