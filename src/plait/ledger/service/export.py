"""The signed objects behind journal entries, for auditors."""

from collections.abc import Iterator, Sequence

from plait.envelope import digest
from plait.ledger.balances import Entry, EntryKind, Line, entry_from_payload
from plait.ledger.service.records import LedgerStore
from plait.types import Digest
from plait.v1.identity_pb2 import SignedEnvelope


def objects_behind(store: LedgerStore, payloads: Sequence[bytes]) -> list[SignedEnvelope]:
    """Orders, reservations, vouchers, releases and their signers' certificates, each once.

    Raises ``LedgerError`` if the store fails; what it does not hold is left out.
    """
    found: dict[Digest, SignedEnvelope] = {}
    for payload in payloads:
        for envelope in _behind(store, entry_from_payload(payload)):
            found[digest(envelope.payload)] = envelope
    return list(found.values())


def _behind(store: LedgerStore, entry: Entry) -> Iterator[SignedEnvelope]:
    if entry.kind is EntryKind.VOID:
        if entry.cause:
            yield from _releases(store, entry)
        return
    if not entry.cause:
        return
    cause = store.object(entry.cause)
    if cause is None:
        return
    yield cause
    if entry.kind is EntryKind.RESERVE:
        yield from _cert(store, _debited(entry).account, cause.signer, entry.posted_ms)
    elif entry.terms is not None:
        yield from _cert(store, entry.terms.account, cause.signer, entry.posted_ms)


def _releases(store: LedgerStore, entry: Entry) -> Iterator[SignedEnvelope]:
    epoch = int(_debited(entry).account.rpartition(":")[2])
    for request, payee in store.release_requests(entry.session_id, epoch):
        yield request
        yield from _cert(store, payee, request.signer, entry.posted_ms)


def _debited(entry: Entry) -> Line:
    return next(line for line in entry.lines if line.debit)


def _cert(store: LedgerStore, peer: str, key: bytes, at_ms: int) -> Iterator[SignedEnvelope]:
    cert = store.delegation(peer, key, at_ms)
    if cert is not None:
        yield cert
