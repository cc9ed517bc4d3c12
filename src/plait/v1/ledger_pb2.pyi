from plait.v1 import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BudgetPeriod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUDGET_PERIOD_UNSPECIFIED: _ClassVar[BudgetPeriod]
    BUDGET_PERIOD_DAY: _ClassVar[BudgetPeriod]
    BUDGET_PERIOD_WEEK: _ClassVar[BudgetPeriod]
    BUDGET_PERIOD_MONTH: _ClassVar[BudgetPeriod]

class EntryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTRY_KIND_UNSPECIFIED: _ClassVar[EntryKind]
    ENTRY_KIND_ISSUE: _ClassVar[EntryKind]
    ENTRY_KIND_RESERVE: _ClassVar[EntryKind]
    ENTRY_KIND_SETTLE: _ClassVar[EntryKind]
    ENTRY_KIND_VOID: _ClassVar[EntryKind]
    ENTRY_KIND_LIMIT: _ClassVar[EntryKind]
    ENTRY_KIND_SUB_ACCOUNT: _ClassVar[EntryKind]
    ENTRY_KIND_ESCROW: _ClassVar[EntryKind]
    ENTRY_KIND_MATURE: _ClassVar[EntryKind]
    ENTRY_KIND_FORFEIT: _ClassVar[EntryKind]
BUDGET_PERIOD_UNSPECIFIED: BudgetPeriod
BUDGET_PERIOD_DAY: BudgetPeriod
BUDGET_PERIOD_WEEK: BudgetPeriod
BUDGET_PERIOD_MONTH: BudgetPeriod
ENTRY_KIND_UNSPECIFIED: EntryKind
ENTRY_KIND_ISSUE: EntryKind
ENTRY_KIND_RESERVE: EntryKind
ENTRY_KIND_SETTLE: EntryKind
ENTRY_KIND_VOID: EntryKind
ENTRY_KIND_LIMIT: EntryKind
ENTRY_KIND_SUB_ACCOUNT: EntryKind
ENTRY_KIND_ESCROW: EntryKind
ENTRY_KIND_MATURE: EntryKind
ENTRY_KIND_FORFEIT: EntryKind

class PayeeAmount(_message.Message):
    __slots__ = ("payee", "microcredits")
    PAYEE_FIELD_NUMBER: _ClassVar[int]
    MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    payee: str
    microcredits: int
    def __init__(self, payee: _Optional[str] = ..., microcredits: _Optional[int] = ...) -> None: ...

class BudgetReservation(_message.Message):
    __slots__ = ("network_id", "account", "lane", "sequence", "session_id", "epoch", "amount", "caps", "route_digest", "issued_ms", "expires_ms", "sub_account")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    CAPS_FIELD_NUMBER: _ClassVar[int]
    ROUTE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    SUB_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    account: str
    lane: int
    sequence: int
    session_id: bytes
    epoch: int
    amount: int
    caps: _containers.RepeatedCompositeFieldContainer[PayeeAmount]
    route_digest: bytes
    issued_ms: int
    expires_ms: int
    sub_account: str
    def __init__(self, network_id: _Optional[str] = ..., account: _Optional[str] = ..., lane: _Optional[int] = ..., sequence: _Optional[int] = ..., session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., amount: _Optional[int] = ..., caps: _Optional[_Iterable[_Union[PayeeAmount, _Mapping]]] = ..., route_digest: _Optional[bytes] = ..., issued_ms: _Optional[int] = ..., expires_ms: _Optional[int] = ..., sub_account: _Optional[str] = ...) -> None: ...

class ReservationGrant(_message.Message):
    __slots__ = ("network_id", "reservation_digest", "account", "session_id", "amount", "granted_ms", "expires_ms", "merge_delay_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    GRANTED_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    MERGE_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    reservation_digest: bytes
    account: str
    session_id: bytes
    amount: int
    granted_ms: int
    expires_ms: int
    merge_delay_ms: int
    def __init__(self, network_id: _Optional[str] = ..., reservation_digest: _Optional[bytes] = ..., account: _Optional[str] = ..., session_id: _Optional[bytes] = ..., amount: _Optional[int] = ..., granted_ms: _Optional[int] = ..., expires_ms: _Optional[int] = ..., merge_delay_ms: _Optional[int] = ...) -> None: ...

class StageReceipt(_message.Message):
    __slots__ = ("network_id", "session_id", "epoch", "stage_index", "chunk", "start_layer", "end_layer", "model_digest", "numeric_class", "traversal", "prompt_tokens", "output_tokens", "input_commit", "output_commit", "previous_digest", "issued_ms", "cached_prompt_tokens", "rejected_draft_tokens", "replayed_tokens", "state_commit")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    START_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    TRAVERSAL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INPUT_COMMIT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_COMMIT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATE_COMMIT_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    session_id: bytes
    epoch: int
    stage_index: int
    chunk: int
    start_layer: int
    end_layer: int
    model_digest: bytes
    numeric_class: str
    traversal: int
    prompt_tokens: int
    output_tokens: int
    input_commit: bytes
    output_commit: bytes
    previous_digest: bytes
    issued_ms: int
    cached_prompt_tokens: int
    rejected_draft_tokens: int
    replayed_tokens: int
    state_commit: bytes
    def __init__(self, network_id: _Optional[str] = ..., session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., stage_index: _Optional[int] = ..., chunk: _Optional[int] = ..., start_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., model_digest: _Optional[bytes] = ..., numeric_class: _Optional[str] = ..., traversal: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., input_commit: _Optional[bytes] = ..., output_commit: _Optional[bytes] = ..., previous_digest: _Optional[bytes] = ..., issued_ms: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., rejected_draft_tokens: _Optional[int] = ..., replayed_tokens: _Optional[int] = ..., state_commit: _Optional[bytes] = ...) -> None: ...

class DrawStatement(_message.Message):
    __slots__ = ("network_id", "session_id", "epoch", "traversal", "output_commit")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRAVERSAL_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_COMMIT_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    session_id: bytes
    epoch: int
    traversal: int
    output_commit: bytes
    def __init__(self, network_id: _Optional[str] = ..., session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., traversal: _Optional[int] = ..., output_commit: _Optional[bytes] = ...) -> None: ...

class SessionVoucher(_message.Message):
    __slots__ = ("network_id", "session_id", "epoch", "sequence", "account", "prompt_tokens", "output_tokens", "transcript", "amounts", "issued_ms", "cached_prompt_tokens", "rejected_draft_tokens", "epoch_close")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    AMOUNTS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_CLOSE_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    session_id: bytes
    epoch: int
    sequence: int
    account: str
    prompt_tokens: int
    output_tokens: int
    transcript: bytes
    amounts: _containers.RepeatedCompositeFieldContainer[PayeeAmount]
    issued_ms: int
    cached_prompt_tokens: int
    rejected_draft_tokens: int
    epoch_close: bool
    def __init__(self, network_id: _Optional[str] = ..., session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., account: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., transcript: _Optional[bytes] = ..., amounts: _Optional[_Iterable[_Union[PayeeAmount, _Mapping]]] = ..., issued_ms: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., rejected_draft_tokens: _Optional[int] = ..., epoch_close: _Optional[bool] = ...) -> None: ...

class SettlementRequest(_message.Message):
    __slots__ = ("network_id", "session_id", "payee", "voucher_digest", "release", "issued_ms", "epoch")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PAYEE_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    session_id: bytes
    payee: str
    voucher_digest: bytes
    release: bool
    issued_ms: int
    epoch: int
    def __init__(self, network_id: _Optional[str] = ..., session_id: _Optional[bytes] = ..., payee: _Optional[str] = ..., voucher_digest: _Optional[bytes] = ..., release: _Optional[bool] = ..., issued_ms: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class IssueOrder(_message.Message):
    __slots__ = ("network_id", "account", "amount", "order_id", "memo", "issued_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    MEMO_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    account: str
    amount: int
    order_id: bytes
    memo: str
    issued_ms: int
    def __init__(self, network_id: _Optional[str] = ..., account: _Optional[str] = ..., amount: _Optional[int] = ..., order_id: _Optional[bytes] = ..., memo: _Optional[str] = ..., issued_ms: _Optional[int] = ...) -> None: ...

class LimitOrder(_message.Message):
    __slots__ = ("network_id", "account", "credit_limit", "order_id", "memo", "issued_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_LIMIT_FIELD_NUMBER: _ClassVar[int]
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    MEMO_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    account: str
    credit_limit: int
    order_id: bytes
    memo: str
    issued_ms: int
    def __init__(self, network_id: _Optional[str] = ..., account: _Optional[str] = ..., credit_limit: _Optional[int] = ..., order_id: _Optional[bytes] = ..., memo: _Optional[str] = ..., issued_ms: _Optional[int] = ...) -> None: ...

class SubAccountTerms(_message.Message):
    __slots__ = ("account", "name", "sequence", "limit", "period", "period_limit", "closed")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    PERIOD_LIMIT_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    account: str
    name: str
    sequence: int
    limit: int
    period: BudgetPeriod
    period_limit: int
    closed: bool
    def __init__(self, account: _Optional[str] = ..., name: _Optional[str] = ..., sequence: _Optional[int] = ..., limit: _Optional[int] = ..., period: _Optional[_Union[BudgetPeriod, str]] = ..., period_limit: _Optional[int] = ..., closed: _Optional[bool] = ...) -> None: ...

class SubAccountOrder(_message.Message):
    __slots__ = ("network_id", "terms", "issued_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    terms: SubAccountTerms
    issued_ms: int
    def __init__(self, network_id: _Optional[str] = ..., terms: _Optional[_Union[SubAccountTerms, _Mapping]] = ..., issued_ms: _Optional[int] = ...) -> None: ...

class AccountQuery(_message.Message):
    __slots__ = ("network_id", "account", "issued_ms", "sub_account")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    SUB_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    account: str
    issued_ms: int
    sub_account: str
    def __init__(self, network_id: _Optional[str] = ..., account: _Optional[str] = ..., issued_ms: _Optional[int] = ..., sub_account: _Optional[str] = ...) -> None: ...

class ExposureJudgement(_message.Message):
    __slots__ = ("network_id", "session_id", "payee", "receipt_digest", "evidence_digest", "issued_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PAYEE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    session_id: bytes
    payee: str
    receipt_digest: bytes
    evidence_digest: bytes
    issued_ms: int
    def __init__(self, network_id: _Optional[str] = ..., session_id: _Optional[bytes] = ..., payee: _Optional[str] = ..., receipt_digest: _Optional[bytes] = ..., evidence_digest: _Optional[bytes] = ..., issued_ms: _Optional[int] = ...) -> None: ...

class JudgedExposure(_message.Message):
    __slots__ = ("judgements",)
    JUDGEMENTS_FIELD_NUMBER: _ClassVar[int]
    judgements: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    def __init__(self, judgements: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ...) -> None: ...

class AccountLimit(_message.Message):
    __slots__ = ("account", "credit_limit")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_LIMIT_FIELD_NUMBER: _ClassVar[int]
    account: str
    credit_limit: int
    def __init__(self, account: _Optional[str] = ..., credit_limit: _Optional[int] = ...) -> None: ...

class JournalLine(_message.Message):
    __slots__ = ("account", "debit", "credit")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    DEBIT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    account: str
    debit: int
    credit: int
    def __init__(self, account: _Optional[str] = ..., debit: _Optional[int] = ..., credit: _Optional[int] = ...) -> None: ...

class JournalEntry(_message.Message):
    __slots__ = ("network_id", "index", "kind", "session_id", "cause_digest", "lines", "posted_ms", "limit", "terms", "sub_account")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CAUSE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    POSTED_MS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    SUB_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    index: int
    kind: EntryKind
    session_id: bytes
    cause_digest: bytes
    lines: _containers.RepeatedCompositeFieldContainer[JournalLine]
    posted_ms: int
    limit: AccountLimit
    terms: SubAccountTerms
    sub_account: str
    def __init__(self, network_id: _Optional[str] = ..., index: _Optional[int] = ..., kind: _Optional[_Union[EntryKind, str]] = ..., session_id: _Optional[bytes] = ..., cause_digest: _Optional[bytes] = ..., lines: _Optional[_Iterable[_Union[JournalLine, _Mapping]]] = ..., posted_ms: _Optional[int] = ..., limit: _Optional[_Union[AccountLimit, _Mapping]] = ..., terms: _Optional[_Union[SubAccountTerms, _Mapping]] = ..., sub_account: _Optional[str] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("reservation", "account_cert")
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_CERT_FIELD_NUMBER: _ClassVar[int]
    reservation: _identity_pb2.SignedEnvelope
    account_cert: _identity_pb2.SignedEnvelope
    def __init__(self, reservation: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., account_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("grant",)
    GRANT_FIELD_NUMBER: _ClassVar[int]
    grant: _identity_pb2.SignedEnvelope
    def __init__(self, grant: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("request", "payee_cert", "voucher")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PAYEE_CERT_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    request: _identity_pb2.SignedEnvelope
    payee_cert: _identity_pb2.SignedEnvelope
    voucher: _identity_pb2.SignedEnvelope
    def __init__(self, request: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., payee_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., voucher: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class SettleResponse(_message.Message):
    __slots__ = ("paid_microcredits",)
    PAID_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    paid_microcredits: int
    def __init__(self, paid_microcredits: _Optional[int] = ...) -> None: ...

class IssueRequest(_message.Message):
    __slots__ = ("order",)
    ORDER_FIELD_NUMBER: _ClassVar[int]
    order: _identity_pb2.SignedEnvelope
    def __init__(self, order: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class IssueResponse(_message.Message):
    __slots__ = ("entry_index",)
    ENTRY_INDEX_FIELD_NUMBER: _ClassVar[int]
    entry_index: int
    def __init__(self, entry_index: _Optional[int] = ...) -> None: ...

class SetLimitRequest(_message.Message):
    __slots__ = ("order",)
    ORDER_FIELD_NUMBER: _ClassVar[int]
    order: _identity_pb2.SignedEnvelope
    def __init__(self, order: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class SetLimitResponse(_message.Message):
    __slots__ = ("entry_index",)
    ENTRY_INDEX_FIELD_NUMBER: _ClassVar[int]
    entry_index: int
    def __init__(self, entry_index: _Optional[int] = ...) -> None: ...

class FileExposureRequest(_message.Message):
    __slots__ = ("exposure",)
    EXPOSURE_FIELD_NUMBER: _ClassVar[int]
    exposure: _identity_pb2.SignedEnvelope
    def __init__(self, exposure: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class FileExposureResponse(_message.Message):
    __slots__ = ("forfeited_microcredits",)
    FORFEITED_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    forfeited_microcredits: int
    def __init__(self, forfeited_microcredits: _Optional[int] = ...) -> None: ...

class SetSubAccountRequest(_message.Message):
    __slots__ = ("order", "account_cert")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_CERT_FIELD_NUMBER: _ClassVar[int]
    order: _identity_pb2.SignedEnvelope
    account_cert: _identity_pb2.SignedEnvelope
    def __init__(self, order: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., account_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class SetSubAccountResponse(_message.Message):
    __slots__ = ("entry_index",)
    ENTRY_INDEX_FIELD_NUMBER: _ClassVar[int]
    entry_index: int
    def __init__(self, entry_index: _Optional[int] = ...) -> None: ...

class ListSubAccountsRequest(_message.Message):
    __slots__ = ("query", "account_cert")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_CERT_FIELD_NUMBER: _ClassVar[int]
    query: _identity_pb2.SignedEnvelope
    account_cert: _identity_pb2.SignedEnvelope
    def __init__(self, query: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., account_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class SubAccountState(_message.Message):
    __slots__ = ("terms", "used_microcredits", "period_used_microcredits", "pending_microcredits")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    USED_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    PERIOD_USED_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    PENDING_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    terms: SubAccountTerms
    used_microcredits: int
    period_used_microcredits: int
    pending_microcredits: int
    def __init__(self, terms: _Optional[_Union[SubAccountTerms, _Mapping]] = ..., used_microcredits: _Optional[int] = ..., period_used_microcredits: _Optional[int] = ..., pending_microcredits: _Optional[int] = ...) -> None: ...

class ListSubAccountsResponse(_message.Message):
    __slots__ = ("sub_accounts",)
    SUB_ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    sub_accounts: _containers.RepeatedCompositeFieldContainer[SubAccountState]
    def __init__(self, sub_accounts: _Optional[_Iterable[_Union[SubAccountState, _Mapping]]] = ...) -> None: ...

class GetAccountRequest(_message.Message):
    __slots__ = ("query", "account_cert")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_CERT_FIELD_NUMBER: _ClassVar[int]
    query: _identity_pb2.SignedEnvelope
    account_cert: _identity_pb2.SignedEnvelope
    def __init__(self, query: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., account_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class GetAccountResponse(_message.Message):
    __slots__ = ("available_microcredits", "pending_microcredits", "next_sequence", "credit_limit", "escrow_microcredits")
    AVAILABLE_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    PENDING_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_LIMIT_FIELD_NUMBER: _ClassVar[int]
    ESCROW_MICROCREDITS_FIELD_NUMBER: _ClassVar[int]
    available_microcredits: int
    pending_microcredits: int
    next_sequence: int
    credit_limit: int
    escrow_microcredits: int
    def __init__(self, available_microcredits: _Optional[int] = ..., pending_microcredits: _Optional[int] = ..., next_sequence: _Optional[int] = ..., credit_limit: _Optional[int] = ..., escrow_microcredits: _Optional[int] = ...) -> None: ...

class GetHistoryRequest(_message.Message):
    __slots__ = ("query", "account_cert", "limit")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_CERT_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    query: _identity_pb2.SignedEnvelope
    account_cert: _identity_pb2.SignedEnvelope
    limit: int
    def __init__(self, query: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., account_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., limit: _Optional[int] = ...) -> None: ...

class GetHistoryResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[JournalEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[JournalEntry, _Mapping]]] = ...) -> None: ...

class GetEvidenceRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class InclusionProof(_message.Message):
    __slots__ = ("leaf_index", "hashes")
    LEAF_INDEX_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    leaf_index: int
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, leaf_index: _Optional[int] = ..., hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class GetEvidenceResponse(_message.Message):
    __slots__ = ("entries", "proofs", "checkpoint", "settled")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    PROOFS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedScalarFieldContainer[bytes]
    proofs: _containers.RepeatedCompositeFieldContainer[InclusionProof]
    checkpoint: str
    settled: bool
    def __init__(self, entries: _Optional[_Iterable[bytes]] = ..., proofs: _Optional[_Iterable[_Union[InclusionProof, _Mapping]]] = ..., checkpoint: _Optional[str] = ..., settled: _Optional[bool] = ...) -> None: ...

class GetCheckpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    def __init__(self, checkpoint: _Optional[str] = ...) -> None: ...

class GetConsistencyRequest(_message.Message):
    __slots__ = ("first_size", "second_size")
    FIRST_SIZE_FIELD_NUMBER: _ClassVar[int]
    SECOND_SIZE_FIELD_NUMBER: _ClassVar[int]
    first_size: int
    second_size: int
    def __init__(self, first_size: _Optional[int] = ..., second_size: _Optional[int] = ...) -> None: ...

class GetConsistencyResponse(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("first_index",)
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    def __init__(self, first_index: _Optional[int] = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("entries", "objects")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedScalarFieldContainer[bytes]
    objects: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    def __init__(self, entries: _Optional[_Iterable[bytes]] = ..., objects: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ...) -> None: ...
