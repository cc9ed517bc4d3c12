"""API keys, the safety of the address, and the port."""

import hashlib
from pathlib import Path

import pytest

from plait.errors import ConfigError
from plait.gateway.bundles import BundleStore
from plait.gateway.config import GatewayConfig
from plait.gateway.keys import KeyRing, load_keys
from plait.gateway.server import listen

KEY = "correct-horse-battery-staple"


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_plain_and_hashed_keys_open_and_have_the_same_owner(tmp_path: Path) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    plain = load_keys(key_file(tmp_path, f"# ours\n\n{KEY}\nanother-key-of-somebody\n"))
    hashed = load_keys(key_file(tmp_path, f"sha256:{digest}\n"))
    assert plain.owner_of(KEY) == hashed.owner_of(KEY) == digest
    assert plain.owner_of(KEY + "x") is None
    assert KEY not in repr(plain)
    assert digest[:8] not in repr(plain)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("short", "too short"),
        ("two words in one line", "neither a key"),
        ("sha256:abc", "neither a key"),
        ("# nothing\n", "no key"),
    ],
)
def test_a_bad_key_file_is_refused_without_showing_the_key(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_keys(key_file(tmp_path, text))
    assert "short\n" not in str(caught.value)
    assert "two words" not in str(caught.value)


def test_a_key_file_must_be_ours_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="other users") as caught:
        load_keys(key_file(tmp_path, KEY, mode=0o640))
    assert caught.value.remedy.startswith("chmod 600")
    with pytest.raises(ConfigError, match="cannot read"):
        load_keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_an_open_address_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="no API keys"):
        GatewayConfig(host=host)
    assert not GatewayConfig(host=host, keys=KeyRing((b"x" * 32,))).loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert GatewayConfig(host=host).loopback


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot listen"):
        listen("nowhere.invalid", 0)


def test_the_bundle_store_forgets_the_oldest_and_tells_owners_apart() -> None:
    store = BundleStore(count_max=2, bytes_max=10)
    assert store.put("a", "me", b"1234")
    assert store.put("b", "me", b"1234")
    assert (store.get("a", "me"), store.get("a", "you")) == (b"1234", None)
    assert store.put("c", "me", b"12")
    assert (store.get("a", "me"), store.get("b", "me")) == (None, b"1234")
    assert store.put("d", "me", b"123456789")
    assert (store.get("b", "me"), store.get("c", "me")) == (None, None)
    assert not store.put("e", "me", b"12345678901")
    assert store.get("d", "me") == b"123456789"
