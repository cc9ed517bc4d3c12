"""Where things are: the network file, the keys of the client, the issuer and the node.

For the commands, at the edge: a flag wins over a variable, that over the last testnet, and
that over the XDG folders.
"""

import os
from pathlib import Path

from platformdirs import user_config_path, user_data_path, user_state_path

from plait.errors import ConfigError
from plait.identity import load_or_create_key

NETWORK_VARIABLE = "PLAIT_NETWORK"
KEY_NAMES = ("identity.key", "ledger.key")


def network_path(option: Path | None = None) -> Path:
    """The network file to use; raises ``ConfigError`` if there is none.

    ``option`` (the flag) wins over ``PLAIT_NETWORK``, then the last testnet started, then
    ``network.toml`` in the XDG configuration folder.
    """
    named = option or _from_environment()
    if named is not None:
        # A folder is accepted as the network file in it.
        path = named / "network.toml" if named.is_dir() else named
        if not path.is_file():
            raise ConfigError(f"there is no network file {path}", remedy="plait testnet up")
        return path
    testnet = last_testnet()
    configured = user_config_path("plait") / "network.toml"
    candidates = [testnet / "network.toml"] if testnet else []
    for candidate in [*candidates, configured]:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        "no network is known: no --network, no PLAIT_NETWORK, no testnet, "
        f"and nothing in {configured}",
        remedy="plait testnet up",
    )


def client_dir(option: Path | None = None) -> Path:
    """The folder with the client's keys, made on first use.

    A testnet brings its own ``client`` folder beside its network file; any other network is
    used with the keys in the XDG data folder. Raises ``ConfigError`` as ``network_path``.
    """
    beside = network_path(option).parent / "client"
    directory = beside if beside.is_dir() else user_data_path("plait") / "client"
    for name in KEY_NAMES:
        load_or_create_key(directory / name)
    return directory


def issuer_dir(option: Path | None = None) -> Path:
    """The folder with ``issuer.key``; raises ``ConfigError`` where we are not the issuer."""
    network = network_path(option)
    directory = network.parent / "issuer"
    if not (directory / "issuer.key").is_file():
        raise ConfigError(
            f"there is no issuer key beside {network}: only the network's issuer can do this"
        )
    return directory


def node_dir() -> Path:
    """Where a node that is not told otherwise keeps its keys and state."""
    return user_data_path("plait") / "node"


def default_testnet_dir() -> Path:
    """Where ``plait testnet up`` puts a network if not told."""
    return user_state_path("plait") / "testnet"


def remember_testnet(directory: Path) -> None:
    """Make a testnet the one that commands use by default."""
    memory = _memory()
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(f"{directory.resolve()}\n")


def last_testnet() -> Path | None:
    """The testnet remembered, if any."""
    try:
        text = _memory().read_text().strip()
    except OSError:
        return None
    return Path(text) if text else None


def forget_testnet(directory: Path) -> None:
    """Forget a testnet, if it is the one remembered."""
    if last_testnet() == directory.resolve():
        _memory().unlink(missing_ok=True)


def _memory() -> Path:
    return user_state_path("plait") / "last-testnet"


def _from_environment() -> Path | None:
    value = os.environ.get(NETWORK_VARIABLE)
    return Path(value) if value else None
