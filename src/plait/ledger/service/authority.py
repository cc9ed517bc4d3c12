"""A ledger authority: the gRPC edge in front of the recorder.

Every request is bounded, its signatures and certificates are checked, then the books
decide. A refusal is a gRPC status with the details "code: reason".
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import grpc
import grpc.aio

from plait.envelope import decode, digest, open_envelope, seal
from plait.errors import (
    BadSignature,
    LedgerError,
    RemoteProtocolError,
    VerificationError,
)
from plait.identity import SigningKey
from plait.ledger.balances import entry_from_payload
from plait.ledger.certs import check_key_cert
from plait.ledger.committee import COMMITTEE_LANE, granters
from plait.ledger.exposure import check_judged, judging_of
from plait.ledger.fork import ReservationFork, VoucherFork
from plait.ledger.journal import (
    FRESHNESS_MS,
    Decline,
    Fork,
    Issue,
    Outcome,
    Refusal,
    Reserve,
    SetLimit,
    SetSubAccount,
    Settle,
)
from plait.ledger.notices import NoticeBoard
from plait.ledger.service.export import objects_behind
from plait.ledger.service.notices import NoticeExchange
from plait.ledger.service.recorder import Recorder
from plait.ledger.service.witness import WitnessedLog
from plait.ledger.sub_accounts import terms_message
from plait.logs import get_logger
from plait.network_file import NetworkFile
from plait.types import U64_MAX, AccountId, Digest, PeerId, SessionId
from plait.v1 import ledger_pb2 as pb
from plait.v1.committee_pb2 import LearnRequest, LearnResponse
from plait.v1.committee_pb2_grpc import (
    CommitteeServiceServicer,
)
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2_grpc import LedgerServiceServicer

log = get_logger(__name__)

MESSAGE_BYTES_MAX = 64 * 1024
MERGE_DELAY_MS = 10_000
"""A granted entry is in a checkpoint at most this much later."""
EXPIRY_INTERVAL_S = 1.0
HISTORY_MAX = 100
EVIDENCE_ENTRIES_MAX = 256
EXPORT_PAGE = 64
KEY_OVERLAP_MS = 120_000
"""How long a replaced ledger key may still begin something."""
VOUCHERS_COMPARED_MAX = 4_096
"""Vouchers settled last: another under the number of one of them is seen at once."""
_STOP_GRACE_S = 1.0

_STATUS = {
    "malformed": grpc.StatusCode.INVALID_ARGUMENT,
    "signature": grpc.StatusCode.PERMISSION_DENIED,
    "stopped": grpc.StatusCode.UNAVAILABLE,
    "credit": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "budget": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "payee": grpc.StatusCode.PERMISSION_DENIED,
    "frozen": grpc.StatusCode.PERMISSION_DENIED,
}
"""Any other code is FAILED_PRECONDITION."""

Params = ParamSpec("Params")
Result = TypeVar("Result")


class _Refused(Exception):
    """A request ends here with a code and a reason for the caller."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


def _answered(
    method: Callable[Concatenate["LedgerServicer", Params], Awaitable[Result]],
) -> Callable[Concatenate["LedgerServicer", Params], Awaitable[Result]]:
    """Turn the errors a caller may see into a gRPC status. The context is the last argument."""

    @wraps(method)
    async def guarded(
        self: "LedgerServicer", /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Result:
        context: Any = args[-1]
        try:
            return await method(self, *args, **kwargs)
        except _Refused as refused:
            await _abort(context, refused.code, str(refused))
        except BadSignature as error:
            await _abort(context, "signature", f"signature: {error}")
        except (RemoteProtocolError, VerificationError, UnicodeError) as error:
            await _abort(context, "malformed", f"malformed: {error}")
        except LedgerError as error:
            await _abort(context, "stopped", f"stopped: {error}")

    return guarded


class LedgerServicer(LedgerServiceServicer, CommitteeServiceServicer):
    """``plait.v1.LedgerService`` and, in a committee, ``plait.v1.CommitteeService``."""

    def __init__(
        self,
        recorder: Recorder,
        network: NetworkFile,
        key: SigningKey,
        clock_ms: Callable[[], int],
        witnessed: WitnessedLog | None = None,
        notices: NoticeExchange | None = None,
    ) -> None:
        self._recorder = recorder
        self._log = witnessed or WitnessedLog(recorder)
        self._notices = notices or NoticeExchange(NoticeBoard(network), network, tuple)
        self._in_committee = len(network.authorities) > 1
        self._books = recorder.books
        self._network = network
        self._key = key
        self._clock_ms = clock_ms
        self._vouchers: OrderedDict[tuple[bytes, int, int], SignedEnvelope] = OrderedDict()

    @_answered
    async def Reserve(self, request: pb.ReserveRequest, context: Any) -> pb.ReserveResponse:
        """Set credit aside for a session and grant it."""
        envelope = request.reservation
        reservation = open_envelope(envelope, pb.BudgetReservation)
        account = AccountId(reservation.account)
        # A session goes on under the key that it began with, whatever was rotated since.
        begun = self._recorder.signed_before(SessionId(reservation.session_id), envelope.signer)
        self._check_signer(envelope, request.account_cert, account, newest=not begun)
        statement = self._notices.board.frozen.get(PeerId(account))
        if statement is not None:
            raise _Refused("frozen", f"the account {statement}")
        if self._in_committee and reservation.lane != COMMITTEE_LANE:
            raise _Refused("lane", "an account has one lane where a committee grants")
        dated = not self._in_committee
        command = Reserve(reservation, digest(envelope.payload), dated=dated)
        outcome = await self._recorder.apply(command, [envelope], request.account_cert)
        if isinstance(outcome, Fork):
            self._tell_forks()
        index = _accepted(outcome)
        return pb.ReserveResponse(grant=self._grant(reservation, command.digest, index))

    @_answered
    async def Learn(self, request: LearnRequest, context: Any) -> LearnResponse:
        """Book what a quorum of the committee has granted and this authority missed."""
        envelope = request.reservation
        granters(request.grant, envelope, self._network.authorities)
        reservation = open_envelope(envelope, pb.BudgetReservation)
        account = AccountId(reservation.account)
        self._check_signer(envelope, request.account_cert, account, newest=False)
        self._tell_equivocation(reservation, request)
        command = Reserve(reservation, digest(envelope.payload), certified=True, dated=False)
        outcome = await self._recorder.apply(command, [envelope], request.account_cert)
        index = _accepted(outcome)
        return LearnResponse(entry_index=index)

    @_answered
    async def Settle(self, request: pb.SettleRequest, context: Any) -> pb.SettleResponse:
        """Pay everybody up to a voucher; without one, only note that a payee wants nothing more."""
        settlement = open_envelope(request.request, pb.SettlementRequest)
        payee = AccountId(settlement.payee)
        # A session outlives a rotation: what it earned is paid to the peer under either key.
        self._check_signer(request.request, request.payee_cert, payee, newest=False)
        if not request.HasField("voucher"):
            decline = Decline(settlement, digest(request.request.payload))
            outcome = await self._recorder.apply(decline, [request.request], request.payee_cert)
            return pb.SettleResponse(paid_microcredits=_accepted(outcome))
        voucher = open_envelope(request.voucher, pb.SessionVoucher)
        holds = self._books.holds(SessionId(voucher.session_id))
        if not holds:
            raise _Refused("session", "no reservation is known for this session")
        payers = {self._recorder.signer_of(hold.reservation) for hold in holds.values()}
        if request.voucher.signer not in payers:
            raise _Refused("signature", "the voucher is not signed by who reserved")
        self._tell_voucher_fork(voucher, request.voucher)
        command = Settle(
            voucher, digest(request.voucher.payload), settlement, digest(request.request.payload)
        )
        objects = [request.request, request.voucher]
        outcome = await self._recorder.apply(command, objects, request.payee_cert)
        return pb.SettleResponse(paid_microcredits=_accepted(outcome))

    @_answered
    async def Issue(self, request: pb.IssueRequest, context: Any) -> pb.IssueResponse:
        """Book new credit by order of the network's issuer."""
        order = open_envelope(request.order, pb.IssueOrder, signer=self._network.issuer_key)
        command = Issue(order, digest(request.order.payload))
        index = _accepted(await self._recorder.apply(command, [request.order]))
        return pb.IssueResponse(entry_index=index)

    @_answered
    async def SetLimit(self, request: pb.SetLimitRequest, context: Any) -> pb.SetLimitResponse:
        """Let an account stand below zero, by order of the network's issuer."""
        order = open_envelope(request.order, pb.LimitOrder, signer=self._network.issuer_key)
        command = SetLimit(order, digest(request.order.payload))
        index = _accepted(await self._recorder.apply(command, [request.order]))
        return pb.SetLimitResponse(entry_index=index)

    @_answered
    async def SetSubAccount(
        self, request: pb.SetSubAccountRequest, context: Any
    ) -> pb.SetSubAccountResponse:
        """Open, change or close a sub-account, by order of the account's owner."""
        order = open_envelope(request.order, pb.SubAccountOrder)
        self._check_signer(request.order, request.account_cert, AccountId(order.terms.account))
        command = SetSubAccount(order, digest(request.order.payload))
        outcome = await self._recorder.apply(command, [request.order], request.account_cert)
        return pb.SetSubAccountResponse(entry_index=_accepted(outcome))

    @_answered
    async def FileExposure(
        self, request: pb.FileExposureRequest, context: Any
    ) -> pb.FileExposureResponse:
        """Forfeit the escrow of a payee that a quorum of judges found exposed."""
        judging = judging_of(self._network)
        command = check_judged(request.exposure, self._network.network_id, judging)
        outcome = await self._recorder.apply(command, [request.exposure])
        return pb.FileExposureResponse(forfeited_microcredits=_accepted(outcome))

    @_answered
    async def ListSubAccounts(
        self, request: pb.ListSubAccountsRequest, context: Any
    ) -> pb.ListSubAccountsResponse:
        """An account's sub-accounts, for its owner or the issuer."""
        account, name = self._queried(request.query, request.account_cert)
        await self._recorder.durable()
        names = [name] if name else sorted(self._books.sub_accounts.of(account))
        return pb.ListSubAccountsResponse(
            sub_accounts=[
                self._sub_account(account, one)
                for one in names
                if one in self._books.sub_accounts.of(account)
            ]
        )

    @_answered
    async def GetAccount(
        self, request: pb.GetAccountRequest, context: Any
    ) -> pb.GetAccountResponse:
        """An account's balances, for its owner or the issuer."""
        account, _ = self._queried(request.query, request.account_cert)
        await self._recorder.durable()
        return pb.GetAccountResponse(
            available_microcredits=min(max(0, self._books.available(account)), U64_MAX),
            pending_microcredits=self._books.pending(account),
            next_sequence=self._books.next_sequence(account, 0),
            credit_limit=self._books.balances.limit(account),
            escrow_microcredits=self._books.escrows.of(account),
        )

    @_answered
    async def GetHistory(
        self, request: pb.GetHistoryRequest, context: Any
    ) -> pb.GetHistoryResponse:
        """The newest entries that touch an account, or one sub-account, or its holds."""
        account, name = self._queried(request.query, request.account_cert)
        await self._recorder.durable()
        limit = min(request.limit or HISTORY_MAX, HISTORY_MAX)
        entries = []
        touched = self._books.history(f"{account}/{name}" if name else account)
        for index in reversed(touched[-limit:]):
            entries.append(pb.JournalEntry.FromString(self._payload(index)))
        return pb.GetHistoryResponse(entries=entries)

    @_answered
    async def GetEvidence(
        self, request: pb.GetEvidenceRequest, context: Any
    ) -> pb.GetEvidenceResponse:
        """A session's entries, each proven in one checkpoint."""
        session_id = SessionId(request.session_id)
        indexes = self._books.history(session_id.hex())[-EVIDENCE_ENTRIES_MAX:]
        settled = self._books.settled(session_id)
        if len(session_id) != 16 or not indexes:
            raise _Refused("session", "no reservation is known for this session")
        size, note = await self._log.checkpoint(covering=indexes[-1] + 1)
        tree = self._recorder.tree
        return pb.GetEvidenceResponse(
            entries=[self._payload(index) for index in indexes],
            proofs=[
                pb.InclusionProof(leaf_index=index, hashes=tree.inclusion_proof(index, size))
                for index in indexes
            ],
            checkpoint=note,
            settled=settled,
        )

    @_answered
    async def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, context: Any
    ) -> pb.GetCheckpointResponse:
        """A checkpoint of everything on disk."""
        _, note = await self._log.checkpoint(covering=self._recorder.committed_size)
        return pb.GetCheckpointResponse(checkpoint=note)

    @_answered
    async def GetConsistency(
        self, request: pb.GetConsistencyRequest, context: Any
    ) -> pb.GetConsistencyResponse:
        """Proof that one checkpointed tree is a prefix of another."""
        first, second = request.first_size, request.second_size
        size, _ = await self._recorder.checkpoint()
        if not 0 < first <= second <= size:
            raise _Refused("malformed", f"sizes must rise from above 0 to at most {size}")
        return pb.GetConsistencyResponse(
            hashes=self._recorder.tree.consistency_proof(first, second)
        )

    async def Export(
        self, request: pb.ExportRequest, context: Any
    ) -> AsyncIterator[pb.ExportResponse]:
        """Stream the committed journal from an index on, in pages."""
        first = request.first_index
        end = self._recorder.committed_size
        while first < end:
            page = list(self._recorder.store.entries(first, EXPORT_PAGE))
            first += len(page)
            payloads = [entry.payload for entry in page]
            objects = objects_behind(self._recorder.store, payloads)
            yield pb.ExportResponse(entries=payloads, objects=objects)

    def _tell_forks(self) -> None:
        """Pass on the proofs of the double signatures seen here."""
        for proof in self._recorder.store.fork_proofs():
            self._notices.perform(self._notices.board.caught(proof))

    def _tell_equivocation(self, reservation: pb.BudgetReservation, shown: LearnRequest) -> None:
        """Tell of an account for which this authority granted another under this number."""
        account = AccountId(reservation.account)
        granted = self._books.granted(account, reservation.lane, reservation.sequence)
        ours = None if granted is None else self._recorder.store.object(granted)
        if ours is not None and granted != digest(shown.reservation.payload):
            pair = (ours, shown.reservation)
            proof = ReservationFork(pair, (shown.account_cert, shown.account_cert))
            self._notices.perform(self._notices.board.caught(proof))

    def _tell_voucher_fork(self, voucher: pb.SessionVoucher, envelope: SignedEnvelope) -> None:
        """Tell of an account that had another voucher under this number settled here.

        Settling goes on as ever: each voucher pays what it promises, up to the caps.
        """
        number = (voucher.session_id, voucher.epoch, voucher.sequence)
        earlier = self._vouchers.pop(number, envelope)
        self._vouchers[number] = earlier
        if len(self._vouchers) > VOUCHERS_COMPARED_MAX:
            self._vouchers.popitem(last=False)
        if earlier.payload == envelope.payload:
            return
        store = self._recorder.store
        certs = [store.delegation(voucher.account, one.signer, 0) for one in (earlier, envelope)]
        if certs[0] is not None and certs[1] is not None:
            proof = VoucherFork((earlier, envelope), (certs[0], certs[1]))
            self._notices.perform(self._notices.board.caught(proof))

    def _check_signer(
        self,
        envelope: SignedEnvelope,
        cert: SignedEnvelope,
        account: AccountId,
        *,
        newest: bool = True,
    ) -> int:
        """Check the signature by the account's ledger key; returns the certificate's serial.

        With ``newest`` a key that was replaced counts no more, but for ``KEY_OVERLAP_MS``: what
        another process of the account was about to send. A revoked one never does.
        """
        now_ms = self._clock_ms()
        revoked = self._notices.board.revoked
        network_id = self._network.network_id
        peer, ledger_key = check_key_cert(cert, network_id, now_ms, PeerId(account), revoked)
        if envelope.signer != ledger_key:
            raise _Refused("signature", "it is not signed by the key the certificate names")
        serial = decode(cert.payload, NodeKeyCert).serial
        known = self._recorder.newest_cert(peer)
        if (
            newest
            and known is not None
            and serial < known[0]
            and known[1] + KEY_OVERLAP_MS < now_ms
        ):
            raise _Refused("signature", "the certificate has been replaced by a newer one")
        return serial

    def _sub_account(self, account: AccountId, name: str) -> pb.SubAccountState:
        use = self._books.sub_accounts.used(account, name, self._clock_ms())
        return pb.SubAccountState(
            terms=terms_message(use.terms),
            used_microcredits=use.used,
            period_used_microcredits=use.period_used,
            pending_microcredits=self._books.pending(account, name),
        )

    def _queried(self, envelope: SignedEnvelope, cert: SignedEnvelope) -> tuple[AccountId, str]:
        """The account and sub-account that a fresh query by its owner or the issuer names."""
        query = open_envelope(envelope, pb.AccountQuery)
        if query.network_id != self._network.network_id:
            raise _Refused("network", "the query is for another network")
        if abs(query.issued_ms - self._clock_ms()) > FRESHNESS_MS:
            raise _Refused("stale", "the query was not signed within two minutes of our clock")
        account = AccountId(query.account)
        if envelope.signer != self._network.issuer_key:
            self._check_signer(envelope, cert, account)
        return account, query.sub_account

    def _grant(
        self, reservation: pb.BudgetReservation, cause: Digest, index: int
    ) -> SignedEnvelope:
        # Derived from the entry alone: a repeated request gets the same grant.
        return seal(
            self._key,
            pb.ReservationGrant(
                network_id=self._network.network_id,
                reservation_digest=cause,
                account=reservation.account,
                session_id=reservation.session_id,
                amount=reservation.amount,
                granted_ms=entry_from_payload(self._payload(index)).posted_ms,
                expires_ms=reservation.expires_ms,
                merge_delay_ms=MERGE_DELAY_MS,
            ),
        )

    def _payload(self, index: int) -> bytes:
        return next(self._recorder.store.entries(index, 1)).payload


def _accepted(outcome: Outcome) -> int:
    match outcome:
        case Refusal():
            raise _Refused(outcome.code, outcome.reason)
        case Fork():
            raise _Refused("fork", "two reservations under one number: the account is frozen")
        case _:
            return outcome.value


async def _abort(context: Any, code: str, details: str) -> NoReturn:
    status = _STATUS.get(code, grpc.StatusCode.FAILED_PRECONDITION)
    await context.abort(status, details[:500])
    raise AssertionError("abort returns never")
