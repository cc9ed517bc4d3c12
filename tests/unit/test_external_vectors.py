"""The vectors of others: Ed25519 in both back ends, and the proofs of the log."""

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from plait import identity
from plait.envelope import pae
from plait.errors import BadProof, BadSignature
from plait.identity import Matches, libsodium_matches, openssl_matches, verify
from plait.ledger.merkle import verify_consistency, verify_inclusion

VECTORS = Path(__file__).parents[1] / "vectors"
LIBSODIUM = libsodium_matches()

both_back_ends = pytest.mark.parametrize(
    "matches",
    [
        openssl_matches,
        pytest.param(
            LIBSODIUM,
            marks=pytest.mark.skipif(LIBSODIUM is None, reason="PyNaCl is not installed"),
        ),
    ],
    ids=["openssl", "libsodium"],
)


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


def accepts(public_key: str, signature: str, message: bytes) -> bool:
    try:
        verify(bytes.fromhex(public_key), bytes.fromhex(signature), message)
    except BadSignature:
        return False
    return True


@both_back_ends
def test_wycheproof(matches: Matches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key with a small component besides its large one is "acceptable": we accept it."""
    monkeypatch.setattr(identity, "_matches", matches)
    cases = load("external/wycheproof-ed25519.json")
    assert len(cases) == 210
    for case in cases:
        accepted = accepts(case["key"], case["sig"], bytes.fromhex(case["msg"]))
        mixed = case["result"] == "acceptable" and "MixedOrderPublicKey" in case["flags"]
        assert accepted == (case["result"] == "valid" or mixed), case


@both_back_ends
def test_cctv_edge_cases(matches: Matches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 914 exactly those 43 without a low-order, non-canonical or residual point."""
    monkeypatch.setattr(identity, "_matches", matches)
    cases = load("external/cctv-ed25519.json")
    forbidden = {
        "low_order_A",
        "low_order_R",
        "non_canonical_A",
        "non_canonical_R",
        "low_order_residue",
    }
    accepted = [
        case["number"] for case in cases if accepts(case["key"], case["sig"], case["msg"].encode())
    ]
    assert len(cases) == 914
    assert len(accepted) == 43
    assert accepted == [
        case["number"] for case in cases if not forbidden.intersection(case["flags"] or ())
    ]


@pytest.mark.skipif(LIBSODIUM is None, reason="PyNaCl is not installed")
def test_without_the_strict_check_the_back_ends_disagree() -> None:
    """So that the check is not thought superfluous one day."""
    assert LIBSODIUM is not None
    disputed = 0
    for case in load("external/cctv-ed25519.json"):
        key, signature = bytes.fromhex(case["key"]), bytes.fromhex(case["sig"])
        message = case["msg"].encode()
        disputed += openssl_matches(key, signature, message) != LIBSODIUM(key, signature, message)
    assert disputed == 165


def signed_members(document: Any) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Every signature anywhere in a document: key, signature and what was signed."""
    if isinstance(document, dict):
        if {"public", "signature", "message"} <= document.keys():
            yield tuple(_bytes(document[name]) for name in ("public", "signature", "message"))  # type: ignore[misc]
        if {"payload_type", "payload", "signer", "signature"} <= document.keys():
            signed = pae(document["payload_type"], _bytes(document["payload"]))
            yield _bytes(document["signer"]), _bytes(document["signature"]), signed
        for member in document.values():
            yield from signed_members(member)
    elif isinstance(document, list):
        for member in document:
            yield from signed_members(member)
    elif isinstance(document, str) and document.startswith("{"):  # a bundle, byte for byte
        with suppress(ValueError):
            yield from signed_members(json.loads(document))


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return base64.b64decode(text)


def outcome(signed: tuple[bytes, bytes, bytes]) -> bool:
    try:
        verify(*signed)
    except BadSignature:
        return False
    return True


@pytest.mark.skipif(LIBSODIUM is None, reason="PyNaCl is not installed")
def test_both_back_ends_agree_on_our_own_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Happy and mutated, and each with its bits flipped."""
    cases = [
        signed
        for path in sorted(VECTORS.glob("*.json"))
        for signed in signed_members(load(path.name))
    ]
    assert len(cases) > 60
    flipped = [
        (key, _flip(signature, number), message)
        for number, (key, signature, message) in enumerate(cases)
        if signature
    ]
    flipped += [(_flip(key, number), sig, m) for number, (key, sig, m) in enumerate(cases) if key]
    verdicts = []
    for matches in (openssl_matches, LIBSODIUM):
        monkeypatch.setattr(identity, "_matches", matches)
        verdicts.append([outcome(signed) for signed in cases + flipped])
    assert verdicts[0] == verdicts[1]
    assert 0 < sum(verdicts[0]) <= len(cases)


def _flip(data: bytes, number: int) -> bytes:
    place = number * 7 % (8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def holds(kind: str, case: Any) -> bool:
    proof = [base64.b64decode(item) for item in case["proof"] or ()]
    try:
        if kind == "inclusion":
            verify_inclusion(
                base64.b64decode(case["leafHash"]),
                case["leafIdx"],
                case["treeSize"],
                proof,
                base64.b64decode(case["root"]),
            )
        else:
            verify_consistency(
                case["size1"],
                case["size2"],
                base64.b64decode(case["root1"]),
                base64.b64decode(case["root2"]),
                proof,
            )
    except BadProof:
        return False
    return True


@pytest.mark.parametrize("kind", ["consistency", "inclusion"])
def test_merkle_proofs(kind: str) -> None:
    for case in load("external/merkle.json")[kind]:
        assert holds(kind, case) == (not case["wantErr"]), case


GARBAGE = base64.b64encode(b"garbage").decode()
RANDOM = base64.b64encode(bytes(range(32))).decode()


def mutations(kind: str, case: Any) -> Iterator[Any]:
    """What the published mutated files do to a happy path."""
    proof = case["proof"] or []
    roots = ("root",) if kind == "inclusion" else ("root1", "root2")
    extra = [GARBAGE, RANDOM, *(case[root] for root in roots)]
    for item in extra:
        yield case | {"proof": [*proof, item]}
        yield case | {"proof": [item, *proof]}
    yield from (case | {root: RANDOM} for root in roots)
    for index, item in enumerate(proof):
        changed = bytearray(base64.b64decode(item))
        changed[0] ^= 1 << 4
        modified = base64.b64encode(bytes(changed)).decode()
        yield case | {"proof": [*proof[:index], modified, *proof[index + 1 :]]}
    if proof:
        yield case | {"proof": []}
        yield case | {"proof": proof[:-1]}
        yield case | {"proof": proof[1:]}
    sizes = ("leafIdx", "treeSize") if kind == "inclusion" else ("size1", "size2")
    for number in sizes:
        for value in (case[number] - 1, case[number] + 1, case[number] ^ 2, case[number] * 2):
            if value != case[number] and not _same_path(kind, case, number, value):
                yield case | {number: value}
    if kind == "inclusion":
        yield case | {"leafHash": RANDOM}
    elif case["root1"] != case["root2"]:
        yield case | {"root1": case["root2"], "root2": case["root1"]}


def _same_path(kind: str, case: Any, number: str, value: int) -> bool:
    """Sizes are bound by the signed checkpoint, not by a proof: other trees have this path."""
    if kind == "inclusion":
        return number == "treeSize" and value > case["leafIdx"]
    return number == "size2" and value >= case["size1"]


@pytest.mark.parametrize("kind", ["consistency", "inclusion"])
def test_mutated_merkle_proofs(kind: str) -> None:
    tried = 0
    for case in load("external/merkle.json")[kind]:
        if case["desc"] == "happy path":
            for mutated in mutations(kind, case):
                assert not holds(kind, mutated), mutated
                tried += 1
    assert tried > 60
