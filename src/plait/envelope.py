"""Signed bytes: DSSE envelopes around deterministic protobuf payloads.

The signature covers PAE(payload_type, payload) (the DSSE v1 specification); the SHA-256
of the payload bytes is an object's identity everywhere. Verifying never re-serialises;
a payload that does not re-encode to itself (unknown or reordered fields, over-long
varints) is refused.
"""

import hashlib
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from plait.errors import BadSignature, RemoteProtocolError
from plait.identity import SigningKey, verify
from plait.types import Digest
from plait.v1.identity_pb2 import SignedEnvelope

MessageT = TypeVar("MessageT", bound=Message)

_TYPE_NAMES = {
    "NodeKeyCert": "node-key-cert",
    "KeyRevocation": "key-revocation",
    "ChannelCert": "channel-cert",
    "NetworkFileDigest": "network-file",
    "Offer": "offer",
    "LinkReport": "link-report",
    "SessionOpen": "session-open",
    "BudgetReservation": "reservation",
    "ReservationGrant": "grant",
    "StageReceipt": "receipt",
    "DrawStatement": "draws",
    "SessionVoucher": "voucher",
    "SettlementRequest": "settlement",
    "IssueOrder": "issue-order",
    "LimitOrder": "limit-order",
    "SubAccountOrder": "sub-account-order",
    "AccountQuery": "account-query",
    "BundleSeal": "bundle-seal",
    "AuditVerdict": "audit-verdict",
    "ExposureReport": "exposure-report",
    "ExposureJudgement": "exposure-judgement",
    "ModelManifest": "model-manifest",
}
_PAYLOAD_TYPES = {
    message: f"application/vnd.plait.{name}.v1" for message, name in _TYPE_NAMES.items()
}


def payload_type(message_class: type[Message]) -> str:
    """Return the payload type of a signed message; raises ``KeyError`` for an unsigned one."""
    return _PAYLOAD_TYPES[message_class.DESCRIPTOR.name]


def pae(type_name: str, payload: bytes) -> bytes:
    """DSSE pre-authentication encoding: what is signed."""
    encoded = type_name.encode()
    return b"DSSEv1 %d %b %d %b" % (len(encoded), encoded, len(payload), payload)


def encode(message: Message) -> bytes:
    """Serialise deterministically: the only encoding of our own signed objects."""
    return message.SerializeToString(deterministic=True)


def digest(payload: bytes) -> Digest:
    """SHA-256 of payload bytes."""
    return Digest(hashlib.sha256(payload).digest())


def seal(key: SigningKey, message: Message) -> SignedEnvelope:
    """Sign a message."""
    type_name, payload = payload_type(type(message)), encode(message)
    signature = key.sign(pae(type_name, payload))
    return SignedEnvelope(
        payload_type=type_name, payload=payload, signer=key.public, signature=signature
    )


def open_envelope(
    envelope: SignedEnvelope,
    message_class: type[MessageT],
    *,
    signer: bytes | None = None,
    verified: bool = False,
) -> MessageT:
    """Verify an envelope and decode its payload.

    ``signer`` is the public key expected; ``None`` accepts any signer (the caller then
    checks what ``envelope.signer`` may say). ``verified``: this very signature was found good
    already. Raises ``BadSignature`` for a wrong type, signer or signature and
    ``RemoteProtocolError`` for a payload that is not the one canonical encoding of a
    ``message_class``.
    """
    expected = payload_type(message_class)
    if envelope.payload_type != expected:
        raise BadSignature(f"expected {expected}, not {envelope.payload_type[:80]!r}")
    if signer is not None and envelope.signer != signer:
        raise BadSignature(f"{expected} is signed by another key")
    if not verified:
        verify(envelope.signer, envelope.signature, pae(expected, envelope.payload))
    return decode(envelope.payload, message_class)


def decode(payload: bytes, message_class: type[MessageT]) -> MessageT:
    """Decode canonical bytes; raises ``RemoteProtocolError`` for any other encoding."""
    message = message_class()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise RemoteProtocolError(f"not a {message_class.DESCRIPTOR.name}") from error
    message.DiscardUnknownFields()  # they would otherwise survive the round trip
    if encode(message) != payload:
        raise RemoteProtocolError(f"{message_class.DESCRIPTOR.name} is not canonically encoded")
    return message
