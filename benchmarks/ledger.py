"""What accounting costs: ``python benchmarks/ledger.py [--settlements N] [--tokens N]``.

Prints one JSON object. Rates per core are of processor time. Settlements go over gRPC and
TLS to an authority in a process of its own, whose disk is the folder ``--dir`` (by default
one for temporary files); the limit of its disk is measured there in the same run, with the
rows of a settlement: commits of one, and of groups of 64 and 1,000. Compare figures within
one run only.
"""

import argparse
import asyncio
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time, time_ns

from plait.envelope import digest, pae, seal
from plait.identity import verify
from plait.ledger.bundle import build_bundle
from plait.ledger.certs import make_key_cert
from plait.ledger.merkle import leaf_hash
from plait.ledger.service.authority import AuthorityKeys, serve_authority
from plait.ledger.service.remote import RemoteLedger
from plait.ledger.service.store import Change, StoredEntry, open_store
from plait.ledger.verify import verify_bundle
from plait.ledger.voucher import open_voucher
from plait.net.tls import create_identity
from plait.network_file import Authority, NetworkFile
from plait.testing.accounting import NETWORK_ID, PaperSession, Plot, key_of, paper_network
from plait.v1 import ledger_pb2 as pb
from plait.v1.identity_pb2 import SignedEnvelope

VERIFY_BUNDLES = """
const { verifyBundle, parseNetworkFile } = require(process.argv[1]);
const fs = require("node:fs");
const [, , bundle, network] = process.argv;
verifyBundle(fs.readFileSync(bundle), parseNetworkFile(fs.readFileSync(network, "utf8"))).then(
  (report) => console.log(report.outcome),
);
"""


def rate_per_core(action: Callable[[], object], seconds: float = 1.0) -> int:
    """How often a second of one core can do it: the best of three rounds."""
    best = 0.0
    for _ in range(3):
        count, start = 0, process_time()
        while (spent := process_time() - start) < seconds / 3:
            for _ in range(50):
                action()
            count += 50
        best = max(best, count / spent)
    return round(best)


def voucher_rates(folder: Path) -> dict[str, int]:
    """Vouchers through one signature check, through all checks, and stored too."""
    session = PaperSession(Plot()).play()
    voucher = session.vouchers[-1]
    message = pae(voucher.payload_type, voucher.payload)
    store, number = open_store(folder / "vouchers.db", NETWORK_ID), 0

    def store_batch() -> None:
        nonlocal number
        batch = []
        for _ in range(64):
            envelope = SignedEnvelope.FromString(voucher.SerializeToString())
            open_voucher(envelope, session.terms)
            number += 1
            # The digest is the key of the table: each must be stored as if it were new.
            envelope.payload = envelope.payload + number.to_bytes(8, "big")
            batch.append(Change(objects=(envelope,)))
        store.commit(batch)

    start = perf_counter()
    while perf_counter() - start < 2:
        store_batch()
    stored_per_s = round(number / (perf_counter() - start))
    store.close()
    return {
        "signatures_verified_per_s_per_core": rate_per_core(
            lambda: verify(voucher.signer, voucher.signature, message)
        ),
        "vouchers_opened_per_s_per_core": rate_per_core(
            lambda: open_voucher(voucher, session.terms)
        ),
        "vouchers_opened_and_stored_per_s": stored_per_s,
        "voucher_bytes": voucher.ByteSize(),
        "voucher_payees": len(session.terms.stages),
    }


def commit_rates(folder: Path) -> dict[str, int]:
    """Settlement-sized changes a second that the disk makes durable, by group size."""
    rates = {}
    envelope = SignedEnvelope(payload=bytes(250), signature=bytes(64), signer=bytes(32))
    for group in (1, 64, 1_000):
        store, index = open_store(folder / f"commits-{group}.db", NETWORK_ID), 0
        start = perf_counter()
        while perf_counter() - start < 2:
            batch = []
            for _ in range(group):
                payload = index.to_bytes(8, "big") + bytes(240)
                objects = tuple(
                    SignedEnvelope(payload=payload + bytes([kind]), signature=envelope.signature)
                    for kind in (1, 2)
                )
                entry = StoredEntry(index, payload, leaf_hash(payload))
                batch.append(Change(entries=(entry,), objects=objects))
                index += 1
            store.commit(batch)
        rates[f"groups_of_{group}"] = round(index / (perf_counter() - start))
        store.close()
    return rates


def network_of(port: int, certificate: bytes) -> NetworkFile:
    """A network with one authority on this machine."""
    authority = Authority(
        peer=key_of("authority").peer_id,
        address=f"127.0.0.1:{port}",
        ledger_key=key_of("authority ledger").public,
        log_key=key_of("authority log").public,
        log_origin="bench.example/log",
        certificate=certificate,
    )
    return paper_network(authorities=(authority,))


def serve(folder: Path, pipe: Connection) -> None:
    """An authority in a process of its own, until the pipe says to stop."""

    async def run() -> None:
        tls = create_identity(key_of("authority").peer_id)
        network = network_of(0, tls.cert_der)
        keys = AuthorityKeys(key_of("authority ledger"), key_of("authority log"))
        path, pem = folder / "journal.db", (tls.cert_pem, tls.key_pem)
        authority = network.authorities[0]
        async with serve_authority(path, network, authority, keys, "127.0.0.1", 0, pem) as running:
            pipe.send((running.port, tls.cert_der))
            await asyncio.to_thread(pipe.recv)
            pipe.send(process_time())

    with suppress(EOFError):
        asyncio.run(run())


class Accounts:
    """A client and three payees who sign what the benchmark sends."""

    def __init__(self) -> None:
        self.now_ms = time_ns() // 1_000_000
        self.payees = [f"payee {number}" for number in range(3)]
        self.certs = {name: self._cert(name) for name in ("client", *self.payees)}

    def _cert(self, name: str) -> SignedEnvelope:
        ledger_key = key_of(f"{name} ledger").public
        return make_key_cert(key_of(name), ledger_key, NETWORK_ID, self.now_ms, 10**8, 1)

    def order(self) -> SignedEnvelope:
        """Credit for all that follows."""
        message = pb.IssueOrder(
            network_id=NETWORK_ID,
            account=key_of("client").peer_id,
            amount=10**15,
            order_id=b"bench",
            issued_ms=self.now_ms,
        )
        return seal(key_of("issuer"), message)

    def reservation(self, number: int) -> SignedEnvelope:
        """One session's reservation; each has a lane of its own, so that none waits."""
        message = pb.BudgetReservation(
            network_id=NETWORK_ID,
            account=key_of("client").peer_id,
            lane=number,
            sequence=1,
            session_id=number.to_bytes(16, "big"),
            amount=300,
            caps=self._amounts(100),
            issued_ms=self.now_ms,
            expires_ms=self.now_ms + 3_600_000,
        )
        return seal(key_of("client ledger"), message)

    def settlement(self, number: int) -> tuple[SignedEnvelope, SignedEnvelope]:
        """The first payee's request for a session, and the voucher it shows."""
        voucher = seal(
            key_of("client ledger"),
            pb.SessionVoucher(
                network_id=NETWORK_ID,
                session_id=number.to_bytes(16, "big"),
                sequence=1,
                account=key_of("client").peer_id,
                transcript=bytes(32),
                amounts=self._amounts(60),
                issued_ms=self.now_ms,
            ),
        )
        request = pb.SettlementRequest(
            network_id=NETWORK_ID,
            session_id=number.to_bytes(16, "big"),
            payee=key_of(self.payees[0]).peer_id,
            voucher_digest=digest(voucher.payload),
            release=True,
            issued_ms=self.now_ms,
        )
        return seal(key_of(f"{self.payees[0]} ledger"), request), voucher

    def _amounts(self, amount: int) -> list[pb.PayeeAmount]:
        return [
            pb.PayeeAmount(payee=key_of(name).peer_id, microcredits=amount) for name in self.payees
        ]


async def timed(calls: Sequence[Callable[[], object]], at_once: int) -> float:
    """Seconds to make all calls, so many at once."""
    waiting = iter(calls)

    async def work() -> None:
        for call in waiting:
            await call()  # type: ignore[misc]

    start = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(work())
    return perf_counter() - start


async def service_rates(authority: Authority, sessions: int) -> dict[str, int]:
    """Reservations and settlements a second, 64 at once, over gRPC and TLS."""
    accounts, ledger = Accounts(), RemoteLedger(authority, deadline_s=60)
    certs = accounts.certs
    reservations = [accounts.reservation(number) for number in range(sessions)]
    settlements = [accounts.settlement(number) for number in range(sessions)]
    try:
        await ledger.issue(accounts.order())
        reserve_s = await timed(
            [lambda one=one: ledger.reserve(one, certs["client"]) for one in reservations], 64
        )
        payee_cert = certs[accounts.payees[0]]
        settle_s = await timed(
            [lambda one=one: ledger.settle(one[0], payee_cert, one[1]) for one in settlements], 64
        )
    finally:
        await ledger.close()
    return {
        "reservations_per_s": round(sessions / reserve_s),
        "settlements_per_s": round(sessions / settle_s),
        "payees_paid_per_s": round(3 * sessions / settle_s),
    }


def service(folder: Path, sessions: int) -> dict[str, float]:
    """Rates of an authority in another process, with its processor time per operation."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(folder, theirs), daemon=True)
    process.start()
    port, certificate = ours.recv()
    authority = network_of(port, certificate).authorities[0]
    rates: dict[str, float] = dict(asyncio.run(service_rates(authority, sessions)))
    ours.send("stop")
    rates["authority_cpu_ms_per_operation"] = round(1_000 * ours.recv() / (2 * sessions), 3)
    process.join()
    return rates


def bundle_figures(tokens: int, folder: Path) -> dict[str, float]:
    """A long answer of three stages: size, and seconds to check it, by both programs."""
    plot = replace(
        Plot(),
        prompt_ids=tuple(range(3, 259)),
        drawn_ids=tuple(10 + number % 40_000 for number in range(tokens)),
        max_tokens=tokens,
        chunk_tokens=32,
        prefill_chunk_tokens=256,
    )
    session = PaperSession(plot)
    start = process_time()
    session.play()
    accounting_s = process_time() - start
    data = build_bundle(session.bundle_parts(), key_of("client"))
    seconds = []
    for _ in range(3):
        start = perf_counter()
        report = verify_bundle(data, paper_network())
        seconds.append(perf_counter() - start)
        assert report.outcome == "verified", report.lines()
    figures = {
        "tokens": tokens,
        "bundle_bytes": len(data),
        "bundle_bytes_per_token": round(len(data) / tokens, 1),
        "verify_s": round(min(seconds), 3),
        "accounting_us_per_token": round(1e6 * accounting_s / tokens, 1),
    }
    node = shutil.which("node")
    if node is not None:
        figures["verify_javascript_s"] = javascript_s(node, data, folder)
    return figures


def javascript_s(node: str, data: bytes, folder: Path) -> float:
    """Seconds of ``node`` for the same, its start included."""
    script = Path(__file__).parents[1] / "docs" / "verify.js"
    bundle, network = folder / "bundle.json", folder / "network.toml"
    bundle.write_bytes(data)
    network.write_text(paper_network().to_toml())
    start = perf_counter()
    shown = subprocess.run(
        [node, "--no-warnings", "-e", VERIFY_BUNDLES, str(script), str(bundle), str(network)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert shown.strip() == "verified", shown
    return round(perf_counter() - start, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settlements", type=int, default=2_000)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--dir", type=Path, help="A folder on the disk to measure.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        folder = Path(scratch)
        figures = {
            "vouchers": voucher_rates(folder),
            "durable_changes_per_s": commit_rates(folder),
            "service": service(folder, arguments.settlements),
            "bundle": bundle_figures(arguments.tokens, folder),
        }
    json.dump(figures, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
