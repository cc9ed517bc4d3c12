"""Verified weights: tensors of a file, each checked against the manifest when read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plait.errors import ModelError
from plait.model.config import LlamaConfig, read_config
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

    Nothing is hashed but what is asked for, so a node verifies its own span only. Raises
    ``ModelError`` when the file's configuration is not the manifest's.
    """

    def __init__(self, gguf: GgufFile, manifest: Manifest) -> None:
        if config_digest(gguf) != manifest.config_sha256:
            raise ModelError(
                f"the configuration in {gguf.path} is not that of {manifest.name}",
                remedy=f"plait models pull {manifest.name}",
            )
        self.config: LlamaConfig = read_config(gguf)
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
        return entry.type.to_fp32(raw, entry.shape)

    def nibbles(self, name: str) -> tuple[Nibbles, ...]:
        """Verified weights of a matrix as 4-bit planes, which add up to it; none if its
        format is not made of any. Raises ``ModelError`` naming the tensor."""
        entry = self._gguf.tensors[name]
        rows, width = entry.shape
        return entry.type.to_nibbles(self.stored(name), (rows, width))

    def rows(self, name: str) -> Rows:
        """Verified rows that stay packed until looked up. Raises ``ModelError``."""
        raw = self.stored(name)
        entry = self._gguf.tensors[name]
        return Rows(raw.reshape(entry.shape[0], -1), entry.type, entry.shape[1])

    def _corrupt(self, name: str) -> ModelError:
        return ModelError(
            f"tensor {name} in {self._gguf.path} does not match the manifest of "
            f"{self._manifest.name}",
            remedy=f"plait models pull {self._manifest.name} --force",
        )
