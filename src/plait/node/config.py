"""A node's configuration: one frozen value, checked once at the edge."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plait.errors import ConfigError
from plait.types import Prices, Span

Role = Literal["stage", "ledger"]

DEFAULT_PRICES = Prices(prompt=5_000, output=20_000)
"""Microcredits per million tokens per layer, when the operator names none."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What one daemon needs. Ports of 0 are chosen by the kernel.

    ``data_dir`` holds the keys (``identity.key``, ``ledger.key``), the TLS pair
    (``tls.key``, ``tls.crt``), ``state`` (one word: starting, ready, draining, stopped)
    and, for the ledger role, ``log.key`` and ``journal.db``.
    """

    name: str
    network_file: Path
    data_dir: Path
    roles: frozenset[Role] = frozenset({"stage"})
    model: str | None = None
    span: Span | None = None
    """None: chosen from free memory."""
    dtype: str = "fp32"
    prices: Prices = DEFAULT_PRICES
    region: str = ""
    host: str = "127.0.0.1"
    public_port: int = 0
    peer_port: int = 0
    p2p_port: int = 0
    ledger_port: int = 0
    threads: int = 0
    """Compute threads; 0 is one per core."""
    kv_tokens_max: int = 16_384
    sessions_max: int = 64
    extra_bootstrap: tuple[str, ...] = field(default=())
    """More multiaddrs to dial than the network file names."""

    def __post_init__(self) -> None:
        if not self.roles:
            raise ConfigError("a node needs at least one role: stage or ledger")
        if "stage" in self.roles and not self.model:
            raise ConfigError("a stage needs a model", remedy="add --model smollm2-135m")
        for port in (self.public_port, self.peer_port, self.p2p_port, self.ledger_port):
            if not 0 <= port < 65536:
                raise ConfigError(f"not a port: {port}")
