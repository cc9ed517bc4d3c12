"""Checkpoints: signed tree heads as C2SP signed notes (c2sp.org/tlog-checkpoint).

The key name equals the log's origin. Parsing is strict: the one canonical spelling of
each line, no extension lines. Signatures by unknown keys are ignored, as the specification
demands (those of witnesses are opened in ``cosignature``); a bad signature under the known
key refuses the whole note.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass

from plait.errors import BadProof, BadSignature
from plait.identity import SigningKey, verify
from plait.ledger.merkle import EMPTY_ROOT
from plait.types import Digest

NOTE_SIZE_MAX = 16_384
SIGNATURES_MAX = 16

_SIGNATURE_START = "— "
_ED25519 = b"\x01"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified tree head: the log's origin, its number of leaves, its root hash."""

    origin: str
    size: int
    root: Digest


@dataclass(frozen=True, slots=True)
class NoteLine:
    """One signature line of a note, not yet verified."""

    name: str
    key_id: bytes
    signature: bytes


def key_id(name: str, public_key: bytes) -> bytes:
    """The 4-byte id of an Ed25519 note key (c2sp.org/signed-note)."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:4]


def sign_note(key: SigningKey, name: str, text: str) -> str:
    """Sign a text that ends in a newline; raises ``ValueError`` for an unusable name or text."""
    check_name(name)
    if not text.endswith("\n") or _has_control(text):
        raise ValueError("a note's text ends in a newline and has no other control character")
    signature = key_id(name, key.public) + key.sign(text.encode())
    return f"{text}\n{_SIGNATURE_START}{name} {base64.b64encode(signature).decode()}\n"


def parse_note(note: str) -> tuple[str, tuple[NoteLine, ...]]:
    """The text of a note and its signature lines, none verified; raises ``BadSignature``."""
    if len(note) > NOTE_SIZE_MAX or _has_control(note):
        raise BadSignature("the note is too long or holds characters it must not")
    text, separator, tail = note.rpartition("\n\n")
    if not separator or not tail.endswith("\n"):
        raise BadSignature("the note has no signatures")
    lines = tail[:-1].split("\n")
    if len(lines) > SIGNATURES_MAX:
        raise BadSignature(f"the note has more than {SIGNATURES_MAX} signatures")
    return f"{text}\n", tuple(map(_signature, lines))


def open_note(note: str, name: str, public_key: bytes) -> str:
    """Return the text of a note signed by the named key; raises ``BadSignature``."""
    text, lines = parse_note(note)
    expected = (name, key_id(name, public_key))
    known = [line.signature for line in lines if (line.name, line.key_id) == expected]
    if len(known) != 1:
        raise BadSignature(f"the note has {len(known)} signatures by {name}, not one")
    verify(public_key, known[0], text.encode())
    return text


def sign_checkpoint(key: SigningKey, origin: str, size: int, root: bytes) -> str:
    """Sign a tree head as a note; ``ValueError`` for a bad origin, size or root."""
    if size < 0 or len(root) != 32:
        raise ValueError("a checkpoint needs a size and a 32-byte root")
    return sign_note(key, origin, f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n")


def open_checkpoint(text: str, origin: str, log_key: bytes) -> Checkpoint:
    """Verify a checkpoint of the log ``origin`` against its public key.

    Raises ``BadSignature`` for the note and ``BadProof`` for what it says.
    """
    lines = open_note(text, origin, log_key).split("\n")
    if len(lines) != 4:
        raise BadProof("a checkpoint has three lines: origin, size, root")
    if lines[0] != origin:
        raise BadProof(f"the checkpoint is of another log: {lines[0][:80]!r}")
    if not (lines[1].isascii() and lines[1].isdigit()) or str(int(lines[1][:20])) != lines[1]:
        raise BadProof("the tree size is not a plain decimal number")
    try:
        root = canonical_base64(lines[2])
    except ValueError as error:
        raise BadProof("the root hash is not base64") from error
    size = int(lines[1])
    if len(root) != 32 or (size == 0) != (root == EMPTY_ROOT):
        raise BadProof("the root hash is not one of a tree of this size")
    return Checkpoint(origin, size, Digest(root))


def check_name(name: str) -> None:
    """Refuse what cannot name a note's key (c2sp.org/signed-note); raises ``ValueError``."""
    if not name or "+" in name or any(letter.isspace() for letter in name):
        raise ValueError(f"not a key name: {name[:80]!r}")


def _signature(line: str) -> NoteLine:
    """Split a signature line; raises ``BadSignature``."""
    name, space, encoded = line.removeprefix(_SIGNATURE_START).partition(" ")
    try:
        raw = canonical_base64(encoded)
        check_name(name)
    except ValueError as error:
        raise BadSignature("a signature line of the note is malformed") from error
    if not line.startswith(_SIGNATURE_START) or not space or len(raw) < 5:
        raise BadSignature("a signature line of the note is malformed")
    return NoteLine(name, raw[:4], raw[4:])


def canonical_base64(text: str) -> bytes:
    """Bytes of the one spelling of base64; raises ``ValueError`` for any other."""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
    if base64.b64encode(raw).decode() != text:
        raise ValueError("not canonical base64")
    return raw


def _has_control(text: str) -> bool:
    # Lone surrogates have no UTF-8 encoding; JSON can smuggle them in.
    return any(
        (letter < " " and letter != "\n") or "\ud800" <= letter < "\ue000" for letter in text
    )
