"""The files of a testnet: keys, ports, signed network file."""

import socket
import stat
from pathlib import Path

import pytest

from plait.errors import ConfigError, NetworkError
from plait.gateway.budgets import Key
from plait.gateway.key_store import KEYS_FILE, KeyStore
from plait.identity import load_key
from plait.network_file import load_network_file
from plait.testnet.cluster import bootstrap_of, create, load
from plait.testnet.folder import data_dir, log_path, log_tail
from plait.testnet.layout import place
from plait.testnet.ports import HOST, PortInUse, check_free, choose_ports
from plait.types import Span

PLACED = place(30, nodes=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "net"


def test_a_cluster_is_remembered_as_it_was_made(folder: Path) -> None:
    cluster = create(folder, PLACED, model="tiny", dtype="bf16")
    assert load(folder) == cluster
    assert [member.name for member in cluster.members] == [
        "node-1",
        "node-2",
        "node-3",
        "node-4",
        "ledger-1",
    ]
    ports = [port for member in cluster.members for port in member.ports.used()]
    assert len(set(ports)) == len(ports) == 16


def test_each_member_has_its_keys_and_a_configuration(folder: Path) -> None:
    cluster = create(folder, PLACED, model="tiny", dtype="bf16")
    node, ledger = cluster.member("node-2"), cluster.member("ledger-1")
    assert node.peer == load_key(data_dir(folder, "node-2") / "identity.key").peer_id
    config = cluster.config(folder, node)
    assert (config.model, config.span, config.dtype) == ("tiny", Span(10, 20), "bf16")
    assert config.network_file == folder / "network.toml"
    assert config.data_dir == data_dir(folder, "node-2")
    assert (config.public_port, config.ledger_port) == (node.ports.public, 0)
    config = cluster.config(folder, ledger)
    assert config.roles == {"ledger"}
    assert (config.model, config.span) == (None, None)
    assert config.ledger_port == ledger.ports.ledger != 0


def test_the_network_file_is_signed_and_holds_public_keys_only(folder: Path) -> None:
    cluster = create(folder, PLACED, model="tiny")
    network = load_network_file(folder / "network.toml")
    assert network.network_id == cluster.network_id
    assert network.issuer_key == load_key(folder / "issuer" / "issuer.key").public
    (authority,) = network.authorities
    ledger = data_dir(folder, "ledger-1")
    assert authority.ledger_key == load_key(ledger / "ledger.key").public
    assert authority.log_key == load_key(ledger / "log.key").public
    assert authority.address == f"{HOST}:{cluster.member('ledger-1').ports.ledger}"
    assert [node.peer for node in network.bootstrap] == [
        member.peer for member in cluster.members if member.span
    ]
    text = (folder / "network.toml").read_text()
    for path in folder.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert path.read_text().strip() not in text


def test_an_ended_testnet_is_replaced_but_other_files_stay(folder: Path) -> None:
    first = create(folder, PLACED, model="tiny")
    (folder / "bundle.json").write_text("{}")
    second = create(folder, PLACED, model="tiny")
    assert second.network_id != first.network_id
    assert second.members[0].peer != first.members[0].peer
    assert (folder / "bundle.json").exists()


def test_the_gateways_keys_outlive_the_network(folder: Path) -> None:
    create(folder, PLACED, model="tiny")
    client = folder / "client"
    before = (client / "identity.key").read_text()
    store = KeyStore(client / KEYS_FILE)
    secret = store.create(Key(id="key-1", label="editor", created_ms=0))
    (client / "audits").mkdir()
    create(folder, PLACED, model="tiny")  # while a gateway still has it open, too
    store.close()
    assert (client / "identity.key").read_text() != before
    assert not (client / "audits").exists()
    again = KeyStore(client / KEYS_FILE)
    found = again.find(secret)
    again.close()
    assert found is not None and found.label == "editor"


def test_a_folder_of_something_else_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="not a testnet's"):
        create(folder, PLACED, model="tiny")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "[]", '{"members": 3}', "\xff"])
def test_a_damaged_file_is_named(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "testnet.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"testnet\.json"):
        load(folder)


def test_a_missing_testnet_and_an_unknown_node_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no testnet in"):
        load(folder)
    cluster = create(folder, PLACED[:1], model="tiny")
    with pytest.raises(ConfigError, match="there are node-1, ledger-1"):
        cluster.member("node-9")


@pytest.mark.parametrize(
    ("host", "multiaddr", "address"),
    [
        ("10.0.0.1", "/ip4/10.0.0.1/tcp/2/p2p/", "10.0.0.1:1"),
        ("::1", "/ip6/::1/tcp/2/p2p/", "[::1]:1"),
        ("node.example.org", "/dns4/node.example.org/tcp/2/p2p/", "node.example.org:1"),
    ],
)
def test_a_bootstrap_node_is_named_by_address_or_name(
    tmp_path: Path, host: str, multiaddr: str, address: str
) -> None:
    node = bootstrap_of(tmp_path, host=host, public_port=1, p2p_port=2)
    assert (node.multiaddr, node.public_address) == (multiaddr + node.peer, address)


def test_chosen_ports_are_free_and_a_taken_one_is_named() -> None:
    ports = choose_ports(20)
    assert len(set(ports)) == 20
    check_free(ports)
    with socket.socket() as taken:
        taken.bind((HOST, ports[3]))
        taken.listen()
        with pytest.raises(PortInUse, match=f"port {ports[3]}") as raised:
            check_free(ports)
    assert isinstance(raised.value, NetworkError)
    assert str(ports[3]) in raised.value.remedy


def test_the_end_of_a_log_is_quoted(folder: Path) -> None:
    assert log_tail(folder, "node-1") == ""
    log_path(folder, "node-1").parent.mkdir(parents=True)
    log_path(folder, "node-1").write_text("".join(f"line {n}\n" for n in range(20)))
    assert log_tail(folder, "node-1", lines=2) == "line 18\nline 19"
