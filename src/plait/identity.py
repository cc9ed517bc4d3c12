"""Ed25519 keys, peer ids, key files, and the one strict signature check.

Every signature in Plait is verified by ``verify`` here. It refuses low-order and
non-canonical public keys and R values and S >= L before any back end sees them, so that
OpenSSL and libsodium agree on every input (RFC 8032; the edge cases are those of
C2SP's CCTV vectors). libsodium verifies twice as fast, signs half as fast again, and is used
where PyNaCl is installed. Peer ids follow the libp2p peer-id specification.
"""

import getpass
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from plait.errors import BadSignature, ConfigError
from plait.types import PeerId

# Identity multihash (0x00, 36 bytes) of the protobuf {Type: Ed25519, Data: 32 bytes}.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_PEER_ID_CHARACTERS = 52

REMEMBERED_BYTES_MAX = 2_048

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


@lru_cache(maxsize=16_384)
def peer_id_of(public_key: bytes) -> PeerId:
    """Return the peer id of a 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


@lru_cache(maxsize=16_384)  # base58 is slow, and the peers are mostly the same
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


@lru_cache(maxsize=16_384)
def _usable_key(public_key: bytes) -> bool:
    return _canonical_point(public_key)


def _canonical_point(encoded: bytes) -> bool:
    y = int.from_bytes(encoded, "little") & _SIGN_BIT_CLEAR
    return y < _FIELD_PRIME and y not in _LOW_ORDER_Y


def verify(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature strictly; raises ``BadSignature`` with the reason.

    What was found good is remembered for a while: certificates, offers and vouchers come
    again and again.
    """
    if len(message) <= REMEMBERED_BYTES_MAX:
        _verify_remembered(public_key, signature, message)
    else:
        _verify(public_key, signature, message)


def _verify(public_key: bytes, signature: bytes, message: bytes) -> None:
    if len(public_key) != 32 or len(signature) != 64:
        raise BadSignature("key or signature has the wrong length")
    if not _usable_key(bytes(public_key)):
        raise BadSignature("public key is low-order or not canonical")
    if not _canonical_point(signature[:32]):
        raise BadSignature("R is low-order or not canonical")
    if int.from_bytes(signature[32:], "little") >= _GROUP_ORDER:
        raise BadSignature("S is not canonical")
    if not _matches(public_key, signature, message):
        raise BadSignature("signature does not match")


_verify_remembered = lru_cache(maxsize=4_096)(_verify)  # an error is not remembered

Matches = Callable[[bytes, bytes, bytes], bool]
"""Whether a signature that passed the strict check fits key and message."""


def openssl_matches(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """The back end that is always there."""
    try:
        _openssl_key(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=16_384)
def _openssl_key(public_key: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public_key)


def libsodium_matches() -> Matches | None:
    """The faster back end, or ``None`` where PyNaCl is not installed."""
    try:
        from nacl.bindings import crypto_sign_open
        from nacl.exceptions import BadSignatureError
    except ImportError:
        return None

    def matches(public_key: bytes, signature: bytes, message: bytes) -> bool:
        try:
            crypto_sign_open(signature + message, public_key)
        except (BadSignatureError, ValueError):
            return False
        return True

    return matches


_matches: Matches = libsodium_matches() or openssl_matches

Sign = Callable[[bytes, bytes, bytes], bytes]
"""The signature of a message, from a seed and the public key that belongs to it."""


def libsodium_sign() -> Sign | None:
    """The faster back end, or ``None`` where PyNaCl is not installed.

    Ed25519 signatures are deterministic: both back ends give the same bytes.
    """
    try:
        from nacl.bindings import crypto_sign
    except ImportError:
        return None

    def sign(seed: bytes, public_key: bytes, message: bytes) -> bytes:
        return crypto_sign(message, seed + public_key)[:64]

    return sign


_sign: Sign | None = libsodium_sign()


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 private key."""

    _private: Ed25519PrivateKey
    _seed: bytes = field(init=False, repr=False, compare=False)
    _public: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Kept raw: a stage signs for every traversal. The public half is always derived here,
        # since a signature with another's would give the private key away.
        public = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        object.__setattr__(self, "_seed", self._private.private_bytes_raw())
        object.__setattr__(self, "_public", public)

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
        return self._seed

    @property
    def public(self) -> bytes:
        """The 32-byte public key."""
        return self._public

    @property
    def peer_id(self) -> PeerId:
        """The public key as a peer id."""
        return peer_id_of(self.public)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature of ``message``."""
        if _sign is not None:
            return _sign(self._seed, self._public, message)
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"SigningKey({self.peer_id})"


PASSPHRASE_VARIABLE = "PLAIT_PASSPHRASE_FILE"
"""Names a file whose first line opens encrypted key files, and encrypts those made from now on."""

_ENCRYPTED = "-----BEGIN ENCRYPTED PRIVATE KEY-----"


def passphrase_of_file() -> bytes | None:
    """The first line of the passphrase file, if one is named; raises ``ConfigError``."""
    name = os.environ.get(PASSPHRASE_VARIABLE)
    if not name:
        return None
    try:
        passphrase = Path(name).read_bytes().split(b"\n", 1)[0]
    except OSError as error:
        raise ConfigError(f"cannot read the passphrase file {name}: {error.strerror}") from error
    if not passphrase:
        raise ConfigError(f"the passphrase file {name} has an empty first line")
    return passphrase


def key_text(key: SigningKey, passphrase: bytes | None) -> str:
    """A key as the text of a key file: hex, or encrypted PKCS #8 with a passphrase."""
    if passphrase is None:
        return key.seed.hex() + "\n"
    encryption = BestAvailableEncryption(passphrase)
    return key._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode()


def save_key(path: Path, key: SigningKey) -> None:
    """Write a key file with mode 0600, encrypted if a passphrase file is named.

    Raises ``ConfigError`` if it exists or cannot be written.
    """
    text = key_text(key, passphrase_of_file())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write the key file {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def protect_key(path: Path, passphrase: bytes) -> bool:
    """Encrypt a key file in place; false if it was already. Raises ``ConfigError``.

    What the disk keeps of the replaced file is not wiped.
    """
    if path.read_text().startswith(_ENCRYPTED):
        return False
    key = load_key(path)
    part = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key_text(key, passphrase))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write the key file {path}: {error.strerror}") from error
    return True


def _decrypted(path: Path, text: str) -> SigningKey:
    passphrase = passphrase_of_file()
    if passphrase is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"the key file {path} is encrypted",
                remedy=f"name a file with its passphrase in {PASSPHRASE_VARIABLE}",
            )
        passphrase = getpass.getpass(f"Passphrase of {path}: ").encode()
    try:
        private = load_pem_private_key(text.encode(), passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"the passphrase does not open the key file {path}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"the key file {path} holds no Ed25519 key")
    return SigningKey(private)


def load_key(path: Path) -> SigningKey:
    """Read a key file; raises ``ConfigError`` if missing, malformed or readable by others."""
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {path}: {error}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"the key file {path} can be read by others", remedy=f"chmod 600 {path}")
    if text.startswith(_ENCRYPTED):
        return _decrypted(path, text)
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
