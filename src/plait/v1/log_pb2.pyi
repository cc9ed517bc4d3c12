from plait.v1 import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetTileRequest(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class GetTileResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class AddCheckpointRequest(_message.Message):
    __slots__ = ("old_size", "proof", "checkpoint")
    OLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    old_size: int
    proof: _containers.RepeatedScalarFieldContainer[bytes]
    checkpoint: str
    def __init__(self, old_size: _Optional[int] = ..., proof: _Optional[_Iterable[bytes]] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class AddCheckpointResponse(_message.Message):
    __slots__ = ("status", "cosignature", "reason", "size", "fork_proof")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    COSIGNATURE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    FORK_PROOF_FIELD_NUMBER: _ClassVar[int]
    status: int
    cosignature: str
    reason: str
    size: int
    fork_proof: bytes
    def __init__(self, status: _Optional[int] = ..., cosignature: _Optional[str] = ..., reason: _Optional[str] = ..., size: _Optional[int] = ..., fork_proof: _Optional[bytes] = ...) -> None: ...

class ExposureReport(_message.Message):
    __slots__ = ("network_id", "verdict", "evidence_digest", "evidence_at", "issued_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_AT_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    verdict: _identity_pb2.SignedEnvelope
    evidence_digest: bytes
    evidence_at: str
    issued_ms: int
    def __init__(self, network_id: _Optional[str] = ..., verdict: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., evidence_digest: _Optional[bytes] = ..., evidence_at: _Optional[str] = ..., issued_ms: _Optional[int] = ...) -> None: ...

class ExposureNotice(_message.Message):
    __slots__ = ("report", "reporter_cert")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    REPORTER_CERT_FIELD_NUMBER: _ClassVar[int]
    report: _identity_pb2.SignedEnvelope
    reporter_cert: _identity_pb2.SignedEnvelope
    def __init__(self, report: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., reporter_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class Notices(_message.Message):
    __slots__ = ("checkpoints", "fork_proofs", "revocations", "exposures")
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    FORK_PROOFS_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    EXPOSURES_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedScalarFieldContainer[str]
    fork_proofs: _containers.RepeatedScalarFieldContainer[bytes]
    revocations: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    exposures: _containers.RepeatedCompositeFieldContainer[ExposureNotice]
    def __init__(self, checkpoints: _Optional[_Iterable[str]] = ..., fork_proofs: _Optional[_Iterable[bytes]] = ..., revocations: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ..., exposures: _Optional[_Iterable[_Union[ExposureNotice, _Mapping]]] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("network_id", "notices")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    notices: Notices
    def __init__(self, network_id: _Optional[str] = ..., notices: _Optional[_Union[Notices, _Mapping]] = ...) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("notices",)
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    notices: Notices
    def __init__(self, notices: _Optional[_Union[Notices, _Mapping]] = ...) -> None: ...
