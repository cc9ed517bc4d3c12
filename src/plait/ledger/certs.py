"""Key certificates: a peer key delegates payments and receipts to a ledger key.

A certificate ends by its date, or when its peer revokes it by serial. To rotate is to sign a
certificate of a new key with the next serial; to revoke is to say which serials are void.
"""

from collections.abc import Mapping
from types import MappingProxyType

from plait.envelope import open_envelope, seal
from plait.errors import BadSignature
from plait.identity import SigningKey, public_key_of
from plait.types import PeerId
from plait.v1.identity_pb2 import KeyRevocation, NodeKeyCert, SignedEnvelope

CLOCK_SKEW_MS_MAX = 120_000
"""How far the clocks of two peers may be apart before dates are refused."""

NOTHING_REVOKED: Mapping[PeerId, int] = MappingProxyType({})


def make_key_cert(
    peer_key: SigningKey,
    ledger_public: bytes,
    network_id: str,
    now_ms: int,
    ttl_ms: int,
    serial: int,
) -> SignedEnvelope:
    """Delegate to a ledger key from now on, for ``ttl_ms``; ``serial`` rises by rotation."""
    cert = NodeKeyCert(
        network_id=network_id,
        peer_id=peer_key.peer_id,
        ledger_key=ledger_public,
        not_before_ms=now_ms,
        expires_ms=now_ms + ttl_ms,
        serial=serial,
    )
    return seal(peer_key, cert)


def check_key_cert(
    envelope: SignedEnvelope,
    network_id: str,
    now_ms: int,
    peer: PeerId | None = None,
    revoked: Mapping[PeerId, int] = NOTHING_REVOKED,
) -> tuple[PeerId, bytes]:
    """Check a certificate and return its peer and the peer's ledger key.

    ``peer`` is the peer expected; ``None`` accepts any. ``revoked`` holds the least serial
    that still counts of each peer that has revoked any. Raises ``BadSignature`` for a
    certificate of another key, peer, network or time, and ``RemoteProtocolError`` for
    one that is malformed.
    """
    cert = open_envelope(envelope, NodeKeyCert)
    try:
        peer_key = public_key_of(cert.peer_id)
    except ValueError as error:
        raise BadSignature(f"the certificate names no peer: {error}") from error
    if envelope.signer != peer_key:
        raise BadSignature("the certificate is not signed by the peer it names")
    if peer is not None and cert.peer_id != peer:
        raise BadSignature(f"the certificate is of {cert.peer_id}, not of {peer}")
    if cert.network_id != network_id:
        raise BadSignature(f"the certificate is for the network {cert.network_id[:80]!r}")
    if len(cert.ledger_key) != 32 or cert.ledger_key == peer_key:
        raise BadSignature("the certificate names no separate ledger key")
    if not cert.not_before_ms - CLOCK_SKEW_MS_MAX <= now_ms < cert.expires_ms:
        raise BadSignature("the certificate is not valid at this time")
    if cert.serial < revoked.get(PeerId(cert.peer_id), 0):
        raise BadSignature("the certificate has been revoked")
    return PeerId(cert.peer_id), cert.ledger_key


def make_revocation(
    peer_key: SigningKey, network_id: str, serial_min: int, now_ms: int
) -> SignedEnvelope:
    """Void every certificate of the peer with a serial below ``serial_min``, for ever."""
    revocation = KeyRevocation(
        network_id=network_id, peer_id=peer_key.peer_id, serial_min=serial_min, issued_ms=now_ms
    )
    return seal(peer_key, revocation)


def check_revocation(envelope: SignedEnvelope, network_id: str) -> tuple[PeerId, int]:
    """Check a revocation; returns whose it is and the least serial that still counts.

    Its date decides nothing: who stole the ledger key cannot sign one, and who stole the peer
    key has everything. Raises ``BadSignature`` and ``RemoteProtocolError``.
    """
    revocation = open_envelope(envelope, KeyRevocation)
    try:
        peer_key = public_key_of(revocation.peer_id)
    except ValueError as error:
        raise BadSignature(f"the revocation names no peer: {error}") from error
    if envelope.signer != peer_key:
        raise BadSignature("the revocation is not signed by the peer it names")
    if revocation.network_id != network_id:
        raise BadSignature(f"the revocation is for the network {revocation.network_id[:80]!r}")
    if revocation.serial_min == 0:
        raise BadSignature("the revocation voids nothing")
    return PeerId(revocation.peer_id), revocation.serial_min
