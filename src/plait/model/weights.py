"""Verified weights: tensors of a file, each checked against the manifest when read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plait.errors import ModelError
from plait.model.config import BIASED, ROTARY_FACTORS, ModelConfig, read_config
from plait.model.gguf_reader import GgufFile
from plait.model.gguf_types import Nibbles, TensorType
from plait.model.manifest import Manifest, config_digest


@dataclass(frozen=True, slots=True)
class Rows:
    """A table whose rows stay packed: an embedding costs its file size, not fp32's."""

    packed: npt.NDArray[np.uint8]
    type: TensorType
    width: int

    def fp32(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """The rows at ``indices``, which must be in range, as [len(indices), width]."""
        picked = self.packed[np.asarray(indices, dtype=np.int64)]
        return self.type.to_fp32(picked.reshape(-1), (len(picked), self.width))


class Weights:
    """The tensors that ``manifest`` promises, out of ``gguf``.

    Nothing is hashed but what is asked for, so a node verifies its own span only. Rows of
    queries and keys come in the order of llama's files, in which the rotary embedding turns
    neighbours, whatever the family's own is. Raises ``ModelError`` when the file's
    configuration is not the manifest's.
    """

    def __init__(self, gguf: GgufFile, manifest: Manifest) -> None:
        if config_digest(gguf) != manifest.config_sha256:
            raise ModelError(
                f"the configuration in {gguf.path} is not that of {manifest.name}",
                remedy=f"plait models pull {manifest.name}",
            )
        self.config: ModelConfig = read_config(gguf)
        self._gguf = gguf
        self._manifest = manifest

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """Verified bytes of a tensor as stored. Raises ``ModelError`` naming the tensor."""
        expected = self._manifest.tensor(name)
        entry = self._gguf.tensors.get(name)
        if entry is None or (entry.type.name, entry.shape) != (expected.dtype, expected.shape):
            raise self._corrupt(name)
        raw = self._gguf.read(name)
        if hashlib.sha256(raw.data).digest() != expected.sha256:
            raise self._corrupt(name)
        return raw

    def fp32(self, name: str) -> npt.NDArray[np.float32]:
        """Verified weights, expanded to fp32. Raises ``ModelError`` naming the tensor."""
        raw = self.stored(name)
        entry = self._gguf.tensors[name]
        order = self._order(name)
        expanded = entry.type.to_fp32(raw, entry.shape)
        return expanded if order is None else expanded[order]

    def nibbles(self, name: str) -> tuple[Nibbles, ...]:
        """Verified weights of a matrix as 4-bit planes, which add up to it; none if its
        format is not made of any. Raises ``ModelError`` naming the tensor."""
        entry = self._gguf.tensors[name]
        rows, width = entry.shape
        planes = entry.type.to_nibbles(self.stored(name), (rows, width))
        order = self._order(name)
        return planes if order is None else tuple(plane.ordered(order) for plane in planes)

    def bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """That of a layer's queries, keys and values, one after the other; None if the family
        has none. Raises ``ModelError`` naming the tensor."""
        if not self.config.family.biases:
            return None
        return np.concatenate([self.fp32(f"blk.{layer}.{part}.bias") for part in BIASED])

    def rotary_factors(self) -> npt.NDArray[np.float32] | None:
        """What divides each pair's frequency, [head size / 2]; None if nothing does. Raises
        ``ModelError``."""
        return self.fp32(ROTARY_FACTORS) if self.config.rotary_factors else None

    def rows(self, name: str) -> Rows:
        """Verified rows that stay packed until looked up. Raises ``ModelError``."""
        raw = self.stored(name)
        entry = self._gguf.tensors[name]
        order = self._order(name)
        packed = raw.reshape(entry.shape[0], -1)
        return Rows(packed if order is None else packed[order], entry.type, entry.shape[1])

    def type_of(self, name: str) -> str:
        """The name of a tensor's format. Raises ``ModelError``."""
        return self._manifest.tensor(name).dtype

    def _order(self, name: str) -> npt.NDArray[np.int64] | None:
        """Where each row of queries or keys lies in the file; None if the order is right."""
        config = self.config
        turned = {"attn_q": config.heads, "attn_k": config.kv_heads}
        heads = next((turned[part] for part in name.split(".") if part in turned), None)
        if heads is None or not config.family.rotary_halves:
            return None
        rows = np.arange(heads * config.head_size).reshape(heads, 2, -1)
        return rows.transpose(0, 2, 1).reshape(-1)

    def _corrupt(self, name: str) -> ModelError:
        return ModelError(
            f"tensor {name} in {self._gguf.path} does not match the manifest of "
            f"{self._manifest.name}",
            remedy=f"plait models pull {self._manifest.name} --force",
        )
