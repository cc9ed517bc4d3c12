"""A node's configuration: one frozen value, checked once at the edge."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plait.errors import ConfigError
from plait.types import Prices, Span

Role = Literal["stage", "ledger", "witness"]

DEFAULT_PRICES = Prices(prompt=5_000, output=20_000)
"""Microcredits per million tokens per layer, when the operator names none."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What one daemon needs. Ports of 0 are chosen by the kernel.

    ``data_dir`` holds the keys (``identity.key``, ``ledger.key``), the TLS pair
    (``tls.key``, ``tls.crt``), ``state`` (one word: starting, ready, draining, stopped),
    ``drained`` (how the last drain ended) and, for the ledger role, ``log.key``,
    ``journal.db`` and the published ``log``; for the witness role
    ``witness.key`` and ``witness``. A witness answers on the public port.
    """

    name: str
    network_file: Path
    data_dir: Path
    roles: frozenset[Role] = frozenset({"stage"})
    model: str | None = None
    span: Span | None = None
    """None: chosen from free memory."""
    dtype: str = "fp32"
    device: str = "cpu"
    """Where to compute; see ``plait.compute.device``."""
    prices: Prices = DEFAULT_PRICES
    region: str = ""
    host: str = "127.0.0.1"
    announce_host: str = ""
    """Where others dial us, if not at ``host``: behind a port mapping or a forwarder."""
    public_port: int = 0
    peer_port: int = 0
    p2p_port: int = 0
    ledger_port: int = 0
    ledger_database: str = ""
    """PostgreSQL connection string of the journal; empty: the file ``journal.db``."""
    threads: int = 0
    """Compute threads; 0 is one per core."""
    kv_tokens_max: int = 16_384
    sessions_max: int = 64
    drain_s: float = 30.0
    """How long sessions may go on after SIGTERM or a drain before they are ended."""
    retained_mb: int = 512
    """Memory for the rows that a replacement of the next stage would be rebuilt from."""
    spill_mb: int = 4096
    """Disk for what of them does not fit in memory."""
    prefix_disk_mb: int = 1024
    """Disk for prompts and answers that clients asked to be kept."""
    keep_alive_s_max: int = 3600
    """For so long at most they are kept there; 0: not at all."""
    retain_inputs: bool = True
    """Keep what is committed to, frame by frame, so that an auditor can ask for it."""
    tape_mb: int = 2048
    """Disk for that."""
    audit_window_s: int = 900
    """How long it is kept after a session has ended."""
    unwitnessed_max: int = 100_000
    """Microcredits that the ledger may say it paid without its witnesses having seen it ..."""
    unwitnessed_s: int = 600
    """... for longer than this, before no new session is taken."""
    with_parent: bool = False
    """End when standard input does: with the process that started this one."""
    extra_bootstrap: tuple[str, ...] = field(default=())
    """More multiaddrs to dial than the network file names."""

    def __post_init__(self) -> None:
        if not self.roles:
            raise ConfigError("a node needs at least one role: stage, ledger or witness")
        if "stage" in self.roles and not self.model:
            raise ConfigError("a stage needs a model", remedy="add --model smollm2-135m")
        if self.unwitnessed_max < 0 or self.unwitnessed_s < 0:
            raise ConfigError("what may be unwitnessed, and for how long, is not below 0")
        for port in (self.public_port, self.peer_port, self.p2p_port, self.ledger_port):
            if not 0 <= port < 65536:
                raise ConfigError(f"not a port: {port}")
