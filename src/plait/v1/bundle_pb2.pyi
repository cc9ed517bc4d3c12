from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BundleSeal(_message.Message):
    __slots__ = ("network_id", "session_id", "sha256", "sealed_ms")
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SEALED_MS_FIELD_NUMBER: _ClassVar[int]
    network_id: str
    session_id: bytes
    sha256: bytes
    sealed_ms: int
    def __init__(self, network_id: _Optional[str] = ..., session_id: _Optional[bytes] = ..., sha256: _Optional[bytes] = ..., sealed_ms: _Optional[int] = ...) -> None: ...

class TensorDigest(_message.Message):
    __slots__ = ("name", "dtype", "shape", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class ModelManifest(_message.Message):
    __slots__ = ("name", "architecture", "layers", "hidden_size", "vocabulary_size", "context_length", "embedding_cost_layers", "head_cost_layers", "tokenizer_sha256", "config_sha256", "tensors", "tensor_root")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_COST_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEAD_COST_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    CONFIG_SHA256_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_ROOT_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    layers: int
    hidden_size: int
    vocabulary_size: int
    context_length: int
    embedding_cost_layers: int
    head_cost_layers: int
    tokenizer_sha256: bytes
    config_sha256: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[TensorDigest]
    tensor_root: bytes
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., context_length: _Optional[int] = ..., embedding_cost_layers: _Optional[int] = ..., head_cost_layers: _Optional[int] = ..., tokenizer_sha256: _Optional[bytes] = ..., config_sha256: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[TensorDigest, _Mapping]]] = ..., tensor_root: _Optional[bytes] = ...) -> None: ...
