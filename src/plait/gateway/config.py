"""What a gateway is told at its start, and its limits."""

import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from plait.errors import ConfigError
from plait.gateway.keys import KeyRing


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Address, keys and limits. Raises ``ConfigError`` for an open door.

    ``keys`` None lets everybody in, so only a loopback address is taken then.
    ``always_bundle`` collects the evidence of every answer, asked for or not.
    """

    host: str = "127.0.0.1"
    port: int = 4700
    keys: KeyRing | None = None
    key_store: Path | None = None
    """Managed keys with budgets; their file."""
    always_bundle: bool = False
    audits: bool = True
    """Hold the network's audit lottery over the answers."""
    version: str = ""
    with_parent: bool = False
    """End when standard input does."""
    sessions_max: int = 256
    waiting_max: int = 0
    """Requests that may wait for a place; more are refused."""
    draft: str | None = None
    """A local model that drafts for those with its tokenizer."""
    body_bytes_max: int = 1 << 20
    answers_max: int = 32
    """Answers of one request: prompts times ``n``."""
    default_max_tokens: int = 256
    bundles_max: int = 256
    bundle_bytes_max: int = 64 << 20
    keep_alive_s: float = 5.0
    request_timeout_s: float = 900.0
    write_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.locked and not self.loopback:
            raise ConfigError(
                f"{self.host} can be reached from other machines, and there are no API keys",
                remedy="plait keys create NAME, or leave out --host",
            )

    @property
    def locked(self) -> bool:
        """Whether a key is needed."""
        return self.keys is not None or self.key_store is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)


@lru_cache(maxsize=64)  # every request names one
def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
