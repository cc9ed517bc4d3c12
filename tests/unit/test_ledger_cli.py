"""``plait ledger`` against an authority in a thread."""

import asyncio
import copy
import csv
import dataclasses
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from plait.cli.root import invoke
from plait.envelope import digest, seal
from plait.identity import SigningKey, load_key, save_key
from plait.ledger.canonical import encode_canonical
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.journal_holds import FRESHNESS_MS
from plait.ledger.service.remote import RemoteLedger
from plait.ledger.service.serving import AuthorityKeys, serve_authority
from plait.net.tls import create_identity
from plait.network_file import Authority, NetworkFile, load_network_file
from plait.v1 import ledger_pb2 as pb

FOUNDER, ISSUER, PEER, LEDGER, LOG, PAYEE, PAYEE_LEDGER = (
    SigningKey.from_seed(bytes([seed]) * 32) for seed in range(1, 8)
)


@dataclass
class World:
    """A network file on disk with a serving authority behind it."""

    path: Path
    network: NetworkFile
    client: str


async def serve(folder: Path, started: threading.Event, stop: asyncio.Event) -> None:
    tls = create_identity(PEER.peer_id)
    authority = Authority(
        PEER.peer_id, "127.0.0.1:0", LEDGER.public, LOG.public, "log.example/net-1", tls.cert_der
    )
    network = NetworkFile("net-1", FOUNDER.peer_id, "open", ISSUER.public, (authority,), ())
    async with serve_authority(
        folder / "journal.db",
        network,
        authority,
        AuthorityKeys(LEDGER, LOG),
        "127.0.0.1",
        0,
        (tls.cert_pem, tls.key_pem),
    ) as running:
        bound = dataclasses.replace(authority, address=f"127.0.0.1:{running.port}")
        dataclasses.replace(network, authorities=(bound,)).save(folder / "network.toml", FOUNDER)
        started.set()
        await stop.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("network")
    for name in ("identity", "ledger"):
        save_key(folder / "client" / f"{name}.key", SigningKey.generate())
    save_key(folder / "issuer" / "issuer.key", ISSUER)
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=[serve(folder, started, stop)])
    thread.start()
    assert started.wait(10)
    path = folder / "network.toml"
    client = load_key(folder / "client" / "identity.key").peer_id
    yield World(path, load_network_file(path), client)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def run(world: World, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    result = invoke(["ledger", *arguments, "--network", str(world.path)])
    captured = capsys.readouterr()
    assert result == code, captured.err
    return captured.out


def run_json(
    world: World, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0
) -> Any:
    return json.loads(run(world, capsys, *arguments, "--json", code=code).splitlines()[-1])


@pytest.mark.slow
def test_issue_then_balance_history_and_audit(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    issued = run_json(world, capsys, "issue", world.client, "500", "--order-id", "aa")
    again = run_json(world, capsys, "issue", world.client, "500", "--order-id", "aa")
    assert issued == again
    assert run_json(world, capsys, "balance")["available_microcredits"] == 500
    assert run_json(world, capsys, "balance", PAYEE.peer_id)["available_microcredits"] == 0
    assert "500 microcredits available" in run(world, capsys, "balance", world.client)
    entries = run_json(world, capsys, "history")["entries"]
    assert [entry["kind"] for entry in entries] == ["issue"]
    assert "issuer:equity" in run(world, capsys, "history")
    report = run_json(world, capsys, "audit")
    assert report["balanced"] and report["violations"] == []
    assert report["entries"] >= report["tree_size"]
    assert "the signed checkpoint holds" in run(world, capsys, "audit")
    signed = run_json(world, capsys, "checkpoint")
    assert signed["origin"] == "log.example/net-1"
    assert run(world, capsys, "checkpoint").startswith("log.example/net-1\n")


def test_export_holds_the_leaves(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(world, capsys, "issue", world.client, "7", "--order-id", "bb", "--memo", "seven")
    lines = [json.loads(line) for line in run(world, capsys, "export").splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    assert run(world, capsys, "export", "--json").splitlines()[0] == json.dumps(lines[0])
    file = tmp_path / "journal.csv"
    run(world, capsys, "export", "--format", "csv", "--output", str(file))
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert sum(int(row["debit"]) - int(row["credit"]) for row in rows) == 0
    run(world, capsys, "export", "--output", str(tmp_path / "no" / "file"), code=3)


def test_settle_presents_what_a_stopped_node_left(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(world, capsys, "issue", world.client, "100", "--order-id", "cc")
    (tmp_path / "s-0").write_bytes(asyncio.run(reserved_session(world)).SerializeToString())
    assert run_json(world, capsys, "settle", str(tmp_path)) == {
        "paid_microcredits": {"s-0": 30},
        "booked": {"s-0": 1},
        "authorities": 1,
        "refused": {},
    }
    assert "30 microcredits" in run(world, capsys, "settle", str(tmp_path))
    (tmp_path / "t-0").write_bytes(b"\xff")
    run(world, capsys, "settle", str(tmp_path), code=3)


async def reserved_session(
    world: World, session_id: bytes = b"s" * 16, sequence: int = 1
) -> pb.SettleRequest:
    """Reserve for a session and sign what its one stage would present."""
    key = load_key(world.path.parent / "client" / "ledger.key")
    peer = load_key(world.path.parent / "client" / "identity.key")
    now_ms, network_id = time.time_ns() // 1_000_000, world.network.network_id
    names: dict[str, Any] = {"network_id": network_id, "session_id": session_id}
    caps = [pb.PayeeAmount(payee=PAYEE.peer_id, microcredits=30)]
    reservation = pb.BudgetReservation(
        **names, account=peer.peer_id, sequence=sequence, amount=30, caps=caps, issued_ms=now_ms
    )
    reservation.expires_ms = now_ms + 60_000
    ledger = RemoteLedger(world.network.authorities[0])
    cert = make_key_cert(peer, key.public, network_id, now_ms, 60_000, 1)
    await ledger.reserve(seal(key, reservation), cert)
    await ledger.close()
    voucher = seal(key, pb.SessionVoucher(**names, account=peer.peer_id, amounts=caps))
    request = pb.SettlementRequest(
        **names, payee=PAYEE.peer_id, voucher_digest=digest(voucher.payload), issued_ms=now_ms
    )
    payee_cert = make_key_cert(PAYEE, PAYEE_LEDGER.public, network_id, now_ms, 60_000, 1)
    return pb.SettleRequest(
        request=seal(PAYEE_LEDGER, request), payee_cert=payee_cert, voucher=voucher
    )


@pytest.mark.slow
def test_a_log_is_compared_with_an_earlier_checkpoint(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved, proof = tmp_path / "saved", tmp_path / "proof.json"
    run(world, capsys, "issue", world.client, "7", "--order-id", "dd")
    note = run(world, capsys, "checkpoint")
    saved.write_text(note)
    assert run_json(world, capsys, "checkpoint")["witnesses"] == []
    size = run_json(world, capsys, "compare", str(saved))["tree_size"]
    assert size == int(note.splitlines()[1])
    run(world, capsys, "issue", world.client, "7", "--order-id", "ee")
    assert f"from {size} to {size + 1}" in run(world, capsys, "compare", str(saved))
    saved.write_text(sign_checkpoint(LOG, "log.example/net-1", size + 9, bytes(32)))
    run(world, capsys, "compare", str(saved), "--proof", str(proof), code=1)
    assert not proof.exists()  # it shrank, which proves nothing
    saved.write_text(sign_checkpoint(LOG, "log.example/net-1", size, bytes(32)))
    run(world, capsys, "compare", str(saved), "--proof", str(proof), code=1)
    assert json.loads(proof.read_text())["kind"] == "growth"
    assert "does not contain" in run(world, capsys, "fork", str(proof))
    assert run_json(world, capsys, "fork", str(proof))["culprit"] == PEER.peer_id
    saved.write_text(sign_checkpoint(LOG, "log.example/net-1", size + 1, bytes(32)))
    run(world, capsys, "compare", str(saved), "--proof", str(proof), code=1)
    assert PEER.peer_id in run(world, capsys, "fork", str(proof))
    assert run_json(world, capsys, "fork", str(proof))["culprit"] == PEER.peer_id
    run(world, capsys, "fork", str(saved), code=1)
    run(world, capsys, "fork", str(tmp_path / "none"), code=3)
    run(world, capsys, "compare", str(saved), "--proof", str(tmp_path / "no" / "file"), code=3)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["balance", "nobody"], 3),
        (["issue", "nobody", "5"], 3),
        (["issue", PAYEE.peer_id, "0"], 3),
        (["issue", PAYEE.peer_id, str(2**64)], 3),
        (["issue", PAYEE.peer_id, "5", "--order-id", "zz"], 3),
        (["issue", PAYEE.peer_id, str(2**64 - 1)], 9),
    ],
)
def test_refusals_are_errors_with_a_code(
    world: World, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    run(world, capsys, "issue", world.client, "7", "--order-id", "dd")
    run(world, capsys, *arguments, code=code)


@pytest.mark.slow
def test_an_exported_journal_is_audited_without_a_network(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "journal.jsonl"
    run(world, capsys, "issue", world.client, "7", "--order-id", "ff")
    run(world, capsys, "limit", world.client, "50", "--order-id", "f0")
    assert run_json(world, capsys, "balance")["credit_limit_microcredits"] == 50
    run(world, capsys, "export", "--output", str(file))
    live, offline = run_json(world, capsys, "audit"), run_json(world, capsys, "audit", str(file))
    assert live == offline
    assert offline["balanced"] and offline["causes"] == offline["entries"] > 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:  # nothing was signed: an authority's own invention
        line.pop("objects", None)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run_json(world, capsys, "audit", str(file), code=1)
    assert "the signed object that caused it is missing" in report["violations"][0]
    run(world, capsys, "limit", world.client, "0", "--order-id", "f1")
    for wrong in ("{}", "[]", "no journal"):
        file.write_text(wrong + "\n")
        run(world, capsys, "audit", str(file), code=6)
    run(world, capsys, "audit", str(tmp_path / "none"), code=3)


@pytest.mark.slow
def test_statement_and_invoice_come_out_byte_for_byte(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(world, capsys, "issue", world.client, "9", "--order-id", "ab")
    file = tmp_path / "journal.jsonl"
    until = datetime.now(UTC).isoformat()
    period = ["--from", "2026-01-01", "--until", until]
    run(world, capsys, "export", "--output", str(file))
    for document in ("statement", "invoice"):
        offline = run(world, capsys, document, *period, "--journal", str(file))
        run(world, capsys, "issue", world.client, "9")  # after the period
        shown = json.loads(offline)
        size = shown["log"]["tree_size"]
        live = run(world, capsys, document, *period, "--tree-size", str(size))
        assert live == offline
        assert shown["account"] == world.client
        assert offline.strip().encode() == encode_canonical(shown)
        newer = json.loads(run(world, capsys, document, *period))
        assert newer["log"]["tree_size"] > size
        assert newer["complete_until_ms"] >= shown["complete_until_ms"]
        run(world, capsys, document, *period, "--tree-size", "999999", code=3)
    closing = int(json.loads(run(world, capsys, "statement", *period))["closing_balance"])
    assert closing == run_json(world, capsys, "balance")["available_microcredits"] - 18
    run(world, capsys, "statement", "--from", until, "--until", until, code=3)
    run(world, capsys, "statement", "--from", "yesterday", "--until", until, code=3)


def test_a_document_says_what_it_covers(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(world, capsys, "issue", world.client, "9", "--order-id", "cd")
    file = tmp_path / "journal.jsonl"
    run(world, capsys, "export", "--output", str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    period = ["--from=2020-01-01", "--until=2090-01-01", "--journal", str(file)]
    audited = run_json(world, capsys, "audit", str(file))
    for document in ("statement", "invoice"):
        result = invoke(["ledger", document, *period, "--network", str(world.path)])
        shown, said = capsys.readouterr()
        assert result == 0 and "not complete" in said
        assert json.loads(shown)["log"] == {
            "origin": "log.example/net-1",
            "tree_size": len(lines),
            "root_hash": audited["root_hash"],
        }
        assert json.loads(shown)["complete"] is False
        latest_ms = max(line["posted_ms"] for line in lines)
        assert json.loads(shown)["complete_until_ms"] == latest_ms - FRESHNESS_MS
        past = ["--from=2020-01-01", "--until=2020-06-01", "--journal", str(file)]
        assert invoke(["ledger", document, *past, "--network", str(world.path)]) == 0
        shown, said = capsys.readouterr()
        assert json.loads(shown)["complete"] is True and "not complete" not in said


def test_help_says_whose_documents_anybody_gets(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    period = ["--from=2020-01-01", "--until=2090-01-01"]
    (world.path.parent / "issuer" / "issuer.key").rename(tmp_path / "issuer.key")
    try:  # without the issuer's key
        shown = json.loads(run(world, capsys, "statement", PAYEE.peer_id, *period))
        assert shown["account"] == PAYEE.peer_id
        run(world, capsys, "balance", PAYEE.peer_id, code=3)
    finally:
        (tmp_path / "issuer.key").rename(world.path.parent / "issuer" / "issuer.key")
    for command in ("statement", "invoice"):
        assert invoke(["ledger", command, "--help"]) == 0
        shown_help = " ".join(capsys.readouterr().out.split())
        assert "anybody's" in shown_help and "issuer's key" not in shown_help


def paid_journal(
    world: World, capsys: pytest.CaptureFixture[str], folder: Path
) -> list[dict[str, Any]]:
    """The lines of an export in which one session was paid."""
    run(world, capsys, "issue", world.client, "100")
    number = run_json(world, capsys, "balance")["next_sequence"]
    session = reserved_session(world, number.to_bytes(16, "big"), number)
    (folder / "s-0").write_bytes(asyncio.run(session).SerializeToString())
    run(world, capsys, "settle", str(folder))
    exported = run(world, capsys, "export").splitlines()
    return [json.loads(line) for line in exported]


def settled(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return next(line for line in reversed(lines) if line["kind"] == "settle")


def multiply_in_payload(lines: list[dict[str, Any]], *, for_readers: bool) -> None:
    """A payment of ten times as much, in what is hashed and, if asked, also for readers."""
    line = settled(lines)
    entry = pb.JournalEntry.FromString(bytes.fromhex(line["payload"]))
    for one in entry.lines:
        one.debit, one.credit = one.debit * 10, one.credit * 10
    line["payload"] = entry.SerializeToString(deterministic=True).hex()
    for one in line["lines"] if for_readers else ():
        one["debit"], one["credit"] = one["debit"] * 10, one["credit"] * 10


FALSIFIED: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "payload": lambda lines: multiply_in_payload(lines, for_readers=False),
    "payload and readers": lambda lines: multiply_in_payload(lines, for_readers=True),
    "amount for readers": lambda lines: settled(lines)["lines"][0].update(debit=300),
    "kind for readers": lambda lines: settled(lines).update(kind="void"),
    "more for readers": lambda lines: settled(lines).update(memo="paid twice"),
    "less for readers": lambda lines: settled(lines).pop("lines"),
    "first lines only": lambda lines: lines.__delitem__(slice(3, None)),
    "newest line gone": lambda lines: lines.pop(-2),
    "another log's": lambda lines: lines[-1].update(
        checkpoint=sign_checkpoint(LEDGER, "log.example/net-1", 3, bytes(32))
    ),
    "another checkpoint": lambda lines: lines[-1].update(
        checkpoint=sign_checkpoint(LOG, "log.example/net-1", len(lines), bytes(32))
    ),
}


@pytest.mark.slow
def test_no_document_is_made_from_a_false_journal(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, good = tmp_path / "journal.jsonl", paid_journal(world, capsys, tmp_path)

    def save(lines: list[dict[str, Any]]) -> None:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    period = ["--from=2020-01-01", "--until=2090-01-01", "--journal", str(file)]
    save(good)
    assert int(json.loads(run(world, capsys, "invoice", *period))["total"]) >= 30
    for name, falsify in FALSIFIED.items():
        lines = copy.deepcopy(good)
        falsify(lines)
        save(lines)
        run(world, capsys, "audit", str(file), code=1)
        for document in ("statement", "invoice"):
            assert run(world, capsys, document, *period, code=1) == "", name


def test_a_journal_of_another_network_is_refused(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, other = tmp_path / "journal.jsonl", tmp_path / "other.toml"
    run(world, capsys, "issue", world.client, "9", "--order-id", "ce")
    run(world, capsys, "export", "--output", str(file))
    period = ["--from=2020-01-01", "--until=2090-01-01", "--journal", str(file)]
    renamed = dataclasses.replace(world.network, network_id="net-2")  # with the same log key
    foreign = dataclasses.replace(world.network.authorities[0], log_key=PAYEE.public)
    for network in (renamed, dataclasses.replace(renamed, authorities=(foreign,))):
        network.save(other, FOUNDER)
        command = ["ledger", "statement", world.client, *period, "--network", str(other)]
        assert invoke(command) == 1
        assert capsys.readouterr().out == ""


def test_a_sub_account_from_opening_to_closing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run(world, capsys, "issue", world.client, "9", "--order-id", "5a")
    opened = run_json(
        world, capsys, "sub-account", "key-1", "--period", "month", "--period-limit", "70"
    )
    assert opened == {
        "name": "key-1",
        "sequence": 1,
        "limit_microcredits": None,
        "period": "month",
        "period_limit_microcredits": 70,
        "closed": False,
    }
    [use] = run_json(world, capsys, "sub-accounts")["sub_accounts"]
    assert use == {
        **opened,
        "used_microcredits": 0,
        "period_used_microcredits": 0,
        "pending_microcredits": 0,
    }
    assert run_json(world, capsys, "balance")["sub_accounts"] == [use]
    assert "key-1: 0 used, 0 in this month" in run(world, capsys, "balance")
    run(world, capsys, "sub-account", "key-1", "--limit", "5", "--close")
    assert "closed, at most 5 microcredits" in run(world, capsys, "sub-accounts")
    shown = run_json(world, capsys, "history", "--sub-account", "key-1")["entries"]
    assert [entry["terms"]["closed"] for entry in shown] == [True, False]
    run(world, capsys, "sub-account", "Key", code=9)
    run(world, capsys, "sub-account", "key-2", "--period", "day", code=3)
    assert run_json(world, capsys, "audit")["violations"] == []
    statement = run(
        world, capsys, "statement", "--from=2020-01-01", "--until=2090-01-01", "--sub-account=key-1"
    )
    assert json.loads(statement)["closing_balance"] == "0"
    exported = run(world, capsys, "export", "--format", "csv").splitlines()
    assert exported[0].endswith(",sub_account") and exported[-1].endswith(",key-1")
