"""The files of a testnet: keys, ports, network file, and one data folder per process.

Everything lies under one folder. ``testnet.json`` remembers names, spans and ports, so
that a node restarts with the same key on the same ports.
"""

import ipaddress
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex

import msgspec

from plait.errors import ConfigError
from plait.identity import load_key, load_or_create_key
from plait.net.tls import load_or_create
from plait.network_file import (
    ESCROW_PERCENT,
    ESCROW_WINDOW_S,
    Authority,
    Bootstrap,
    Judge,
    NetworkFile,
    Witness,
)
from plait.node.config import NodeConfig, Role
from plait.testnet.control import STOP_GRACE_S
from plait.testnet.folder import (
    CLIENT_DIR,
    CLUSTER_FILE,
    ISSUER_DIR,
    KEYS_FILE,
    LOCK_FILE,
    LOGS_DIR,
    NETWORK_FILE,
    NODES_DIR,
    OWN_NAMES,
    data_dir,
)
from plait.testnet.layout import Placed, ledger_names, witness_quorum, witnesses_among
from plait.testnet.ports import HOST, choose_ports
from plait.testnet.wan import Wan, private_address
from plait.types import PeerId, Span

JUDGE_KEY = "judge.key"
"""In the issuer's folder: a testnet has one judge."""
_BOOTSTRAP_MAX = 4


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback ports of one node; 0 where it listens on none."""

    public: int
    peer: int
    p2p: int
    ledger: int = 0

    def used(self) -> tuple[int, ...]:
        """The ports it listens on."""
        return tuple(port for port in (self.public, self.peer, self.p2p, self.ledger) if port)


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a testnet."""

    name: str
    peer: PeerId
    roles: tuple[Role, ...]
    model: str | None
    span: Span | None
    ports: Ports
    host: str = HOST
    """Where others dial it."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A testnet as ``testnet.json`` remembers it."""

    network_id: str
    model: str
    dtype: str
    members: tuple[Member, ...]
    wan: Wan | None = None
    disk_mb: int = 0
    """The size of each node's data folder, a disk of its own; 0 leaves it where it is."""
    device: str = "cpu"

    def member(self, name: str) -> Member:
        """The named process; raises ``ConfigError`` listing the names there are."""
        for member in self.members:
            if member.name == name:
                return member
        names = ", ".join(member.name for member in self.members)
        raise ConfigError(f"there is no node {name!r}; there are {names}")

    @property
    def is_forwarded(self) -> bool:
        """Whether a forwarder stands between the nodes: they listen behind what they announce."""
        return self.wan is not None and self.wan.backend == "forwarder"

    def listening_host(self, member: Member) -> str:
        """The address a member binds."""
        if self.wan is None or self.is_forwarded:
            return HOST
        if member.name == self.wan.behind_nat:
            return private_address(self.wan, self.members.index(member) + 1)
        return member.host

    def config(self, directory: Path, member: Member) -> NodeConfig:
        """The configuration of a member's daemon."""
        return NodeConfig(
            name=member.name,
            network_file=directory / NETWORK_FILE,
            data_dir=data_dir(directory, member.name),
            roles=frozenset(member.roles),
            model=member.model,
            span=member.span,
            dtype=self.dtype,
            device=self.device,
            host=self.listening_host(member),
            announce_host=member.host if self.is_forwarded else "",
            public_port=member.ports.public,
            peer_port=member.ports.peer,
            p2p_port=member.ports.p2p,
            ledger_port=member.ports.ledger,
            threads=1,  # many daemons share this machine's cores
            drain_s=STOP_GRACE_S * 0.8,  # so that a node ends by itself before it is killed
        )


def create(
    directory: Path,
    placed: tuple[Placed, ...],
    *,
    model: str,
    dtype: str = "fp32",
    device: str = "cpu",
    ports: Callable[[int], list[int]] = choose_ports,
    wan: Wan | None = None,
    disk_mb: int = 0,
    authorities: int = 1,
    witnesses: int | None = None,
) -> Cluster:
    """Make the files of a new testnet, replacing an ended one in the same folder.

    Only its gateway's keys and usage stay.
    So many of the nodes are witnesses too, by default three. The caller holds the folder's
    lock. Raises ``ConfigError`` if the folder holds anything else and ``NetworkError`` if
    ports are short.
    """
    _clear(directory)
    ledgers = ledger_names(authorities)
    hidden = wan.behind_nat if wan else ""
    dialled = [item.name for item in placed if item.name != hidden]
    watching = dialled[: witnesses_among(len(dialled), witnesses)]
    free = iter(ports(3 * len(placed) + 4 * len(ledgers)))
    members = [
        Member(
            item.name,
            make_data_dir(data_dir(directory, item.name)),
            ("stage", "witness") if item.name in watching else ("stage",),
            model=model,
            span=item.span,
            ports=Ports(next(free), next(free), next(free)),
        )
        for item in placed
    ]
    members += [
        Member(
            name,
            make_data_dir(data_dir(directory, name)),
            ("ledger",),
            model=None,
            span=None,
            ports=Ports(next(free), next(free), next(free), ledger=next(free)),
        )
        for name in ledgers
    ]
    if wan is not None:
        members = [
            replace(member, host=wan.address(number)) for number, member in enumerate(members, 1)
        ]
    cluster = Cluster(f"testnet-{token_hex(4)}", model, dtype, tuple(members), wan, disk_mb, device)
    _write_network_file(directory, cluster)
    for name in ("identity.key", "ledger.key"):
        load_or_create_key(directory / CLIENT_DIR / name)
    (directory / LOGS_DIR).mkdir()
    # Last: a folder without it was not completed.
    (directory / CLUSTER_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(cluster)))
    return cluster


def load(directory: Path) -> Cluster:
    """Read ``testnet.json``; raises ``ConfigError`` if there is none or it is damaged."""
    path = directory / CLUSTER_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Cluster)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no testnet in {directory}", remedy="plait testnet up"
        ) from error
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def check_reusable(directory: Path) -> None:
    """Raise ``ConfigError`` if the folder holds files that no testnet made."""
    if not directory.is_dir():
        if directory.exists():
            raise ConfigError(f"{directory} is not a folder")
        return
    names = {path.name for path in directory.iterdir()}
    if names - {LOCK_FILE} and not names & {CLUSTER_FILE, NODES_DIR}:
        raise ConfigError(
            f"{directory} holds files that are not a testnet's", remedy="another --dir"
        )


def _clear(directory: Path) -> None:
    check_reusable(directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in directory.iterdir():
        if path.name not in OWN_NAMES or path.name == LOCK_FILE:
            continue
        if path.name == CLIENT_DIR and path.is_dir() and not path.is_symlink():
            for part in path.iterdir():
                if not part.name.startswith(KEYS_FILE):  # SQLite has files beside it
                    _remove(part)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_data_dir(folder: Path) -> PeerId:
    """Make a node's keys and TLS pair where they are missing; returns its peer id."""
    peer = load_or_create_key(folder / "identity.key").peer_id
    load_or_create_key(folder / "ledger.key")
    load_or_create(folder, peer)
    return peer


def authority_of(folder: Path, *, address: str, log_origin: str) -> Authority:
    """Describe the ledger authority whose data folder this is, making its log key."""
    peer = make_data_dir(folder)
    return Authority(
        peer=peer,
        address=address,
        ledger_key=load_key(folder / "ledger.key").public,
        log_key=load_or_create_key(folder / "log.key").public,
        log_origin=log_origin,
        certificate=load_or_create(folder, peer).cert_der,
    )


def witness_of(folder: Path, *, name: str, address: str) -> Witness:
    """Describe the witness whose data folder this is, making its witness key."""
    peer = make_data_dir(folder)
    return Witness(
        name,
        load_or_create_key(folder / "witness.key").public,
        address,
        load_or_create(folder, peer).cert_der,
    )


def bootstrap_of(folder: Path, *, host: str, public_port: int, p2p_port: int) -> Bootstrap:
    """Describe the bootstrap node whose data folder this is, reachable at an address or a name."""
    peer = make_data_dir(folder)
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns4"
    return Bootstrap(
        peer=peer,
        multiaddr=f"/{kind}/{host}/tcp/{p2p_port}/p2p/{peer}",
        public_address=f"[{host}]:{public_port}" if kind == "ip6" else f"{host}:{public_port}",
        certificate=load_or_create(folder, peer).cert_der,
    )


def _write_network_file(directory: Path, cluster: Cluster) -> None:
    issuer = directory / ISSUER_DIR
    founder_key = load_or_create_key(issuer / "founder.key")
    hidden = cluster.wan.behind_nat if cluster.wan else ""
    dialled = [m for m in cluster.members if "stage" in m.roles and m.name != hidden]
    witnesses = tuple(
        witness_of(
            data_dir(directory, member.name),
            name=f"{cluster.network_id}/{member.name}",
            address=f"{member.host}:{member.ports.public}",
        )
        for member in cluster.members
        if "witness" in member.roles
    )
    network = NetworkFile(
        network_id=cluster.network_id,
        founder=founder_key.peer_id,
        admission="open",
        issuer_key=load_or_create_key(issuer / "issuer.key").public,
        authorities=tuple(
            authority_of(
                data_dir(directory, ledger.name),
                address=f"{ledger.host}:{ledger.ports.ledger}",
                log_origin=f"{cluster.network_id}/{ledger.name}",
            )
            for ledger in cluster.members
            if "ledger" in ledger.roles
        ),
        witnesses=witnesses,
        witness_quorum=witness_quorum(len(witnesses)),
        judges=(Judge("issuer", load_or_create_key(issuer / JUDGE_KEY).public),),
        judge_quorum=1,
        escrow_percent=ESCROW_PERCENT,
        escrow_window_s=ESCROW_WINDOW_S,
        bootstrap=tuple(
            bootstrap_of(
                data_dir(directory, member.name),
                host=member.host,
                public_port=member.ports.public,
                p2p_port=member.ports.p2p,
            )
            for member in dialled[:_BOOTSTRAP_MAX]
        ),
    )
    network.save(directory / NETWORK_FILE, founder_key)
