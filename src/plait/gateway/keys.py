"""API keys: a file with one key, or its SHA-256, per line.

Only hashes are kept in memory. A lookup compares with every key in constant time.
"""

import hashlib
import hmac
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from plait.errors import ConfigError

KEY_CHARACTERS_MIN = 16
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_PLAIN = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys that open a gateway, as SHA-256 digests."""

    digests: tuple[bytes, ...] = field(repr=False)

    def owner_of(self, key: str) -> str | None:
        """A stable name for the holder of a key, or None for a key that is not known."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        known = [hmac.compare_digest(digest, other) for other in self.digests]
        return digest.hex() if any(known) else None


def load_keys(path: Path) -> KeyRing:
    """Read a key file; empty lines and lines that begin with ``#`` are skipped.

    Raises ``ConfigError`` if it cannot be read, is open to others, or holds no valid key.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the key file {path} is not text") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"other users can use the key file {path} (mode {stat.S_IMODE(mode):04o})",
            remedy=f"chmod 600 {path}",
        )
    entries = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    digests = tuple(
        _digest(path, number, entry)
        for number, entry in entries
        if entry and not entry.startswith("#")
    )
    if not digests:
        raise ConfigError(f"there is no key in {path}", remedy="write one key per line")
    return KeyRing(digests)


def _digest(path: Path, number: int, entry: str) -> bytes:
    if hashed := _HASHED.fullmatch(entry):
        return bytes.fromhex(hashed[1])
    # The key itself never appears in a message.
    if entry.startswith("sha256:") or not _PLAIN.fullmatch(entry):
        raise ConfigError(
            f"line {number} of {path} is neither a key nor sha256: and 64 hexadecimal digits"
        )
    if len(entry) < KEY_CHARACTERS_MIN:
        raise ConfigError(
            f"the key in line {number} of {path} is too short to be safe",
            remedy=f"use at least {KEY_CHARACTERS_MIN} characters, as from: openssl rand -hex 24",
        )
    return hashlib.sha256(entry.encode()).digest()
