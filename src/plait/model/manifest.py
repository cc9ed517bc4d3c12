"""The manifest: what a model is, down to the digest of every tensor.

It is a pure function of the GGUF file and the model's name. Its digest, the SHA-256 of
its protobuf payload, names the model on the network; ``model/wire.py`` knows the payload.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from plait.errors import ModelError
from plait.ledger import merkle
from plait.model.config import read_config
from plait.model.gguf_reader import GgufFile, metadata_digest_parts
from plait.types import Digest, ModelShape

if TYPE_CHECKING:
    from plait.model.local import LocalModel

FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """A tensor as stored: GGUF type name, shape rows first, SHA-256 of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: Digest


@dataclass(frozen=True)  # no slots: a client asks for payload and digest at each request
class Manifest:
    """Description of one model's weights; ``tensors`` are in ascending order of name."""

    name: str
    architecture: str
    layers: int
    hidden_size: int
    vocabulary_size: int
    context_length: int
    embedding_cost_layers: int
    head_cost_layers: int
    tokenizer_sha256: Digest
    config_sha256: Digest
    tensors: tuple[TensorDigest, ...]
    tensor_root: Digest

    @cached_property
    def payload(self) -> bytes:
        """The deterministic protobuf bytes that a publisher signs."""
        from plait.model import wire  # wire builds manifests, so it imports this module

        return wire.manifest_to_payload(self)

    @cached_property
    def digest(self) -> Digest:
        """SHA-256 of the payload: the model's name on the network."""
        return Digest(hashlib.sha256(self.payload).digest())

    @property
    def shape(self) -> ModelShape:
        """What router and ledger need to know."""
        return ModelShape(
            name=self.name,
            digest=self.digest,
            layers=self.layers,
            embedding_cost_layers=self.embedding_cost_layers,
            head_cost_layers=self.head_cost_layers,
            bytes_per_row=FP32_BYTES * self.hidden_size,
        )

    def tensor(self, name: str) -> TensorDigest:
        """The entry of one tensor. Raises ``ModelError`` if there is none."""
        for entry in self.tensors:
            if entry.name == name:
                return entry
        raise ModelError(f"the manifest of {self.name} has no tensor {name}")


def build_manifest(name: str, gguf: GgufFile) -> Manifest:
    """Describe an open file; hashes every tensor. Raises ``ModelError``."""
    from plait.model import wire

    config = read_config(gguf)
    tensors = tuple(
        TensorDigest(
            entry.name,
            entry.type.name,
            entry.shape,
            Digest(hashlib.sha256(gguf.read(entry.name).data).digest()),
        )
        for entry in sorted(gguf.tensors.values(), key=lambda entry: entry.name)
    )
    leaves = [merkle.leaf_hash(wire.tensor_to_payload(tensor)) for tensor in tensors]
    return Manifest(
        name=name,
        architecture=config.architecture,
        layers=config.layers,
        hidden_size=config.hidden_size,
        vocabulary_size=config.vocabulary_size,
        context_length=config.context_length,
        embedding_cost_layers=0,  # a lookup
        head_cost_layers=-(-config.head_parameters // config.layer_parameters),
        tokenizer_sha256=tokenizer_digest(gguf),
        config_sha256=config_digest(gguf),
        tensors=tensors,
        tensor_root=Digest(merkle.root_of(leaves)),
    )


def tokenizer_digest(gguf: GgufFile) -> Digest:
    """SHA-256 over the tokenizer's metadata: vocabulary, merges, template."""
    return _metadata_digest(gguf, tokenizer=True)


def vocabulary_digest(local: "LocalModel") -> Digest:
    """SHA-256 over what each id stands for: names and kinds of tokens, and how many rows the
    embedding has. Models that agree in it can read each other's ids. Raises ``ModelError``."""
    return _vocabulary_digest(local.weights_path, local.manifest.digest)


@lru_cache(maxsize=16)
def _vocabulary_digest(path: Path, manifest: Digest) -> Digest:
    hashed = hashlib.sha256()
    with GgufFile.open(path) as gguf:
        for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            kind, raw = gguf.raw(key)
            hashed.update(struct.pack("<IQ", kind, len(raw)) + raw)
        hashed.update(struct.pack("<Q", read_config(gguf).vocabulary_size))
    return Digest(hashed.digest())


def config_digest(gguf: GgufFile) -> Digest:
    """SHA-256 over all metadata but the tokenizer's."""
    return _metadata_digest(gguf, tokenizer=False)


def _metadata_digest(gguf: GgufFile, *, tokenizer: bool) -> Digest:
    hashed = hashlib.sha256()
    for part in metadata_digest_parts(gguf, tokenizer=tokenizer):
        hashed.update(part)
    return Digest(hashed.digest())
