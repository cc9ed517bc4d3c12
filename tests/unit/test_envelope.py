import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.envelope import decode, digest, encode, open_envelope, pae, payload_type, seal
from plait.errors import BadSignature, RemoteProtocolError
from plait.identity import SigningKey
from plait.v1.identity_pb2 import ChannelCert, NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import PayeeAmount, SessionVoucher
from plait.v1.stage_pb2 import Frame

KEY = SigningKey.from_seed(bytes(range(32)))
OTHER = SigningKey.from_seed(bytes(32))
CERT = NodeKeyCert(network_id="net", peer_id=KEY.peer_id, ledger_key=OTHER.public, serial=7)


def test_pae_is_that_of_the_dsse_specification() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


def test_what_is_sealed_opens() -> None:
    envelope = seal(KEY, CERT)
    assert open_envelope(envelope, NodeKeyCert) == CERT
    assert open_envelope(envelope, NodeKeyCert, signer=KEY.public) == CERT
    assert digest(envelope.payload) == digest(encode(CERT))


def test_another_signer_is_refused() -> None:
    with pytest.raises(BadSignature, match="another key"):
        open_envelope(seal(OTHER, CERT), NodeKeyCert, signer=KEY.public)


def test_one_type_is_not_taken_for_another() -> None:
    envelope = seal(KEY, CERT)
    with pytest.raises(BadSignature, match="expected"):
        open_envelope(envelope, ChannelCert)
    envelope.payload_type = payload_type(ChannelCert)
    with pytest.raises(BadSignature, match="does not match"):
        open_envelope(envelope, ChannelCert)


def test_an_unsigned_message_has_no_payload_type() -> None:
    with pytest.raises(KeyError):
        payload_type(Frame)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_noticed(data: st.DataObject) -> None:
    envelope = seal(KEY, CERT)
    name = data.draw(st.sampled_from(["payload", "signer", "signature"]))
    content = bytearray(getattr(envelope, name))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    setattr(envelope, name, bytes(content))
    with pytest.raises(BadSignature):
        open_envelope(envelope, NodeKeyCert, signer=KEY.public)


VOUCHER = SessionVoucher(
    network_id="net", sequence=300, amounts=[PayeeAmount(payee="a", microcredits=1)]
)
CANONICAL = encode(VOUCHER)


@pytest.mark.parametrize(
    "payload",
    [
        CANONICAL + b"\x98\x06\x01",  # an unknown field
        CANONICAL.replace(b"\x0a\x01a\x10\x01", b"\x0a\x01a\x10\x01\x98\x06\x01").replace(
            b"\x4a\x05", b"\x4a\x08"
        ),  # an unknown field in a nested message
        CANONICAL.replace(b"\x20\xac\x02", b"\x20\xac\x82\x00"),  # an over-long varint
        CANONICAL[5:] + CANONICAL[:5],  # reordered fields
        CANONICAL + b"\x18\x00",  # a default written out
        CANONICAL + b"\x20\xac\x02",  # a field twice
        CANONICAL[:-1],
        b"\xff",
    ],
)
def test_any_other_encoding_is_refused(payload: bytes) -> None:
    assert payload != CANONICAL
    with pytest.raises(RemoteProtocolError):
        decode(payload, SessionVoucher)
    envelope = SignedEnvelope(
        payload_type=payload_type(SessionVoucher),
        payload=payload,
        signer=KEY.public,
        signature=KEY.sign(pae(payload_type(SessionVoucher), payload)),
    )
    with pytest.raises(RemoteProtocolError):
        open_envelope(envelope, SessionVoucher)


def test_the_canonical_encoding_decodes() -> None:
    assert decode(CANONICAL, SessionVoucher) == VOUCHER


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_decode_or_are_refused(payload: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert encode(decode(payload, SessionVoucher)) == payload
