import pytest

from plait.envelope import seal
from plait.errors import BadSignature
from plait.ledger.certs import CLOCK_SKEW_MS_MAX, check_key_cert, make_key_cert
from plait.testing.accounting import NETWORK_ID, NOW_MS, key_of
from plait.v1.identity_pb2 import NodeKeyCert

PEER, LEDGER = key_of("peer"), key_of("peer ledger")
CERT = make_key_cert(PEER, LEDGER.public, NETWORK_ID, NOW_MS, 1_000, 3)


def fields(**changes: object) -> NodeKeyCert:
    cert = NodeKeyCert.FromString(CERT.payload)
    for name, value in changes.items():
        setattr(cert, name, value)
    return cert


def test_a_good_certificate_gives_peer_and_key() -> None:
    assert check_key_cert(CERT, NETWORK_ID, NOW_MS) == (PEER.peer_id, LEDGER.public)
    assert check_key_cert(CERT, NETWORK_ID, NOW_MS, PEER.peer_id)[1] == LEDGER.public


@pytest.mark.parametrize(
    ("now_ms", "valid"),
    [
        (NOW_MS - CLOCK_SKEW_MS_MAX - 1, False),
        (NOW_MS - CLOCK_SKEW_MS_MAX, True),
        (NOW_MS + 999, True),
        (NOW_MS + 1_000, False),
    ],
)
def test_it_is_valid_for_its_time(now_ms: int, valid: bool) -> None:
    if valid:
        check_key_cert(CERT, NETWORK_ID, now_ms)
    else:
        with pytest.raises(BadSignature, match="time"):
            check_key_cert(CERT, NETWORK_ID, now_ms)


def test_it_is_of_the_peer_and_network_expected() -> None:
    with pytest.raises(BadSignature, match="not of"):
        check_key_cert(CERT, NETWORK_ID, NOW_MS, key_of("other").peer_id)
    with pytest.raises(BadSignature, match="network"):
        check_key_cert(CERT, "another", NOW_MS)


@pytest.mark.parametrize(
    ("signer", "changes", "reason"),
    [
        ("other", {}, "not signed by the peer"),
        ("peer", {"peer_id": key_of("other").peer_id}, "not signed by the peer"),
        ("peer", {"peer_id": ""}, "names no peer"),
        ("peer", {"peer_id": PEER.peer_id + " "}, "names no peer"),
        ("peer", {"ledger_key": b""}, "no separate ledger key"),
        ("peer", {"ledger_key": PEER.public}, "no separate ledger key"),
    ],
)
def test_a_forged_certificate_is_refused(
    signer: str, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(BadSignature, match=reason):
        check_key_cert(seal(key_of(signer), fields(**changes)), NETWORK_ID, NOW_MS)
