"""Which network file and which keys a command uses."""

from pathlib import Path

import pytest

from plait.errors import ConfigError
from plait.identity import load_key
from plait.locate import (
    client_dir,
    default_testnet_dir,
    forget_testnet,
    issuer_dir,
    last_testnet,
    network_path,
    remember_testnet,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """XDG folders of our own."""
    for name in ("STATE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.delenv("PLAIT_NETWORK", raising=False)
    return tmp_path


def network_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "network.toml").touch()
    return folder / "network.toml"


def test_flag_then_variable_then_testnet_then_configuration(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as raised:
        network_path()
    assert raised.value.remedy == "plait testnet up"
    configured = network_in(home / "config" / "plait")
    assert network_path() == configured
    testnet = network_in(home / "net")
    remember_testnet(testnet.parent)
    assert network_path() == testnet
    named = network_in(home / "named")
    monkeypatch.setenv("PLAIT_NETWORK", str(named))
    assert network_path() == named
    flag = network_in(home / "flag")
    assert network_path(flag) == flag


def test_a_folder_stands_for_the_network_file_in_it(home: Path) -> None:
    path = network_in(home / "net")
    assert network_path(path.parent) == path


def test_a_named_file_that_is_not_there_is_an_error_not_a_fallback(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network_in(home / "config" / "plait")
    with pytest.raises(ConfigError, match=r"no network file .*gone\.toml"):
        network_path(home / "gone.toml")
    monkeypatch.setenv("PLAIT_NETWORK", str(home / "gone.toml"))
    with pytest.raises(ConfigError, match=r"gone\.toml"):
        network_path()


def test_a_testnet_whose_files_are_gone_is_passed_over(home: Path) -> None:
    remember_testnet(home / "removed")
    configured = network_in(home / "config" / "plait")
    assert network_path() == configured


def test_a_testnet_is_forgotten_only_by_its_own_end(home: Path) -> None:
    assert last_testnet() is None
    remember_testnet(home / "one")
    remember_testnet(home / "two")
    forget_testnet(home / "one")
    assert last_testnet() == home / "two"
    forget_testnet(home / "two")
    forget_testnet(home / "two")
    assert last_testnet() is None


def test_a_testnet_brings_its_client_and_another_network_uses_the_users_keys(home: Path) -> None:
    testnet = network_in(home / "net")
    (testnet.parent / "client").mkdir()
    assert client_dir(testnet) == testnet.parent / "client"
    other = network_in(home / "other")
    folder = client_dir(other)
    assert folder == home / "data" / "plait" / "client"
    key = load_key(folder / "identity.key")
    assert load_key(folder / "ledger.key") != key
    assert load_key(client_dir(other) / "identity.key").public == key.public


def test_only_the_issuer_has_an_issuer_folder(home: Path) -> None:
    network = network_in(home / "net")
    with pytest.raises(ConfigError, match="only the network's issuer"):
        issuer_dir(network)
    (network.parent / "issuer").mkdir()
    (network.parent / "issuer" / "issuer.key").touch()
    assert issuer_dir(network) == network.parent / "issuer"


def test_a_testnet_lives_in_the_state_folder(home: Path) -> None:
    assert default_testnet_dir() == home / "state" / "plait" / "testnet"
