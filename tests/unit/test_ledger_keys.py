"""Keys on disk: rotation, revocation, passphrases."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plait.cli.node import app
from plait.errors import ConfigError
from plait.identity import (
    PASSPHRASE_VARIABLE,
    SigningKey,
    load_key,
    load_or_create_key,
    protect_key,
    save_key,
)
from plait.ledger.service.key_store import newest_ledger_key, newest_serial, rotate_ledger_key
from plait.testing.accounting import key_of

KEY = key_of("k")


def test_a_rotation_is_one_new_file(tmp_path: Path) -> None:
    first, serial = newest_ledger_key(tmp_path)
    assert serial == newest_serial(tmp_path) == 1
    assert [rotate_ledger_key(tmp_path) for _ in range(10)] == list(range(2, 12))
    newest, serial = newest_ledger_key(tmp_path)
    assert serial == 11  # not the last by name
    assert newest.public not in {first.public, load_key(tmp_path / "ledger-10.key").public}
    assert newest_ledger_key(tmp_path)[0].public == newest.public
    (tmp_path / "ledger-99.key.part").write_text("torn")
    (tmp_path / "ledger-012.key").write_text("another spelling")
    assert newest_serial(tmp_path) == 11
    with pytest.raises(ConfigError, match="no ledger key"):
        rotate_ledger_key(tmp_path / "elsewhere")
    assert newest_serial(tmp_path / "elsewhere") == 1


def passphrase(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = "open sesame") -> None:
    path = folder / "passphrase"
    path.write_text(f"{text}\nsecond line\n")
    monkeypatch.setenv(PASSPHRASE_VARIABLE, str(path))


def test_a_key_file_with_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.key"
    passphrase(tmp_path, monkeypatch)
    save_key(path, KEY)
    assert path.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert KEY.seed.hex() not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_key(path).seed == KEY.seed
    passphrase(tmp_path, monkeypatch, "another")
    with pytest.raises(ConfigError, match="does not open"):
        load_key(path)
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    with pytest.raises(ConfigError, match="is encrypted") as refused:
        load_key(path)
    assert PASSPHRASE_VARIABLE in refused.value.remedy


def test_bad_passphrase_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passphrase(tmp_path, monkeypatch, "")
    with pytest.raises(ConfigError, match="empty"):
        save_key(tmp_path / "a.key", KEY)
    monkeypatch.setenv(PASSPHRASE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot read"):
        save_key(tmp_path / "a.key", KEY)
    assert not (tmp_path / "a.key").exists()


def test_another_algorithm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
    )

    passphrase(tmp_path, monkeypatch)
    pem = X25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame")
    )
    path = tmp_path / "a.key"
    path.touch(0o600)
    path.write_bytes(pem)
    with pytest.raises(ConfigError, match="no Ed25519"):
        load_key(path)


def test_protecting_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, SigningKey] = {}
    for name in ("identity.key", "ledger.key"):
        keys[name] = load_or_create_key(tmp_path / name)
    (tmp_path / "tls.key").write_text("for gRPC")
    arguments = ["protect-keys", "--data-dir", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    passphrase(tmp_path, monkeypatch)
    done = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert done == {"encrypted": ["identity.key", "ledger.key"]}
    assert json.loads(CliRunner().invoke(app, arguments).stdout) == {"encrypted": []}
    assert not protect_key(tmp_path / "ledger.key", b"x")
    for name, key in keys.items():
        assert load_key(tmp_path / name).seed == key.seed
    assert (tmp_path / "tls.key").read_text() == "for gRPC"


def test_the_rotating_command(tmp_path: Path) -> None:
    arguments = ["--data-dir", str(tmp_path), "--json"]
    assert isinstance(CliRunner().invoke(app, ["rotate-key", *arguments]).exception, ConfigError)
    load_or_create_key(tmp_path / "ledger.key")
    result = CliRunner().invoke(app, ["rotate-key", *arguments])
    assert json.loads(result.stdout) == {"serial": 2}
