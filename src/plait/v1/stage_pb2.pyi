from plait.v1 import identity_pb2 as _identity_pb2
from plait.v1 import session_pb2 as _session_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AuditOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AUDIT_OUTCOME_UNSPECIFIED: _ClassVar[AuditOutcome]
    AUDIT_OUTCOME_CONSISTENT: _ClassVar[AuditOutcome]
    AUDIT_OUTCOME_EXPOSED: _ClassVar[AuditOutcome]
    AUDIT_OUTCOME_UNRESPONSIVE: _ClassVar[AuditOutcome]
AUDIT_OUTCOME_UNSPECIFIED: AuditOutcome
AUDIT_OUTCOME_CONSISTENT: AuditOutcome
AUDIT_OUTCOME_EXPOSED: AuditOutcome
AUDIT_OUTCOME_UNRESPONSIVE: AuditOutcome

class Activations(_message.Message):
    __slots__ = ("dtype", "rows", "width", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: _session_pb2.WireDtype
    rows: int
    width: int
    data: bytes
    def __init__(self, dtype: _Optional[_Union[_session_pb2.WireDtype, str]] = ..., rows: _Optional[int] = ..., width: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("session_id", "epoch", "traversal", "first_position", "token_ids", "activations", "sample", "close_chunk", "voucher", "receipts", "deadline_ms", "traceparent", "replay", "draft_ids", "stage_us", "embedding", "score_ids")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRAVERSAL_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_CHUNK_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    DRAFT_IDS_FIELD_NUMBER: _ClassVar[int]
    STAGE_US_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SCORE_IDS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    traversal: int
    first_position: int
    token_ids: TokenIds
    activations: Activations
    sample: bool
    close_chunk: bool
    voucher: _identity_pb2.SignedEnvelope
    receipts: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    deadline_ms: int
    traceparent: str
    replay: bool
    draft_ids: _containers.RepeatedScalarFieldContainer[int]
    stage_us: _containers.RepeatedScalarFieldContainer[int]
    embedding: bool
    score_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., traversal: _Optional[int] = ..., first_position: _Optional[int] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., activations: _Optional[_Union[Activations, _Mapping]] = ..., sample: _Optional[bool] = ..., close_chunk: _Optional[bool] = ..., voucher: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., receipts: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ..., deadline_ms: _Optional[int] = ..., traceparent: _Optional[str] = ..., replay: _Optional[bool] = ..., draft_ids: _Optional[_Iterable[int]] = ..., stage_us: _Optional[_Iterable[int]] = ..., embedding: _Optional[bool] = ..., score_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionFault(_message.Message):
    __slots__ = ("session_id", "epoch", "peer_id", "code", "reason")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    peer_id: str
    code: str
    reason: str
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., peer_id: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class TokenResult(_message.Message):
    __slots__ = ("session_id", "epoch", "traversal", "ids", "logprobs", "receipts", "draws", "stage_us", "top_logprobs", "embedding", "score_logprobs", "score_tops")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRAVERSAL_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    STAGE_US_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SCORE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SCORE_TOPS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    traversal: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    receipts: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    draws: _identity_pb2.SignedEnvelope
    stage_us: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    embedding: bytes
    score_logprobs: _containers.RepeatedScalarFieldContainer[float]
    score_tops: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., traversal: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., receipts: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ..., draws: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., stage_us: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ..., embedding: _Optional[bytes] = ..., score_logprobs: _Optional[_Iterable[float]] = ..., score_tops: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ...) -> None: ...

class TopLogprobs(_message.Message):
    __slots__ = ("ids", "logprobs")
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class LinkRequest(_message.Message):
    __slots__ = ("frame", "fault")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    frame: Frame
    fault: SessionFault
    def __init__(self, frame: _Optional[_Union[Frame, _Mapping]] = ..., fault: _Optional[_Union[SessionFault, _Mapping]] = ...) -> None: ...

class LinkResponse(_message.Message):
    __slots__ = ("result", "fault")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    result: TokenResult
    fault: SessionFault
    def __init__(self, result: _Optional[_Union[TokenResult, _Mapping]] = ..., fault: _Optional[_Union[SessionFault, _Mapping]] = ...) -> None: ...

class AuditChallenge(_message.Message):
    __slots__ = ("epochs", "nonce", "anchor", "client_cert", "stage_cert", "offer")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    CLIENT_CERT_FIELD_NUMBER: _ClassVar[int]
    STAGE_CERT_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    epochs: _containers.RepeatedCompositeFieldContainer[AuditEpoch]
    nonce: bytes
    anchor: AuditAnchor
    client_cert: _identity_pb2.SignedEnvelope
    stage_cert: _identity_pb2.SignedEnvelope
    offer: _identity_pb2.SignedEnvelope
    def __init__(self, epochs: _Optional[_Iterable[_Union[AuditEpoch, _Mapping]]] = ..., nonce: _Optional[bytes] = ..., anchor: _Optional[_Union[AuditAnchor, _Mapping]] = ..., client_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., stage_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., offer: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class AuditEpoch(_message.Message):
    __slots__ = ("session_open", "receipt", "previous")
    SESSION_OPEN_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    session_open: _identity_pb2.SignedEnvelope
    receipt: _identity_pb2.SignedEnvelope
    previous: _identity_pb2.SignedEnvelope
    def __init__(self, session_open: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., receipt: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., previous: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class AuditAnchor(_message.Message):
    __slots__ = ("entry", "voucher", "path", "growth", "checkpoint")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    GROWTH_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    entry: bytes
    voucher: _identity_pb2.SignedEnvelope
    path: _containers.RepeatedScalarFieldContainer[bytes]
    growth: _containers.RepeatedScalarFieldContainer[bytes]
    checkpoint: str
    def __init__(self, entry: _Optional[bytes] = ..., voucher: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., path: _Optional[_Iterable[bytes]] = ..., growth: _Optional[_Iterable[bytes]] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class AuditCrossing(_message.Message):
    __slots__ = ("traversal", "first_position", "rows", "payload_digest", "payload")
    TRAVERSAL_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    traversal: int
    first_position: int
    rows: int
    payload_digest: bytes
    payload: bytes
    def __init__(self, traversal: _Optional[int] = ..., first_position: _Optional[int] = ..., rows: _Optional[int] = ..., payload_digest: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class AuditOpening(_message.Message):
    __slots__ = ("epoch", "received", "sent", "states")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    received: _containers.RepeatedCompositeFieldContainer[AuditCrossing]
    sent: _containers.RepeatedCompositeFieldContainer[AuditCrossing]
    states: _containers.RepeatedCompositeFieldContainer[AuditCrossing]
    def __init__(self, epoch: _Optional[int] = ..., received: _Optional[_Iterable[_Union[AuditCrossing, _Mapping]]] = ..., sent: _Optional[_Iterable[_Union[AuditCrossing, _Mapping]]] = ..., states: _Optional[_Iterable[_Union[AuditCrossing, _Mapping]]] = ...) -> None: ...

class AuditVerdict(_message.Message):
    __slots__ = ("network_id", "session_id", "epoch", "chunk", "stage_index", "peer_id", "auditor_peer_id", "outcome", "receipt_digest", "numeric_class", "distance_ppb", "margin_micros", "position", "reason", "issued_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    AUDITOR_PEER_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_PPB_FIELD_NUMBER: _ClassVar[int]
    MARGIN_MICROS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    session_id: bytes
    epoch: int
    chunk: int
    stage_index: int
    peer_id: str
    auditor_peer_id: str
    outcome: AuditOutcome
    receipt_digest: bytes
    numeric_class: str
    distance_ppb: int
    margin_micros: int
    position: int
    reason: str
    issued_ms: int
    def __init__(self, network_id: _Optional[str] = ..., session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., chunk: _Optional[int] = ..., stage_index: _Optional[int] = ..., peer_id: _Optional[str] = ..., auditor_peer_id: _Optional[str] = ..., outcome: _Optional[_Union[AuditOutcome, str]] = ..., receipt_digest: _Optional[bytes] = ..., numeric_class: _Optional[str] = ..., distance_ppb: _Optional[int] = ..., margin_micros: _Optional[int] = ..., position: _Optional[int] = ..., reason: _Optional[str] = ..., issued_ms: _Optional[int] = ...) -> None: ...

class ExamineResponse(_message.Message):
    __slots__ = ("opening", "verdict")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    opening: AuditOpening
    verdict: _identity_pb2.SignedEnvelope
    def __init__(self, opening: _Optional[_Union[AuditOpening, _Mapping]] = ..., verdict: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class AuditEvidence(_message.Message):
    __slots__ = ("challenge", "openings", "verdict")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    OPENINGS_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    challenge: AuditChallenge
    openings: _containers.RepeatedCompositeFieldContainer[AuditOpening]
    verdict: _identity_pb2.SignedEnvelope
    def __init__(self, challenge: _Optional[_Union[AuditChallenge, _Mapping]] = ..., openings: _Optional[_Iterable[_Union[AuditOpening, _Mapping]]] = ..., verdict: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...
