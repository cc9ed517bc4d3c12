"""Signed notes and checkpoints: published vectors, and everything that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadProof, BadSignature, VerificationError
from plait.identity import SigningKey
from plait.ledger.checkpoint import key_id, open_checkpoint, open_note, sign_checkpoint, sign_note

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "checkpoint.json").read_text())
KEY = SigningKey.from_seed(bytes(range(32)))
OTHER = SigningKey.from_seed(bytes(32))
ORIGIN = "ledger.example/net-1"
ROOT = bytes(range(32))
NOTE = sign_checkpoint(KEY, ORIGIN, 7, ROOT)


@pytest.mark.parametrize("case", VECTORS["key_ids"], ids=lambda case: case["name"])
def test_key_ids(case: dict[str, Any]) -> None:
    assert key_id(case["name"], bytes.fromhex(case["key"])).hex() == case["id"]


@pytest.mark.parametrize("case", VECTORS["notes"], ids=lambda case: case["name"])
def test_published_notes_open(case: dict[str, Any]) -> None:
    text = open_note(case["note"], case["name"], bytes.fromhex(case["key"]))
    assert case["note"].startswith(text + "\n— ")


@pytest.mark.parametrize("case", VECTORS["checkpoints"], ids=lambda case: str(case["size"]))
def test_checkpoint_vectors(case: dict[str, Any]) -> None:
    key = SigningKey.from_seed(bytes.fromhex(case["seed"]))
    root = bytes.fromhex(case["root"])
    assert sign_checkpoint(key, case["origin"], case["size"], root) == case["note"]
    opened = open_checkpoint(case["note"], case["origin"], bytes.fromhex(case["log_key"]))
    assert (opened.origin, opened.size, opened.root) == (case["origin"], case["size"], root)


@given(st.integers(0, len(NOTE.encode()) - 1), st.integers(0, 7))
def test_every_flipped_bit_is_refused(index: int, bit: int) -> None:
    damaged = bytearray(NOTE.encode())
    damaged[index] ^= 1 << bit
    text = damaged.decode(errors="surrogateescape")
    with pytest.raises(VerificationError):
        open_checkpoint(text, ORIGIN, KEY.public)


def body(text: str, key: SigningKey = KEY, name: str = ORIGIN) -> str:
    return sign_note(key, name, text)


@pytest.mark.parametrize(
    "note",
    [
        body(f"{ORIGIN}\n07\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"),
        body(f"{ORIGIN}\n+7\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"),
        body(f"{ORIGIN}\n\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"),
        body(f"{ORIGIN}\n٧\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"),
        body(f"{ORIGIN}\n{'9' * 30}\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"),
        body(f"{ORIGIN}\n7\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh9=\n"),
        body(f"{ORIGIN}\n7\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8\n"),
        body(f"{ORIGIN}\n7\nAAEC\n"),
        body(f"{ORIGIN}\n0\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"),
        body(f"{ORIGIN}\n7\n"),
        body(f"{ORIGIN}\n7\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\nextension\n"),
        body("other.example\n7\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"),
    ],
)
def test_signed_but_malformed_checkpoints_are_refused(note: str) -> None:
    with pytest.raises(BadProof):
        open_checkpoint(note, ORIGIN, KEY.public)


def test_unknown_signatures_are_ignored_and_known_ones_must_hold() -> None:
    text, signature = NOTE.split("\n\n")
    witness = sign_note(OTHER, "witness.example", text + "\n").split("\n\n")[1]
    impostor = sign_note(OTHER, ORIGIN, text + "\n").split("\n\n")[1]
    both = f"{text}\n\n{witness}{impostor}{signature}"
    assert open_checkpoint(both, ORIGIN, KEY.public).size == 7
    for note in (
        f"{text}\n\n{witness}",
        f"{text}\n\n{impostor}",
        f"{text}\n\n{signature}{signature}",
        f"{text}\n\n{signature}{witness * 16}",
        f"{text}\n\n{signature}— \n",
        f"{text}\n\n{signature}garbage\n",
        f"{text}\n\n{signature[:-1]}",
        f"{text}\n{signature}",
        "",
        NOTE + "x" * 20_000,
        NOTE.replace("\n", "\r\n"),
        NOTE + "\ud800",
    ):
        with pytest.raises(BadSignature):
            open_checkpoint(note, ORIGIN, KEY.public)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u00a0b", "a\nb"])
def test_bad_key_names_are_our_own_bug(name: str) -> None:
    with pytest.raises(ValueError):
        sign_checkpoint(KEY, name, 1, ROOT)


def test_bad_heads_are_our_own_bug() -> None:
    with pytest.raises(ValueError):
        sign_checkpoint(KEY, ORIGIN, -1, ROOT)
    with pytest.raises(ValueError):
        sign_checkpoint(KEY, ORIGIN, 1, ROOT[:31])
    with pytest.raises(ValueError):
        sign_note(KEY, ORIGIN, "no newline at the end")
