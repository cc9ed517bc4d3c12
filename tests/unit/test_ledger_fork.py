"""Fork proofs: what proves that somebody signed twice, and what does not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from plait.cli.ledger import app
from plait.envelope import digest, seal
from plait.errors import BadProof, VerificationError
from plait.ledger.bundle_fields import write_envelope
from plait.ledger.canonical import encode_canonical
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import Checkpoint, sign_checkpoint
from plait.ledger.fork import (
    ForkProof,
    LogFork,
    ReservationFork,
    VoucherFork,
    check_fork_proof,
    grown_apart,
    read_fork_proof,
    write_fork_proof,
)
from plait.ledger.merkle import Tree, leaf_hash, root_of
from plait.ledger.service.store import Change, StoredCert, StoredFork, open_store
from plait.network_file import parse_network_file
from plait.testing.accounting import NETWORK_ID, NOW_MS, cert_of, key_of, paper_network
from plait.types import AccountId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation, SessionVoucher

NETWORK = paper_network()
ORIGIN = NETWORK.authorities[0].log_origin
CLIENT = key_of("client").peer_id


def note(size: int, root: int, key: str = "authority log", origin: str = ORIGIN) -> str:
    return sign_checkpoint(key_of(key), origin, size, bytes([root]) * 32)


def reserved(key: str = "client ledger", **changes: Any) -> SignedEnvelope:
    fields: dict[str, Any] = {
        "network_id": NETWORK_ID,
        "account": CLIENT,
        "lane": 1,
        "sequence": 5,
        "session_id": b"s" * 16,
        "amount": 7,
    }
    return seal(key_of(key), BudgetReservation(**{**fields, **changes}))


LOG = LogFork(ORIGIN, (note(7, 1), note(7, 2)))
CERT = cert_of("client")
TWICE = ReservationFork((reserved(), reserved(amount=8)), (CERT, CERT))


def promised(key: str = "client ledger", **changes: Any) -> SignedEnvelope:
    fields: dict[str, Any] = {
        "network_id": NETWORK_ID,
        "account": CLIENT,
        "session_id": b"s" * 16,
        "epoch": 2,
        "sequence": 5,
    }
    return seal(key_of(key), SessionVoucher(**{**fields, **changes}))


PAID = VoucherFork((promised(), promised(output_tokens=8)), (CERT, CERT))


@pytest.mark.parametrize("proof", [LOG, TWICE, PAID])
def test_a_proof_travels_and_holds(proof: ForkProof) -> None:
    data = write_fork_proof(proof)
    assert read_fork_proof(data) == proof
    verdict = check_fork_proof(read_fork_proof(data), NETWORK)
    expected = NETWORK.authorities[0].peer if proof is LOG else CLIENT
    assert verdict.culprit == expected
    assert "two" in verdict.statement


def test_a_new_key_or_a_false_date_is_no_escape() -> None:
    renewed = make_key_cert(key_of("client"), key_of("new").public, NETWORK_ID, 1, 2, 2)
    proof = ReservationFork((reserved(), reserved("new", issued_ms=NOW_MS * 9)), (CERT, renewed))
    assert check_fork_proof(proof, NETWORK).culprit == CLIENT


NOTHING: list[Callable[[], ForkProof]] = [
    lambda: LogFork(ORIGIN, (note(7, 1), note(7, 1))),
    lambda: LogFork(ORIGIN, (note(7, 1), note(8, 2))),
    lambda: LogFork(ORIGIN, (note(7, 1), note(7, 2, key="stranger"))),
    lambda: LogFork(ORIGIN, (note(7, 1), note(7, 2, origin="other.example"))),
    lambda: LogFork("other.example", (note(7, 1), note(7, 2))),
    lambda: replace(TWICE, reservations=(reserved(), reserved())),
    lambda: replace(TWICE, reservations=(reserved(), reserved(lane=2, amount=8))),
    lambda: replace(TWICE, reservations=(reserved(), reserved(sequence=6))),
    lambda: replace(TWICE, reservations=(reserved(), reserved(network_id="x"))),
    lambda: replace(TWICE, reservations=(reserved(), reserved(account=key_of("x").peer_id))),
    lambda: replace(TWICE, reservations=(reserved(), reserved("stranger", amount=8))),
    lambda: replace(PAID, vouchers=(promised(), promised())),
    lambda: replace(PAID, vouchers=(promised(), promised(sequence=6))),
    lambda: replace(PAID, vouchers=(promised(), promised(epoch=3))),
    lambda: replace(PAID, vouchers=(promised(), promised(session_id=b"t" * 16))),
    lambda: replace(PAID, vouchers=(promised(), promised(network_id="x"))),
    lambda: replace(PAID, vouchers=(promised(), promised("stranger", output_tokens=8))),
    lambda: replace(PAID, vouchers=(promised(), reserved())),
    lambda: replace(TWICE, certs=(CERT, cert_of("stage 0"))),
    lambda: replace(TWICE, certs=(CERT, SignedEnvelope())),
]


@pytest.mark.parametrize("proof", NOTHING)
def test_what_proves_nothing(proof: Callable[[], ForkProof]) -> None:
    with pytest.raises(VerificationError):
        check_fork_proof(proof(), NETWORK)


def test_the_same_content_signed_twice_is_no_fork() -> None:
    """A signer can make many signatures of one payload: only payloads are compared."""
    again = SignedEnvelope.FromString(reserved().SerializeToString())
    with pytest.raises(VerificationError, match="the same"):
        check_fork_proof(replace(TWICE, reservations=(reserved(), again)), NETWORK)


@pytest.mark.slow
@given(st.sampled_from([LOG, TWICE, PAID]), st.data())
def test_no_flipped_bit_accuses_another(proof: ForkProof, data: st.DataObject) -> None:
    damaged = bytearray(write_fork_proof(proof))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((ValueError, VerificationError)):
        check_fork_proof(read_fork_proof(bytes(damaged)), NETWORK)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b" " * 70_000,
        encode_canonical({"format": "x", "kind": "log", "origin": "", "checkpoints": ["", ""]}),
        encode_canonical(
            {"format": "plait.fork.v1", "kind": "log", "origin": "", "checkpoints": [""]}
        ),
        encode_canonical(
            {
                "format": "plait.fork.v1",
                "kind": "other",
                "reservations": [write_envelope(reserved())] * 2,
                "certs": [write_envelope(CERT)] * 2,
            }
        ),
    ],
)
def test_what_is_no_proof_cannot_be_read(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_fork_proof(data)


def test_the_vectors() -> None:
    path = Path(__file__).parents[1] / "vectors" / "fork.json"
    vectors = json.loads(path.read_text(encoding="utf-8"))
    network = parse_network_file(vectors["network_toml"].encode())
    for case in vectors["proofs"]:
        proof = read_fork_proof(case["data"].encode())
        if case["culprit"]:
            assert check_fork_proof(proof, network).culprit == case["culprit"], case["name"]
        else:
            with pytest.raises(VerificationError):
                check_fork_proof(proof, network)


def test_the_store_hands_out_proofs(tmp_path: Path) -> None:
    first, second = TWICE.reservations
    fork = StoredFork(AccountId(CLIENT), digest(first.payload), digest(second.payload))
    store = open_store(tmp_path / "journal.db", NETWORK_ID)
    store.commit([Change(objects=(first, second), forks=(fork,))])
    assert store.fork_proofs() == []
    store.commit([Change(certs=(StoredCert(CLIENT, 1, CERT.SerializeToString()),))])
    assert store.fork_proofs() == [TWICE]
    store.close()


def test_the_command(tmp_path: Path) -> None:
    network, path = tmp_path / "network.toml", tmp_path / "proof.json"
    NETWORK.save(network, key_of("founder"))
    path.write_bytes(write_fork_proof(LOG))
    result = CliRunner().invoke(app, ["fork", str(path), "--network", str(network)])
    assert result.exit_code == 0
    assert result.output.startswith(f"proven: {NETWORK.authorities[0].peer}")
    path.write_bytes(write_fork_proof(LogFork(ORIGIN, (note(7, 1), note(7, 1)))))
    result = CliRunner().invoke(app, ["fork", str(path), "--network", str(network)])
    assert isinstance(result.exception, VerificationError)


def test_judge_takes_a_fork_proof(tmp_path: Path) -> None:
    network, path = tmp_path / "network.toml", tmp_path / "proof.json"
    NETWORK.save(network, key_of("founder"))
    path.write_bytes(write_fork_proof(PAID))
    result = CliRunner().invoke(app, ["judge", str(path), "--network", str(network)])
    assert result.exit_code == 1
    assert result.output.startswith(f"proven: {CLIENT} signed two vouchers under number 5")
    path.write_bytes(write_fork_proof(replace(PAID, vouchers=(promised(), promised()))))
    result = CliRunner().invoke(app, ["judge", str(path), "--network", str(network)])
    assert isinstance(result.exception, VerificationError)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 39), st.booleans())
def test_a_larger_tree_without_the_smaller_is_proven(
    size: int, more: int, changed: int, lie: bool
) -> None:
    leaves = [leaf_hash(b"%d" % number) for number in range(size + more)]
    signed = list(leaves)
    if lie:
        signed[changed % (size + more)] = leaf_hash(b"another")
    smaller = Checkpoint(ORIGIN, size, root_of(signed[:size]))
    larger, tree = Checkpoint(ORIGIN, size + more, root_of(leaves)), Tree(leaves)
    key = key_of("authority log")
    first, second = (sign_checkpoint(key, ORIGIN, c.size, c.root) for c in (smaller, larger))
    found = grown_apart((first, second), smaller, larger, tree)
    assert (found is None) == (smaller.root == root_of(leaves[:size]))
    if found is not None:
        assert read_fork_proof(write_fork_proof(found)) == found
        assert "does not contain" in check_fork_proof(found, NETWORK).statement
    with pytest.raises(BadProof, match="another tree"):
        grown_apart((first, second), smaller, replace(larger, root=leaf_hash(b"")), tree)
