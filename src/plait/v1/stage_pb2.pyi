from plait.v1 import identity_pb2 as _identity_pb2
from plait.v1 import session_pb2 as _session_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    __slots__ = ("session_id", "epoch", "traversal", "first_position", "token_ids", "activations", "sample", "close_chunk", "voucher", "receipts", "deadline_ms", "traceparent", "replay", "draft_ids", "stage_us")
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
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., traversal: _Optional[int] = ..., first_position: _Optional[int] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., activations: _Optional[_Union[Activations, _Mapping]] = ..., sample: _Optional[bool] = ..., close_chunk: _Optional[bool] = ..., voucher: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., receipts: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ..., deadline_ms: _Optional[int] = ..., traceparent: _Optional[str] = ..., replay: _Optional[bool] = ..., draft_ids: _Optional[_Iterable[int]] = ..., stage_us: _Optional[_Iterable[int]] = ...) -> None: ...

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
    __slots__ = ("session_id", "epoch", "traversal", "ids", "logprobs", "receipts", "draws", "stage_us", "top_logprobs")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRAVERSAL_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    STAGE_US_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    traversal: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    receipts: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    draws: _identity_pb2.SignedEnvelope
    stage_us: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., traversal: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., receipts: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ..., draws: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., stage_us: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ...) -> None: ...

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
