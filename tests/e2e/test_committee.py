"""A committee of real processes: one killed, brought back; keys rotated and revoked."""

import asyncio
import json
import shutil
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import pytest

from plait.envelope import payload_type, seal
from plait.errors import LedgerError, PeerUnreachable
from plait.identity import load_key
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import open_checkpoint
from plait.ledger.merkle import Tree, leaf_hash
from plait.ledger.service.remote import RemoteLedger
from plait.ledger.service.tiles import entries_of_folder
from plait.network_file import Authority, NetworkFile, load_network_file
from plait.testing.testnets import Testnet
from plait.v1.identity_pb2 import NodeKeyCert
from plait.v1.ledger_pb2 import AccountQuery

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
PROMPT = "Why is the sky blue?"
CERT_TYPE = payload_type(NodeKeyCert)


@pytest.fixture(scope="module")
def committee(own_testnet: Callable[..., Testnet]) -> Testnet:
    """Four authorities, of which one may fail; three witnesses, quorum two."""
    return own_testnet(authorities=4)


def verified(net: Testnet, name: str) -> None:
    bundle = net.directory.parent / name
    answer = net.run(PROMPT, "--max-tokens", "40", "--bundle", str(bundle))
    assert len(answer["token_ids"]) == 40
    report = net.json("verify", str(bundle), "--network", str(net.network))
    assert report["outcome"] == "verified", report
    claims = {claim["name"]: claim for claim in report["claims"]}
    assert claims["witnesses"]["ok"] is True


async def books(network: NetworkFile, net: Testnet) -> list[tuple[int, int, int]]:
    """Available and pending of the client, and entries, of each authority."""
    issuer = load_key(net.directory / "issuer" / "issuer.key")
    account = load_key(net.account / "identity.key").peer_id
    rows = []
    for authority in network.authorities:
        ledger = RemoteLedger(authority)
        now_ms = time.time_ns() // 1_000_000
        query = AccountQuery(network_id=network.network_id, account=account, issued_ms=now_ms)
        state = await ledger.account(seal(issuer, query))
        entries = [payload async for payload in ledger.export()]
        rows.append((state.available, state.pending, len(entries)))
        await ledger.close()
    return rows


async def until_back(authority: Authority) -> None:
    async with asyncio.timeout(60):
        while True:
            ledger = RemoteLedger(authority)
            try:
                await anext(ledger.export())
            except PeerUnreachable:
                await asyncio.sleep(0.2)
            else:
                return
            finally:
                await ledger.close()


async def until_equal(network: NetworkFile, net: Testnet) -> list[tuple[int, int, int]]:
    async with asyncio.timeout(60):
        while len(set(rows := await books(network, net))) > 1:  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.5)
    return rows


def test_one_of_four_may_die_and_come_back(committee: Testnet) -> None:
    network = load_network_file(committee.network)
    assert len(network.authorities) == 4
    assert (len(network.witnesses), network.witness_quorum) == (3, 2)
    verified(committee, "all.json")
    committee.control("kill", "ledger-1")
    verified(committee, "without-one.json")
    # What was paid stands elsewhere in each one's log: another's gives the anchor now.
    bundle = committee.directory.parent / "without-one.json"
    lots = committee.json("audit", "request", str(bundle), "--network", str(committee.network))[
        "lots"
    ]
    for lot in lots:
        assert "anchor" not in lot["reason"] and "ledger" not in lot["reason"], lot
    committee.control("restart", "ledger-1")
    asyncio.run(until_back(network.authorities[0]))
    # What it missed waits with the client and the stages; a client brings it when it runs.
    verified(committee, "with-it-again.json")
    rows = asyncio.run(until_equal(network, committee))
    assert rows[0][1] == 0 and rows[0][2] >= 5
    for number, authority in enumerate(network.authorities, 1):
        log = committee.directory / "nodes" / f"ledger-{number}" / "log"
        note = (log / "checkpoint").read_text()
        checkpoint = open_checkpoint(note, authority.log_origin, authority.log_key)
        tree = Tree(map(leaf_hash, entries_of_folder(log, checkpoint.size)))
        assert tree.root() == checkpoint.root


def test_credit_issued_to_a_new_account_is_spent(committee: Testnet, tmp_path: Path) -> None:
    for name in ("network.toml", "network.toml.sig"):
        shutil.copy(committee.directory / name, tmp_path / name)
    (tmp_path / "client").mkdir()  # whose keys are made on first use
    network = ("--network", str(tmp_path / "network.toml"))
    account = committee.json("ledger", "balance", *network)["account"]
    issuer = ("--network", str(committee.network))
    issued = committee.json("ledger", "issue", account, "50000", *issuer)
    assert (issued["booked"], issued["authorities"]) == (4, 4)
    told = committee.json("run", committee.model, PROMPT, "--max-tokens", "8", *network)
    assert told["cost_microcredits"] > 0
    balance = committee.json("ledger", "balance", *network)
    assert balance["answers"] >= 3
    left = balance["available_microcredits"] + balance["pending_microcredits"]
    assert left == 50_000 - told["cost_microcredits"]
    for number in range(1, 5):
        own = ("--authority", f"ledger-{number}")
        report = committee.json("ledger", "audit", *own, *network)
        assert report["violations"] == [] and report["witnessed"] is True


def test_a_ledger_key_is_rotated_and_revoked_without_a_failed_request(committee: Testnet) -> None:
    network = load_network_file(committee.network)
    folder = committee.directory / "nodes" / "node-2"
    common = ("--data-dir", str(folder))
    assert committee.json("node", "rotate-key", *common) == {"serial": 2}
    serials = set()
    for number in range(3):
        bundle = committee.directory.parent / f"rotated-{number}.json"
        verified(committee, bundle.name)
        serials |= stage_serials(bundle, load_key(folder / "identity.key").peer_id)
    assert 2 in serials
    revoked = committee.json("node", "revoke-key", *common, "--network", str(committee.network))
    assert revoked["serial_min"] == 2 and revoked["told"] >= 4
    asyncio.run(until_refused(network, folder))
    verified(committee, "after.json")


def stage_serials(bundle: Path, peer: str) -> set[int]:
    """Serials of a peer's certificates, wherever they stand in a bundle."""
    found, waiting = set(), [json.loads(bundle.read_text())]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict) and item.get("payload_type") == CERT_TYPE:
            cert = NodeKeyCert.FromString(b64decode(item["payload"]))
            if cert.peer_id == peer:
                found.add(cert.serial)
        elif isinstance(item, dict | list):
            waiting += item.values() if isinstance(item, dict) else item
    return found


async def until_refused(network: NetworkFile, folder: Path) -> None:
    """Until every authority refuses the voided key, within the promised minute."""
    peer, old = load_key(folder / "identity.key"), load_key(folder / "ledger.key")
    async with asyncio.timeout(60):
        for authority in network.authorities:
            ledger = RemoteLedger(authority)
            while True:
                now_ms = time.time_ns() // 1_000_000
                cert = make_key_cert(peer, old.public, network.network_id, now_ms, 10**6, 1)
                query = AccountQuery(
                    network_id=network.network_id, account=peer.peer_id, issued_ms=now_ms
                )
                try:
                    await ledger.account(seal(old, query), cert)
                except LedgerError as error:
                    assert "revoked" in str(error) or "newer" in str(error)
                    if "revoked" in str(error):
                        break
                await asyncio.sleep(0.2)
            await ledger.close()
