"""Address translation for one host, as a home router does it. Pure, over IPv4 packets.

The ports are kept (one inner host never conflicts with itself), so only addresses and
checksums change. What comes from outside passes only as an answer: from an address and
port that the inner host has sent to before (RFC 4787: address and port-dependent filtering).
"""

import struct
from collections import OrderedDict

_TCP, _UDP = 6, 17
_CHECKSUM_OFFSET = {_TCP: 16, _UDP: 6}
_FLOWS_MAX = 4096
_ADDRESS_SOURCE, _ADDRESS_TARGET, _HEADER_CHECKSUM = 12, 16, 10

Flow = tuple[int, bytes, bytes]
"""Protocol, inner port, and the other side's address and port."""


class Translator:
    """Rewrites packets of one inner address. Addresses are four bytes."""

    def __init__(self, inner: bytes, outer: bytes) -> None:
        self._inner = inner
        self._outer = outer
        self._flows: OrderedDict[Flow, None] = OrderedDict()

    def outgoing(self, packet: bytes) -> bytes | None:
        """A packet of the inner host as the outside sees it; None if it is not one."""
        ports = _ports(packet)
        if ports is None or packet[12:16] != self._inner:
            return None
        flow = (packet[9], ports[:2], packet[16:20] + ports[2:])
        self._flows[flow] = None
        self._flows.move_to_end(flow)
        if len(self._flows) > _FLOWS_MAX:
            self._flows.popitem(last=False)
        return _rewritten(packet, _ADDRESS_SOURCE, self._outer)

    def incoming(self, packet: bytes) -> bytes | None:
        """A packet from outside as the inner host sees it; None unless it is an answer."""
        ports = _ports(packet)
        if ports is None or packet[16:20] != self._outer:
            return None
        if (packet[9], ports[2:], packet[12:16] + ports[:2]) not in self._flows:
            return None
        return _rewritten(packet, _ADDRESS_TARGET, self._inner)


def _ports(packet: bytes) -> bytes | None:
    """Source and target port, four bytes; None for a fragment or another protocol."""
    if len(packet) < 20 or packet[9] not in _CHECKSUM_OFFSET:
        return None
    fragment = int.from_bytes(packet[6:8], "big") & 0x3FFF
    start = (packet[0] & 0xF) * 4
    enough = start >= 20 and len(packet) >= start + _CHECKSUM_OFFSET[packet[9]] + 2
    return packet[start : start + 4] if enough and not fragment else None


def _rewritten(packet: bytes, offset: int, address: bytes) -> bytes:
    changed = bytearray(packet)
    old = bytes(changed[offset : offset + 4])
    changed[offset : offset + 4] = address
    _amend(changed, _HEADER_CHECKSUM, old, address)
    inner = (packet[0] & 0xF) * 4 + _CHECKSUM_OFFSET[packet[9]]
    # A UDP checksum of zero means that there is none.
    if packet[9] == _TCP or changed[inner : inner + 2] != b"\0\0":
        _amend(changed, inner, old, address)
    return bytes(changed)


def _amend(packet: bytearray, offset: int, old: bytes, new: bytes) -> None:
    """Update a one's complement checksum for changed words (RFC 1624, equation 3)."""
    (checksum,) = struct.unpack_from("!H", packet, offset)
    total = ~checksum & 0xFFFF
    for word in struct.unpack("!HH", old):
        total += ~word & 0xFFFF
    total += sum(struct.unpack("!HH", new))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", packet, offset, ~total & 0xFFFF)
