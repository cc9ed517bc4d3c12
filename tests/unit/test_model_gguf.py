"""The GGUF reader: what a sound file says, and that no other file gets past it."""

import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from plait.errors import ModelError
from plait.model.gguf_reader import GgufFile
from plait.model.gguf_types import BY_NAME
from plait.model.gguf_writer import StoredTensor, Value, write_gguf
from plait.model.tiny import write_tiny

F32 = BY_NAME["F32"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def written(path: Path, metadata: dict[str, Value], *tensors: StoredTensor) -> Path:
    write_gguf(path, metadata, tensors)
    return path


def test_metadata_of_every_kind_comes_back(path: Path) -> None:
    metadata: dict[str, Value] = {
        "text": "grün",
        "flag": True,
        "integer": 7,
        "number": 0.5,
        "texts": ["a", "", "ß"],
        "integers": [3, -1],
    }
    with GgufFile.open(written(path, metadata)) as gguf:
        assert gguf.keys() == list(metadata)
        assert gguf.text("text") == "grün"
        assert gguf.flag("flag", False) is True
        assert gguf.integer("integer") == 7
        assert gguf.number("number") == 0.5
        assert gguf.texts("texts") == ["a", "", "ß"]
        assert gguf.integers("integers") == [3, -1]


def test_absent_values_have_defaults_or_raise(path: Path) -> None:
    with GgufFile.open(written(path, {"here": 1})) as gguf:
        assert gguf.text("no", "default") == "default"
        assert gguf.integer("no", 5) == 5
        assert gguf.number("no", 0.5) == 0.5
        assert gguf.flag("no", True) is True
        with pytest.raises(ModelError, match="lacks the metadata no"):
            gguf.integer("no")
        with pytest.raises(ModelError, match="here is not a text"):
            gguf.text("here")
        with pytest.raises(ModelError, match="here is not an array"):
            gguf.texts("here")


def test_tensors_come_back_with_rows_first(path: Path) -> None:
    raw = struct.pack("<6f", *range(6))
    odd = StoredTensor("odd", F32, (1,), struct.pack("<f", 9))
    with GgufFile.open(written(path, {}, odd, StoredTensor("w", F32, (2, 3), raw))) as gguf:
        assert gguf.tensors["w"].shape == (2, 3)
        assert gguf.tensors["w"].offset % 32 == 0
        assert gguf.read("w").tobytes() == raw
        with pytest.raises(ModelError, match="no tensor other"):
            gguf.read("other")


def test_a_file_cut_after_opening_is_an_error_and_not_a_fault(path: Path) -> None:
    raw = bytes(4 * 4096)
    with GgufFile.open(written(path, {}, StoredTensor("w", F32, (4096,), raw))) as gguf:
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ModelError, match="ends inside tensor w"):
            gguf.read("w")


def test_missing_and_empty_files_and_folders(path: Path, tmp_path: Path) -> None:
    path.touch()
    for wrong in (path, tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError):
            GgufFile.open(wrong)


HEADER = struct.pack("<4sI", b"GGUF", 3)
NAME = struct.pack("<Q", 1) + b"w"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(60), "not a GGUF"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1"),
        (HEADER + struct.pack("<QQ", 2**40, 0), "tensors; at most"),
        (HEADER + struct.pack("<QQ", 0, 2**40), "metadata values; at most"),
        (HEADER + struct.pack("<QQ", 0, 1), "ends inside its header"),
        (HEADER + struct.pack("<QQQ", 0, 1, 2**63), "bytes in one name"),
        (HEADER + struct.pack("<QQ", 0, 1) + NAME + struct.pack("<I", 99), "unknown type 99"),
        (HEADER + struct.pack("<QQ", 0, 1) + NAME + struct.pack("<IQ", 8, 2**62), "one text"),
        (
            HEADER + struct.pack("<QQ", 0, 1) + NAME + struct.pack("<IIQ", 9, 8, 2**62),
            "texts in one array",
        ),
        (HEADER + struct.pack("<QQ", 0, 1) + NAME + struct.pack("<IIQ", 9, 9, 1), "array of type"),
        (HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<I", 9), "9 dimensions"),
        (
            HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<IQIQ", 1, 2**63, 0, 0),
            "impossible shape",
        ),
        (
            HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<IQIQ", 1, 1, 77, 0),
            "unknown type 77",
        ),
        (
            HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<IQIQ", 1, 33, 3, 0),
            "not whole Q4_1 groups",
        ),
        (
            HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<IQIQ", 1, 1, 0, 2**40),
            "outside of the file",
        ),
        (
            HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<IQIQ", 1, 1, 0, 3),
            "outside of the file",
        ),
    ],
)
def test_lies_are_refused(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        GgufFile.open(path)


def test_names_may_not_repeat(path: Path) -> None:
    twice = StoredTensor("w", F32, (1,), bytes(4))
    with pytest.raises(ModelError, match="tensor w twice"):
        GgufFile.open(written(path, {}, twice, twice))
    data = HEADER + struct.pack("<QQ", 0, 2) + 2 * (NAME + struct.pack("<I?", 7, True))
    path.write_bytes(data)
    with pytest.raises(ModelError, match="metadata w twice"):
        GgufFile.open(path)


def test_a_damaged_header_raises_nothing_but_model_error(path: Path) -> None:
    write_tiny(path)
    whole = path.read_bytes()
    chance = random.Random(7)
    for _ in range(60):
        data = bytearray(whole[: 12_000 if chance.random() < 0.5 else None])
        if chance.random() < 0.5:
            del data[chance.randrange(len(data)) :]
        for _ in range(chance.randrange(1, 4)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        with suppress(ModelError), GgufFile.open(path) as gguf:
            for key in gguf.keys():  # noqa: SIM118  not a mapping
                for read in (gguf.text, gguf.texts, gguf.integers, gguf.integer, gguf.number):
                    with suppress(ModelError):
                        read(key)


def test_the_tiny_model_is_the_same_everywhere(tmp_path: Path) -> None:
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    write_tiny(first)
    write_tiny(second)
    assert first.read_bytes() == second.read_bytes()
    with GgufFile.open(first) as gguf:
        assert len(gguf.texts("tokenizer.ggml.tokens")) == 300
        assert {entry.type.name for entry in gguf.tensors.values()} >= {"Q4_1", "Q8_0", "F32"}
