"""Single values of a bundle, to and from canonical JSON; reading raises ``ValueError``.

Bytes are base64 or hex in their one canonical spelling; an integer beyond 2^53 - 1 is a
decimal string, and never a smaller one.
"""

import base64
import binascii
from collections.abc import Collection, Mapping, Sequence

from plait.ledger.canonical import INTEGER_MAX, JsonValue
from plait.types import U64_MAX, Prices
from plait.v1.identity_pb2 import SignedEnvelope

U32_MAX = 2**32 - 1


def write_integer(value: int) -> JsonValue:
    """An unsigned integer; a string if a JSON number could not hold it."""
    return value if value <= INTEGER_MAX else str(value)


def read_integer(value: JsonValue, what: str, maximum: int = U64_MAX) -> int:
    """An unsigned integer up to ``maximum``."""
    number = -1
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and len(value) <= 20 and value.isascii() and value.isdigit():
        number = int(value)
        if number <= INTEGER_MAX or str(number) != value:
            raise ValueError(f"{what} must be written as a number")
    if not 0 <= number <= maximum:
        raise ValueError(f"{what} is not an integer from 0 to {maximum}")
    return number


def read_text(value: JsonValue, what: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a string")
    return value


def read_flag(value: JsonValue, what: str) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} is not true or false")
    return value


def read_items(value: JsonValue, what: str) -> Sequence[JsonValue]:
    """An array."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is not an array")
    return value


def read_members(value: JsonValue, what: str, names: Collection[str]) -> Mapping[str, JsonValue]:
    """An object with exactly these members."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    missing, unknown = set(names) - set(value), set(value) - set(names)
    if missing:
        raise ValueError(f"{what} lacks the member {min(missing)}")
    if unknown:
        raise ValueError(f"{what} has an unknown member {min(unknown)[:80]}")
    return value


def read_ids(value: JsonValue, what: str) -> tuple[int, ...]:
    """An array of token ids."""
    return tuple(read_integer(item, what, U32_MAX) for item in read_items(value, what))


def write_base64(data: bytes) -> JsonValue:
    """Bytes as base64."""
    return base64.b64encode(data).decode()


def read_base64(value: JsonValue, what: str) -> bytes:
    """Bytes from canonical base64."""
    text = read_text(value, what)
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(f"{what} is not base64") from error
    if base64.b64encode(data).decode() != text:
        raise ValueError(f"{what} is not canonical base64")
    return data


def read_hex(value: JsonValue, what: str, length: int) -> bytes:
    """Bytes of a fixed length from lower-case hex."""
    text = read_text(value, what)
    try:
        data = bytes.fromhex(text)
    except ValueError as error:
        raise ValueError(f"{what} is not hex") from error
    if len(data) != length or data.hex() != text:
        raise ValueError(f"{what} is not {length} bytes of lower-case hex")
    return data


def write_envelope(envelope: SignedEnvelope) -> JsonValue:
    """A signed envelope, member by member."""
    return {
        "payload": write_base64(envelope.payload),
        "payload_type": envelope.payload_type,
        "signature": write_base64(envelope.signature),
        "signer": write_base64(envelope.signer),
    }


def read_envelope(value: JsonValue, what: str) -> SignedEnvelope:
    """A signed envelope; its signature is not checked here."""
    names = ("payload", "payload_type", "signature", "signer")
    members = read_members(value, what, names)
    return SignedEnvelope(
        payload=read_base64(members["payload"], f"{what}: payload"),
        payload_type=read_text(members["payload_type"], f"{what}: payload_type"),
        signature=read_base64(members["signature"], f"{what}: signature"),
        signer=read_base64(members["signer"], f"{what}: signer"),
    )


def read_envelopes(value: JsonValue, what: str) -> tuple[SignedEnvelope, ...]:
    """An array of signed envelopes."""
    return tuple(
        read_envelope(item, f"{what} {index}") for index, item in enumerate(read_items(value, what))
    )


def write_prices(prices: Prices) -> JsonValue:
    """Prices by kind of token."""
    return {name: write_integer(getattr(prices, name)) for name in _PRICES}


def read_prices(value: JsonValue, what: str) -> Prices:
    """Prices by kind of token."""
    members = read_members(value, what, _PRICES)
    return Prices(**{name: read_integer(members[name], f"{what}: {name}") for name in _PRICES})


_PRICES = ("prompt", "output", "cached_prompt", "rejected_draft", "replayed")


def write_optional_envelope(envelope: SignedEnvelope | None) -> JsonValue:
    """An envelope, or null."""
    return None if envelope is None else write_envelope(envelope)


def read_optional_envelope(value: JsonValue, what: str) -> SignedEnvelope | None:
    """An envelope, or None for null."""
    return None if value is None else read_envelope(value, what)
