"""Cosignatures: a witness's timestamped signature on a checkpoint (c2sp.org/tlog-cosignature).

Version 1, Ed25519. A cosignature says that, as of its time, this is the largest tree the
witness has seen of the log, and that it grew from every earlier one it saw.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from plait.errors import BadSignature
from plait.identity import SigningKey, verify
from plait.ledger.checkpoint import NoteLine, check_name, parse_note
from plait.network_file import Witness

_ED25519_COSIGNATURE = b"\x04"
_TIME_S_MAX = 2**63 - 1
_SIGNATURE_BYTES = 8 + 64


@dataclass(frozen=True, slots=True)
class Cosignature:
    """A verified cosignature: by whom, and when (seconds since the epoch)."""

    name: str
    time_s: int


def cosignature_key_id(name: str, public_key: bytes) -> bytes:
    """The 4-byte id of a witness key."""
    material = name.encode() + b"\n" + _ED25519_COSIGNATURE + public_key
    return hashlib.sha256(material).digest()[:4]


def cosign(key: SigningKey, name: str, note: str, time_s: int) -> str:
    """Cosign a signed checkpoint; returns one signature line, to be appended to the note.

    The caller has verified the checkpoint. Raises ``ValueError`` for an unusable name or
    time and ``BadSignature`` for what is no note.
    """
    check_name(name)
    if not 0 <= time_s <= _TIME_S_MAX:
        raise ValueError(f"not a time: {time_s}")
    text, _ = parse_note(note)
    signature = key.sign(_message(text, time_s))
    raw = cosignature_key_id(name, key.public) + time_s.to_bytes(8, "big") + signature
    return f"— {name} {base64.b64encode(raw).decode()}\n"


def open_cosignatures(note: str, witnesses: Sequence[Witness]) -> tuple[Cosignature, ...]:
    """The cosignatures of known witnesses on a note, one for each at most, in their order.

    Lines by unknown keys are ignored. Raises ``BadSignature`` for a bad signature under a
    known key, and for what is no note. The log's own signature is not checked here.
    """
    text, lines = parse_note(note)
    opened = [_opened(text, lines, witness) for witness in witnesses]
    return tuple(cosignature for cosignature in opened if cosignature is not None)


def _opened(text: str, lines: Sequence[NoteLine], witness: Witness) -> Cosignature | None:
    expected = witness.name, cosignature_key_id(witness.name, witness.key)
    newest = None
    for line in lines:
        if (line.name, line.key_id) != expected:
            continue
        time_s = int.from_bytes(line.signature[:8], "big")
        if len(line.signature) != _SIGNATURE_BYTES or time_s > _TIME_S_MAX:
            raise BadSignature(f"the cosignature of {witness.name} is malformed")
        verify(witness.key, line.signature[8:], _message(text, time_s))
        if newest is None or time_s > newest.time_s:
            newest = Cosignature(witness.name, time_s)
    return newest


def _message(text: str, time_s: int) -> bytes:
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()
