"""Reader for GGUF files (versions 2 and 3): metadata, tensor table, raw tensor bytes.

The file may come from anybody: every length is checked against the file before it is
used, everything is bounded, and the only exception is ``ModelError``. Metadata values
are decoded when asked for; tensors are read with ``pread``, so that a file truncated
later is an error and not a fault.
"""

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from plait.errors import ModelError
from plait.model.gguf_types import BY_CODE, TensorType

HEADER_BYTES_MAX = 256 << 20
TENSORS_MAX = 100_000
METADATA_MAX = 65_536
NAME_BYTES_MAX = 1_024
TEXT_BYTES_MAX = 16 << 20
DIMENSIONS_MAX = 4
DIMENSION_MAX = 1 << 40
ALIGNMENT_MAX = 1 << 20

_FLAG, _TEXT, _ARRAY = 7, 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q"} | {
    _FLAG: "<?",
    12: "<d",
}
_INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. ``shape`` is rows first, as numpy has it; ``offset`` is absolute."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Value:
    kind: int
    start: int
    end: int


class GgufFile:
    """An open GGUF file; a context manager. Use ``GgufFile.open(path)``."""

    def __init__(
        self,
        path: Path,
        descriptor: int,
        header: mmap.mmap,
        values: dict[str, _Value],
        tensors: dict[str, TensorEntry],
    ) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(tensors)
        self._descriptor = descriptor
        self._header = header
        self._values = values

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map the file and check its header and tensor table. Raises ``ModelError``."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"cannot open {path}: {error.strerror}") from error
        try:
            header = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            os.close(descriptor)
            raise ModelError(f"{path} is not a GGUF file: {error}") from error
        try:
            walk = _Walk(header, path)
            values = walk.metadata()
            tensors = walk.tensor_table(values)
        except BaseException:
            header.close()
            os.close(descriptor)
            raise
        return cls(path, descriptor, header, values, tensors)

    def close(self) -> None:
        """Release the mapping and the descriptor; idempotent."""
        if self._descriptor >= 0:
            self._header.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def keys(self) -> list[str]:
        """Metadata keys, in the file's order."""
        return list(self._values)

    def raw(self, key: str) -> tuple[int, bytes]:
        """GGUF type code and undecoded bytes of a metadata value, for digests."""
        value = self._value(key)
        return value.kind, self._header[value.start : value.end]

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of any width. Raises ``ModelError`` when absent without default."""
        if default is not None and key not in self._values:
            return default
        value = self._value(key)
        if value.kind not in _INTEGERS:
            raise ModelError(f"{self.path}: {key} is not an integer")
        return int(struct.unpack_from(_SCALARS[value.kind], self._header, value.start)[0])

    def number(self, key: str, default: float | None = None) -> float:
        """A 32- or 64-bit float. Raises ``ModelError`` when absent without default."""
        if default is not None and key not in self._values:
            return default
        value = self._value(key)
        if value.kind not in (6, 12):
            raise ModelError(f"{self.path}: {key} is not a number")
        return float(struct.unpack_from(_SCALARS[value.kind], self._header, value.start)[0])

    def flag(self, key: str, default: bool) -> bool:
        """A boolean, or ``default`` when absent. Raises ``ModelError`` on another type."""
        if key not in self._values:
            return default
        value = self._value(key)
        if value.kind != _FLAG:
            raise ModelError(f"{self.path}: {key} is not a flag")
        return self._header[value.start] != 0

    def text(self, key: str, default: str | None = None) -> str:
        """A UTF-8 string. Raises ``ModelError`` when absent without default."""
        if default is not None and key not in self._values:
            return default
        value = self._value(key)
        if value.kind != _TEXT:
            raise ModelError(f"{self.path}: {key} is not a text")
        return self._decode(value.start + 8, value.end, key)

    def texts(self, key: str) -> list[str]:
        """An array of UTF-8 strings. Raises ``ModelError``."""
        kind, count, position = self._array(key)
        if kind != _TEXT:
            raise ModelError(f"{self.path}: {key} is not an array of texts")
        raw, found, position = self._header[position : self._value(key).end], [], 0
        try:
            for _ in range(count):
                end = position + 8 + _U64.unpack_from(raw, position)[0]
                found.append(raw[position + 8 : end].decode())
                position = end
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: {key} is not UTF-8") from error
        return found

    def integers(self, key: str) -> list[int]:
        """An array of integers of any width. Raises ``ModelError``."""
        kind, count, position = self._array(key)
        if kind not in _INTEGERS:
            raise ModelError(f"{self.path}: {key} is not an array of integers")
        found = np.frombuffer(self._header, _SCALARS[kind], count, position)
        return [int(item) for item in found]

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor as stored. Raises ``ModelError`` if the file is cut short."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.path} has no tensor {name}")
        data = np.empty(tensor.size, np.uint8)
        view, done = data.data, 0
        while done < tensor.size:
            try:
                count = os.preadv(self._descriptor, [view[done:]], tensor.offset + done)
            except OSError as error:
                raise ModelError(f"cannot read {name} of {self.path}: {error}") from error
            if count == 0:
                raise ModelError(f"{self.path} ends inside tensor {name}")
            done += count
        return data

    def _value(self, key: str) -> _Value:
        value = self._values.get(key)
        if value is None:
            raise ModelError(f"{self.path} lacks the metadata {key}")
        return value

    def _array(self, key: str) -> tuple[int, int, int]:
        value = self._value(key)
        if value.kind != _ARRAY:
            raise ModelError(f"{self.path}: {key} is not an array")
        kind = _U32.unpack_from(self._header, value.start)[0]
        return kind, _U64.unpack_from(self._header, value.start + 4)[0], value.start + 12

    def _decode(self, start: int, end: int, key: str) -> str:
        try:
            return self._header[start:end].decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: {key} is not UTF-8") from error


def check_whole(gguf: GgufFile) -> None:
    """Raise ``ModelError`` if the file is one part of several."""
    parts = gguf.integer("split.count", 0)
    if parts > 1:
        raise ModelError(
            f"{gguf.path} is one of {parts} parts",
            remedy="join them: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
        )


class _Walk:
    """One pass over the header, checking every length before it is used."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._position = 0
        self._end = min(len(data), HEADER_BYTES_MAX)
        if data[:4] != b"GGUF":
            raise self._bad("is not a GGUF file")
        self._position = 4
        version = self._u32()
        if version not in (2, 3):
            raise self._bad(f"is GGUF version {version}; 2 and 3 are known")
        self._tensor_count = self._count(self._u64(), TENSORS_MAX, "tensors")
        self._value_count = self._count(self._u64(), METADATA_MAX, "metadata values")

    def metadata(self) -> dict[str, _Value]:
        """Where every metadata value lies."""
        values: dict[str, _Value] = {}
        for _ in range(self._value_count):
            key = self._name()
            kind = self._u32()
            start = self._position
            self._skip_value(kind)
            if key in values:
                raise self._bad(f"has the metadata {key} twice")
            values[key] = _Value(kind, start, self._position)
        return values

    def tensor_table(self, values: dict[str, _Value]) -> dict[str, TensorEntry]:
        """The tensors, with absolute offsets that lie inside the file."""
        entries = [self._tensor() for _ in range(self._tensor_count)]
        alignment = self._alignment(values.get("general.alignment"))
        base = -(-self._position // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, kind, shape, offset in entries:
            size = kind.size(shape)
            if size is None:
                raise self._bad(f"has tensor {name} of {shape}, not whole {kind.name} groups")
            if offset % alignment or base + offset + size > len(self._data):
                raise self._bad(f"has tensor {name} outside of the file")
            if name in tensors:
                raise self._bad(f"has tensor {name} twice")
            tensors[name] = TensorEntry(name, kind, shape, base + offset, size)
        return tensors

    def _tensor(self) -> tuple[str, TensorType, tuple[int, ...], int]:
        name = self._name()
        dimensions = self._u32()
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            raise self._bad(f"has tensor {name} with {dimensions} dimensions")
        shape = tuple(self._u64() for _ in range(dimensions))
        if not all(1 <= length <= DIMENSION_MAX for length in shape):
            raise self._bad(f"has tensor {name} of impossible shape {shape}")
        code = self._u32()
        kind = BY_CODE.get(code)
        if kind is None:
            known = ", ".join(known.name for known in BY_CODE.values())
            raise self._bad(f"has tensor {name} of unknown type {code}; known: {known}")
        return name, kind, shape[::-1], self._u64()

    def _alignment(self, value: _Value | None) -> int:
        if value is None:
            return 32
        if value.kind != 4:
            raise self._bad("has an alignment that is not a 32-bit integer")
        alignment = int(_U32.unpack_from(self._data, value.start)[0])
        if not 0 < alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
            raise self._bad(f"has alignment {alignment}")
        return alignment

    def _skip_value(self, kind: int) -> None:
        if kind == _TEXT:
            self._advance(self._count(self._u64(), TEXT_BYTES_MAX, "bytes in one text"))
        elif kind == _ARRAY:
            self._skip_array()
        elif kind in _SCALARS:
            self._advance(struct.calcsize(_SCALARS[kind]))
        else:
            raise self._bad(f"has metadata of unknown type {kind}")

    def _skip_array(self) -> None:
        kind, count = self._u32(), self._u64()
        if kind in _SCALARS:
            self._advance(self._count(count, self._end, "items") * struct.calcsize(_SCALARS[kind]))
        elif kind == _TEXT:
            self._position = self._skip_texts(count)
        else:
            raise self._bad(f"has an array of type {kind}")

    def _skip_texts(self, count: int) -> int:
        # A tight loop: vocabularies hold 10^5 texts.
        data, position, end, unpack = self._data, self._position, self._end, _U64.unpack_from
        for _ in range(self._count(count, (end - position) // 8, "texts in one array")):
            if position + 8 > end:
                raise self._bad("ends inside its header")
            position += 8 + unpack(data, position)[0]
        if position > end:
            raise self._bad("ends inside its header")
        return position

    def _name(self) -> str:
        length = self._count(self._u64(), NAME_BYTES_MAX, "bytes in one name")
        start = self._position
        self._advance(length)
        try:
            return self._data[start : self._position].decode()
        except UnicodeDecodeError as error:
            raise self._bad("has a name that is not UTF-8") from error

    def _u32(self) -> int:
        self._advance(4)
        return int(_U32.unpack_from(self._data, self._position - 4)[0])

    def _u64(self) -> int:
        self._advance(8)
        return int(_U64.unpack_from(self._data, self._position - 8)[0])

    def _advance(self, count: int) -> None:
        if self._position + count > self._end:
            raise self._bad("ends inside its header")
        self._position += count

    def _count(self, value: int, limit: int, what: str) -> int:
        if value > limit:
            raise self._bad(f"claims {value} {what}; at most {limit} are allowed")
        return value

    def _bad(self, what: str) -> ModelError:
        return ModelError(
            f"{self._path} {what}", remedy="pull the model again, or add another file"
        )


def metadata_digest_parts(gguf: GgufFile, *, tokenizer: bool) -> Iterator[bytes]:
    """Length-prefixed, key-ordered bytes of the tokenizer's metadata, or of all the rest."""
    for key in sorted(gguf.keys()):
        if key.startswith("tokenizer.") == tokenizer:
            kind, raw = gguf.raw(key)
            name = key.encode()
            yield struct.pack("<IIQ", len(name), kind, len(raw)) + name
            yield raw
