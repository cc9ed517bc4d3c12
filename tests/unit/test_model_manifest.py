"""Manifests: deterministic, strict about what arrives, and binding on the weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from plait.errors import ModelError, RemoteProtocolError
from plait.ledger import merkle
from plait.model.gguf_reader import GgufFile
from plait.model.local import LocalModel
from plait.model.manifest import Manifest, build_manifest, vocabulary_digest
from plait.model.tiny import write_tiny
from plait.model.weights import Weights
from plait.model.wire import manifest_from_payload, manifest_to_payload, tensor_to_payload
from plait.types import Digest, Span
from plait.v1 import bundle_pb2 as pb


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_tiny(path)
    return path


@pytest.fixture
def manifest(path: Path) -> Manifest:
    with GgufFile.open(path) as gguf:
        return build_manifest("tiny-random", gguf)


def test_models_read_each_others_ids_if_their_vocabularies_are_one(
    path: Path, manifest: Manifest, tmp_path: Path
) -> None:
    def changed(old: bytes, new: bytes) -> LocalModel:
        data = path.read_bytes()
        assert old in data
        other = tmp_path / f"{new.hex()}.gguf"
        other.write_bytes(data.replace(old, new))
        with GgufFile.open(other) as gguf:
            return LocalModel("other", build_manifest("other", gguf), other)

    ours = vocabulary_digest(LocalModel("tiny-random", manifest, path))
    template = changed(b"<|im_start|>assistant", b"<|im_start|>ASSISTANT")
    assert template.manifest.tokenizer_sha256 != manifest.tokenizer_sha256
    assert vocabulary_digest(template) == ours
    assert vocabulary_digest(changed(b"<|endoftext|>", b"<|ENDOFTEXT|>")) != ours


def test_it_survives_the_wire(manifest: Manifest) -> None:
    assert manifest_from_payload(manifest.payload) == manifest
    assert manifest_from_payload(manifest.payload).digest == manifest.digest


def test_it_says_what_router_and_ledger_need(manifest: Manifest) -> None:
    shape = manifest.shape
    assert (shape.name, shape.layers, shape.digest) == ("tiny-random", 8, manifest.digest)
    assert (shape.embedding_cost_layers, shape.head_cost_layers) == (0, 1)
    assert shape.bytes_per_row == 4 * 64
    assert shape.priced_layers(Span(4, 8)) == 5


def test_the_root_is_over_the_tensors_in_order_of_name(manifest: Manifest) -> None:
    names = [tensor.name for tensor in manifest.tensors]
    assert names == sorted(names)
    leaves = [merkle.leaf_hash(tensor_to_payload(tensor)) for tensor in manifest.tensors]
    assert manifest.tensor_root == merkle.root_of(leaves)


def test_any_other_tensor_makes_another_digest(path: Path, manifest: Manifest) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with GgufFile.open(path) as gguf:
        other = build_manifest("tiny-random", gguf)
    assert other.digest != manifest.digest
    assert other.config_sha256 == manifest.config_sha256


def changed(manifest: Manifest, **changes: object) -> bytes:
    return manifest_to_payload(dataclasses.replace(manifest, **changes))  # type: ignore[arg-type]


def test_false_manifests_are_refused(manifest: Manifest) -> None:
    tensor = manifest.tensors[0]
    odd = dataclasses.replace(tensor, dtype="Q9_9")
    message = pb.ModelManifest.FromString(manifest.payload)
    trailing = manifest.payload + b"\xf8\x07\x01"  # a field nobody knows
    for payload in (
        b"\xff",
        trailing,
        changed(manifest, name=""),
        changed(manifest, layers=0),
        changed(manifest, tensor_root=Digest(bytes(32))),
        changed(manifest, config_sha256=Digest(b"short")),
        changed(manifest, tensors=manifest.tensors[::-1]),
        changed(manifest, tensors=(odd, *manifest.tensors[1:])),
        changed(manifest, tensors=manifest.tensors[1:]),
        b"\x0a\x00" + message.SerializeToString(),
    ):
        with pytest.raises(RemoteProtocolError):
            manifest_from_payload(payload)


def test_weights_are_those_of_the_manifest(path: Path, manifest: Manifest) -> None:
    with GgufFile.open(path) as gguf:
        weights = Weights(gguf, manifest)
        table = weights.fp32("token_embd.weight")
        assert table.shape == (300, 64)
        rows = weights.rows("token_embd.weight").fp32([7, 7, 299])
        assert np.array_equal(rows, table[[7, 7, 299]])
        with pytest.raises(ModelError, match="has no tensor nothing"):
            weights.fp32("nothing")


def test_a_changed_tensor_is_named(path: Path, manifest: Manifest) -> None:
    with GgufFile.open(path) as gguf:
        offset = gguf.tensors["blk.3.ffn_up.weight"].offset
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 1
    path.write_bytes(data)
    with GgufFile.open(path) as gguf:
        weights = Weights(gguf, manifest)
        weights.fp32("blk.2.ffn_up.weight")
        with pytest.raises(ModelError, match=r"tensor blk\.3\.ffn_up\.weight") as caught:
            weights.fp32("blk.3.ffn_up.weight")
    assert caught.value.remedy == "plait models pull tiny-random --force"


def test_a_changed_configuration_is_refused(path: Path, manifest: Manifest) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"tiny random", b"tiny rANDOM"))
    with GgufFile.open(path) as gguf, pytest.raises(ModelError, match="configuration"):
        Weights(gguf, manifest)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"llama\x16", b"gemma\x16", "'gemma' model"),
        (b"blk.7.ffn_up", b"blk.9.ffn_up", r"blk\.7\.ffn_up\.weight is missing"),
        (b"token_embd.weight", b"token_EMBD.weight", "no usable token_embd"),
    ],
)
def test_other_architectures_are_refused(path: Path, old: bytes, new: bytes, message: str) -> None:
    data = path.read_bytes()
    if old.startswith(b"llama"):
        old, new = (
            b"\x05\x00\x00\x00\x00\x00\x00\x00llama",
            b"\x05\x00\x00\x00\x00\x00\x00\x00gemma",
        )
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with GgufFile.open(path) as gguf, pytest.raises(ModelError, match=message):
        build_manifest("x", gguf)
