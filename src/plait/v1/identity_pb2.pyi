from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class SignedEnvelope(_message.Message):
    __slots__ = ("payload_type", "payload", "signer", "signature")
    PAYLOAD_TYPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    payload_type: str
    payload: bytes
    signer: bytes
    signature: bytes
    def __init__(self, payload_type: _Optional[str] = ..., payload: _Optional[bytes] = ..., signer: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class NodeKeyCert(_message.Message):
    __slots__ = ("network_id", "peer_id", "ledger_key", "not_before_ms", "expires_ms", "serial")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    LEDGER_KEY_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    peer_id: str
    ledger_key: bytes
    not_before_ms: int
    expires_ms: int
    serial: int
    def __init__(self, network_id: _Optional[str] = ..., peer_id: _Optional[str] = ..., ledger_key: _Optional[bytes] = ..., not_before_ms: _Optional[int] = ..., expires_ms: _Optional[int] = ..., serial: _Optional[int] = ...) -> None: ...

class ChannelCert(_message.Message):
    __slots__ = ("network_id", "peer_id", "certificate", "expires_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    peer_id: str
    certificate: bytes
    expires_ms: int
    def __init__(self, network_id: _Optional[str] = ..., peer_id: _Optional[str] = ..., certificate: _Optional[bytes] = ..., expires_ms: _Optional[int] = ...) -> None: ...

class NetworkFileDigest(_message.Message):
    __slots__ = ("network_id", "sha256")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    sha256: bytes
    def __init__(self, network_id: _Optional[str] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class KeyRevocation(_message.Message):
    __slots__ = ("network_id", "peer_id", "serial_min", "issued_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    SERIAL_MIN_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    peer_id: str
    serial_min: int
    issued_ms: int
    def __init__(self, network_id: _Optional[str] = ..., peer_id: _Optional[str] = ..., serial_min: _Optional[int] = ..., issued_ms: _Optional[int] = ...) -> None: ...
