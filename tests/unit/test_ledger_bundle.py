import json
from dataclasses import replace
from typing import Any

import pytest

from plait.errors import LocalProtocolError
from plait.ledger.bundle import BUNDLE_BYTES_MAX, build_bundle, read_bundle
from plait.ledger.bundle_fields import read_base64, read_hex, read_integer, write_integer
from plait.ledger.canonical import encode_canonical
from plait.testing.accounting import PaperSession, Plot, key_of
from plait.types import U64_MAX

CLIENT = key_of("client")
PARTS = PaperSession(Plot()).play().bundle_parts()
DATA = build_bundle(PARTS, CLIENT)


def test_what_is_built_reads_back() -> None:
    assert read_bundle(DATA).parts == PARTS
    bare = replace(PARTS, manifest=None, entries=(), proofs=(), checkpoint=None)
    assert read_bundle(build_bundle(bare, CLIENT)).parts == bare


def test_what_is_on_the_wire_is_written_if_it_is_not_fp32() -> None:
    lean = PaperSession(Plot(wire_dtype="bf16")).play().bundle_parts()
    data = build_bundle(lean, CLIENT)
    assert read_bundle(data).parts == lean
    assert b"wire_dtype" not in DATA
    for wrong in ("fp32", "fp8", 2):
        again = json.loads(data)
        again["epochs"][0]["terms"]["wire_dtype"] = wrong
        with pytest.raises(ValueError, match="unknown wire dtype"):
            read_bundle(encode_canonical(again))


def test_building_is_deterministic_and_needs_the_client() -> None:
    assert build_bundle(PARTS, CLIENT) == DATA
    with pytest.raises(LocalProtocolError):
        build_bundle(PARTS, key_of("stranger"))
    with pytest.raises(LocalProtocolError):
        build_bundle(replace(PARTS, network_id="other"), CLIENT)
    with pytest.raises(ValueError, match="surrogate"):
        build_bundle(replace(PARTS, text="\ud800"), CLIENT)


def objects(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all objects inside."""
    if isinstance(value, dict):
        inner = [found for name, item in value.items() for found in objects(item, (*path, name))]
        return [path, *inner]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in objects(item, (*path, i))]
    return []


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def test_missing_and_unknown_members_are_refused_everywhere() -> None:
    paths = objects(json.loads(DATA))
    assert len(paths) > 30
    for path in paths:
        unknown = json.loads(DATA)
        at(unknown, path)["unknown"] = 1
        with pytest.raises(ValueError, match="unknown member"):
            read_bundle(encode_canonical(unknown))
        missing = json.loads(DATA)
        del at(missing, path)[sorted(at(missing, path))[0]]
        with pytest.raises(ValueError, match="lacks"):
            read_bundle(encode_canonical(missing))


@pytest.mark.parametrize("value", [None, True, 7, -1, "x", [], {}, [[]], [7, 7], ["x"], 2**53 - 1])
def test_a_member_of_another_type_is_refused(value: Any) -> None:
    for name, present in json.loads(DATA).items():
        if type(value) is type(present) or (value is None and name in ("manifest", "checkpoint")):
            continue
        if name in ("manifest", "checkpoint") and isinstance(value, str):
            continue
        with pytest.raises(ValueError, match=r"."):
            read_bundle(encode_canonical({**json.loads(DATA), name: value}))


def test_integers_are_numbers_as_long_as_a_double_holds_them() -> None:
    for value in (0, 2**53 - 1, 2**53, U64_MAX):
        assert read_integer(write_integer(value), "it") == value
    assert write_integer(2**53) == "9007199254740992"
    for wrong in ("1", "9007199254740991", "09007199254740992", str(U64_MAX + 1), "+", "٣", ""):
        with pytest.raises(ValueError, match="it"):
            read_integer(wrong, "it")
    for wrong_type in (True, None, -1, [1]):
        with pytest.raises(ValueError, match="it"):
            read_integer(wrong_type, "it")


@pytest.mark.parametrize("text", ["A", "AA", "AB==", "AA=", "AAAA ", "AAA\n", "-_==", "é", "AA==A"])
def test_base64_has_one_spelling(text: str) -> None:
    with pytest.raises(ValueError, match="base64"):
        read_base64(text, "it")


@pytest.mark.parametrize("text", ["AB", "0", "", "0 0", "00 ", "zz", "0000"])
def test_hex_has_one_spelling(text: str) -> None:
    assert read_hex("ab", "it", 1) == b"\xab"
    with pytest.raises(ValueError, match="hex"):
        read_hex(text, "it", 1)


def test_an_oversized_bundle_is_not_parsed() -> None:
    with pytest.raises(ValueError, match="at most"):
        read_bundle(bytes(BUNDLE_BYTES_MAX + 1))
