"""What accounting costs on this machine: ``plait bench ledger``.

Rates per core are of processor time, the best of three rounds. Settlements go over gRPC and
TLS to an authority in a process of its own; what its disk can do is measured in the same
run, with the rows of a settlement. Compare figures within one run only.
"""

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time, time_ns
from typing import TypeVar

from plait.envelope import digest, open_envelope, seal
from plait.identity import SigningKey, openssl_matches, verify
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import Checkpoint
from plait.ledger.journal import Accepted, Books, Command, Issue, Reserve, Settle
from plait.ledger.journal_audit import JournalAuditor, JournalPage, audit_journal
from plait.ledger.merkle import leaf_hash, root_of
from plait.ledger.service.authority import EXPORT_PAGE
from plait.ledger.service.remote import RemoteLedger
from plait.ledger.service.serving import AuthorityKeys, serve_authority
from plait.ledger.service.store import Change, StoredEntry, open_store
from plait.ledger.service.verify_ahead import processes_for, verified_ahead
from plait.net.tls import create_identity
from plait.network_file import Authority, NetworkFile
from plait.v1 import ledger_pb2 as pb
from plait.v1.identity_pb2 import SignedEnvelope

NETWORK_ID = "bench"
Result = TypeVar("Result")
PAYEES = 3
AT_ONCE = 64
VOUCHERS_PER_S_BAR = 6_000
AUDIT_PER_S_BAR = 8_000
_KEYS = {
    name: SigningKey.from_seed(bytes([number]) * 32)
    for number, name in enumerate(
        ["founder", "issuer", "authority", "authority ledger", "log", "client", "client ledger"]
        + [f"payee {number}{key}" for number in range(PAYEES) for key in ("", " ledger")],
        start=1,
    )
}


@dataclass(frozen=True, slots=True)
class LedgerFigures:
    """Rates a second. A voucher pays three payees."""

    vouchers_verified_and_stored_per_s_per_core: int
    signatures_verified_per_s_per_core: int
    """By the strict check that everything here uses, each once."""
    signatures_verified_by_openssl_per_s_per_core: int
    vouchers_audited_per_s_per_core: int
    audit_of_signature_limit: float
    """Vouchers audited a second of a core as a share of the signatures it can verify."""
    vouchers_audited_per_s: int
    """Of wall time, with a process per core that verifies signatures, their start included."""
    audit_us_beside_signatures: float
    """Microseconds of processor time that the auditing process itself takes for each of them."""
    journal_entries_audited_per_s_per_core: int
    voucher_bytes: int
    settlements_per_s: int
    reservations_per_s: int
    authority_cpu_ms_per_operation: float
    commits_of_1_per_s: int
    commits_of_64_per_s: int
    """Settlement-sized changes a second that the disk makes durable, in groups of 64."""
    settlements_of_commit_limit: float
    """Settlements a second as a share of that limit."""


class Signers:
    """A client and its payees, who sign what the benchmark sends."""

    def __init__(self) -> None:
        self.now_ms = time_ns() // 1_000_000
        self.payees = [f"payee {number}" for number in range(PAYEES)]
        self.certs = {name: self._cert(name) for name in ("client", *self.payees)}

    def _cert(self, name: str) -> SignedEnvelope:
        ledger_key = _KEYS[f"{name} ledger"].public
        return make_key_cert(_KEYS[name], ledger_key, NETWORK_ID, self.now_ms, 10**8, 1)

    def order(self) -> SignedEnvelope:
        """Credit for all that follows."""
        message = pb.IssueOrder(
            network_id=NETWORK_ID,
            account=_KEYS["client"].peer_id,
            amount=10**15,
            order_id=b"bench",
            issued_ms=self.now_ms,
        )
        return seal(_KEYS["issuer"], message)

    def reservation(self, number: int) -> SignedEnvelope:
        """One session's reservation; each has a lane of its own, so that none waits."""
        message = pb.BudgetReservation(
            network_id=NETWORK_ID,
            account=_KEYS["client"].peer_id,
            lane=number,
            sequence=1,
            session_id=number.to_bytes(16, "big"),
            amount=300,
            caps=self._amounts(100),
            issued_ms=self.now_ms,
            expires_ms=self.now_ms + 3_600_000,
        )
        return seal(_KEYS["client ledger"], message)

    def voucher(self, number: int, amount: int = 60) -> SignedEnvelope:
        """A session's voucher."""
        message = pb.SessionVoucher(
            network_id=NETWORK_ID,
            session_id=number.to_bytes(16, "big"),
            sequence=amount,
            account=_KEYS["client"].peer_id,
            prompt_tokens=200,
            output_tokens=32 * amount,
            transcript=bytes(32),
            amounts=self._amounts(amount),
            issued_ms=self.now_ms,
        )
        return seal(_KEYS["client ledger"], message)

    def settlement(self, number: int) -> tuple[SignedEnvelope, SignedEnvelope]:
        """The first payee's request for a session, and the voucher it shows."""
        voucher = self.voucher(number)
        request = pb.SettlementRequest(
            network_id=NETWORK_ID,
            session_id=number.to_bytes(16, "big"),
            payee=_KEYS[self.payees[0]].peer_id,
            voucher_digest=digest(voucher.payload),
            release=True,
            issued_ms=self.now_ms,
        )
        return seal(_KEYS[f"{self.payees[0]} ledger"], request), voucher

    def _amounts(self, amount: int) -> list[pb.PayeeAmount]:
        return [pb.PayeeAmount(payee=_KEYS[p].peer_id, microcredits=amount) for p in self.payees]


def measure_ledger(
    folder: Path, settlements: int, progress: Callable[[str], None] = lambda what: None
) -> LedgerFigures:
    """Measure everything on the disk of ``folder``, with so many settlements."""
    progress("vouchers")
    stored_per_s, voucher_bytes = _vouchers_stored(folder)
    progress("signatures")
    verified_per_s, openssl_per_s = (_verify_rate(check) for check in (verify, openssl_matches))
    progress("audit")
    vouchers_per_s, entries_per_s = _audit_rates()
    audited_per_s, beside_us = _audit_rate_of_all_cores(settlements)
    progress("commits")
    singles, groups = (_commit_rate(folder, group) for group in (1, AT_ONCE))
    progress("settlements")
    reserved, settled, cpu_ms = _service_rates(folder, settlements)
    return LedgerFigures(
        vouchers_verified_and_stored_per_s_per_core=stored_per_s,
        signatures_verified_per_s_per_core=verified_per_s,
        signatures_verified_by_openssl_per_s_per_core=openssl_per_s,
        vouchers_audited_per_s_per_core=vouchers_per_s,
        audit_of_signature_limit=round(vouchers_per_s / verified_per_s, 3),
        vouchers_audited_per_s=audited_per_s,
        audit_us_beside_signatures=beside_us,
        journal_entries_audited_per_s_per_core=entries_per_s,
        voucher_bytes=voucher_bytes,
        settlements_per_s=settled,
        reservations_per_s=reserved,
        authority_cpu_ms_per_operation=cpu_ms,
        commits_of_1_per_s=singles,
        commits_of_64_per_s=groups,
        settlements_of_commit_limit=round(settled / groups, 3),
    )


def _vouchers_stored(folder: Path) -> tuple[int, int]:
    """Vouchers parsed, verified and made durable a second of one core; bytes of one."""
    signers, best, size = Signers(), 0.0, 0
    store = open_store(folder / "vouchers.db", NETWORK_ID)
    for round_number in range(3):
        first = round_number * 4_096
        messages = [
            signers.voucher(number).SerializeToString() for number in range(first, first + 4_096)
        ]
        size, start = len(messages[0]), process_time()
        for batch in _batches(messages, 256):
            envelopes = [SignedEnvelope.FromString(message) for message in batch]
            for envelope in envelopes:
                open_envelope(envelope, pb.SessionVoucher)
            store.commit([Change(objects=tuple(envelopes))])
        best = max(best, len(messages) / (process_time() - start))
    store.close()
    return round(best), size


def _verify_rate(check: Callable[[bytes, bytes, bytes], object]) -> int:
    """Signatures of a voucher's size that a check verifies a second of one core."""
    key, best = _KEYS["client ledger"], 0.0
    for round_number in range(3):
        messages = [b"%d %d" % (round_number, n) + bytes(240) for n in range(2_048)]
        signatures = [key.sign(message) for message in messages]
        start = process_time()
        for message, signature in zip(messages, signatures, strict=True):
            check(key.public, signature, message)
        best = max(best, len(messages) / (process_time() - start))
    return round(best)


def _batches(items: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _audit_rates() -> tuple[int, int]:
    """Vouchers, and entries of a journal of 16 vouchers a session, audited a second of a core."""
    signers, best = Signers(), 0.0
    for round_number in range(3):
        pages, checkpoint, vouchers = _journal(signers, round_number * 64, 64)
        auditor = JournalAuditor(NETWORK_ID, _KEYS["issuer"].public)
        start = process_time()
        report = audit_journal(auditor, pages, checkpoint)
        best = max(best, vouchers / (process_time() - start))
        if report.violations:
            raise AssertionError(report.violations)
    return round(best), round(best * 17 / 16)


def _audit_rate_of_all_cores(sessions: int) -> tuple[int, float]:
    """Vouchers audited a second of wall time, and microseconds of our own processor for each."""
    pages, checkpoint, vouchers = _journal(Signers(), 10_000, sessions)
    auditor = JournalAuditor(NETWORK_ID, _KEYS["issuer"].public)
    start, cpu = perf_counter(), process_time()
    report = audit_journal(auditor, verified_ahead(pages, processes_for(pages)), checkpoint)
    seconds, cpu = perf_counter() - start, process_time() - cpu
    if report.violations:
        raise AssertionError(report.violations)
    return round(vouchers / seconds), round(1e6 * cpu / vouchers, 1)


def _paged(pages: Sequence[JournalPage]) -> list[JournalPage]:
    """As an authority exports them: so many entries a page."""
    return [
        JournalPage(
            tuple(leaf for page in pages[at : at + EXPORT_PAGE] for leaf in page.entries),
            tuple(item for page in pages[at : at + EXPORT_PAGE] for item in page.objects),
        )
        for at in range(0, len(pages), EXPORT_PAGE)
    ]


def _journal(
    signers: Signers, first: int, sessions: int
) -> tuple[list[JournalPage], Checkpoint, int]:
    """A journal in memory: its pages, their checkpoint, and how many vouchers it has."""
    books, pages, leaves = Books(NETWORK_ID), list[JournalPage](), list[bytes]()

    def post(command: Command, *objects: SignedEnvelope) -> None:
        outcome = books.apply(command, signers.now_ms)
        if not isinstance(outcome, Accepted):
            raise AssertionError(outcome)
        payloads = tuple(entry.payload for entry in outcome.entries)
        leaves.extend(payloads)
        # As they come from a file: other objects than those that were signed.
        copies = (SignedEnvelope.FromString(item.SerializeToString()) for item in objects)
        pages.append(JournalPage(payloads, tuple(copies)))

    order = signers.order()
    opened = pb.IssueOrder.FromString(order.payload)
    post(Issue(opened, digest(order.payload)), order)
    for number in range(first, first + sessions):
        reservation = signers.reservation(number)
        message = pb.BudgetReservation.FromString(reservation.payload)
        post(Reserve(message, digest(reservation.payload)), reservation, signers.certs["client"])
        for amount in range(1, 17):
            voucher = signers.voucher(number, amount)
            shown = pb.SessionVoucher.FromString(voucher.payload)
            request = pb.SettlementRequest(
                network_id=NETWORK_ID,
                session_id=shown.session_id,
                payee=shown.amounts[0].payee,
                voucher_digest=digest(voucher.payload),
            )
            post(Settle(shown, digest(voucher.payload), request, digest(b"")), voucher)
    root = root_of([leaf_hash(leaf) for leaf in leaves])
    return _paged(pages), Checkpoint("bench", len(leaves), root), 16 * sessions


def _commit_rate(folder: Path, group: int) -> int:
    """Settlement-sized changes made durable a second, so many in each transaction."""
    store, index = open_store(folder / f"commits-{group}.db", NETWORK_ID), 0
    start = perf_counter()
    while perf_counter() - start < 2:
        batch = []
        for _ in range(group):
            payload = index.to_bytes(8, "big") + bytes(240)
            objects = tuple(
                SignedEnvelope(payload=payload + bytes([kind]), signature=bytes(64))
                for kind in (1, 2)
            )
            entry = StoredEntry(index, payload, leaf_hash(payload))
            batch.append(Change(entries=(entry,), objects=objects))
            index += 1
        store.commit(batch)
    seconds = perf_counter() - start
    store.close()
    return round(index / seconds)


def network_of(port: int, certificate: bytes) -> NetworkFile:
    """A network with one authority on this machine."""
    authority = Authority(
        peer=_KEYS["authority"].peer_id,
        address=f"127.0.0.1:{port}",
        ledger_key=_KEYS["authority ledger"].public,
        log_key=_KEYS["log"].public,
        log_origin="bench.example/log",
        certificate=certificate,
    )
    founder, issuer = _KEYS["founder"].peer_id, _KEYS["issuer"].public
    return NetworkFile(NETWORK_ID, founder, "open", issuer, (authority,), ())


def _serve(folder: Path, pipe: Connection) -> None:
    """An authority in a process of its own, until the pipe says to stop."""

    async def run() -> None:
        tls = create_identity(_KEYS["authority"].peer_id)
        network = network_of(0, tls.cert_der)
        keys = AuthorityKeys(_KEYS["authority ledger"], _KEYS["log"])
        path, pem = folder / "journal.db", (tls.cert_pem, tls.key_pem)
        authority = network.authorities[0]
        async with serve_authority(path, network, authority, keys, "127.0.0.1", 0, pem) as running:
            pipe.send((running.port, tls.cert_der))
            await asyncio.to_thread(pipe.recv)
            pipe.send(process_time())
            await asyncio.to_thread(pipe.recv)
            pipe.send(process_time())

    with suppress(EOFError):
        _run(run)


def _run(main: Callable[[], Coroutine[object, object, Result]]) -> Result:
    """With the event loop of a node."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def _service_rates(folder: Path, sessions: int) -> tuple[int, int, float]:
    """Reservations and settlements a second, and the authority's milliseconds for each."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(folder, theirs), daemon=True)
    process.start()
    port, certificate = ours.recv()
    authority = network_of(port, certificate).authorities[0]
    signers = Signers()
    reservations = [signers.reservation(number) for number in range(sessions)]
    settlements = [signers.settlement(number) for number in range(sessions)]

    async def run() -> tuple[float, float]:
        ledger = RemoteLedger(authority, deadline_s=60)
        try:
            await ledger.issue(signers.order())
            ours.send("begin")
            client = signers.certs["client"]
            reserve_s = await _timed([partial(ledger.reserve, one, client) for one in reservations])
            payee = signers.certs[signers.payees[0]]
            settle_s = await _timed(
                [partial(ledger.settle, request, payee, shown) for request, shown in settlements]
            )
            return reserve_s, settle_s
        finally:
            await ledger.close()

    reserve_s, settle_s = _run(run)
    began = ours.recv()
    ours.send("end")
    cpu_ms = 1_000 * (ours.recv() - began) / (2 * sessions)
    process.join()
    return round(sessions / reserve_s), round(sessions / settle_s), round(cpu_ms, 3)


async def _timed(calls: Sequence[Callable[[], Awaitable[object]]]) -> float:
    """Seconds to make all calls, ``AT_ONCE`` at once."""
    waiting = iter(calls)

    async def work() -> None:
        for call in waiting:
            await call()

    start = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(work())
    return perf_counter() - start
