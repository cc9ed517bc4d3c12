"""Committees: what a grant needs, how faults are borne, real authorities over gRPC."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.client.account import open_account
from plait.envelope import digest, seal
from plait.errors import (
    BadProof,
    BadSignature,
    LedgerError,
    PeerUnreachable,
    PlaitError,
    VerificationError,
)
from plait.identity import SigningKey
from plait.ledger.certs import make_key_cert
from plait.ledger.committee import (
    check_grants,
    combine_grants,
    faults_max,
    granters,
    grants_in,
    quorum_of,
)
from plait.ledger.notices import NoticeBoard
from plait.ledger.service.committee import RemoteCommittee, connect
from plait.ledger.service.notices import NoticeExchange, posts_of
from plait.ledger.service.remote import RemoteLedger
from plait.ledger.service.serving import AuthorityKeys, RunningAuthority, serve_authority
from plait.ledger.sub_accounts import SubAccount, terms_message
from plait.net.tls import TlsIdentity, create_identity
from plait.network_file import Authority, NetworkFile
from plait.testing.accounting import NOW_MS, PaperSession, Plot, grant_of, key_of
from plait.testnet.ports import choose_ports
from plait.types import AccountId, SessionId
from plait.v1 import ledger_pb2 as pb
from plait.v1.committee_pb2 import LearnRequest
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2_grpc import LedgerServiceServicer, add_LedgerServiceServicer_to_server

NETWORK_ID = "net-1"
ISSUER, CLIENT, CLIENT_LEDGER, PAYEE, PAYEE_LEDGER = (
    key_of(name) for name in ("issuer", "client", "client ledger", "payee", "payee ledger")
)


def test_how_many_may_fail() -> None:
    figures = [(n, faults_max(n), quorum_of(n)) for n in (1, 2, 3, 4, 7, 10)]
    assert figures == [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 3), (7, 2, 5), (10, 3, 7)]
    for n in range(1, 20):
        # Two quorums share more authorities than may lie, and the honest alone are one.
        assert 2 * quorum_of(n) - n > faults_max(n)
        assert n - faults_max(n) >= quorum_of(n)


# The pure check ------------------------------------------------------------------------

SESSION = PaperSession(Plot())
TERMS, RESERVATION = SESSION.terms, SESSION.reservation
MEMBERS = tuple(
    Authority(
        key_of(f"authority {n}").peer_id,
        f"127.0.0.1:{n}",
        key_of(f"ledger {n}").public,
        key_of(f"log/{n}").public,
        f"log/{n}",
        b"",
    )
    for n in range(4)
)


def granted_by(number: int, reservation: SignedEnvelope = RESERVATION) -> SignedEnvelope:
    grant = pb.ReservationGrant.FromString(grant_of(reservation).payload)
    return seal(key_of(f"ledger {number}"), grant)


@given(st.lists(st.integers(0, 4), max_size=6))
def test_a_grant_needs_a_quorum_of_different_authorities(numbers: list[int]) -> None:
    combined = combine_grants([granted_by(number) for number in numbers], MEMBERS)
    expected = len(set(numbers)) == len(numbers) >= 3 and max(numbers, default=4) < 4
    try:
        cap = check_grants(combined, RESERVATION, MEMBERS, TERMS, 0, NOW_MS)
    except VerificationError:
        assert not expected
    else:
        assert expected
        assert cap > 0
        names = [one.log_origin for one in granters(combined, RESERVATION, MEMBERS)]
        assert names == [f"log/{number}" for number in sorted(numbers)]


def test_the_grant_of_one_authority_is_as_before() -> None:
    single = MEMBERS[:1]
    grant = combine_grants([granted_by(0)], single)
    assert grant == granted_by(0)
    assert check_grants(grant, RESERVATION, single, TERMS, None, NOW_MS) > 0
    with pytest.raises(BadProof, match="3 are needed"):
        check_grants(grant, RESERVATION, MEMBERS, TERMS, None, NOW_MS)


def test_what_is_no_committees_grant() -> None:
    grants = [granted_by(number) for number in range(3)]
    good = combine_grants(grants, MEMBERS)
    signed = SignedEnvelope()
    signed.CopyFrom(good)
    signed.signer = b"x"
    broken = SignedEnvelope(payload_type=good.payload_type, payload=b"\xff")
    forged = granted_by(1)
    forged.signature = forged.signature[::-1]
    other = seal(key_of("ledger 1"), pb.ReservationGrant(reservation_digest=b"x" * 32))
    for bad in (
        signed,
        broken,
        combine_grants(grants[::-1], ()),
        combine_grants([grants[0], forged, grants[2]], MEMBERS),
        combine_grants([grants[0], other, grants[2]], MEMBERS),
        combine_grants([grants[0], combine_grants(grants, MEMBERS), grants[2]], MEMBERS),
    ):
        with pytest.raises(VerificationError):
            check_grants(bad, RESERVATION, MEMBERS, TERMS, 0, NOW_MS)


def test_the_grant_of_a_liar_counts_no_more() -> None:
    def checked(*numbers: int) -> int:
        grant = combine_grants([granted_by(number) for number in numbers], MEMBERS)
        trusted = MEMBERS[1:]
        return check_grants(grant, RESERVATION, MEMBERS, TERMS, 0, NOW_MS, trusted=trusted)

    assert checked(1, 2, 3) == checked(0, 1, 2, 3)
    with pytest.raises(BadProof, match="2 of 4"):
        checked(0, 1, 2)
    with pytest.raises(BadSignature, match="lied"):
        check_grants(granted_by(0), RESERVATION, MEMBERS[:1], TERMS, 0, NOW_MS, trusted=())


# Real authorities ----------------------------------------------------------------------


class Liar(LedgerServiceServicer):
    """Grants whatever is asked, and says that it paid whatever is shown."""

    def __init__(self, number: int) -> None:
        self._key = key_of(f"ledger {number}")

    async def Reserve(self, request: pb.ReserveRequest, context: Any) -> pb.ReserveResponse:
        message = pb.BudgetReservation.FromString(request.reservation.payload)
        grant = pb.ReservationGrant(
            network_id=message.network_id,
            reservation_digest=digest(request.reservation.payload),
            account=message.account,
            session_id=message.session_id,
            amount=message.amount,
            expires_ms=message.expires_ms,
        )
        return pb.ReserveResponse(grant=seal(self._key, grant))

    async def Settle(self, request: pb.SettleRequest, context: Any) -> pb.SettleResponse:
        return pb.SettleResponse(paid_microcredits=10**9)

    async def GetAccount(self, request: Any, context: Any) -> pb.GetAccountResponse:
        return pb.GetAccountResponse(available_microcredits=10**9)


class Refuser(LedgerServiceServicer):
    """Refuses everything."""

    async def Reserve(self, request: pb.ReserveRequest, context: Any) -> pb.ReserveResponse:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "mood: no")
        raise AssertionError("abort raises")


@dataclass
class Committee:
    """Four authorities, each of which can be stopped, started again, or be replaced."""

    folder: Path
    network: NetworkFile
    tls: list[TlsIdentity]
    stacks: dict[int, AsyncExitStack] = field(default_factory=dict)
    running: dict[int, RunningAuthority] = field(default_factory=dict)

    async def start(self, number: int, servicer: LedgerServiceServicer | None = None) -> None:
        stack = self.stacks[number] = AsyncExitStack()
        authority, tls = self.network.authorities[number], self.tls[number]
        port = int(authority.address.rpartition(":")[2])
        if servicer is not None:
            server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            add_LedgerServiceServicer_to_server(servicer, server)
            pair = grpc.ssl_server_credentials([(tls.key_pem, tls.cert_pem)])
            server.add_secure_port(authority.address, pair)
            await server.start()
            stack.push_async_callback(server.stop, 0)
            return
        keys = AuthorityKeys(key_of(f"ledger {number}"), key_of(f"log/{number}"))
        pems = (tls.cert_pem, tls.key_pem)
        store = self.folder / str(number) / "journal.db"
        serving = serve_authority(store, self.network, authority, keys, "127.0.0.1", port, pems)
        self.running[number] = await stack.enter_async_context(serving)

    async def stop(self, number: int) -> None:
        self.running.pop(number, None)
        await self.stacks.pop(number).aclose()

    async def issue(self, amount: int = 1_000) -> None:
        for number, one in self.running.items():
            order = pb.IssueOrder(
                network_id=NETWORK_ID,
                account=CLIENT.peer_id,
                amount=amount,
                order_id=b"first",
                issued_ms=now_ms(),
            )
            ledger = RemoteLedger(self.network.authorities[number])
            await ledger.issue(seal(ISSUER, order))
            await ledger.close()
            assert one.recorder.books.available(AccountId(CLIENT.peer_id)) == amount

    def balances(self, number: int) -> tuple[int, int, int]:
        """Available and pending of the client, and what the payee has."""
        books = self.running[number].recorder.books
        account = AccountId(CLIENT.peer_id)
        payee = books.available(AccountId(PAYEE.peer_id))
        return books.available(account), books.pending(account), payee


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def four(
    folder: Path, servicers: Mapping[int, LedgerServiceServicer]
) -> AsyncIterator[Committee]:
    ports, tls = choose_ports(4), [create_identity(member.peer) for member in MEMBERS]
    authorities = tuple(
        replace(member, address=f"127.0.0.1:{port}", certificate=one.cert_der)
        for member, port, one in zip(MEMBERS, ports, tls, strict=True)
    )
    network = NetworkFile(NETWORK_ID, MEMBERS[0].peer, "open", ISSUER.public, authorities, ())
    committee = Committee(folder, network, tls)
    try:
        for number in range(4):
            await committee.start(number, servicers.get(number))
        await committee.issue()
        yield committee
    finally:
        for number in list(committee.stacks):
            await committee.stop(number)


@asynccontextmanager
async def joined(committee: Committee, name: str = "missed") -> AsyncIterator[RemoteCommittee]:
    network = committee.network
    notices = NoticeExchange(NoticeBoard(network), network, tuple)
    ledger = await connect(network, notices, committee.folder / name)
    assert isinstance(ledger, RemoteCommittee)
    try:
        yield ledger
    finally:
        await ledger.close()


def reservation(sequence: int, amount: int = 100, **changes: Any) -> SignedEnvelope:
    fields: dict[str, Any] = {
        "network_id": NETWORK_ID,
        "account": CLIENT.peer_id,
        "lane": 0,
        "sequence": sequence,
        "session_id": bytes([sequence]) * 16,
        "amount": amount,
        "caps": [pb.PayeeAmount(payee=PAYEE.peer_id, microcredits=amount)],
        "issued_ms": now_ms(),
        "expires_ms": now_ms() + 60_000,
    }
    return seal(CLIENT_LEDGER, pb.BudgetReservation(**{**fields, **changes}))


def settlement(sequence: int, amount: int) -> tuple[SignedEnvelope, SignedEnvelope, SignedEnvelope]:
    voucher = seal(
        CLIENT_LEDGER,
        pb.SessionVoucher(
            network_id=NETWORK_ID,
            session_id=bytes([sequence]) * 16,
            account=CLIENT.peer_id,
            amounts=[pb.PayeeAmount(payee=PAYEE.peer_id, microcredits=amount)],
        ),
    )
    request = pb.SettlementRequest(
        network_id=NETWORK_ID,
        session_id=bytes([sequence]) * 16,
        payee=PAYEE.peer_id,
        voucher_digest=digest(voucher.payload),
        release=True,
        issued_ms=now_ms(),
    )
    return seal(PAYEE_LEDGER, request), cert(PAYEE, PAYEE_LEDGER), voucher


def cert(peer: SigningKey, ledger: SigningKey) -> SignedEnvelope:
    return make_key_cert(peer, ledger.public, NETWORK_ID, now_ms(), 10**7, 1)


def query() -> SignedEnvelope:
    message = pb.AccountQuery(network_id=NETWORK_ID, account=CLIENT.peer_id, issued_ms=now_ms())
    return seal(CLIENT_LEDGER, message)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():  # noqa: ASYNC110 - it has no event to wait for
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("fault", ["none", "liar", "refuser", "dead"])
async def test_a_session_is_granted_and_settled_with_one_bad_authority(
    tmp_path: Path, fault: str
) -> None:
    servicers: dict[str, LedgerServiceServicer] = {"liar": Liar(2), "refuser": Refuser()}
    bad = {2: servicers[fault]} if fault in servicers else {}
    async with four(tmp_path, bad) as committee:
        if fault == "dead":
            await committee.stop(2)
        honest = [0, 1, 3] if fault != "none" else [0, 1, 2, 3]
        async with joined(committee) as ledger:
            for sequence in (1, 2):
                asked = reservation(sequence)
                grant = await ledger.reserve(asked, cert(CLIENT, CLIENT_LEDGER))
                assert len(granters(grant, asked, committee.network.authorities)) == 3
                assert await ledger.settle(*settlement(sequence, 40)) == 40
            account = await ledger.account(query(), cert(CLIENT, CLIENT_LEDGER))
            assert account.available == 920
            evidence = await ledger.evidence(SessionId(b"\x01" * 16))
            assert evidence.settled and len(evidence.entries) == 3
            await until(lambda: all(committee.balances(n) == (920, 0, 80) for n in honest))
            if fault == "dead":
                # Back again, it is brought all that it missed.
                await committee.start(2)
                await until(lambda: committee.balances(2) == (920, 0, 80))
                await until(lambda: not list((tmp_path / "missed" / "2").iterdir()))


@pytest.mark.parametrize("bad", [{}, {2: Liar(2)}])
async def test_a_client_that_signs_twice_gets_at_most_one_grant_and_a_proof(
    tmp_path: Path, bad: Mapping[int, LedgerServiceServicer]
) -> None:
    async with (
        four(tmp_path, bad) as committee,
        joined(committee) as one,
        joined(committee, "other") as other,
    ):
        first, second = reservation(1, 600), reservation(1, 700, session_id=b"z" * 16)
        client_cert = cert(CLIENT, CLIENT_LEDGER)
        answers = await asyncio.gather(
            one.reserve(first, client_cert),
            other.reserve(second, client_cert),
            return_exceptions=True,
        )
        granted = [answer for answer in answers if isinstance(answer, SignedEnvelope)]
        assert len(granted) <= 1
        assert all(isinstance(answer, SignedEnvelope | PlaitError) for answer in answers)
        # Whoever saw both has the proof and tells it to the others.
        stranger = NoticeExchange(NoticeBoard(committee.network), committee.network, tuple)
        posts = posts_of([committee.network.authorities[n] for n in committee.running])
        for post in posts * 2:
            await stranger.exchange(post)
        assert stranger.board.frozen.keys() == {CLIENT.peer_id}
        for number in committee.running:
            alone = RemoteLedger(committee.network.authorities[number])
            with pytest.raises(LedgerError, match="frozen"):
                await alone.reserve(reservation(2), client_cert)
            await alone.close()


async def test_two_dead_of_four_grant_nothing_and_nothing_is_lost(tmp_path: Path) -> None:
    async with four(tmp_path, {}) as committee, joined(committee) as ledger:
        await committee.stop(2)
        await committee.stop(3)
        asked, client_cert = reservation(1), cert(CLIENT, CLIENT_LEDGER)
        with pytest.raises(PeerUnreachable, match="2 of 4"):
            await ledger.reserve(asked, client_cert)
        await committee.start(2)
        # The same reservation, not another under its number.
        for _ in range(100):
            try:
                grant = await ledger.reserve(asked, client_cert)
                break
            except PeerUnreachable:
                await asyncio.sleep(0.1)
        assert len(granters(grant, asked, committee.network.authorities)) == 3


async def test_what_all_refuse_is_refused(tmp_path: Path) -> None:
    async with four(tmp_path, {}) as committee, joined(committee) as ledger:
        client_cert = cert(CLIENT, CLIENT_LEDGER)
        with pytest.raises(LedgerError, match="credit"):
            await ledger.reserve(reservation(1, 5_000), client_cert)
        with pytest.raises(LedgerError, match="one lane"):
            await ledger.reserve(reservation(1, lane=7), client_cert)
        with pytest.raises(LedgerError, match="next number"):
            await ledger.reserve(reservation(3), client_cert)
        assert await ledger.reserve(reservation(1), client_cert)


async def test_learning_needs_a_quorum(tmp_path: Path) -> None:
    async with four(tmp_path, {}) as committee, joined(committee) as ledger:
        asked, client_cert = reservation(1), cert(CLIENT, CLIENT_LEDGER)
        members = committee.network.authorities
        grants = grants_in(await ledger.reserve(asked, client_cert))
        other = reservation(2)
        for grant in (grants[0], combine_grants(grants[:2], members)):
            with pytest.raises(LedgerError, match="needed"):
                await ledger._members[0].learn(
                    LearnRequest(reservation=asked, grant=grant, account_cert=client_cert)
                )
        with pytest.raises(LedgerError, match="another reservation"):
            await ledger._members[0].learn(
                LearnRequest(
                    reservation=other,
                    grant=combine_grants(grants, members),
                    account_cert=client_cert,
                )
            )


async def test_an_account_has_one_lane(tmp_path: Path) -> None:
    account = open_account(tmp_path, serial=True)
    numbers = []

    async def use() -> None:
        async with account.free_lane(idle=True) as lane:
            sequence, _ = lane.load()
            await asyncio.sleep(0)
            lane.save(sequence + 1, None)
            numbers.append((lane.number, sequence))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(use())
    assert sorted(numbers) == [(0, sequence) for sequence in range(1, 6)]


async def test_a_sub_account_holds_in_a_committee_and_who_was_away_learns_of_it(
    tmp_path: Path,
) -> None:
    def order(sequence: int, limit: int) -> SignedEnvelope:
        terms = SubAccount(AccountId(CLIENT.peer_id), "team", sequence, limit)
        message = pb.SubAccountOrder(network_id=NETWORK_ID, terms=terms_message(terms))
        return seal(CLIENT_LEDGER, message)

    own = cert(CLIENT, CLIENT_LEDGER)
    async with four(tmp_path, {}) as committee, joined(committee) as ledger:
        await committee.stop(2)
        await ledger.set_sub_account(order(1, 10), own)
        await ledger.set_sub_account(order(2, 100), own)
        await ledger.reserve(reservation(1, 60, sub_account="team"), own)
        await ledger.settle(*settlement(1, 25))
        [use] = await ledger.sub_accounts(query(), own)
        assert (use.terms.limit, use.used, use.pending) == (100, 25, 0)
        await committee.start(2)
        await until(lambda: committee.balances(2) == committee.balances(0) == (975, 0, 25))
        with pytest.raises(LedgerError, match="75 left of the limit"):
            await ledger.reserve(reservation(2, 76, sub_account="team"), own)
