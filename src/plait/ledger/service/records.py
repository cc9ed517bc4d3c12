"""What a ledger keeps on disk, and the port of whatever keeps it.

Two stores implement the port: SQLite (``store``) and PostgreSQL (``postgres``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from plait.envelope import decode
from plait.ledger.fork import ReservationFork
from plait.types import AccountId, Digest, PeerId, SessionId
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope

INTEGER_MAX = 2**63 - 1
"""The integers of SQL are signed."""


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """A leaf as it stands on disk."""

    index: int
    payload: bytes
    leaf_hash: Digest


@dataclass(frozen=True, slots=True)
class StoredRelease:
    """That a payee released a hold, and the digest of the request that says so."""

    session_id: SessionId
    epoch: int
    payee: AccountId
    request: Digest


@dataclass(frozen=True, slots=True)
class StoredFork:
    """Digests of two reservations that one account signed under one number."""

    account: AccountId
    first: Digest
    second: Digest


@dataclass(frozen=True, slots=True)
class StoredCert:
    """The newest key certificate of a peer."""

    peer: PeerId
    serial: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class StoredDelegation:
    """Digest of a certificate, among the objects, under which a peer's key has signed."""

    peer: PeerId
    ledger_key: bytes
    expires_ms: int
    cert: Digest


@dataclass(frozen=True, slots=True)
class Change:
    """What one command adds. Objects are serialized envelopes, kept by payload digest."""

    entries: tuple[StoredEntry, ...] = ()
    objects: tuple[SignedEnvelope, ...] = ()
    releases: tuple[StoredRelease, ...] = ()
    forks: tuple[StoredFork, ...] = ()
    certs: tuple[StoredCert, ...] = ()
    delegations: tuple[StoredDelegation, ...] = ()
    checkpoint: tuple[int, str] | None = None
    """Size and signed note."""


class LedgerStore(Protocol):
    """Append-only tables of entries and of the signed objects behind them.

    ``commit`` is called by one thread only. After any error of a commit its outcome is
    unknown: a store refuses to go on and must be opened again. Everything raises
    ``LedgerError`` when the disk fails.
    """

    def commit(self, changes: Sequence[Change]) -> None:
        """Make changes durable in one transaction."""

    def entries(self, first: int = 0, limit: int = -1) -> Iterator[StoredEntry]:
        """Committed entries from index ``first`` on, in order; ``limit`` -1 is all."""

    def object(self, object_digest: bytes) -> SignedEnvelope | None:
        """A committed signed object by the digest of its payload."""

    def delegation(self, peer: str, ledger_key: bytes, at_ms: int) -> SignedEnvelope | None:
        """The certificate under which a peer's ledger key signed at a time."""

    def release_requests(
        self, session_id: bytes, epoch: int
    ) -> list[tuple[SignedEnvelope, AccountId]]:
        """The signed requests by which payees released one hold, each with its payee."""

    def releases(self) -> list[StoredRelease]:
        """All releases."""

    def forks(self) -> list[StoredFork]:
        """All double signatures seen."""

    def fork_proofs(self) -> list[ReservationFork]:
        """Portable proofs of the double signatures seen."""

    def certs(self) -> list[StoredCert]:
        """The newest certificate of each peer."""

    def checkpoint(self) -> tuple[int, str] | None:
        """The last signed checkpoint, wherever it is known from: its size and note."""

    def close(self) -> None:
        """Close it; after a failure without touching it."""


def fork_proofs_in(store: LedgerStore) -> list[ReservationFork]:
    """Portable proofs of the double signatures in a store.

    One is left out if its account's newest certificate is not of the key that signed.
    """
    certs = {cert.peer: SignedEnvelope.FromString(cert.envelope) for cert in store.certs()}
    proofs = []
    for fork in store.forks():
        first, second = store.object(fork.first), store.object(fork.second)
        cert = certs.get(PeerId(fork.account))
        if first is None or second is None or cert is None:
            continue
        key = decode(cert.payload, NodeKeyCert).ledger_key
        if first.signer == second.signer == key:
            proofs.append(ReservationFork((first, second), (cert, cert)))
    return proofs
