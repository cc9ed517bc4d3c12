import hashlib
import stat
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from plait import identity
from plait.errors import BadSignature, ConfigError
from plait.identity import (
    SigningKey,
    load_key,
    load_or_create_key,
    peer_id_of,
    public_key_of,
    save_key,
    verify,
)

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
KEY = SigningKey.from_seed(bytes(range(32)))

Point = tuple[int, int]
NEUTRAL: Point = (0, 1)


def add(a: Point, b: Point) -> Point:
    """Affine addition on the twisted Edwards curve of RFC 8032, section 5.1.4."""
    (x1, y1), (x2, y2) = a, b
    k = D * x1 * x2 * y1 * y2
    x3 = (x1 * y2 + x2 * y1) * pow(1 + k, -1, P)
    y3 = (y1 * y2 + x1 * x2) * pow(1 - k, -1, P)
    return x3 % P, y3 % P


def times(scalar: int, point: Point) -> Point:
    result = NEUTRAL
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point, scalar = add(point, point), scalar >> 1
    return result


def recover(y: int, odd: int) -> Point | None:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    if (x * x - square) % P:
        return None
    return (P - x if x % 2 != odd else x) % P, y


def encoded(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def small_order_points() -> set[Point]:
    points: set[Point] = set()
    y = 2
    while len(points) < 8:
        point = recover(y, 0)
        if point is not None:
            torsion = times(L, point)
            points |= {times(k, torsion) for k in range(8)}
        y += 1
    return points


SMALL = small_order_points()
LOW_ORDER_ENCODINGS = sorted(encoded(point) for point in SMALL)
# y + P still fits 255 bits for y < 19, and x = 0 may carry the wrong sign bit.
NON_CANONICAL = [
    (y | sign << 255).to_bytes(32, "little") for y in range(P, 2**255) for sign in (0, 1)
] + [(1 | 1 << 255).to_bytes(32, "little"), (P - 1 | 1 << 255).to_bytes(32, "little")]


def test_there_are_eight_points_of_small_order_and_the_table_has_their_y() -> None:
    assert len(SMALL) == 8
    assert all(times(8, point) == NEUTRAL for point in SMALL)
    assert {y for _, y in SMALL} == identity._LOW_ORDER_Y


@pytest.mark.parametrize("point", [*LOW_ORDER_ENCODINGS, *NON_CANONICAL])
def test_such_a_key_or_r_is_refused(point: bytes) -> None:
    signature = KEY.sign(b"message")
    with pytest.raises(BadSignature, match="public key"):
        verify(point, signature, b"message")
    with pytest.raises(BadSignature, match="R is"):
        verify(KEY.public, point + signature[32:], b"message")


def test_a_low_order_key_that_signs_everything_is_refused() -> None:
    # With A and R neutral, S = 0 satisfies the equation for any message.
    neutral = encoded(NEUTRAL)
    with pytest.raises(BadSignature):
        verify(neutral, neutral + bytes(32), b"anything")


def test_s_plus_the_group_order_is_refused() -> None:
    signature = KEY.sign(b"message")
    verify(KEY.public, signature, b"message")
    s = int.from_bytes(signature[32:], "little") + L
    with pytest.raises(BadSignature, match="S is"):
        verify(KEY.public, signature[:32] + s.to_bytes(32, "little"), b"message")


@pytest.mark.parametrize(("key_size", "signature_size"), [(0, 64), (31, 64), (33, 64), (32, 63)])
def test_wrong_lengths_are_refused(key_size: int, signature_size: int) -> None:
    with pytest.raises(BadSignature, match="length"):
        verify(KEY.public.ljust(33)[:key_size], KEY.sign(b"")[:signature_size], b"")


def corpus() -> list[tuple[bytes, bytes, bytes]]:
    """Honest, torsion-mangled, bit-flipped and malleated (key, signature, message) triples."""
    cases = []
    for number in range(24):
        key = SigningKey.from_seed(hashlib.sha256(b"%d" % number).digest())
        message = b"message %d" % number
        signature = key.sign(message)
        flipped = bytearray(signature)
        flipped[number % 64] ^= 1 << number % 8
        cases += [(key.public, signature, message), (key.public, bytes(flipped), message)]
        s = int.from_bytes(signature[32:], "little")
        cases.append((key.public, signature[:32] + (s + L).to_bytes(32, "little"), message))
        mixed_key = encoded(add(_point(key.public), sorted(SMALL)[number % 8]))
        mixed_r = encoded(add(_point(signature[:32]), sorted(SMALL)[number % 8]))
        cases += [(mixed_key, signature, message), (key.public, mixed_r + signature[32:], message)]
        cases.append((LOW_ORDER_ENCODINGS[number % 8], signature, message))
        cases.append((NON_CANONICAL[number], signature, message))
        cases.append((key.public, NON_CANONICAL[number] + bytes(32), message))
        cases.append((LOW_ORDER_ENCODINGS[number % 8], encoded(NEUTRAL) + bytes(32), message))
    return cases


def _point(data: bytes) -> Point:
    y = int.from_bytes(data, "little")
    point = recover(y & 2**255 - 1, y >> 255)
    assert point is not None
    return point


def test_both_back_ends_agree_behind_the_strict_check() -> None:
    signing = pytest.importorskip("nacl.signing")
    exceptions = pytest.importorskip("nacl.exceptions")
    accepted = 0
    for public, signature, message in corpus():
        try:
            verify(public, signature, message)
            ours = True
        except BadSignature:
            ours = False
        strict = ours or _passes_the_strict_check(public, signature)
        try:
            signing.VerifyKey(public).verify(message, signature)
            libsodium = strict
        except (exceptions.BadSignatureError, ValueError):
            libsodium = False
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
            openssl = strict
        except (InvalidSignature, ValueError):
            openssl = False
        assert ours == libsodium == openssl
        accepted += ours
    assert accepted >= 24


def _passes_the_strict_check(public: bytes, signature: bytes) -> bool:
    canonical = all(identity._canonical_point(point) for point in (public, signature[:32]))
    return canonical and int.from_bytes(signature[32:], "little") < L


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_its_key(public: bytes) -> None:
    peer = peer_id_of(public)
    assert peer.startswith("12D3KooW")
    assert public_key_of(peer) == public


@pytest.mark.parametrize(
    "spoil",
    [
        lambda peer: "",
        lambda peer: peer + " ",
        lambda peer: " " + peer,
        lambda peer: peer + "\n",
        lambda peer: peer[:-1],
        lambda peer: peer[:-1] + "0",
        lambda peer: "1" + peer[:-1],
        lambda peer: peer[:-1] + "é",
        lambda peer: "z" * 52,
        lambda peer: "z" * 1_000_000,
        lambda peer: "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    ],
)
def test_a_peer_id_has_one_spelling(spoil) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"."):
        public_key_of(spoil(KEY.peer_id))


def test_a_key_file_is_private_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity.key"
    key = load_or_create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path).seed == load_or_create_key(path).seed == key.seed
    assert key.seed.hex() not in repr(key)
    with pytest.raises(ConfigError, match="cannot write"):
        save_key(path, key)


def test_a_bad_key_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with pytest.raises(ConfigError, match="cannot read"):
        load_key(path)
    for text in ("", "zz", "00" * 31, "00" * 33):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="damaged"):
            load_key(path)
    save_key(tmp_path / "open.key", KEY)
    (tmp_path / "open.key").chmod(0o640)
    with pytest.raises(ConfigError, match="read by others") as caught:
        load_key(tmp_path / "open.key")
    assert caught.value.remedy.startswith("chmod 600")


@given(seed=st.binary(min_size=32, max_size=32), message=st.binary(max_size=300))
def test_both_back_ends_sign_alike(seed: bytes, message: bytes) -> None:
    sign = identity.libsodium_sign()
    assert sign is not None
    key = SigningKey.from_seed(seed)
    plain = Ed25519PrivateKey.from_private_bytes(seed)
    assert sign(key.seed, key.public, message) == plain.sign(message) == key.sign(message)
