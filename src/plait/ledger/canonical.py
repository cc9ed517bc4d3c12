"""Canonical JSON (RFC 8785), in the subset that bundles use.

No floats, ASCII member names (so that sorting by code point is sorting by UTF-16 unit),
integers within 2^53 - 1: larger ones travel as decimal strings, because a JSON number is
a double. What is read must be, byte for byte, what would be written.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeAlias

JsonValue: TypeAlias = "bool | int | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"

INTEGER_MAX = 2**53 - 1
DEPTH_MAX = 16


def encode_canonical(value: JsonValue) -> bytes:
    """Encode a value; raises ``ValueError`` if it is outside the subset."""
    _check(value, DEPTH_MAX)
    # For this subset Python's escapes are those of RFC 8785 section 3.2.2.2.
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError


def decode_canonical(data: bytes) -> JsonValue:
    """Decode bytes; raises ``ValueError`` unless they are the one canonical encoding."""
    try:
        value: JsonValue = json.loads(
            data.decode(), parse_float=_no_float, parse_constant=_no_float
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if encode_canonical(value) != data:
        raise ValueError("not canonical JSON: it does not re-encode to itself")
    return value


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"a number that is not an integer: {text[:40]}")


def _check(value: object, depth: int) -> None:
    if depth == 0:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int):
        if not -INTEGER_MAX <= value <= INTEGER_MAX:
            raise ValueError("an integer beyond 2^53 - 1 must be written as a string")
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str) or not name.isascii():
                raise ValueError("a member name is ASCII text")
            _check(item, depth - 1)
    else:
        raise ValueError(f"not a JSON value of this subset: {type(value).__name__}")
