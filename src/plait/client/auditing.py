"""Asking for audits: the lots of a bundle that were drawn, each by the auditor it falls to.

The client reveals its nonce with each challenge. It takes no verdict on trust: it opens the
auditor's signature, and keeps what the stage opened, so that anybody can judge again.
"""

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import grpc

from plait.client.account import Account
from plait.client.dialer import Dialer
from plait.envelope import open_envelope
from plait.errors import BadProof, PeerUnreachable, PlaitError, RemoteProtocolError
from plait.ledger.audit_request import audited_peer, challenge_for, lots_of, paying_entry
from plait.ledger.audit_rules import tolerance_of
from plait.ledger.audit_wire import check_anchor
from plait.ledger.balances import entry_from_payload
from plait.ledger.bundle import BundleParts, read_bundle
from plait.ledger.lottery import Lot, audit_seed, auditor_of, is_drawn, session_nonce
from plait.ledger.service.committee import Ledger
from plait.ledger.service.proving import fetch_anchor
from plait.ledger.terms import StageTerms
from plait.network_file import Authority, NetworkFile
from plait.router.view import Offer, View
from plait.types import Digest, PeerId
from plait.v1 import stage_pb2, stage_pb2_grpc
from plait.v1.identity_pb2 import SignedEnvelope

EXAMINE_TIMEOUT_S = 600.0
VIEW_TIMEOUT_S = 20.0
"""For all lots of a bundle together. A host that fell out of view offers again within 15 s."""

_OUTCOMES = {
    stage_pb2.AUDIT_OUTCOME_CONSISTENT: "consistent",
    stage_pb2.AUDIT_OUTCOME_EXPOSED: "exposed",
    stage_pb2.AUDIT_OUTCOME_UNRESPONSIVE: "unresponsive",
}


class Known(Protocol):
    """What is known of the network."""

    def view(self) -> View:
        """The offers known now."""

    async def changed(self) -> None:
        """Return after the next change."""


@dataclass(frozen=True, slots=True)
class Audited:
    """What became of one lot.

    ``outcome`` is a verdict, ``undrawn``, or ``unaudited`` with the reason: nobody could
    look. ``evidence`` is there with a verdict.
    """

    lot: Lot
    peer: PeerId
    outcome: str
    auditor: PeerId | None = None
    reason: str = ""
    evidence: stage_pb2.AuditEvidence | None = None


async def audit_bundle(
    bundle: bytes,
    network: NetworkFile,
    account: Account,
    ledger: Ledger,
    dialer: Dialer,
    known: Known,
    only: Collection[PeerId] = (),
    skip: Collection[Lot] = (),
) -> list[Audited]:
    """Audit every lot of a bundle that was drawn; ``only`` restricts who may be the auditor.

    Lots in ``skip`` are left out: they were looked at before. Raises ``BadProof`` for a bundle
    that is not ours, ``ValueError`` for one that is none.
    """
    parts = read_bundle(bundle).parts
    if parts.terms.client != account.peer:
        raise BadProof("only the client of a session can have it audited")
    # The bundle may be from before a stage was paid.
    evidence = await ledger.evidence(parts.terms.session_id)
    parts = replace(parts, entries=evidence.entries)
    log = log_of(evidence.checkpoint, network)
    opened_with = account.with_key(parts.terms.client_ledger_key)
    nonce = session_nonce(opened_with.ledger_key, parts.terms.session_id)
    anchors: dict[bytes, stage_pb2.AuditAnchor] = {}
    view_until_s = asyncio.get_running_loop().time() + VIEW_TIMEOUT_S
    audited = []
    for lot in [one for one in lots_of(parts) if one not in skip]:
        peer = audited_peer(parts, lot)
        try:
            anchor = await _anchor(parts, lot, log, anchors)
            seed = _seed(parts, lot, network, anchor, nonce)
            if not is_drawn(seed, lot, network.audit_rate_percent):
                audited.append(Audited(lot, peer, "undrawn"))
                continue
            tolerance_of(_stage_of(parts, lot).numeric_class)  # or nothing can be said of it
            challenge = challenge_for(parts, lot, nonce, anchor)
            eligible = await _eligible(parts, lot, known, only, view_until_s)
            audited.append(await _audit(parts, lot, challenge, seed, dialer, known, eligible))
        except PlaitError as error:
            audited.append(Audited(lot, peer, "unaudited", reason=str(error)))
    return audited


def log_of(checkpoint: str, network: NetworkFile) -> Authority:
    """Whose log a checkpoint is of: in a committee each has its own, with indexes of its own.

    Raises ``BadProof`` for a log that is none of the network's.
    """
    origin = checkpoint.partition("\n")[0]
    for authority in network.authorities:
        if authority.log_origin == origin:
            return authority
    raise BadProof(f"the network has no log {origin[:80]!r}")


async def _anchor(
    parts: BundleParts,
    lot: Lot,
    log: Authority,
    fetched: dict[bytes, stage_pb2.AuditAnchor],
) -> stage_pb2.AuditAnchor:
    number, voucher = paying_entry(parts, lot)
    entry = parts.entries[number]
    if entry not in fetched:
        proof = await fetch_anchor(log, entry_from_payload(entry).index)
        fetched[entry] = stage_pb2.AuditAnchor(
            entry=entry,
            voucher=voucher,
            path=proof.path,
            growth=proof.growth,
            checkpoint=proof.checkpoint,
        )
    return fetched[entry]


def _seed(
    parts: BundleParts, lot: Lot, network: NetworkFile, anchor: stage_pb2.AuditAnchor, nonce: bytes
) -> Digest:
    terms = next(epoch.terms for epoch in parts.epochs if epoch.terms.epoch == lot.epoch)
    head = check_anchor(anchor, network, lot, terms, audited_peer(parts, lot))
    return audit_seed(head, terms.session_id, nonce)


async def _audit(
    parts: BundleParts,
    lot: Lot,
    challenge: stage_pb2.AuditChallenge,
    seed: Digest,
    dialer: Dialer,
    known: Known,
    eligible: Sequence[PeerId],
) -> Audited:
    peer = audited_peer(parts, lot)
    auditor = auditor_of(seed, lot, eligible)
    if auditor is None:
        reason = "no host of these layers is known that took no part in the session"
        return Audited(lot, peer, "unaudited", reason=reason)
    openings, verdict = await _examined(dialer, known.view().offers[auditor], challenge)
    evidence = stage_pb2.AuditEvidence(challenge=challenge, openings=openings, verdict=verdict)
    said = open_envelope(verdict, stage_pb2.AuditVerdict)
    stated = (said.session_id, said.epoch, said.chunk, said.stage_index, said.auditor_peer_id)
    asked = (parts.terms.session_id, lot.epoch, lot.chunk, lot.stage_index, auditor)
    if stated != asked or said.outcome not in _OUTCOMES:
        raise RemoteProtocolError("the verdict is of something else")
    return Audited(lot, peer, _OUTCOMES[said.outcome], auditor, said.reason, evidence)


async def _eligible(
    parts: BundleParts, lot: Lot, known: Known, only: Collection[PeerId], until_s: float
) -> list[PeerId]:
    """Who may be the auditor. A client that has just begun may hear of them in a moment."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until_s):
            while not eligible_auditors(parts, lot, known.view()):
                await known.changed()
    eligible = eligible_auditors(parts, lot, known.view())
    return [one for one in eligible if not only or one in only]


def eligible_auditors(parts: BundleParts, lot: Lot, view: View) -> tuple[PeerId, ...]:
    """Other hosts of the stage's layers in its numeric class, that took no part."""
    stage = _stage_of(parts, lot)
    took_part = {one.peer for epoch in parts.epochs for one in epoch.terms.stages}
    return tuple(
        sorted(
            offer.peer
            for offer in view.offers.values()
            if offer.model_digest == parts.terms.model_digest
            and offer.numeric_class == stage.numeric_class
            and offer.span.contains(stage.span)
            and offer.peer not in took_part
        )
    )


def _stage_of(parts: BundleParts, lot: Lot) -> StageTerms:
    epoch = next(epoch for epoch in parts.epochs if epoch.terms.epoch == lot.epoch)
    return epoch.terms.stages[lot.stage_index]


async def _examined(
    dialer: Dialer, offer: Offer, challenge: stage_pb2.AuditChallenge
) -> tuple[Sequence[stage_pb2.AuditOpening], SignedEnvelope]:
    await dialer.greet(offer)
    stub = stage_pb2_grpc.StageServiceStub(dialer.peer_channel(offer))
    openings: list[stage_pb2.AuditOpening] = []
    try:
        async for response in stub.Examine(challenge, timeout=EXAMINE_TIMEOUT_S):
            if response.WhichOneof("kind") == "verdict":
                return openings, response.verdict
            openings.append(response.opening)
    except grpc.aio.AioRpcError as error:
        raise PeerUnreachable(f"the auditor {offer.peer}: {error.details()}") from error
    raise RemoteProtocolError("the auditor gave no verdict")
