"""TLS without a certificate authority: every node pins the other's certificate.

A node has one self-signed P-256 certificate (gRPC refuses Ed25519), bound to its peer
key by a signed ``ChannelCert`` or by its offer. The public port shows it; the peer port
also asks the caller for a certificate out of a live set of trusted ones.
"""

import datetime
import os
import re
import ssl
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.utils import CryptographyDeprecationWarning

from plait.envelope import open_envelope, seal
from plait.errors import BadSignature, ConfigError, RemoteProtocolError
from plait.identity import SigningKey, peer_id_of
from plait.types import PeerId
from plait.v1.identity_pb2 import ChannelCert, SignedEnvelope

SERVER_NAME = "plait"
"""The DNS name in every certificate; who it is, is decided by pinning."""

CERTIFICATE_BYTES_MAX = 512
MESSAGE_BYTES_MAX = 8 * 1024 * 1024

_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9.-]{1,253}):([0-9]{1,5})")

_NOT_BEFORE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)

_NOT_A_CERTIFICATE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    CryptographyDeprecationWarning,
)

_OPTIONS_BOTH: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1_500),
    # What counts for a process that hangs: its kernel goes on to acknowledge bytes, and without
    # this gRPC waits a minute for the answer to a ping.
    ("grpc.http2.ping_timeout_ms", 1_500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


class CallContext(Protocol):
    """The part of ``grpc.aio.ServicerContext`` that says who calls."""

    def auth_context(self) -> Any:
        """Return the TLS properties of the call: name to list of bytes."""


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """A node's or client's certificate and its private key."""

    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    cert_der: bytes = field(repr=False)
    server_name: str = SERVER_NAME


def _subject(peer: PeerId) -> x509.Name:
    # The end of a peer id is 117 bits of its key: enough to name it, small enough for an offer.
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, peer[-20:])])


def create_identity(peer: PeerId) -> TlsIdentity:
    """Make a P-256 key and a certificate that signs itself (about 345 bytes of DER).

    It names the peer, so that nobody else can announce it as theirs.
    """
    key, name = ec.generate_private_key(ec.SECP256R1()), _subject(peer)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return TlsIdentity(
        cert_pem=certificate.public_bytes(Encoding.PEM),
        key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        cert_der=certificate.public_bytes(Encoding.DER),
    )


def load_or_create(data_dir: Path, peer: PeerId) -> TlsIdentity:
    """Read ``tls.crt`` and ``tls.key`` from ``data_dir``, or make both on first use.

    Raises ``ConfigError`` when they are damaged, do not belong together, or the key can
    be read by others.
    """
    key_path, cert_path = data_dir / "tls.key", data_dir / "tls.crt"
    if not key_path.exists():
        identity = create_identity(peer)
        cert_path.write_bytes(identity.cert_pem)
        descriptor = os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(identity.key_pem)
        return identity
    try:
        key_pem, cert_pem = key_path.read_bytes(), cert_path.read_bytes()
        key, certificate = (
            load_pem_private_key(key_pem, None),
            x509.load_pem_x509_certificate(cert_pem),
        )
        if key_path.stat().st_mode & 0o077:
            raise ConfigError(
                f"the key file {key_path} can be read by others", remedy=f"chmod 600 {key_path}"
            )
        if key.public_key() != certificate.public_key():
            raise ValueError("the key is not the certificate's")
        if certificate.subject != _subject(peer):
            raise ValueError(f"the certificate is not {peer}'s")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot use the TLS files in {data_dir}: {error}",
            remedy=f"remove {key_path} and {cert_path}; new ones are made at the next start",
        ) from error
    return TlsIdentity(cert_pem, key_pem, certificate.public_bytes(Encoding.DER))


@lru_cache(maxsize=4096)
def acceptable_certificate(cert_der: bytes, peer: PeerId) -> bool:
    """Whether the bytes are a certificate of our own shape that names the peer.

    Peers' certificates go together into one root store, where a single malformed one
    could shut everybody out: so only self-signed P-256 with our one name is let in.
    """
    if len(cert_der) > CERTIFICATE_BYTES_MAX:
        return False
    with warnings.catch_warnings():
        # What the library only warns about today, other parsers already refuse.
        warnings.simplefilter("error")
        try:
            certificate = x509.load_der_x509_certificate(cert_der)
            return certificate.subject == _subject(peer) and _has_our_shape(certificate, cert_der)
        except _NOT_A_CERTIFICATE:
            return False


def _has_our_shape(certificate: x509.Certificate, cert_der: bytes) -> bool:
    key, signature = certificate.public_key(), certificate.signature
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        return False
    certificate.verify_directly_issued_by(certificate)
    names = [entry.value for entry in certificate.extensions]
    return (
        certificate.version is x509.Version.v3
        and names == [x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)])]
        # The one encoding of the signature: this parser lets unused bits pass, others do not.
        and cert_der.endswith(b"\x03" + bytes([len(signature) + 1]) + b"\0" + signature)
    )


def make_channel_cert(
    peer_key: SigningKey, identity: TlsIdentity, network_id: str, now_ms: int, ttl_ms: int
) -> SignedEnvelope:
    """Bind the TLS certificate to the peer key until ``now_ms + ttl_ms``."""
    return seal(
        peer_key,
        ChannelCert(
            network_id=network_id,
            peer_id=peer_key.peer_id,
            certificate=identity.cert_der,
            expires_ms=now_ms + ttl_ms,
        ),
    )


def check_channel_cert(
    envelope: SignedEnvelope, network_id: str, now_ms: int
) -> tuple[PeerId, bytes]:
    """Return the peer and the certificate (DER) of a valid ``ChannelCert``.

    Raises ``BadSignature`` or ``RemoteProtocolError`` for any other.
    """
    statement = open_envelope(envelope, ChannelCert)
    peer = peer_id_of(envelope.signer)
    if statement.peer_id != peer:
        raise BadSignature("a channel certificate must be signed by the peer it names")
    if statement.network_id != network_id:
        raise RemoteProtocolError("the channel certificate is for another network", peer=peer)
    if statement.expires_ms <= now_ms:
        raise RemoteProtocolError("the channel certificate has expired", peer=peer)
    if not acceptable_certificate(statement.certificate, peer):
        raise RemoteProtocolError("not a self-signed P-256 certificate of the peer", peer=peer)
    return peer, statement.certificate


def pem_of(cert_der: bytes) -> bytes:
    """Convert a certificate from DER to PEM."""
    return ssl.DER_cert_to_PEM_cert(cert_der).encode()


def is_address(text: str) -> bool:
    """Whether the text is ``host:port`` and nothing that gRPC would read otherwise."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[1]) < 65536


def channel(
    address: str, peer_cert_der: bytes, identity: TlsIdentity | None = None
) -> grpc.aio.Channel:
    """Open a channel to exactly the holder of ``peer_cert_der`` at ``host:port``.

    ``identity`` is shown to the peer port; the public port needs none. A dead link fails
    the calls on it within 2 s, and a lost one is retried at most once a second. Raises
    ``RemoteProtocolError`` for an address of another form.
    """
    if not is_address(address):
        raise RemoteProtocolError(f"not an address: {address[:200]!r}")
    credentials = grpc.ssl_channel_credentials(
        root_certificates=pem_of(peer_cert_der),
        private_key=identity.key_pem if identity else None,
        certificate_chain=identity.cert_pem if identity else None,
    )
    options: list[tuple[str, Any]] = [
        *_OPTIONS_BOTH,
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # A proxy or a pooled connection would hide which peer answers.
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    # The scheme is ours: an address must not name a socket file or a resolver.
    return grpc.aio.secure_channel(f"dns:///{address}", credentials, options=options)


def server_options() -> list[tuple[str, int]]:
    """Options for every gRPC server: sizes, keepalive, handshake time, one owner per port."""
    return [
        *_OPTIONS_BOTH,
        ("grpc.http2.min_ping_interval_without_data_ms", 300),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.server_handshake_timeout_ms", 3_000),
        ("grpc.max_concurrent_streams", 256),
        ("grpc.so_reuseport", 0),
    ]


def server_credentials_public(identity: TlsIdentity) -> grpc.ServerCredentials:
    """Credentials of the public port: the caller stays anonymous."""
    return grpc.ssl_server_credentials([(identity.key_pem, identity.cert_pem)])


def server_credentials_peer(
    identity: TlsIdentity, trusted: Callable[[], Sequence[bytes]]
) -> grpc.ServerCredentials:
    """Credentials of the peer port: only holders of a trusted certificate (DER) get in.

    ``trusted`` is asked at every handshake, from a thread of gRPC: it must return an
    immutable sequence and do no work. The same object twice means nothing has changed.
    At most one certificate per peer: among several of one name, only one would get in.
    """
    last = [trusted()]

    def configuration(certificates: Sequence[bytes]) -> grpc.ServerCertificateConfiguration:
        # Our own certificate keeps the root store from being empty, which gRPC refuses.
        roots = dict.fromkeys([identity.cert_der, *certificates])
        return grpc.ssl_server_certificate_configuration(
            [(identity.key_pem, identity.cert_pem)],
            root_certificates=b"".join(pem_of(cert_der) for cert_der in roots),
        )

    # None, which the stubs leave out, spares the parsing of all roots at each handshake.
    def fetch() -> Any:
        certificates = trusted()
        if certificates is last[0]:
            return None
        last[0] = certificates
        return configuration(certificates)

    return grpc.dynamic_ssl_server_credentials(
        configuration(last[0]), fetch, require_client_authentication=True
    )


def caller_certificate(context: CallContext) -> bytes | None:
    """DER of the certificate the caller proved to hold; None on the public port."""
    pem = context.auth_context().get("x509_pem_cert")
    return ssl.PEM_cert_to_DER_cert(pem[0].decode()) if pem else None
