"""Activations as bytes: fp32, bf16, or 8 bits with a scale for every 32 numbers.

fp32 is exact. bf16 keeps 8 bits of each number (relative error at most 2^-8, half an ulp)
and loses no range. int8 keeps each number to within 1/254 of the largest of its group, on
top of 0.05 % from the half-precision scale; it is for links where bytes are what takes time.
Little-endian throughout. Rows are encoded each on its own, one after the other, so that a
prefix of rows is a prefix of the bytes; a row in int8 is its scales, then its numbers.
"""

import numpy as np
import numpy.typing as npt

from plait.compute.port import Hidden
from plait.errors import LocalProtocolError, RemoteProtocolError
from plait.types import WireDtype

GROUP = 32
_BF16_MAX = np.float32(3.3895314e38)
_F16_MAX = np.float32(65504.0)


def wire_bytes(rows: int, width: int, dtype: WireDtype) -> int:
    """Size of an encoded [rows, width]; raises ``LocalProtocolError`` for a width that
    int8 cannot divide into groups."""
    match dtype:
        case "fp32":
            return rows * width * 4
        case "bf16":
            return rows * width * 2
        case "int8":
            if width % GROUP:
                raise LocalProtocolError(f"int8 takes widths that are multiples of {GROUP}")
            return rows * width + rows * (width // GROUP) * 2


def encode(hidden: Hidden, dtype: WireDtype) -> bytes:
    """Encode activations; raises ``LocalProtocolError`` if they are not finite, or out of
    range for int8 (beyond 8 million)."""
    if not np.isfinite(hidden).all():
        raise LocalProtocolError("activations that are not finite")
    match dtype:
        case "fp32":
            return np.ascontiguousarray(hidden, "<f4").tobytes()
        case "bf16":
            return _to_bf16(hidden).tobytes()
        case "int8":
            return _encode_int8(hidden)


def decode(payload: bytes, rows: int, width: int, dtype: WireDtype) -> Hidden:
    """Decode [rows, width] of fp32; raises ``RemoteProtocolError`` for a payload of another
    size or with numbers that are not finite."""
    if rows < 1 or width < 1 or (dtype == "int8" and width % GROUP):
        raise RemoteProtocolError(f"activations of {rows} rows by {width} in {dtype}")
    if len(payload) != wire_bytes(rows, width, dtype):
        raise RemoteProtocolError(
            f"{len(payload)} bytes of activations; {rows} rows in {dtype} "
            f"are {wire_bytes(rows, width, dtype)}"
        )
    match dtype:
        case "fp32":
            hidden = np.frombuffer(payload, "<f4").astype(np.float32, copy=False)
        case "bf16":
            hidden = np.zeros(rows * width, "<f4")
            hidden.view("<u2")[1::2] = np.frombuffer(payload, "<u2")
        case "int8":
            hidden = _decode_int8(payload, rows, width)
    if not np.isfinite(hidden).all():
        raise RemoteProtocolError("activations that are not finite")
    return hidden.reshape(rows, width)


def rounded(hidden: Hidden, dtype: WireDtype) -> Hidden:
    """What arrives of activations that are sent; raises as ``encode`` does."""
    rows, width = hidden.shape
    return hidden if dtype == "fp32" else decode(encode(hidden, dtype), rows, width, dtype)


def _to_bf16(hidden: Hidden) -> npt.NDArray[np.uint16]:
    """The upper halves of fp32, rounded to nearest, ties to even."""
    halves = np.ascontiguousarray(hidden, "<f4").view("<u2")
    if not halves[..., ::2].any():  # rounded already: below fp32 every layer does that
        return halves[..., 1::2]
    clipped = np.clip(hidden, -_BF16_MAX, _BF16_MAX)  # rounding up must not give infinity
    bits = np.ascontiguousarray(clipped, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")


def _encode_int8(hidden: Hidden) -> bytes:
    rows, width = hidden.shape
    if width % GROUP:
        raise LocalProtocolError(f"int8 takes widths that are multiples of {GROUP}")
    groups = hidden.reshape(rows, width // GROUP, GROUP)
    largest = np.abs(groups).max(-1)
    if (largest > 127 * _F16_MAX).any():
        raise LocalProtocolError("activations too large for int8")
    scale: npt.NDArray[np.float16] = (largest / np.float32(127)).astype("<f2")  # [rows, groups]
    divisor = scale.astype(np.float32)[..., None]
    # A scale too small for half precision is 0, and so is what it stands for.
    ratio = np.divide(groups, divisor, out=np.zeros_like(groups), where=divisor > 0)
    codes = np.clip(np.rint(ratio), -127, 127).astype(np.int8)
    return np.concatenate(
        [scale.view(np.uint8), codes.reshape(rows, width).view(np.uint8)], axis=1
    ).tobytes()


def _decode_int8(payload: bytes, rows: int, width: int) -> Hidden:
    scale_bytes = 2 * (width // GROUP)
    whole = np.frombuffer(payload, np.uint8).reshape(rows, scale_bytes + width)
    scale = np.ascontiguousarray(whole[:, :scale_bytes]).view("<f2").astype(np.float32)
    codes = np.ascontiguousarray(whole[:, scale_bytes:]).view(np.int8)
    return codes.reshape(rows, -1, GROUP).astype(np.float32) * scale[..., None]
