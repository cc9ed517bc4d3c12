"""The alphabet of byte-level BPE: each byte is written as one printable character.

Printable Latin-1 characters stand for themselves; the other bytes, in order, are the
characters from U+0100 on (GPT-2's convention: a space is ``Ġ``).
"""

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

ALPHABET = tuple(
    chr(byte if byte in _PRINTABLE else 0x100 + _OTHERS.index(byte)) for byte in range(256)
)
"""The character of each byte, by the byte's value."""

BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def to_bytes(token: str) -> bytes | None:
    """The bytes a token stands for; None if it is not written in the alphabet."""
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return None
