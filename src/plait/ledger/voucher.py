"""Vouchers: the client's signed cumulative promise to all stages of a pipeline."""

import hashlib
from collections.abc import Iterable

from plait.envelope import digest, open_envelope
from plait.errors import Overspend, RemoteProtocolError
from plait.ledger.terms import SessionTerms
from plait.types import U64_MAX, Digest, Microcredits, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import PayeeAmount, SessionVoucher

_START = b"plait.transcript.v1\0"


class Transcript:
    """Chained digest of all receipts of an epoch, in chunk then stage order."""

    def __init__(self, terms: SessionTerms) -> None:
        start = _START + terms.session_id + terms.epoch.to_bytes(4, "big")
        self.value = Digest(hashlib.sha256(start).digest())

    def add(self, receipts: Iterable[SignedEnvelope]) -> None:
        """Add receipts by the digest of their payload."""
        for receipt in receipts:
            link = self.value + digest(receipt.payload)
            self.value = Digest(hashlib.sha256(link).digest())


def amounts_of(terms: SessionTerms, counts: TokenCounts) -> tuple[Microcredits, ...]:
    """What each stage has earned for these cumulative counts, in stage order.

    Raises ``Overspend`` if one of them or their sum does not fit 64 bits.
    """
    amounts = tuple(terms.price(index, counts) for index in range(len(terms.stages)))
    if sum(amounts) > U64_MAX:
        raise Overspend("the session's price does not fit 64 bits")
    return amounts


def payee_amounts(terms: SessionTerms, amounts: Iterable[Microcredits]) -> list[PayeeAmount]:
    """Amounts in stage order as messages that name the payees."""
    return [
        PayeeAmount(payee=stage.peer, microcredits=amount)
        for stage, amount in zip(terms.stages, amounts, strict=True)
    ]


def voucher_message(
    terms: SessionTerms,
    sequence: int,
    counts: TokenCounts,
    transcript: bytes,
    issued_ms: int,
    *,
    cut_amounts: Iterable[Microcredits] | None = None,
) -> SessionVoucher:
    """The voucher for the first ``sequence`` chunks of the epoch.

    ``cut_amounts`` makes it the epoch's last: of the chunk that was cut short, only the
    stages that signed a receipt for it are paid.
    """
    amounts = amounts_of(terms, counts) if cut_amounts is None else cut_amounts
    return SessionVoucher(
        network_id=terms.network_id,
        session_id=terms.session_id,
        epoch=terms.epoch,
        sequence=sequence,
        account=terms.client,
        prompt_tokens=counts.prompt,
        output_tokens=counts.output,
        transcript=transcript,
        cached_prompt_tokens=counts.cached_prompt,
        rejected_draft_tokens=counts.rejected_draft,
        amounts=payee_amounts(terms, amounts),
        issued_ms=issued_ms,
        epoch_close=cut_amounts is not None,
    )


def open_voucher(envelope: SignedEnvelope, terms: SessionTerms) -> SessionVoucher:
    """Check that the client signed a voucher for this epoch of this session.

    Raises ``BadSignature``, and ``RemoteProtocolError`` for a voucher that is malformed
    or of another network, session, epoch or account.
    """
    voucher = open_envelope(envelope, SessionVoucher, signer=terms.client_ledger_key)
    stated = (voucher.network_id, voucher.session_id, voucher.epoch, voucher.account)
    if stated != (terms.network_id, terms.session_id, terms.epoch, terms.client):
        raise RemoteProtocolError("the voucher is for another network, session, epoch or account")
    return voucher


def voucher_counts(voucher: SessionVoucher) -> TokenCounts:
    """The cumulative counts that a voucher pays for."""
    return TokenCounts(
        prompt=voucher.prompt_tokens,
        output=voucher.output_tokens,
        cached_prompt=voucher.cached_prompt_tokens,
        rejected_draft=voucher.rejected_draft_tokens,
    )


def amount_for(voucher: SessionVoucher, payee: str) -> Microcredits:
    """What a voucher promises a payee; ``RemoteProtocolError`` unless it is named once."""
    amounts = [item.microcredits for item in voucher.amounts if item.payee == payee]
    if len(amounts) != 1:
        raise RemoteProtocolError(f"the voucher names the payee {payee} {len(amounts)} times")
    return Microcredits(amounts[0])
