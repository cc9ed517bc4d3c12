"""The authority over real gRPC and TLS on loopback: rules, refusals, evidence."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from plait.envelope import digest, open_envelope, seal
from plait.errors import ConfigError, LedgerError, PeerUnreachable
from plait.identity import SigningKey
from plait.ledger.balances import EntryKind, entry_from_payload
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import open_checkpoint
from plait.ledger.journal import FRESHNESS_MS, GRACE_MS
from plait.ledger.journal_audit import JournalAuditor, audit_journal
from plait.ledger.merkle import leaf_hash, root_of, verify_consistency, verify_inclusion
from plait.ledger.service.authority import KEY_OVERLAP_MS
from plait.ledger.service.remote import AccountState, RemoteLedger
from plait.ledger.service.serving import AuthorityKeys, Clock, RunningAuthority, serve_authority
from plait.ledger.service.store import Store
from plait.net.tls import create_identity
from plait.network_file import Authority, NetworkFile
from plait.types import SessionId
from plait.v1 import ledger_pb2 as pb
from plait.v1.identity_pb2 import SignedEnvelope

NETWORK = "net-1"
START_MS = 1_700_000_000_000
SESSION = SessionId(b"s" * 16)
ISSUER, CLIENT, CLIENT_LEDGER, PAYEE, PAYEE_LEDGER, LEDGER, LOG, PEER = (
    SigningKey.from_seed(bytes([seed]) * 32) for seed in range(1, 9)
)


class Times:
    """Wall and steady clock of a test."""

    def __init__(self) -> None:
        self.wall_ms = START_MS
        self.steady_ms = 0

    def clock(self) -> Clock:
        return Clock(lambda: self.wall_ms, lambda: self.steady_ms)

    def pass_ms(self, step_ms: int) -> None:
        self.wall_ms += step_ms
        self.steady_ms += step_ms


@dataclass
class Service:
    """A serving authority and a client of it."""

    running: RunningAuthority
    remote: RemoteLedger
    authority: Authority
    times: Times

    async def expire(self) -> None:
        clock = Clock(lambda: self.times.wall_ms, lambda: self.times.steady_ms)
        await self.running.recorder.expire(clock.now_ms())

    def open_checkpoint(self, note: str) -> tuple[int, bytes]:
        opened = open_checkpoint(note, self.authority.log_origin, self.authority.log_key)
        return opened.size, opened.root


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Service]:
    tls, times = create_identity(PEER.peer_id), Times()
    authority = Authority(
        peer=PEER.peer_id,
        address="127.0.0.1:0",
        ledger_key=LEDGER.public,
        log_key=LOG.public,
        log_origin="ledger.example/net-1",
        certificate=tls.cert_der,
    )
    network = NetworkFile(NETWORK, PEER.peer_id, "open", ISSUER.public, (authority,), ())
    keys = AuthorityKeys(LEDGER, LOG)
    async with serve_authority(
        folder / "journal.db",
        network,
        authority,
        keys,
        "127.0.0.1",
        0,
        (tls.cert_pem, tls.key_pem),
        clock=times.clock(),
    ) as running:
        bound = dataclasses.replace(authority, address=f"127.0.0.1:{running.port}")
        remote = RemoteLedger(bound)
        try:
            yield Service(running, remote, bound, times)
        finally:
            await remote.close()


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        yield running


def cert(peer: SigningKey, ledger: SigningKey, serial: int = 1) -> SignedEnvelope:
    return make_key_cert(peer, ledger.public, NETWORK, START_MS, 10**9, serial)


CLIENT_CERT, PAYEE_CERT = cert(CLIENT, CLIENT_LEDGER), cert(PAYEE, PAYEE_LEDGER)


def order(amount: int = 1_000, key: SigningKey = ISSUER) -> SignedEnvelope:
    message = pb.IssueOrder(
        network_id=NETWORK,
        account=CLIENT.peer_id,
        amount=amount,
        order_id=b"first",
        issued_ms=START_MS,
    )
    return seal(key, message)


def reservation(
    sequence: int = 1,
    *,
    amount: int = 100,
    key: SigningKey = CLIENT_LEDGER,
    issued_ms: int = START_MS,
    session_id: bytes = SESSION,
) -> SignedEnvelope:
    message = pb.BudgetReservation(
        network_id=NETWORK,
        account=CLIENT.peer_id,
        sequence=sequence,
        session_id=session_id,
        amount=amount,
        caps=[pb.PayeeAmount(payee=PAYEE.peer_id, microcredits=80)],
        issued_ms=issued_ms,
        expires_ms=issued_ms + 60_000,
    )
    return seal(key, message)


def voucher(amount: int, key: SigningKey = CLIENT_LEDGER) -> SignedEnvelope:
    message = pb.SessionVoucher(
        network_id=NETWORK,
        session_id=SESSION,
        account=CLIENT.peer_id,
        amounts=[pb.PayeeAmount(payee=PAYEE.peer_id, microcredits=amount)],
    )
    return seal(key, message)


def request(
    shown: SignedEnvelope, *, release: bool = False, key: SigningKey = PAYEE_LEDGER
) -> SignedEnvelope:
    message = pb.SettlementRequest(
        network_id=NETWORK,
        session_id=SESSION,
        payee=PAYEE.peer_id,
        voucher_digest=digest(shown.payload),
        release=release,
        issued_ms=START_MS,
    )
    return seal(key, message)


def query(
    key: SigningKey, issued_ms: int = START_MS, account: str = CLIENT.peer_id
) -> SignedEnvelope:
    return seal(key, pb.AccountQuery(network_id=NETWORK, account=account, issued_ms=issued_ms))


async def test_one_session_with_evidence(service: Service) -> None:
    remote = service.remote
    assert await remote.issue(order()) == 0
    grant_envelope = await remote.reserve(reservation(), CLIENT_CERT)
    grant = open_envelope(grant_envelope, pb.ReservationGrant, signer=LEDGER.public)
    assert grant.reservation_digest == digest(reservation().payload)
    assert (grant.amount, grant.granted_ms, grant.expires_ms) == (100, START_MS, START_MS + 60_000)
    # The answer may get lost: the same request brings the same bytes.
    service.times.pass_ms(10_000)
    assert await remote.reserve(reservation(), CLIENT_CERT) == grant_envelope
    assert await remote.account(query(CLIENT_LEDGER), CLIENT_CERT) == AccountState(900, 100, 2)
    shown = voucher(30)
    assert await remote.settle(request(shown), PAYEE_CERT, shown) == 30
    evidence = await remote.evidence(SESSION)
    assert not evidence.settled
    shown = voucher(42)
    assert await remote.settle(request(shown, release=True), PAYEE_CERT, shown) == 42
    evidence = await remote.evidence(SESSION)
    assert evidence.settled
    kinds = [entry_from_payload(payload).kind for payload in evidence.entries]
    assert kinds == [EntryKind.RESERVE, EntryKind.SETTLE, EntryKind.SETTLE, EntryKind.VOID]
    size, root = service.open_checkpoint(evidence.checkpoint)
    for payload, (index, hashes) in zip(evidence.entries, evidence.proofs, strict=True):
        assert entry_from_payload(payload).index == index
        verify_inclusion(leaf_hash(payload), index, size, hashes, root)
    assert await remote.account(query(ISSUER)) == AccountState(958, 0, 2)
    history = await remote.history(query(CLIENT_LEDGER), CLIENT_CERT, limit=2)
    assert [entry.index for entry in history] == [4, 3]


async def test_a_payee_releases_without_a_voucher(service: Service) -> None:
    remote = service.remote
    await remote.issue(order())
    await remote.reserve(reservation(), CLIENT_CERT)
    nothing = SignedEnvelope()
    assert await refusal(remote.release(request(nothing), PAYEE_CERT)) == "malformed"
    message = pb.SettlementRequest(
        network_id=NETWORK,
        session_id=SESSION,
        payee=PAYEE.peer_id,
        release=True,
        issued_ms=START_MS,
    )
    assert await refusal(remote.release(seal(CLIENT_LEDGER, message), PAYEE_CERT)) == "signature"
    assert await remote.release(seal(PAYEE_LEDGER, message), PAYEE_CERT) == 0
    assert await remote.account(query(ISSUER)) == AccountState(1_000, 0, 2)
    assert (await remote.evidence(SESSION)).settled


async def test_a_credit_limit_is_the_issuers_to_set(service: Service) -> None:
    remote = service.remote
    message = pb.LimitOrder(
        network_id=NETWORK,
        account=CLIENT.peer_id,
        credit_limit=100,
        order_id=b"limit",
        issued_ms=START_MS,
    )
    assert await refusal(remote.set_limit(seal(CLIENT, message))) == "signature"
    assert await refusal(remote.reserve(reservation(), CLIENT_CERT)) == "credit"
    assert await remote.set_limit(seal(ISSUER, message)) == 0
    await remote.reserve(reservation(), CLIENT_CERT)
    assert await remote.account(query(ISSUER)) == AccountState(0, 100, 2, 100)


async def test_the_export_carries_what_was_signed(service: Service) -> None:
    remote = service.remote
    await remote.issue(order())
    await remote.reserve(reservation(), CLIENT_CERT)
    shown = voucher(30)
    await remote.settle(request(shown), PAYEE_CERT, shown)
    await remote.settle(request(shown, release=True), PAYEE_CERT, shown)
    pages = [page async for page in remote.export_pages()]
    note = await remote.checkpoint()
    signed = open_checkpoint(note, service.authority.log_origin, service.authority.log_key)
    report = audit_journal(JournalAuditor(NETWORK, ISSUER.public), pages, signed)
    assert (report.entries, report.causes, report.violations) == (4, 4, ())


async def test_export_and_consistency(service: Service) -> None:
    remote = service.remote
    assert service.open_checkpoint(await remote.checkpoint())[0] == 0
    await remote.issue(order())
    first_size, first_root = service.open_checkpoint(
        (await service.running.recorder.checkpoint(covering=1))[1]
    )
    await remote.reserve(reservation(), CLIENT_CERT)
    size, root = service.open_checkpoint((await remote.evidence(SESSION)).checkpoint)
    leaves = [leaf_hash(payload) async for payload in remote.export()]
    assert root_of(leaves[:size]) == root
    proof = await remote.consistency(first_size, size)
    verify_consistency(first_size, size, first_root, root, proof)
    assert len([payload async for payload in remote.export(1)]) == 1
    for sizes in ((0, 1), (2, 1), (1, 3)):
        with pytest.raises(LedgerError, match="malformed"):
            await remote.consistency(*sizes)


async def refusal(call: object) -> str:
    """The code in a refusal's message."""
    assert asyncio.iscoroutine(call)
    with pytest.raises(LedgerError) as caught:
        await call
    return str(caught.value).split(": ")[1]


async def test_refusals(service: Service) -> None:
    remote = service.remote
    assert await refusal(remote.issue(order(key=CLIENT))) == "signature"
    assert await refusal(remote.issue(reservation())) == "signature"  # another type of object
    await remote.issue(order())
    assert await refusal(remote.issue(order(5))) == "order-id"
    assert await refusal(remote.reserve(reservation(amount=1_001), CLIENT_CERT)) == "credit"
    assert await refusal(remote.reserve(reservation(key=PAYEE_LEDGER), CLIENT_CERT)) == "signature"
    assert await refusal(remote.reserve(reservation(key=PAYEE_LEDGER), PAYEE_CERT)) == "signature"
    assert await refusal(remote.reserve(reservation(), SignedEnvelope())) == "signature"
    assert await refusal(remote.reserve(reservation(2), CLIENT_CERT)) == "sequence"
    late = reservation(issued_ms=START_MS - FRESHNESS_MS - 1)
    assert await refusal(remote.reserve(late, CLIENT_CERT)) == "stale"
    shown = voucher(10)
    assert await refusal(remote.settle(request(shown), PAYEE_CERT, shown)) == "session"
    assert await refusal(remote.evidence(SESSION)) == "session"
    await remote.reserve(reservation(), CLIENT_CERT)
    forged = voucher(10, key=PAYEE_LEDGER)
    assert await refusal(remote.settle(request(forged), PAYEE_CERT, forged)) == "signature"
    assert await refusal(remote.settle(request(shown), PAYEE_CERT, voucher(20))) == "malformed"
    stolen = request(shown, key=CLIENT_LEDGER)
    assert await refusal(remote.settle(stolen, PAYEE_CERT, shown)) == "signature"
    assert await refusal(remote.account(query(PAYEE_LEDGER), CLIENT_CERT)) == "signature"
    assert await refusal(remote.account(query(CLIENT_LEDGER, 0), CLIENT_CERT)) == "stale"
    assert await refusal(remote.account(query(ISSUER, 0))) == "stale"
    fork = reservation(session_id=b"t" * 16)
    assert await refusal(remote.reserve(fork, CLIENT_CERT)) == "fork"
    assert await refusal(remote.reserve(reservation(2), CLIENT_CERT)) == "frozen"
    assert await remote.settle(request(shown), PAYEE_CERT, shown) == 10


async def test_a_replaced_certificate_is_refused_but_its_vouchers_still_pay(
    service: Service,
) -> None:
    remote = service.remote
    await remote.issue(order())
    await remote.reserve(reservation(), CLIENT_CERT)
    rotated = SigningKey.from_seed(bytes(32))
    other = reservation(2, key=rotated, session_id=b"t" * 16)
    await remote.reserve(other, cert(CLIENT, rotated, serial=2))
    # For a moment the old key may still begin something: another process was about to.
    await remote.reserve(reservation(3, session_id=b"u" * 16), CLIENT_CERT)
    later_ms = START_MS + KEY_OVERLAP_MS + 1
    service.times.pass_ms(KEY_OVERLAP_MS + 1)
    late = reservation(4, session_id=b"v" * 16, issued_ms=later_ms)
    assert await refusal(remote.reserve(late, CLIENT_CERT)) == "signature"
    # What it began goes on: the same again is granted, and so is the next epoch of its session.
    assert await remote.reserve(reservation(), CLIENT_CERT)
    more = pb.BudgetReservation.FromString(reservation(4, issued_ms=later_ms).payload)
    more.epoch = 2
    assert await remote.reserve(seal(CLIENT_LEDGER, more), CLIENT_CERT)
    shown = voucher(10)
    assert await remote.settle(request(shown), PAYEE_CERT, shown) == 10


async def test_concurrent_settlements_of_one_voucher_pay_once(service: Service) -> None:
    remote = service.remote
    await remote.issue(order())
    await remote.reserve(reservation(), CLIENT_CERT)
    vouchers = [voucher(amount) for amount in (10, 50, 30, 50, 20)]
    calls = [remote.settle(request(shown), PAYEE_CERT, shown) for shown in vouchers * 4]
    paid = await asyncio.gather(*calls)
    assert max(paid) == 50
    assert service.running.recorder.books.balances.all()[PAYEE.peer_id] == 50  # type: ignore[index]


async def test_who_signs_two_vouchers_of_one_number_is_granted_nothing_more(
    service: Service,
) -> None:
    remote = service.remote
    await remote.issue(order())
    await remote.reserve(reservation(), CLIENT_CERT)
    for amount in (10, 10):
        await remote.settle(request(voucher(amount)), PAYEE_CERT, voucher(amount))
    more = reservation(2, session_id=b"another session!"[:16])
    await remote.reserve(more, CLIENT_CERT)
    # The other one is paid all the same: the credit was set aside.
    assert await remote.settle(request(voucher(20)), PAYEE_CERT, voucher(20)) == 20
    again = reservation(3, session_id=b"yet another one!"[:16])
    assert await refusal(remote.reserve(again, CLIENT_CERT)) == "frozen"


async def test_holds_expire_after_grace_and_no_clock_jump_hastens_it(service: Service) -> None:
    remote, times = service.remote, service.times
    await remote.issue(order())
    await remote.reserve(reservation(), CLIENT_CERT)
    clock = times.clock()
    times.wall_ms += 24 * 3_600_000
    assert clock.expiry_ms() == START_MS
    times.wall_ms = START_MS
    times.pass_ms(60_000 + GRACE_MS - 1)
    await service.expire()
    assert not (await remote.evidence(SESSION)).settled
    times.pass_ms(1)
    assert clock.expiry_ms() == times.wall_ms
    await service.expire()
    assert (await remote.evidence(SESSION)).settled


async def test_a_big_message_is_refused_before_it_is_parsed(service: Service) -> None:
    big = SignedEnvelope(payload=bytes(70_000))
    with pytest.raises(LedgerError, match="larger than max"):
        await service.remote.issue(big)


async def test_nobody_else_can_pose_as_the_ledger(service: Service) -> None:
    stranger = create_identity(PEER.peer_id)
    forged = dataclasses.replace(service.authority, certificate=stranger.cert_der)
    remote = RemoteLedger(forged)
    with pytest.raises(PeerUnreachable):
        await remote.checkpoint()
    await remote.close()
    # As a task does that ends after the connection it asks over.
    with pytest.raises(PeerUnreachable, match="closed"):
        await remote.checkpoint()


async def test_a_stopped_ledger_is_unreachable_not_refusing(service: Service) -> None:
    store = service.running.recorder.store
    assert isinstance(store, Store)
    store._failed = True
    with pytest.raises(PeerUnreachable, match="stopped"):
        await service.remote.issue(order())
    assert service.running.stopped.is_set()
    with pytest.raises(PeerUnreachable):
        await service.remote.account(query(ISSUER))


async def test_errors_of_the_body_come_out_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with serving(tmp_path):
            raise KeyError("body")


async def test_wrong_keys_and_taken_ports_are_configuration_errors(
    service: Service, tmp_path: Path
) -> None:
    network = NetworkFile(NETWORK, PEER.peer_id, "open", ISSUER.public, (service.authority,), ())
    tls = create_identity(PEER.peer_id)
    pair = (tls.cert_pem, tls.key_pem)
    path = tmp_path / "other" / "journal.db"
    for keys, port in (
        (AuthorityKeys(LOG, LEDGER), 0),
        (AuthorityKeys(LEDGER, LOG), service.running.port),
    ):
        with pytest.raises(ConfigError):
            async with serve_authority(
                path, network, service.authority, keys, "127.0.0.1", port, pair
            ):
                pass
