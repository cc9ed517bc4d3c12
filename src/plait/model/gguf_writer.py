"""Minimal writer of GGUF version 3 files: what the tiny test model needs, no more."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.model.gguf_types import TensorType

ALIGNMENT = 32

Value = str | bool | int | float | Sequence[str] | Sequence[int]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor to write; ``shape`` is rows first, ``raw`` is packed as ``type`` says."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    raw: bytes


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[StoredTensor]) -> None:
    """Write a file, the same bytes for the same arguments. Raises ``OSError``."""
    header = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_text(key), _value(value)]
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        header.append(_text(tensor.name) + struct.pack("<I", len(dimensions)))
        header.append(struct.pack(f"<{len(dimensions)}Q", *dimensions))
        header.append(struct.pack("<IQ", tensor.type.code, offset))
        offset += len(tensor.raw) + _padding(len(tensor.raw))
    with path.open("wb") as file:
        file.write(b"".join(header))
        file.write(bytes(_padding(file.tell())))
        for tensor in tensors:
            file.write(tensor.raw)
            file.write(bytes(_padding(len(tensor.raw))))


def _padding(length: int) -> int:
    return -length % ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """Type code and value: u32, f32, bool, text, or an array of texts or of i32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    texts = [_text(item) for item in value if isinstance(item, str)]
    if texts:
        return struct.pack("<IIQ", 9, 8, len(texts)) + b"".join(texts)
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
