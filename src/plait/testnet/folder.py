"""What lies where in a testnet's folder."""

from pathlib import Path

CLUSTER_FILE = "testnet.json"
NETWORK_FILE = "network.toml"
LOCK_FILE = "testnet.lock"
CONTROL_SOCKET = "control.sock"
CLIENT_DIR, ISSUER_DIR, NODES_DIR, LOGS_DIR = "client", "issuer", "nodes", "logs"
KEYS_FILE = "gateway.db"
"""In the client's folder: the gateway's API keys and their usage, which outlive a network. Without
them the next gateway would let everybody in."""

SUPERVISOR_NAME = "supervisor"
WAN_NAME = "wan"

OWN_NAMES = frozenset(
    {CLUSTER_FILE, NETWORK_FILE, f"{NETWORK_FILE}.sig", LOCK_FILE, CONTROL_SOCKET}
    | {CLIENT_DIR, ISSUER_DIR, NODES_DIR, LOGS_DIR}
)
"""Everything a testnet makes; whatever else is in the folder is left alone."""


def data_dir(directory: Path, name: str) -> Path:
    """Where a node keeps its keys and state."""
    return directory / NODES_DIR / name


def log_path(directory: Path, name: str) -> Path:
    """Where a process's output goes."""
    return directory / LOGS_DIR / f"{name}.log"


def log_tail(directory: Path, name: str, *, lines: int = 12) -> str:
    """The last lines of a process's log, possibly empty."""
    try:
        text = log_path(directory, name).read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
