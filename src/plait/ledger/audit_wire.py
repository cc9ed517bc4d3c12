"""Audit messages from and to values: a challenge is believed only after every check here.

The stage that is asked, the auditor, and whoever judges the evidence later read it alike:
what the client and the stage signed fits together, the log holds the entry that paid the
stage for the chunk, and the lottery drew it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from plait.envelope import digest, open_envelope
from plait.errors import BadProof, BadSignature
from plait.identity import public_key_of
from plait.ledger.audit_rules import Crossing, OpenedEpoch
from plait.ledger.balances import Entry, EntryKind, entry_from_payload
from plait.ledger.blame import about
from plait.ledger.certs import check_key_cert
from plait.ledger.checkpoint import Checkpoint, open_checkpoint
from plait.ledger.cosignature import open_cosignatures
from plait.ledger.lottery import Anchor, Lot, anchor_of, audit_seed, check_nonce, is_drawn
from plait.ledger.opening import terms_from_message
from plait.ledger.terms import SessionTerms, StageTerms
from plait.network_file import Authority, NetworkFile
from plait.types import AccountId, Digest, PeerId, Sampling
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import SessionVoucher, StageReceipt
from plait.v1.offer_pb2 import Offer
from plait.v1.session_pb2 import SessionOpen
from plait.v1.stage_pb2 import AuditAnchor, AuditChallenge, AuditCrossing, AuditOpening

EPOCHS_MAX = 64
PART_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class ChallengedEpoch:
    """One epoch of the stage's stint with its checked receipts."""

    terms: SessionTerms
    receipt: StageReceipt
    previous: StageReceipt | None


@dataclass(frozen=True, slots=True)
class Challenge:
    """A checked challenge. ``stage`` is the audited stage as the last epoch's terms have it."""

    lot: Lot
    epochs: tuple[ChallengedEpoch, ...]
    sampling: Sampling
    stage: StageTerms
    numeric_class: str
    commitment: bytes
    seed: Digest
    receipt_digest: Digest

    @property
    def terms(self) -> SessionTerms:
        """The terms of the chunk's epoch."""
        return self.epochs[-1].terms


def read_challenge(message: AuditChallenge, network: NetworkFile) -> Challenge:
    """Check a challenge whole; raises ``BadProof``, ``BadSignature`` or ``RemoteProtocolError``."""
    if not 1 <= len(message.epochs) <= EPOCHS_MAX:
        raise BadProof(f"a challenge names 1 to {EPOCHS_MAX} epochs")
    opens = [open_envelope(epoch.session_open, SessionOpen) for epoch in message.epochs]
    client_key = _key_of(message.client_cert, network, opens[0], opens[0].client_peer_id)
    for epoch in message.epochs:
        if epoch.session_open.signer != client_key:
            raise BadSignature("an opening is not signed by the client")
    commitment = opens[0].audit_commit
    if any(one.audit_commit != commitment for one in opens):
        raise BadProof("a session keeps what its client committed to for audits")
    check_nonce(message.nonce, commitment)

    last = open_envelope(message.epochs[-1].receipt, StageReceipt)
    if last.stage_index >= len(opens[-1].route.stages):
        raise BadProof("the receipt is of a stage that the route does not have")
    peer = PeerId(opens[-1].route.stages[last.stage_index].peer_id)
    stage_key = _key_of(message.stage_cert, network, opens[-1], peer)
    with about("offer"):
        numeric_class = _numeric_class(message.offer, peer)
    epochs: list[ChallengedEpoch] = []
    sampling = Sampling()
    for number, (part, opened) in enumerate(zip(message.epochs, opens, strict=True)):
        with about(f"epoch {opened.epoch}"):
            blank = [numeric_class] * len(opened.route.stages)
            terms, sampling = terms_from_message(opened, client_key, blank, [b""] * len(blank))
            whole = number == len(opens) - 1
            epochs.append(_epoch(part.receipt, part.previous, terms, peer, stage_key, whole=whole))
    lot = Lot(last.epoch, last.chunk, last.stage_index)
    terms = epochs[-1].terms
    stage = terms.stages[lot.stage_index]
    _check_stint(epochs, stage)
    if stage.entered_epoch == 1 and last.cached_prompt_tokens:
        raise BadProof("the stage began from cached positions, which it cannot open")
    if digest(message.offer.payload) != stage.offer_digest:
        raise BadProof("the offer is not the one that the route names")
    anchor = check_anchor(message.anchor, network, lot, terms, peer)
    seed = audit_seed(anchor, terms.session_id, message.nonce)
    if not is_drawn(seed, lot, network.audit_rate_percent):
        raise BadProof("the lottery did not draw this chunk")
    return Challenge(
        lot,
        tuple(epochs),
        sampling,
        stage,
        numeric_class,
        commitment,
        seed,
        digest(message.epochs[-1].receipt.payload),
    )


def check_anchor(
    message: AuditAnchor, network: NetworkFile, lot: Lot, terms: SessionTerms, payee: PeerId
) -> Anchor:
    """The log holds the entry that paid ``payee`` by a voucher that covers the chunk."""
    with about("anchor"):
        voucher = open_envelope(message.voucher, SessionVoucher, signer=terms.client_ledger_key)
        covers = voucher.epoch > lot.epoch or (
            voucher.epoch == lot.epoch and voucher.sequence > lot.chunk
        )
        if voucher.session_id != terms.session_id or not covers:
            raise BadProof("the voucher does not cover the chunk")
        entry = entry_from_payload(message.entry)
        if not _pays(entry, network, terms, digest(message.voucher.payload), payee):
            raise BadProof("the entry does not pay the stage by this voucher")
        checkpoint = _trusted(message.checkpoint, network)
        return anchor_of(message.entry, entry.index, message.path, message.growth, checkpoint)


def opened_epochs(
    challenge: Challenge, openings: Iterable[AuditOpening]
) -> tuple[OpenedEpoch, ...]:
    """What a stage opened, put to the challenge's epochs; raises ``BadProof``."""
    received: dict[int, list[Crossing]] = {epoch.terms.epoch: [] for epoch in challenge.epochs}
    sent: dict[int, list[Crossing]] = {number: [] for number in received}
    states: dict[int, list[Crossing]] = {number: [] for number in received}
    for part in openings:
        if part.epoch not in received:
            raise BadProof(f"epoch {part.epoch} was not asked for")
        received[part.epoch] += map(_crossing, part.received)
        sent[part.epoch] += map(_crossing, part.sent)
        states[part.epoch] += map(_crossing, part.states)
    return tuple(
        OpenedEpoch(
            epoch.terms,
            epoch.receipt,
            tuple(received[epoch.terms.epoch]),
            tuple(sent[epoch.terms.epoch]),
            tuple(states[epoch.terms.epoch]),
            epoch.previous,
        )
        for epoch in challenge.epochs
    )


def opening_parts(
    epoch: int,
    received: Sequence[Crossing],
    sent: Sequence[Crossing],
    states: Sequence[Crossing] = (),
) -> Iterator[AuditOpening]:
    """What is opened of one epoch, in messages of about a mebibyte."""
    part, size = AuditOpening(epoch=epoch), 0
    for crossings, name in ((received, "received"), (sent, "sent"), (states, "states")):
        for one in crossings:
            getattr(part, name).append(_crossing_message(one))
            size += len(one.payload or b"") + 64
            if size >= PART_BYTES_MAX:
                yield part
                part, size = AuditOpening(epoch=epoch), 0
    if part.received or part.sent or part.states:
        yield part


def _crossing(message: AuditCrossing) -> Crossing:
    if len(message.payload_digest) != 32:
        raise BadProof("a payload's digest is 32 bytes")
    return Crossing(
        message.traversal,
        message.first_position,
        message.rows,
        Digest(message.payload_digest),
        message.payload if message.HasField("payload") else None,
    )


def _crossing_message(crossing: Crossing) -> AuditCrossing:
    return AuditCrossing(
        traversal=crossing.traversal,
        first_position=crossing.first_position,
        rows=crossing.rows,
        payload_digest=crossing.payload_digest,
        payload=crossing.payload,
    )


def _key_of(cert: SignedEnvelope, network: NetworkFile, opened: SessionOpen, peer: str) -> bytes:
    """The ledger key that a certificate names; it was valid when the epoch was opened."""
    if open_envelope(cert, NodeKeyCert).peer_id != peer:
        raise BadSignature(f"the certificate is not of {peer}")
    return check_key_cert(cert, network.network_id, opened.issued_ms, PeerId(peer))[1]


def _numeric_class(envelope: SignedEnvelope, peer: PeerId) -> str:
    try:
        return open_envelope(envelope, Offer, signer=public_key_of(peer)).numeric_class
    except ValueError as error:
        raise BadSignature(f"no key belongs to {peer}") from error


def _epoch(
    receipt: SignedEnvelope,
    previous: SignedEnvelope,
    terms: SessionTerms,
    peer: PeerId,
    key: bytes,
    *,
    whole: bool,
) -> ChallengedEpoch:
    """``whole``: it is the chunk's epoch, so the receipt before the chunk's must be there."""
    index = [number for number, stage in enumerate(terms.stages) if stage.peer == peer]
    message = open_envelope(receipt, StageReceipt, signer=key)
    _check_own(message, terms, index)
    if not (previous.payload or (whole and message.chunk)):
        return ChallengedEpoch(terms, message, None)
    before = open_envelope(previous, StageReceipt, signer=key)
    _check_own(before, terms, index)
    if digest(previous.payload) != message.previous_digest or before.chunk + 1 != message.chunk:
        raise BadProof("the receipts are not of one chunk and the one before")
    return ChallengedEpoch(terms, message, before)


def _check_own(receipt: StageReceipt, terms: SessionTerms, index: Sequence[int]) -> None:
    stated = (receipt.network_id, receipt.session_id, receipt.epoch, receipt.model_digest)
    agreed = (terms.network_id, terms.session_id, terms.epoch, terms.model_digest)
    if stated != agreed or [receipt.stage_index] != list(index):
        raise BadProof("a receipt is of another session, epoch or stage")


def _check_stint(epochs: Sequence[ChallengedEpoch], stage: StageTerms) -> None:
    """The epochs are those of the stage's stint, in order, of one session.

    Epochs that never got a receipt are left out: nothing in them was accepted.
    """
    numbers = [epoch.terms.epoch for epoch in epochs]
    if numbers != sorted(set(numbers)) or numbers[0] < stage.entered_epoch:
        raise BadProof("the epochs are not in order, or from before the stage entered")
    if len({(epoch.terms.session_id, epoch.terms.client) for epoch in epochs}) != 1:
        raise BadProof("the epochs are of several sessions")


def _pays(
    entry: Entry, network: NetworkFile, terms: SessionTerms, cause: bytes, payee: PeerId
) -> bool:
    credited = {line.account for line in entry.lines if line.credit}
    return (
        entry.kind == EntryKind.SETTLE
        and entry.network_id == network.network_id
        and entry.session_id == terms.session_id
        and entry.cause == cause
        and AccountId(payee) in credited
    )


def _trusted(note: str, network: NetworkFile) -> Checkpoint:
    """A checkpoint of one of the network's logs with the network's quorum of witnesses."""
    refused: BadSignature | None = None
    for authority in network.authorities:
        try:
            checkpoint = _opened(note, authority)
        except BadSignature as error:
            refused = error
            continue
        if len(open_cosignatures(note, network.witnesses)) < network.witness_quorum:
            raise BadProof("too few witnesses have cosigned the checkpoint")
        return checkpoint
    raise refused or BadSignature("the network has no ledger authority")


def _opened(note: str, authority: Authority) -> Checkpoint:
    return open_checkpoint(note, authority.log_origin, authority.log_key)
