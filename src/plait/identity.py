"""Ed25519 keys, peer ids, key files, and the one strict signature check.

Every signature in Plait is verified by ``verify`` here. It refuses low-order and
non-canonical public keys and R values and S >= L before any backend sees them, so that
OpenSSL and libsodium agree on every input (RFC 8032; the edge cases are those of
C2SP's CCTV vectors). Peer ids follow the libp2p peer-id specification.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from plait.errors import BadSignature, ConfigError
from plait.types import PeerId

# Identity multihash (0x00, 36 bytes) of the protobuf {Type: Ed25519, Data: 32 bytes}.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_PEER_ID_CHARACTERS = 52

_FIELD_PRIME = 2**255 - 19
_GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
_SIGN_BIT_CLEAR = 2**255 - 1

# y coordinates of the eight points of small order (encodings with either sign bit).
_LOW_ORDER_Y = frozenset(
    {
        0,
        1,
        _FIELD_PRIME - 1,
        2707385501144840649318225287225658788936804267575313519463743609750303402022,
        55188659117513257062467267217118295137698188065244968500265048394206261417927,
    }
)


def peer_id_of(public_key: bytes) -> PeerId:
    """Return the peer id of a 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


def public_key_of(peer_id: str) -> bytes:
    """Return the public key inside a peer id; raises ``ValueError`` if it holds none.

    Only the one canonical spelling is accepted: a peer id names a ledger account, and the
    base58 decoder would strip white space, so one key could have several names.
    """
    if len(peer_id) != _PEER_ID_CHARACTERS:  # also bounds the decoder's quadratic work
        raise ValueError(f"not an Ed25519 peer id: {peer_id[:64]}")
    raw = base58.b58decode(peer_id)
    if not raw.startswith(_PEER_ID_PREFIX) or peer_id_of(raw[6:]) != peer_id:
        raise ValueError(f"not an Ed25519 peer id: {peer_id[:64]}")
    return raw[6:]


def _canonical_point(encoded: bytes) -> bool:
    y = int.from_bytes(encoded, "little") & _SIGN_BIT_CLEAR
    return y < _FIELD_PRIME and y not in _LOW_ORDER_Y


def verify(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature strictly; raises ``BadSignature`` with the reason."""
    if len(public_key) != 32 or len(signature) != 64:
        raise BadSignature("key or signature has the wrong length")
    if not _canonical_point(public_key):
        raise BadSignature("public key is low-order or not canonical")
    if not _canonical_point(signature[:32]):
        raise BadSignature("R is low-order or not canonical")
    if int.from_bytes(signature[32:], "little") >= _GROUP_ORDER:
        raise BadSignature("S is not canonical")
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise BadSignature("signature does not match") from error


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 private key."""

    _private: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> "SigningKey":
        """Make a new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> "SigningKey":
        """Rebuild a key from its 32-byte seed."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes."""
        return self._private.private_bytes_raw()

    @property
    def public(self) -> bytes:
        """The 32-byte public key."""
        return self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @property
    def peer_id(self) -> PeerId:
        """The public key as a peer id."""
        return peer_id_of(self.public)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature of ``message``."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"SigningKey({self.peer_id})"


def save_key(path: Path, key: SigningKey) -> None:
    """Write a key file with mode 0600; raises ``ConfigError`` if it exists or cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write the key file {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(key.seed.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())


def load_key(path: Path) -> SigningKey:
    """Read a key file; raises ``ConfigError`` if missing, malformed or readable by others."""
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {path}: {error}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"the key file {path} can be read by others", remedy=f"chmod 600 {path}")
    try:
        seed = bytes.fromhex(text.strip())
        if len(seed) != 32:
            raise ValueError("a key is 32 bytes")
        return SigningKey.from_seed(seed)
    except ValueError as error:
        raise ConfigError(f"the key file {path} is damaged: {error}") from error


def load_or_create_key(path: Path) -> SigningKey:
    """Read the key file, or make one on first use."""
    if not path.exists():
        save_key(path, SigningKey.generate())
    return load_key(path)
