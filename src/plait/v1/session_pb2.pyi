from plait.v1 import identity_pb2 as _identity_pb2
from plait.v1 import offer_pb2 as _offer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WireDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WIRE_DTYPE_UNSPECIFIED: _ClassVar[WireDtype]
    WIRE_DTYPE_F32: _ClassVar[WireDtype]
    WIRE_DTYPE_BF16: _ClassVar[WireDtype]
    WIRE_DTYPE_INT8: _ClassVar[WireDtype]

class Qos(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QOS_UNSPECIFIED: _ClassVar[Qos]
    QOS_INTERACTIVE: _ClassVar[Qos]
    QOS_STANDARD: _ClassVar[Qos]
    QOS_BATCH: _ClassVar[Qos]
WIRE_DTYPE_UNSPECIFIED: WireDtype
WIRE_DTYPE_F32: WireDtype
WIRE_DTYPE_BF16: WireDtype
WIRE_DTYPE_INT8: WireDtype
QOS_UNSPECIFIED: Qos
QOS_INTERACTIVE: Qos
QOS_STANDARD: Qos
QOS_BATCH: Qos

class Sampling(_message.Message):
    __slots__ = ("temperature_micros", "top_p_micros", "top_k", "seed", "end_ids", "min_p_micros", "presence_penalty_micros", "frequency_penalty_micros", "repetition_penalty_micros", "logit_bias", "top_logprobs", "grammar")
    TEMPERATURE_MICROS_FIELD_NUMBER: _ClassVar[int]
    TOP_P_MICROS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    END_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_MICROS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_MICROS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_MICROS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_MICROS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    temperature_micros: int
    top_p_micros: int
    top_k: int
    seed: int
    end_ids: _containers.RepeatedScalarFieldContainer[int]
    min_p_micros: int
    presence_penalty_micros: int
    frequency_penalty_micros: int
    repetition_penalty_micros: int
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    top_logprobs: int
    grammar: Grammar
    def __init__(self, temperature_micros: _Optional[int] = ..., top_p_micros: _Optional[int] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., end_ids: _Optional[_Iterable[int]] = ..., min_p_micros: _Optional[int] = ..., presence_penalty_micros: _Optional[int] = ..., frequency_penalty_micros: _Optional[int] = ..., repetition_penalty_micros: _Optional[int] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., top_logprobs: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("id", "micros")
    ID_FIELD_NUMBER: _ClassVar[int]
    MICROS_FIELD_NUMBER: _ClassVar[int]
    id: int
    micros: int
    def __init__(self, id: _Optional[int] = ..., micros: _Optional[int] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("json_schema", "regex", "lark")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    LARK_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    lark: str
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., lark: _Optional[str] = ...) -> None: ...

class RouteStage(_message.Message):
    __slots__ = ("peer_id", "start_layer", "end_layer", "offer_digest", "priced_layers", "prices", "entered_epoch", "base", "carried_microcredits", "replayed_tokens", "rebuilt")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    START_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    OFFER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PRICED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PRICES_FIELD_NUMBER: _ClassVar[int]
    ENTERED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    CARRIED_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REBUILT_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    start_layer: int
    end_layer: int
    offer_digest: bytes
    priced_layers: int
    prices: _offer_pb2.Prices
    entered_epoch: int
    base: Counts
    carried_microcredits: int
    replayed_tokens: int
    rebuilt: bool
    def __init__(self, peer_id: _Optional[str] = ..., start_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., offer_digest: _Optional[bytes] = ..., priced_layers: _Optional[int] = ..., prices: _Optional[_Union[_offer_pb2.Prices, _Mapping]] = ..., entered_epoch: _Optional[int] = ..., base: _Optional[_Union[Counts, _Mapping]] = ..., carried_microcredits: _Optional[int] = ..., replayed_tokens: _Optional[int] = ..., rebuilt: _Optional[bool] = ...) -> None: ...

class Counts(_message.Message):
    __slots__ = ("prompt", "output", "cached_prompt", "rejected_draft")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_DRAFT_FIELD_NUMBER: _ClassVar[int]
    prompt: int
    output: int
    cached_prompt: int
    rejected_draft: int
    def __init__(self, prompt: _Optional[int] = ..., output: _Optional[int] = ..., cached_prompt: _Optional[int] = ..., rejected_draft: _Optional[int] = ...) -> None: ...

class RoutePlan(_message.Message):
    __slots__ = ("model_digest", "stages")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    model_digest: bytes
    stages: _containers.RepeatedCompositeFieldContainer[RouteStage]
    def __init__(self, model_digest: _Optional[bytes] = ..., stages: _Optional[_Iterable[_Union[RouteStage, _Mapping]]] = ...) -> None: ...

class SessionOpen(_message.Message):
    __slots__ = ("network_id", "session_id", "epoch", "client_peer_id", "route", "sampling", "prompt_tokens", "max_tokens", "chunk_tokens", "prefill_chunk_tokens", "wire_dtype", "handoff_salt", "issued_ms", "expires_ms", "resume_position", "qos", "start", "audit_commit")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_PEER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_SALT_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    RESUME_POSITION_FIELD_NUMBER: _ClassVar[int]
    QOS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    AUDIT_COMMIT_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    session_id: bytes
    epoch: int
    client_peer_id: str
    route: RoutePlan
    sampling: Sampling
    prompt_tokens: int
    max_tokens: int
    chunk_tokens: int
    prefill_chunk_tokens: int
    wire_dtype: WireDtype
    handoff_salt: bytes
    issued_ms: int
    expires_ms: int
    resume_position: int
    qos: Qos
    start: Counts
    audit_commit: bytes
    def __init__(self, network_id: _Optional[str] = ..., session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., client_peer_id: _Optional[str] = ..., route: _Optional[_Union[RoutePlan, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., prefill_chunk_tokens: _Optional[int] = ..., wire_dtype: _Optional[_Union[WireDtype, str]] = ..., handoff_salt: _Optional[bytes] = ..., issued_ms: _Optional[int] = ..., expires_ms: _Optional[int] = ..., resume_position: _Optional[int] = ..., qos: _Optional[_Union[Qos, str]] = ..., start: _Optional[_Union[Counts, _Mapping]] = ..., audit_commit: _Optional[bytes] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("session_open", "client_cert", "stage_index", "context_ids", "prefix_digests", "neighbour_offers")
    SESSION_OPEN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_CERT_FIELD_NUMBER: _ClassVar[int]
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOUR_OFFERS_FIELD_NUMBER: _ClassVar[int]
    session_open: _identity_pb2.SignedEnvelope
    client_cert: _identity_pb2.SignedEnvelope
    stage_index: int
    context_ids: _containers.RepeatedScalarFieldContainer[int]
    prefix_digests: _containers.RepeatedScalarFieldContainer[bytes]
    neighbour_offers: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    def __init__(self, session_open: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., client_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., stage_index: _Optional[int] = ..., context_ids: _Optional[_Iterable[int]] = ..., prefix_digests: _Optional[_Iterable[bytes]] = ..., neighbour_offers: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "reason", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: str
    reason: str
    retry_after_ms: int
    def __init__(self, code: _Optional[str] = ..., reason: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("refusal", "hold_expires_ms", "stage_cert", "reusable_tokens")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    HOLD_EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    STAGE_CERT_FIELD_NUMBER: _ClassVar[int]
    REUSABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    hold_expires_ms: int
    stage_cert: _identity_pb2.SignedEnvelope
    reusable_tokens: int
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ..., hold_expires_ms: _Optional[int] = ..., stage_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., reusable_tokens: _Optional[int] = ...) -> None: ...

class ConfirmRequest(_message.Message):
    __slots__ = ("session_id", "epoch", "reservation", "grant", "voucher", "cached_tokens")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    reservation: _identity_pb2.SignedEnvelope
    grant: _identity_pb2.SignedEnvelope
    voucher: _identity_pb2.SignedEnvelope
    cached_tokens: int
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., reservation: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., grant: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., voucher: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class ConfirmResponse(_message.Message):
    __slots__ = ("refusal",)
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("session_id", "epoch", "voucher", "reason", "prefix_digests", "keep_alive_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREFIX_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_S_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    voucher: _identity_pb2.SignedEnvelope
    reason: str
    prefix_digests: _containers.RepeatedScalarFieldContainer[bytes]
    keep_alive_s: int
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., voucher: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., reason: _Optional[str] = ..., prefix_digests: _Optional[_Iterable[bytes]] = ..., keep_alive_s: _Optional[int] = ...) -> None: ...

class CloseResponse(_message.Message):
    __slots__ = ("settled",)
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    settled: bool
    def __init__(self, settled: _Optional[bool] = ...) -> None: ...

class CloseEpochRequest(_message.Message):
    __slots__ = ("session_id", "epoch", "traversal", "position")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRAVERSAL_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    traversal: int
    position: int
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., traversal: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class CloseEpochResponse(_message.Message):
    __slots__ = ("receipt", "positions", "retained", "traversals_received", "traversals_sent")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    TRAVERSALS_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TRAVERSALS_SENT_FIELD_NUMBER: _ClassVar[int]
    receipt: _identity_pb2.SignedEnvelope
    positions: int
    retained: int
    traversals_received: int
    traversals_sent: int
    def __init__(self, receipt: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., positions: _Optional[int] = ..., retained: _Optional[int] = ..., traversals_received: _Optional[int] = ..., traversals_sent: _Optional[int] = ...) -> None: ...
