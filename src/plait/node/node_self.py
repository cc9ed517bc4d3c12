"""A stage node's identity, surroundings and ports, before anything runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from plait.errors import ConfigError
from plait.identity import SigningKey, load_or_create_key
from plait.ledger.certs import make_key_cert
from plait.ledger.service.key_store import newest_ledger_key
from plait.ledger.service.notices import Post, posts_of
from plait.net.directory import TrustedCertificates
from plait.net.tls import (
    TlsIdentity,
    load_or_create,
    server_credentials_peer,
    server_credentials_public,
    server_options,
)
from plait.net.watch import targets_of
from plait.network_file import NetworkFile
from plait.node.config import NodeConfig
from plait.node.state import Incarnations
from plait.router.view import View
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope

KEY_CERT_TTL_MS = 30 * 86_400_000


@dataclass(frozen=True, slots=True)
class NodeSelf:
    """A stage node's identity and surroundings."""

    config: NodeConfig
    network: NetworkFile
    peer_key: SigningKey
    ledger_key: SigningKey
    tls: TlsIdentity
    incarnation: int
    clock_ms: Callable[[], int]

    @property
    def peer(self) -> PeerId:
        """Its id in the network."""
        return self.peer_key.peer_id


def read_identity(
    config: NodeConfig, network: NetworkFile, clock_ms: Callable[[], int]
) -> NodeSelf:
    """Read or make the keys; raises ``ConfigError`` where the network does not admit them."""
    peer_key = load_or_create_key(config.data_dir / "identity.key")
    if not network.admits(peer_key.peer_id):
        raise ConfigError(f"this network does not admit {peer_key.peer_id}")
    return NodeSelf(
        config=config,
        network=network,
        peer_key=peer_key,
        ledger_key=newest_ledger_key(config.data_dir)[0],
        tls=load_or_create(config.data_dir, peer_key.peer_id),
        incarnation=Incarnations(config.data_dir).next(time.time_ns()),
        clock_ms=clock_ms,
    )


def key_cert(me: NodeSelf, key: SigningKey, serial: int) -> SignedEnvelope:
    """The certificate of a ledger key, signed by the peer key and valid from now."""
    network_id, now_ms = me.network.network_id, me.clock_ms()
    return make_key_cert(me.peer_key, key.public, network_id, now_ms, KEY_CERT_TTL_MS, serial)


def posts_in_view(me: NodeSelf, view: View) -> list[Post]:
    """Whom to exchange notices with: the nodes in view, and the ledger."""
    nodes = [Post(target.address, target.certificate) for target in targets_of(view, me.peer)]
    return nodes + posts_of(me.network.authorities)


@dataclass(frozen=True, slots=True)
class Ports:
    """Both gRPC servers, bound but not started, so that a port in use is told at once."""

    public: grpc.aio.Server
    public_address: str
    peer: grpc.aio.Server
    peer_address: str

    @classmethod
    def bind(cls, me: NodeSelf, trusted: TrustedCertificates) -> "Ports":
        """Bind both; raises ``ConfigError`` naming an address that cannot be had."""
        config = me.config
        public = _bind(config, config.public_port, server_credentials_public(me.tls))
        credentials = server_credentials_peer(me.tls, trusted.certificates)
        return cls(*public, *_bind(config, config.peer_port, credentials))


def _bind(
    config: NodeConfig, port: int, credentials: grpc.ServerCredentials
) -> tuple[grpc.aio.Server, str]:
    """A server on our host, and the address that others dial."""
    server, host = grpc.aio.server(options=server_options()), config.host
    try:
        bound = server.add_secure_port(f"{host}:{port}", credentials)
        return server, f"{config.announce_host or host}:{bound}"
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: the port is in use, or the address is not ours",
            remedy="stop what uses it, or choose another port (0 takes a free one)",
        ) from error
