"""Address translation of whole packets."""

import socket
import struct

import pytest

from plait.testnet.nat import Translator

INNER, OUTER, PEER, STRANGER = map(
    socket.inet_aton, ("10.18.1.4", "198.18.1.4", "198.18.1.1", "198.18.1.9")
)
TCP, UDP = 6, 17


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(
    source: bytes,
    target: bytes,
    ports: tuple[int, int],
    protocol: int = TCP,
    payload: bytes = b"hi!",
) -> bytes:
    """An IPv4 packet with right checksums."""
    ends = struct.pack("!HH", *ports)
    if protocol == TCP:
        body = bytearray(ends + struct.pack("!IIBBHHH", 7, 9, 5 << 4, 2, 1024, 0, 0) + payload)
        offset = 16
    else:
        body = bytearray(ends + struct.pack("!HH", 8 + len(payload), 0) + payload)
        offset = 6
    pseudo = source + target + struct.pack("!BBH", 0, protocol, len(body))
    struct.pack_into("!H", body, offset, checksum(pseudo + bytes(body)))
    header = bytearray(
        struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0, source, target)
    )
    struct.pack_into("!H", header, 10, checksum(bytes(header)))
    return bytes(header + body)


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_what_leaves_comes_from_outside_and_answers_come_back(protocol: int) -> None:
    nat = Translator(INNER, OUTER)
    sent = packet(INNER, PEER, (5000, 80), protocol)
    assert nat.outgoing(sent) == packet(OUTER, PEER, (5000, 80), protocol)
    answer = packet(PEER, OUTER, (80, 5000), protocol, b"yes")
    assert nat.incoming(answer) == packet(PEER, INNER, (80, 5000), protocol, b"yes")


def test_who_was_not_called_does_not_get_in() -> None:
    nat = Translator(INNER, OUTER)
    assert nat.incoming(packet(PEER, OUTER, (80, 5000))) is None
    nat.outgoing(packet(INNER, PEER, (5000, 80)))
    assert nat.incoming(packet(STRANGER, OUTER, (80, 5000))) is None
    assert nat.incoming(packet(PEER, OUTER, (81, 5000))) is None
    assert nat.incoming(packet(PEER, OUTER, (80, 5001))) is None
    assert nat.incoming(packet(PEER, OUTER, (80, 5000), UDP)) is None
    assert nat.incoming(packet(PEER, INNER, (80, 5000))) is None, "its own address is not known"


@pytest.mark.parametrize("length", [0, 1, 19, 20, 23, 37])
def test_a_stump_is_dropped(length: int) -> None:
    nat = Translator(INNER, OUTER)
    assert nat.outgoing(packet(INNER, PEER, (1, 2), payload=b"")[:length]) is None


def test_fragments_and_other_protocols_are_dropped() -> None:
    nat = Translator(INNER, OUTER)
    whole = bytearray(packet(INNER, PEER, (1, 2)))
    whole[6] = 0x20
    assert nat.outgoing(bytes(whole)) is None
    whole[6], whole[9] = 0, 1
    assert nat.outgoing(bytes(whole)) is None
