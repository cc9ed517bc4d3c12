"""``plait net create`` and ``show``."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.cli import main
from plait.identity import load_key
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.log_proof import LogProof, write_log_proof
from plait.ledger.merkle import leaf_hash
from plait.ledger.policy import read_policy
from plait.network_file import load_network_file

NODE = "node.example.org:4700:4701"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def net(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plait", "net", *arguments])
    return main()


def test_a_created_network_is_signed_and_shown(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--authority", "ledger.example.org:4600", "--node", NODE, "--json"]
    assert net(monkeypatch, "create", "physics", *options) == 0
    created: dict[str, Any] = json.loads(capsys.readouterr().out)
    network = load_network_file(here / "physics" / "network.toml")
    assert network.network_id.startswith("physics-")
    assert network.authorities[0].address == "ledger.example.org:4600"
    assert network.bootstrap[0].multiaddr.startswith("/dns4/node.example.org/tcp/4701/p2p/12D3Koo")
    for folder, keys in {
        "ledger-1": ["identity.key", "ledger.key", "log.key", "tls.key"],
        "node-1": ["identity.key", "ledger.key", "tls.key"],
        "issuer": ["founder.key", "issuer.key"],
    }.items():
        assert all((here / "physics" / folder / key).is_file() for key in keys)
    assert net(monkeypatch, "show", "--network", "physics", "--json") == 0
    assert json.loads(capsys.readouterr().out) == created
    assert net(monkeypatch, "show", "--network", "physics") == 0
    assert network.bootstrap[0].peer in capsys.readouterr().out


def test_its_policy_and_a_proof(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert net(monkeypatch, "create", "physics") == 0
    network = load_network_file(here / "physics" / "network.toml")
    capsys.readouterr()
    assert net(monkeypatch, "policy", "--network", "physics") == 0
    policy = read_policy(capsys.readouterr().out.encode())
    (authority,) = network.authorities
    assert policy.logs == {authority.log_origin: authority.log_key}
    key = load_key(here / "physics" / "ledger-1" / "log.key")
    note = sign_checkpoint(key, authority.log_origin, 1, leaf_hash(b"entry"))
    proof = Path("entry.tlog-proof")
    proof.write_text(write_log_proof(LogProof(0, (), note, b"entry")))
    known = ("--network", "physics", "--json")
    assert net(monkeypatch, "check-proof", str(proof), *known) == 0
    assert json.loads(capsys.readouterr().out)["size"] == 1
    proof.write_text(write_log_proof(LogProof(0, (), note, b"another")))
    assert net(monkeypatch, "check-proof", str(proof), *known) == 1
    proof.write_text(write_log_proof(LogProof(0, (), note)))
    assert net(monkeypatch, "check-proof", str(proof), *known) == 1
    Path("policy.txt").write_text("quorum nobody\n")
    assert net(monkeypatch, "check-proof", str(proof), "--policy", "policy.txt") == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["Physics!"], "not a network name"),
        (["physics", "--admission", "anybody"], "unknown admission"),
        (["physics", "--authority", "ledger"], "not an address: 'ledger'"),
        (["physics", "--authority", "ledger:99999"], "not an address"),
        (["physics", "--node", "node:1"], "not an address"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_made(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    error: str,
) -> None:
    assert net(monkeypatch, "create", *arguments) == 3
    assert error in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_an_existing_folder_is_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "physics").mkdir()
    assert net(monkeypatch, "create", "physics") == 3
    assert "exists already" in capsys.readouterr().err
