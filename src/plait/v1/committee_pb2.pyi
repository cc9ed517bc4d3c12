from plait.v1 import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CommitteeGrant(_message.Message):
    __slots__ = ("grants",)
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    grants: _containers.RepeatedCompositeFieldContainer[_identity_pb2.SignedEnvelope]
    def __init__(self, grants: _Optional[_Iterable[_Union[_identity_pb2.SignedEnvelope, _Mapping]]] = ...) -> None: ...

class LearnRequest(_message.Message):
    __slots__ = ("reservation", "grant", "account_cert")
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_CERT_FIELD_NUMBER: _ClassVar[int]
    reservation: _identity_pb2.SignedEnvelope
    grant: _identity_pb2.SignedEnvelope
    account_cert: _identity_pb2.SignedEnvelope
    def __init__(self, reservation: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., grant: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ..., account_cert: _Optional[_Union[_identity_pb2.SignedEnvelope, _Mapping]] = ...) -> None: ...

class LearnResponse(_message.Message):
    __slots__ = ("entry_index",)
    ENTRY_INDEX_FIELD_NUMBER: _ClassVar[int]
    entry_index: int
    def __init__(self, entry_index: _Optional[int] = ...) -> None: ...
