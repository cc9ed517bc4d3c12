"""A ledger authority: the gRPC edge in front of the recorder.

Every request is bounded, its signatures and certificates are checked, then the books
decide. A refusal is a gRPC status with the details "code: reason".
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import grpc
import grpc.aio

from plait.envelope import decode, digest, open_envelope, seal
from plait.errors import (
    BadSignature,
    ConfigError,
    LedgerError,
    RemoteProtocolError,
    VerificationError,
)
from plait.identity import SigningKey
from plait.ledger.balances import entry_from_payload
from plait.ledger.certs import check_key_cert
from plait.ledger.committee import COMMITTEE_LANE, granters
from plait.ledger.fork import ReservationFork
from plait.ledger.journal import (
    FRESHNESS_MS,
    GRACE_MS,
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
from plait.ledger.notices import NoticeBoard, Told
from plait.ledger.service.export import objects_behind
from plait.ledger.service.head import HeadFile
from plait.ledger.service.notices import NoticeExchange, NoticeFile, NoticeServicer, posts_of
from plait.ledger.service.recorder import LogIdentity, Recorder
from plait.ledger.service.records import LedgerStore
from plait.ledger.service.store import open_store
from plait.ledger.service.tiles import LogServicer, TileFolder
from plait.ledger.service.witness import Cosigner, WitnessedLog
from plait.ledger.sub_accounts import terms_message
from plait.logs import get_logger
from plait.network_file import Authority, NetworkFile
from plait.types import U64_MAX, AccountId, Digest, PeerId, SessionId
from plait.v1 import ledger_pb2 as pb
from plait.v1.committee_pb2 import LearnRequest, LearnResponse
from plait.v1.committee_pb2_grpc import (
    CommitteeServiceServicer,
    add_CommitteeServiceServicer_to_server,
)
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2_grpc import LedgerServiceServicer, add_LedgerServiceServicer_to_server
from plait.v1.log_pb2_grpc import (
    add_LogServiceServicer_to_server,
    add_NoticeServiceServicer_to_server,
)

log = get_logger(__name__)

MESSAGE_BYTES_MAX = 64 * 1024
MERGE_DELAY_MS = 10_000
"""A granted entry is in a checkpoint at most this much later."""
EXPIRY_INTERVAL_S = 1.0
HISTORY_MAX = 100
EVIDENCE_ENTRIES_MAX = 256
EXPORT_PAGE = 64
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


@dataclass(frozen=True, slots=True)
class AuthorityKeys:
    """The two keys of an authority: grants are signed by one, checkpoints by the other."""

    ledger: SigningKey
    log: SigningKey


@dataclass(frozen=True, slots=True)
class RunningAuthority:
    """A serving authority. ``stopped`` is set when its disk failed and it must be restarted."""

    host: str
    port: int
    recorder: Recorder
    stopped: asyncio.Event = field(repr=False)


class _Refused(Exception):
    """A request ends here with a code and a reason for the caller."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


class Clock:
    """Wall time, and a time for expiry that no jump of the wall clock brings forward."""

    def __init__(
        self,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        steady_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        self._wall_ms, self._steady_ms = wall_ms, steady_ms
        self._wall_start_ms, self._steady_start_ms = wall_ms(), steady_ms()

    def now_ms(self) -> int:
        """Wall time."""
        return self._wall_ms()

    def elapsed_ms(self) -> int:
        """Time since the authority started."""
        return self._steady_ms() - self._steady_start_ms

    def expiry_ms(self) -> int:
        """The earlier of wall time and start time plus what has elapsed."""
        return min(self._wall_ms(), self._wall_start_ms + self.elapsed_ms())


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

    @_answered
    async def Reserve(self, request: pb.ReserveRequest, context: Any) -> pb.ReserveResponse:
        """Set credit aside for a session and grant it."""
        envelope = request.reservation
        reservation = open_envelope(envelope, pb.BudgetReservation)
        account = AccountId(reservation.account)
        self._check_signer(envelope, request.account_cert, account)
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

    def _check_signer(
        self,
        envelope: SignedEnvelope,
        cert: SignedEnvelope,
        account: AccountId,
        *,
        newest: bool = True,
    ) -> int:
        """Check the signature by the account's ledger key; returns the certificate's serial.

        With ``newest`` a key that was replaced counts no more; a revoked one never does.
        """
        now_ms = self._clock_ms()
        revoked = self._notices.board.revoked
        network_id = self._network.network_id
        peer, ledger_key = check_key_cert(cert, network_id, now_ms, PeerId(account), revoked)
        if envelope.signer != ledger_key:
            raise _Refused("signature", "it is not signed by the key the certificate names")
        serial = decode(cert.payload, NodeKeyCert).serial
        known = self._recorder.newest_serial(peer)
        if newest and known is not None and serial < known:
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


@asynccontextmanager
async def serve_authority(
    store_path: Path,
    network: NetworkFile,
    authority: Authority,
    keys: AuthorityKeys,
    host: str,
    port: int,
    tls: tuple[bytes, bytes],
    *,
    clock: Clock | None = None,
    cosigners: Sequence[Cosigner] = (),
    database: str = "",
) -> AsyncIterator[RunningAuthority]:
    """Serve a ledger authority while the context is open.

    ``tls`` is certificate and key in PEM; port 0 lets the kernel choose. ``cosigners`` are
    ways to witnesses of the network file, asked for each checkpoint. The log is published
    as tiles in the folder ``log`` beside the store. ``database`` is a PostgreSQL connection
    string; empty keeps the journal in the file ``store_path``. Raises
    ``ConfigError`` for keys that are not the network file's or an address in use, and
    ``LedgerError`` for a store that cannot be used.
    """
    if (keys.ledger.public, keys.log.public) != (authority.ledger_key, authority.log_key):
        raise ConfigError("the authority's keys are not those of the network file")
    clock = clock or Clock()
    store = _open_store(store_path, network.network_id, database)
    try:
        identity = LogIdentity(authority.log_origin, keys.log)
        recorder = Recorder(store, network.network_id, identity, clock.now_ms)
    except BaseException:
        store.close()
        raise
    try:
        witnessed = WitnessedLog(
            recorder,
            network.witnesses,
            network.witness_quorum,
            cosigners,
            publish=TileFolder(store_path.with_name("log"), recorder).publish,
        )
        notices = _notices(network, authority, NoticeFile(store_path.with_name("notices")))
        servicer = LedgerServicer(recorder, network, keys.ledger, clock.now_ms, witnessed, notices)
        server, bound = _server(servicer, host, port, tls)
        add_LogServiceServicer_to_server(LogServicer(recorder, lambda: witnessed.shown), server)
        add_NoticeServiceServicer_to_server(NoticeServicer(notices, network.network_id), server)
        await server.start()
        try:
            failure: Exception | None = None
            async with asyncio.TaskGroup() as tasks:
                chores = tasks.create_task(
                    _chores(recorder, witnessed, notices, clock), name="ledger-chores"
                )
                telling = tasks.create_task(notices.run(), name="ledger-notices")
                try:
                    yield RunningAuthority(host, bound, recorder, recorder.stopped)
                except Exception as error:  # noqa: BLE001 - raised below, out of the group's wrapping
                    failure = error
                finally:
                    chores.cancel()
                    telling.cancel()
            if failure is not None:
                raise failure
        finally:
            await server.stop(_STOP_GRACE_S)
    finally:
        recorder.close()


def _notices(network: NetworkFile, authority: Authority, file: NoticeFile) -> NoticeExchange:
    others = [one for one in network.authorities if one.peer != authority.peer]
    board = NoticeBoard(network, own_log=authority.log_origin)
    return NoticeExchange(board, network, lambda: posts_of(others), file=file)


def _open_store(path: Path, network_id: str, database: str) -> LedgerStore:
    if not database:
        return open_store(path, network_id)
    try:
        from plait.ledger.service.postgres import open_postgres
    except ImportError as error:
        raise ConfigError(
            "a ledger in PostgreSQL needs psycopg", remedy="pip install 'plait[postgres]'"
        ) from error
    return open_postgres(database, network_id, HeadFile(path.with_name(path.name + ".head")))


def _server(
    servicer: LedgerServicer, host: str, port: int, tls: tuple[bytes, bytes]
) -> tuple[grpc.aio.Server, int]:
    cert_pem, key_pem = tls
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", 256),
            ("grpc.server_handshake_timeout_ms", 3_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 300),
            ("grpc.http2.max_ping_strikes", 0),
        ]
    )
    add_LedgerServiceServicer_to_server(servicer, server)
    add_CommitteeServiceServicer_to_server(servicer, server)
    credentials = grpc.ssl_server_credentials([(key_pem, cert_pem)])
    try:
        bound = server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise ConfigError(f"the ledger cannot listen on {host}:{port}: {error}") from error
    return server, bound


async def _chores(
    recorder: Recorder, witnessed: WitnessedLog, notices: NoticeExchange, clock: Clock
) -> None:
    """Sign checkpoints and void what has expired, until the recorder stops."""
    try:
        while True:
            _, note = await witnessed.checkpoint(recorder.committed_size)
            notices.take(Told(checkpoints=(note,)))
            # After a long outage the payees get their grace time again before anything expires.
            if clock.elapsed_ms() >= GRACE_MS:
                await recorder.expire(clock.expiry_ms())
            await asyncio.sleep(EXPIRY_INTERVAL_S)
    except LedgerError as error:
        log.error("the ledger refuses all requests until it is restarted", reason=str(error))


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
