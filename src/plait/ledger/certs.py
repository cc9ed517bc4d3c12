"""Key certificates: a peer key delegates payments and receipts to a ledger key."""

from plait.envelope import open_envelope, seal
from plait.errors import BadSignature
from plait.identity import SigningKey, public_key_of
from plait.types import PeerId
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope

CLOCK_SKEW_MS_MAX = 120_000
"""How far the clocks of two peers may be apart before dates are refused."""


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
    envelope: SignedEnvelope, network_id: str, now_ms: int, peer: PeerId | None = None
) -> tuple[PeerId, bytes]:
    """Check a certificate and return its peer and the peer's ledger key.

    ``peer`` is the peer expected; ``None`` accepts any. Raises ``BadSignature`` for a
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
    return PeerId(cert.peer_id), cert.ledger_key
