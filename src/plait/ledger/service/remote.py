"""A client of a ledger authority, pinned to its certificate.

Whatever the authority signs is checked by the caller against the network file
(``reserve.check_grant``, ``checkpoint.open_checkpoint``); this module only carries.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from plait.errors import (
    DeadlineExceeded,
    LedgerError,
    PeerUnreachable,
    PlaitError,
    RemoteProtocolError,
)
from plait.ledger.journal_audit import JournalPage
from plait.ledger.service.channels import pinned_channel
from plait.ledger.sub_accounts import SubAccountUse, terms_from
from plait.network_file import Authority
from plait.types import Digest, SessionId
from plait.v1 import ledger_pb2 as pb
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2_grpc import LedgerServiceStub

"""The DNS name in every certificate of a network; who it is, is decided by pinning."""

DEADLINE_S = 5.0
EXPORT_DEADLINE_S = 300.0
MESSAGE_BYTES_MAX = 4 * 1024 * 1024

_REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True, slots=True)
class AccountState:
    """An account's balances in microcredits; the next reservation number of lane 0."""

    available: int
    pending: int
    next_sequence: int
    credit_limit: int = 0
    """How far below zero the account may stand; part of what is available."""
    escrow: int = 0
    """Of what the account was paid: still in escrow."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A session's entries as leaf bytes, with a proof (index, hashes) of each in the checkpoint.

    ``settled`` is true when nothing of the session is held any more.
    """

    entries: tuple[bytes, ...]
    proofs: tuple[tuple[int, tuple[Digest, ...]], ...]
    checkpoint: str
    settled: bool


class RemoteLedger:
    """One authority. Every call has a deadline of 5 s (``export`` 300 s) and raises
    ``LedgerError`` when the ledger refuses, ``PeerUnreachable`` or ``DeadlineExceeded``
    when there is no answer, ``RemoteProtocolError`` for anything else."""

    def __init__(self, authority: Authority, *, deadline_s: float = DEADLINE_S) -> None:
        self._authority = authority
        self._deadline_s = deadline_s
        self._channel = pinned_channel(
            authority.address, authority.certificate, message_bytes_max=MESSAGE_BYTES_MAX
        )
        self._stub = LedgerServiceStub(self._channel)

    async def reserve(self, reservation: SignedEnvelope, cert: SignedEnvelope) -> SignedEnvelope:
        """Ask for a reservation; returns the grant's envelope."""
        request = pb.ReserveRequest(reservation=reservation, account_cert=cert)
        response = await self._call(self._stub.Reserve, request, pb.ReserveResponse)
        return response.grant

    async def settle(
        self, request: SignedEnvelope, cert: SignedEnvelope, voucher: SignedEnvelope | None
    ) -> int:
        """Present a voucher, or without one a release.

        Returns what the payee has been paid in the session so far.
        """
        message = pb.SettleRequest(request=request, payee_cert=cert, voucher=voucher)
        response = await self._call(self._stub.Settle, message, pb.SettleResponse)
        return response.paid_microcredits

    async def issue(self, order: SignedEnvelope) -> int:
        """Book an issuer's order; returns the entry's index."""
        response = await self._call(
            self._stub.Issue, pb.IssueRequest(order=order), pb.IssueResponse
        )
        return response.entry_index

    async def account(
        self, query: SignedEnvelope, cert: SignedEnvelope | None = None
    ) -> AccountState:
        """Balances of the account in a fresh query; the issuer needs no certificate."""
        request = pb.GetAccountRequest(query=query, account_cert=cert)
        response = await self._call(self._stub.GetAccount, request, pb.GetAccountResponse)
        return AccountState(
            response.available_microcredits,
            response.pending_microcredits,
            response.next_sequence,
            response.credit_limit,
            response.escrow_microcredits,
        )

    async def history(
        self, query: SignedEnvelope, cert: SignedEnvelope | None = None, limit: int = 50
    ) -> list[pb.JournalEntry]:
        """The newest entries of an account, newest first."""
        request = pb.GetHistoryRequest(query=query, account_cert=cert, limit=limit)
        response = await self._call(self._stub.GetHistory, request, pb.GetHistoryResponse)
        return list(response.entries)

    async def evidence(self, session_id: SessionId) -> Evidence:
        """What the log says about a session, with proofs."""
        request = pb.GetEvidenceRequest(session_id=session_id)
        response = await self._call(self._stub.GetEvidence, request, pb.GetEvidenceResponse)
        if len(response.proofs) != len(response.entries):
            raise self._broken("it gave another number of proofs than of entries")
        return Evidence(
            entries=tuple(response.entries),
            proofs=tuple(
                (proof.leaf_index, tuple(map(Digest, proof.hashes))) for proof in response.proofs
            ),
            checkpoint=response.checkpoint,
            settled=response.settled,
        )

    async def checkpoint(self) -> str:
        """The last signed checkpoint."""
        request = pb.GetCheckpointRequest()
        response = await self._call(self._stub.GetCheckpoint, request, pb.GetCheckpointResponse)
        return response.checkpoint

    async def consistency(self, first_size: int, second_size: int) -> list[Digest]:
        """Proof that the log of the first size is a prefix of that of the second."""
        request = pb.GetConsistencyRequest(first_size=first_size, second_size=second_size)
        response = await self._call(self._stub.GetConsistency, request, pb.GetConsistencyResponse)
        return [Digest(item) for item in response.hashes]

    async def release(self, request: SignedEnvelope, cert: SignedEnvelope) -> int:
        """Release a payee's part of a session without a voucher; returns what it was paid.

        The request is a ``SettlementRequest`` with ``release`` and no voucher digest.
        """
        message = pb.SettleRequest(request=request, payee_cert=cert)
        response = await self._call(self._stub.Settle, message, pb.SettleResponse)
        return response.paid_microcredits

    async def set_limit(self, order: SignedEnvelope) -> int:
        """Book an issuer's credit limit for an account; returns the entry's index."""
        request = pb.SetLimitRequest(order=order)
        response = await self._call(self._stub.SetLimit, request, pb.SetLimitResponse)
        return response.entry_index

    async def set_sub_account(self, order: SignedEnvelope, cert: SignedEnvelope) -> int:
        """Book an owner's terms of a sub-account; returns the entry's index."""
        request = pb.SetSubAccountRequest(order=order, account_cert=cert)
        response = await self._call(self._stub.SetSubAccount, request, pb.SetSubAccountResponse)
        return response.entry_index

    async def file_exposure(self, exposure: SignedEnvelope) -> int:
        """File what a quorum of judges signed; returns what was forfeited in its session."""
        request = pb.FileExposureRequest(exposure=exposure)
        response = await self._call(self._stub.FileExposure, request, pb.FileExposureResponse)
        return response.forfeited_microcredits

    async def sub_accounts(
        self, query: SignedEnvelope, cert: SignedEnvelope | None = None
    ) -> list[SubAccountUse]:
        """An account's sub-accounts by name, or the one that the query names if it exists."""
        request = pb.ListSubAccountsRequest(query=query, account_cert=cert)
        response = await self._call(self._stub.ListSubAccounts, request, pb.ListSubAccountsResponse)
        try:
            return [
                SubAccountUse(
                    terms_from(state.terms),
                    state.used_microcredits,
                    state.period_used_microcredits,
                    state.pending_microcredits,
                )
                for state in response.sub_accounts
            ]
        except ValueError as error:
            raise self._broken(f"it named an unknown period: {error}") from error

    async def export(self, first_index: int = 0) -> AsyncIterator[bytes]:
        """The journal's leaves from an index on."""
        async for page in self.export_pages(first_index):
            for payload in page.entries:
                yield payload

    async def export_pages(self, first_index: int = 0) -> AsyncIterator[JournalPage]:
        """The journal from an index on, with the signed objects behind each entry."""
        request = pb.ExportRequest(first_index=first_index)
        try:
            async for page in self._stub.Export(request, timeout=EXPORT_DEADLINE_S):
                yield JournalPage(tuple(page.entries), tuple(page.objects))
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def _call(
        self,
        method: Callable[..., Awaitable[object]],
        request: Message,
        response_class: type[Response],
    ) -> Response:
        try:
            response = await method(request, timeout=self._deadline_s)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        except grpc.aio.UsageError as error:  # closed, by ourselves, before a task that asks ends
            address = self._authority.address
            raise PeerUnreachable(f"the connection to the ledger at {address} is closed") from error
        if not isinstance(response, response_class):
            raise self._broken("it answered with another message")
        return response

    def _error(self, error: grpc.aio.AioRpcError) -> PlaitError:
        code, details = error.code(), error.details() or ""
        address = self._authority.address
        if code in _REFUSED:
            return LedgerError(f"the ledger refuses: {details}", remedy=_remedy(details))
        if code is grpc.StatusCode.UNAVAILABLE:
            return PeerUnreachable(f"the ledger at {address} does not answer: {details}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"the ledger at {address} did not answer in time")
        return self._broken(f"{code.name}: {details}")

    def _broken(self, reason: str) -> RemoteProtocolError:
        return RemoteProtocolError(reason, peer=self._authority.peer)


def _remedy(details: str) -> str:
    match details.partition(":")[0]:
        case "credit":
            return "ask the network's issuer for credit (plait ledger balance shows yours)"
        case "budget":
            return "raise the sub-account's limit (plait ledger sub-account), or wait"
        case "stale":
            return "set this machine's clock"
        case _:
            return ""


def voucher_in(message: pb.SettleRequest) -> SignedEnvelope | None:
    """The voucher of a settlement; None of one that only releases."""
    return message.voucher if message.HasField("voucher") else None
