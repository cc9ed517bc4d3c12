from dataclasses import replace
from pathlib import Path

import pytest

from plait.errors import ConfigError
from plait.network_file import Bootstrap, NetworkFile, load_network_file, parse_network_file
from plait.testing.accounting import key_of, paper_network

BOOTSTRAP = Bootstrap(key_of("a").peer_id, "/ip4/127.0.0.1/tcp/1", "127.0.0.1:2", b"\x30\x82")
NETWORK = paper_network(bootstrap=(BOOTSTRAP,), allowed_peers=frozenset({key_of("a").peer_id}))
FOUNDER = key_of("founder")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "network.toml"
    NETWORK.save(path, FOUNDER)
    return path


def test_what_is_saved_loads(path: Path) -> None:
    assert load_network_file(path) == NETWORK
    assert path.with_name("network.toml.sig").exists()


@pytest.mark.parametrize("name", ['a "quoted" name', "back\\slash", "new\nline", "\x7f", "名前"])
def test_any_name_survives(name: str) -> None:
    network = replace(NETWORK, network_id=name)
    assert parse_network_file(network.to_toml().encode()) == network


def test_admission() -> None:
    assert NETWORK.admits(key_of("b").peer_id)
    closed = replace(NETWORK, admission="allowlist")
    assert closed.admits(key_of("a").peer_id)
    assert not closed.admits(key_of("b").peer_id)


def test_a_changed_file_is_refused(path: Path) -> None:
    path.write_text(path.read_text() + "# one more line\n")
    with pytest.raises(ConfigError, match="for another network file"):
        load_network_file(path)


def test_a_signature_of_somebody_else_is_refused(path: Path) -> None:
    NETWORK.save(path, key_of("somebody else"))
    with pytest.raises(ConfigError, match="signature"):
        load_network_file(path)


@pytest.mark.parametrize("signature", [b"", b"!", b"AAAA", b"AAAA AAAA"])
def test_a_damaged_signature_is_refused(path: Path, signature: bytes) -> None:
    path.with_name("network.toml.sig").write_bytes(signature)
    with pytest.raises(ConfigError, match="signature"):
        load_network_file(path)


def test_a_missing_file_is_named(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other\.toml") as caught:
        load_network_file(tmp_path / "other.toml")
    assert "plait testnet up" in caught.value.remedy
    path.with_name("network.toml.sig").unlink()
    with pytest.raises(ConfigError, match=r"network\.toml\.sig"):
        load_network_file(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[network]", "[nothing]"),
        ('admission = "open"', 'admission = "everybody"'),
        (FOUNDER.peer_id, "12D3KooW"),
        (f'"{FOUNDER.peer_id}"', "7"),
        (NETWORK.issuer_key.hex(), "ab"),
        (NETWORK.issuer_key.hex(), "zz" * 32),
        ('certificate = "MII=', 'certificate = "*'),
        (f'peer = "{BOOTSTRAP.peer}"', 'peer = "nobody"'),
        ("audit_rate_percent = 2", 'audit_rate_percent = "many"'),
        ('id = "', "id = ["),
        ("# A Plait", "x = " + "[" * 5000 + "]" * 5000 + "#"),
    ],
)
def test_a_bad_file_is_refused(old: str, new: str) -> None:
    text = NETWORK.to_toml()
    assert old in text
    with pytest.raises(ConfigError, match="not valid"):
        parse_network_file(text.replace(old, new).encode())


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="not valid"):
        parse_network_file(b"\xff\xfe")


def test_it_holds_no_secret() -> None:
    assert isinstance(NETWORK, NetworkFile)
    assert FOUNDER.seed.hex() not in NETWORK.to_toml()
