"""Audits in memory: the bundle, the paid entry and the challenge of a paper session."""

from collections.abc import Sequence
from dataclasses import replace

from plait.envelope import digest, seal
from plait.ledger.audit_request import challenge_for, paying_entry
from plait.ledger.balances import Entry, EntryKind, Line, hold_account
from plait.ledger.bundle import BundleParts, EpochParts
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.lottery import Lot
from plait.ledger.merkle import Tree, leaf_hash
from plait.network_file import NetworkFile
from plait.testing.accounting import NETWORK_ID, NOW_MS, key_of, paper_network
from plait.testing.stages import CLIENT_CERT, PaperClient, PaperSwarm
from plait.types import AccountId, PeerId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SessionVoucher
from plait.v1.offer_pb2 import Offer as OfferMessage
from plait.v1.stage_pb2 import AuditAnchor, AuditChallenge

NUMERIC_CLASS = "0000000000000000/fp32/fake"
LOG_SIZE = 21
_ENTRY_INDEX = 12


def audit_network(rate_percent: int = 100) -> NetworkFile:
    """The paper network, where every chunk is audited unless told otherwise."""
    return paper_network(audit_rate_percent=rate_percent)


def sign_offers(
    swarm: PaperSwarm, names: Sequence[str], numeric_class: str = NUMERIC_CLASS
) -> dict[PeerId, SignedEnvelope]:
    """Give each node an offer that is really signed, before a session begins."""
    signed: dict[PeerId, SignedEnvelope] = {}
    for name in names:
        key = key_of(name)
        offer = OfferMessage(network_id=NETWORK_ID, numeric_class=numeric_class, region=name)
        signed[key.peer_id] = seal(key, offer)
        node = swarm.nodes[key.peer_id]
        node.offer = replace(
            node.offer,
            digest=digest(signed[key.peer_id].payload),
            numeric_class=numeric_class,
        )
    return signed


class Docket:
    """Collects a paper client's epochs, and makes challenges of them."""

    def __init__(self, client: PaperClient, offers: dict[PeerId, SignedEnvelope]) -> None:
        self.client = client
        self._offers = offers
        self._epochs: list[EpochParts] = []
        self._certs = {peer: node.settlement.cert for peer, node in client.swarm.nodes.items()}

    def note_epoch(self) -> None:
        """Keep the evidence of the client's current epoch; call it when the epoch ends."""
        terms, evidence = self.client.terms, self.client.books.evidence()
        opening = self.client.opening(terms, 0)
        self._epochs.append(
            EpochParts(
                terms=terms,
                session_open=opening.session_open,
                stage_certs=tuple(self._certs[stage.peer] for stage in terms.stages),
                offers=tuple(self._offers[stage.peer] for stage in terms.stages),
                frames=(),
                reservation=None,
                grant=None,
                receipts=evidence.receipts,
                cut=evidence.cut,
                voucher=evidence.voucher,
            )
        )

    def parts(self) -> BundleParts:
        """The bundle, with the one entry that pays every stage by the last voucher."""
        client = self.client
        return BundleParts(
            network_id=NETWORK_ID,
            client_cert=CLIENT_CERT,
            manifest=None,
            prompt_ids=client.prompt,
            token_ids=tuple(client.drawn),
            text="",
            finish_reason="length",
            epochs=tuple(self._epochs),
            entries=(self._entry().payload,),
            sealed_ms=NOW_MS,
        )

    def challenge(self, lot: Lot) -> AuditChallenge:
        """The challenge of a lot, whether it was drawn or not."""
        parts = self.parts()
        number, voucher = paying_entry(parts, lot)
        anchor = self._anchor(parts.entries[number], voucher)
        return challenge_for(parts, lot, self.client.nonce, anchor)

    def _entry(self) -> Entry:
        voucher = next(
            epoch.voucher for epoch in reversed(self._epochs) if epoch.voucher is not None
        )
        amounts = SessionVoucher.FromString(voucher.payload).amounts
        session = self.client.terms.session_id
        hold = hold_account(session, 1)
        lines = [Line(AccountId(one.payee), 0, one.microcredits) for one in amounts]
        total = sum(one.microcredits for one in amounts)
        return Entry(
            network_id=NETWORK_ID,
            index=_ENTRY_INDEX,
            kind=EntryKind.SETTLE,
            session_id=session,
            cause=digest(voucher.payload),
            lines=(Line(hold, total, 0), *lines),
            posted_ms=NOW_MS,
        )

    def _anchor(self, entry: bytes, voucher: SignedEnvelope) -> AuditAnchor:
        leaves = [leaf_hash(b"entry %d" % number) for number in range(LOG_SIZE)]
        leaves[_ENTRY_INDEX] = leaf_hash(entry)
        tree = Tree(leaves)
        origin = audit_network().authorities[0].log_origin
        return AuditAnchor(
            entry=entry,
            voucher=voucher,
            path=tree.inclusion_proof(_ENTRY_INDEX, _ENTRY_INDEX + 1),
            growth=tree.consistency_proof(_ENTRY_INDEX + 1, LOG_SIZE),
            checkpoint=sign_checkpoint(key_of("authority log"), origin, LOG_SIZE, tree.root()),
        )
