from plait.v1 import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OfferState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OFFER_STATE_UNSPECIFIED: _ClassVar[OfferState]
    OFFER_STATE_READY: _ClassVar[OfferState]
    OFFER_STATE_DRAINING: _ClassVar[OfferState]
    OFFER_STATE_WITHDRAWN: _ClassVar[OfferState]

class EvidenceLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVIDENCE_LEVEL_UNSPECIFIED: _ClassVar[EvidenceLevel]
    EVIDENCE_LEVEL_STAGE_RECEIPTS: _ClassVar[EvidenceLevel]
    EVIDENCE_LEVEL_FRONTING_NODE: _ClassVar[EvidenceLevel]
OFFER_STATE_UNSPECIFIED: OfferState
OFFER_STATE_READY: OfferState
OFFER_STATE_DRAINING: OfferState
OFFER_STATE_WITHDRAWN: OfferState
EVIDENCE_LEVEL_UNSPECIFIED: EvidenceLevel
EVIDENCE_LEVEL_STAGE_RECEIPTS: EvidenceLevel
EVIDENCE_LEVEL_FRONTING_NODE: EvidenceLevel

class Prices(_message.Message):
    __slots__ = ("prompt", "cached_prompt", "output", "rejected_draft", "replayed")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_DRAFT_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    prompt: int
    cached_prompt: int
    output: int
    rejected_draft: int
    replayed: int
    def __init__(self, prompt: _Optional[int] = ..., cached_prompt: _Optional[int] = ..., output: _Optional[int] = ..., rejected_draft: _Optional[int] = ..., replayed: _Optional[int] = ...) -> None: ...

class DeclaredEnergy(_message.Message):
    __slots__ = ("millijoules_per_token_layer", "grams_co2_per_kwh")
    MILLIJOULES_PER_TOKEN_LAYER_FIELD_NUMBER: _ClassVar[int]
    GRAMS_CO2_PER_KWH_FIELD_NUMBER: _ClassVar[int]
    millijoules_per_token_layer: int
    grams_co2_per_kwh: int
    def __init__(self, millijoules_per_token_layer: _Optional[int] = ..., grams_co2_per_kwh: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("network_id", "model_digest", "start_layer", "end_layer", "incarnation", "sequence", "issued_ms", "expires_ms", "state", "evidence", "prices", "numeric_class", "region", "kv_tokens_total", "kv_tokens_free", "sessions_active", "decode_us", "prefill_us_per_token", "public_address", "peer_address", "certificate", "multiaddrs", "energy")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    PRICES_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FREE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    MULTIADDRS_FIELD_NUMBER: _ClassVar[int]
    ENERGY_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    model_digest: bytes
    start_layer: int
    end_layer: int
    incarnation: int
    sequence: int
    issued_ms: int
    expires_ms: int
    state: OfferState
    evidence: EvidenceLevel
    prices: Prices
    numeric_class: str
    region: str
    kv_tokens_total: int
    kv_tokens_free: int
    sessions_active: int
    decode_us: int
    prefill_us_per_token: int
    public_address: str
    peer_address: str
    certificate: bytes
    multiaddrs: _containers.RepeatedScalarFieldContainer[str]
    energy: DeclaredEnergy
    def __init__(self, network_id: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., start_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., issued_ms: _Optional[int] = ..., expires_ms: _Optional[int] = ..., state: _Optional[_Union[OfferState, str]] = ..., evidence: _Optional[_Union[EvidenceLevel, str]] = ..., prices: _Optional[_Union[Prices, _Mapping]] = ..., numeric_class: _Optional[str] = ..., region: _Optional[str] = ..., kv_tokens_total: _Optional[int] = ..., kv_tokens_free: _Optional[int] = ..., sessions_active: _Optional[int] = ..., decode_us: _Optional[int] = ..., prefill_us_per_token: _Optional[int] = ..., public_address: _Optional[str] = ..., peer_address: _Optional[str] = ..., certificate: _Optional[bytes] = ..., multiaddrs: _Optional[_Iterable[str]] = ..., energy: _Optional[_Union[DeclaredEnergy, _Mapping]] = ...) -> None: ...

class MeasuredLink(_message.Message):
    __slots__ = ("peer_id", "rtt_us", "bandwidth")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    RTT_US_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    rtt_us: int
    bandwidth: int
    def __init__(self, peer_id: _Optional[str] = ..., rtt_us: _Optional[int] = ..., bandwidth: _Optional[int] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("network_id", "incarnation", "sequence", "issued_ms", "expires_ms", "links")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    incarnation: int
    sequence: int
    issued_ms: int
    expires_ms: int
    links: _containers.RepeatedCompositeFieldContainer[MeasuredLink]
    def __init__(self, network_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., issued_ms: _Optional[int] = ..., expires_ms: _Optional[int] = ..., links: _Optional[_Iterable[_Union[MeasuredLink, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("model_digest",)
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model_digest: bytes
    def __init__(self, model_digest: _Optional[bytes] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("envelopes", "gone_peer_ids", "snapshot")
    ENVELOPES_FIELD_NUMBER: _ClassVar[int]
    GONE_PEER_IDS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    envelopes: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    gone_peer_ids: _containers.RepeatedScalarFieldContainer[str]
    snapshot: bool
    def __init__(self, envelopes: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ..., gone_peer_ids: _Optional[_Iterable[str]] = ..., snapshot: _Optional[bool] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("model_digest", "prompt_tokens", "max_tokens")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model_digest: bytes
    prompt_tokens: int
    max_tokens: int
    def __init__(self, model_digest: _Optional[bytes] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("would_accept", "reason", "predicted_start_us", "kv_tokens_free", "incarnation")
    WOULD_ACCEPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_START_US_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FREE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    would_accept: bool
    reason: str
    predicted_start_us: int
    kv_tokens_free: int
    incarnation: int
    def __init__(self, would_accept: _Optional[bool] = ..., reason: _Optional[str] = ..., predicted_start_us: _Optional[int] = ..., kv_tokens_free: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("channel_cert",)
    CHANNEL_CERT_FIELD_NUMBER: _ClassVar[int]
    channel_cert: _identity_pb2.SignedEnvelope
    def __init__(self, channel_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("expires_ms",)
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    expires_ms: int
    def __init__(self, expires_ms: _Optional[int] = ...) -> None: ...
