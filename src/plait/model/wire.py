"""Manifests to and from protobuf. What arrives is checked before anything uses it."""

from itertools import pairwise

from google.protobuf.message import DecodeError

from plait.errors import RemoteProtocolError
from plait.ledger import merkle
from plait.model.gguf_types import BY_NAME
from plait.model.manifest import Manifest, TensorDigest
from plait.types import Digest
from plait.v1 import bundle_pb2 as pb

PAYLOAD_BYTES_MAX = 32 << 20


def tensor_to_payload(tensor: TensorDigest) -> bytes:
    """The bytes of one leaf of the tensor tree."""
    return _tensor_to_message(tensor).SerializeToString(deterministic=True)


def manifest_to_payload(manifest: Manifest) -> bytes:
    """Deterministic bytes; their SHA-256 is the model digest."""
    message = pb.ModelManifest(
        name=manifest.name,
        architecture=manifest.architecture,
        layers=manifest.layers,
        hidden_size=manifest.hidden_size,
        vocabulary_size=manifest.vocabulary_size,
        context_length=manifest.context_length,
        embedding_cost_layers=manifest.embedding_cost_layers,
        head_cost_layers=manifest.head_cost_layers,
        tokenizer_sha256=manifest.tokenizer_sha256,
        config_sha256=manifest.config_sha256,
        tensors=map(_tensor_to_message, manifest.tensors),
        tensor_root=manifest.tensor_root,
    )
    return message.SerializeToString(deterministic=True)


def manifest_from_payload(payload: bytes) -> Manifest:
    """Decode and check a manifest.

    Raises ``RemoteProtocolError`` on bytes that do not re-encode to themselves, fields out
    of range, tensors out of order, or a root that is not theirs.
    """
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise RemoteProtocolError(f"a manifest of {len(payload)} bytes")
    try:
        message = pb.ModelManifest.FromString(payload)
    except DecodeError as error:
        raise RemoteProtocolError("a manifest that is not protobuf") from error
    manifest = Manifest(
        name=message.name,
        architecture=message.architecture,
        layers=message.layers,
        hidden_size=message.hidden_size,
        vocabulary_size=message.vocabulary_size,
        context_length=message.context_length,
        embedding_cost_layers=message.embedding_cost_layers,
        head_cost_layers=message.head_cost_layers,
        tokenizer_sha256=_digest(message.tokenizer_sha256),
        config_sha256=_digest(message.config_sha256),
        tensors=tuple(_tensor_from_message(tensor) for tensor in message.tensors),
        tensor_root=_digest(message.tensor_root),
    )
    if manifest_to_payload(manifest) != payload:
        raise RemoteProtocolError("a manifest that does not re-encode to itself")
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    sizes = (manifest.layers, manifest.hidden_size, manifest.vocabulary_size)
    if not manifest.name or not manifest.architecture or not all(sizes) or not manifest.tensors:
        raise RemoteProtocolError("a manifest with empty fields")
    names = [tensor.name for tensor in manifest.tensors]
    if any(earlier >= later for earlier, later in pairwise(names)):
        raise RemoteProtocolError("a manifest whose tensors are not in order of name")
    leaves = [merkle.leaf_hash(tensor_to_payload(tensor)) for tensor in manifest.tensors]
    if merkle.root_of(leaves) != manifest.tensor_root:
        raise RemoteProtocolError("a manifest whose tensor root is not that of its tensors")


def _tensor_to_message(tensor: TensorDigest) -> pb.TensorDigest:
    return pb.TensorDigest(
        name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, sha256=tensor.sha256
    )


def _tensor_from_message(message: pb.TensorDigest) -> TensorDigest:
    if message.dtype not in BY_NAME:
        raise RemoteProtocolError(f"a tensor of unknown type {message.dtype!r}")
    return TensorDigest(message.name, message.dtype, tuple(message.shape), _digest(message.sha256))


def _digest(value: bytes) -> Digest:
    if len(value) != 32:
        raise RemoteProtocolError(f"a digest of {len(value)} bytes")
    return Digest(value)
