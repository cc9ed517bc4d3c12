"""Whom to dial when."""

import pytest

from plait.identity import SigningKey
from plait.net.dialing import BACKOFF_S_MAX, LEARNED_MAX, DialBook, is_direct
from plait.types import PeerId

IDS = sorted(SigningKey.from_seed(bytes([n] * 32)).peer_id for n in range(12))
FIRST = IDS[0]


def at(peer: PeerId, port: int = 4001) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"


def book(*bootstrap: PeerId, degree: int = 3, peer: PeerId = FIRST) -> DialBook:
    return DialBook(peer, [at(other) for other in bootstrap], degree, lambda: 0.5)


def test_bootstrap_is_dialled_for_ever_with_growing_pauses() -> None:
    targets = book(IDS[1], FIRST)
    now, pauses = 0.0, []
    for attempt in range(12):
        (target,) = targets.due(now, frozenset())
        assert targets.due(now, frozenset()) == []
        assert targets.dialled(target, "refused", now) == (attempt == 0)
        pauses.append(target.due_s - now)
        now = target.due_s
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert pauses[-1] == BACKOFF_S_MAX
    assert targets.unreachable(frozenset()) == {at(IDS[1]): "refused"}
    assert targets.unreachable({IDS[1]}) == {}


def test_a_lost_bootstrap_is_redialled_soon() -> None:
    targets = book(IDS[1])
    (target,) = targets.due(0, frozenset())
    targets.dialled(target, None, 0)
    assert targets.due(1, {IDS[1]}) == []
    assert targets.due(1, frozenset()) == [target]


def test_learned_peers_fill_up_to_the_degree() -> None:
    targets = book(IDS[1], degree=3)
    targets.learn([at(peer) for peer in IDS], 0)
    first = targets.due(0, frozenset())
    assert [t.bootstrap for t in first] == [True, False, False]
    assert targets.due(0, frozenset()) == []
    for target in first:
        targets.dialled(target, None, 0)
    assert targets.due(5, {t.peer for t in first}) == []
    assert len(targets.due(5, {t.peer for t in first[:2]})) == 1


def test_peers_that_failed_less_go_first() -> None:
    targets = book(degree=1)
    targets.learn([at(IDS[1]), at(IDS[2])], 0)
    (target,) = targets.due(0, frozenset())
    targets.dialled(target, "refused", 0)
    (other,) = targets.due(100, frozenset())
    assert other is not target


def test_the_larger_id_waits_for_the_smaller_to_dial() -> None:
    targets = book(peer=IDS[5])
    targets.learn([at(IDS[1]), at(IDS[9])], 0)
    assert [t.peer for t in targets.due(0, frozenset())] == [IDS[9]]
    assert [t.peer for t in targets.due(1, frozenset())] == [IDS[1]]


def test_a_new_address_replaces_the_old_one() -> None:
    targets = book(degree=9)
    targets.learn([at(IDS[1], 1), at(IDS[1], 2), at(IDS[1], 2)], 0)
    assert [t.multiaddr for t in targets.due(0, frozenset())] == [at(IDS[1], 2)]


def test_what_is_learned_is_bounded() -> None:
    targets = book(degree=10 * LEARNED_MAX)
    targets.learn((f"/ip4/127.0.0.1/tcp/1/p2p/Q{n}" for n in range(LEARNED_MAX + 10)), 0)
    assert len(targets.due(9, frozenset())) == LEARNED_MAX


@pytest.mark.parametrize(
    ("multiaddr", "direct"),
    [
        (at(FIRST), True),
        (f"/ip6/::1/tcp/4001/p2p/{FIRST}", True),
        (f"/ip4/::1/tcp/4001/p2p/{FIRST}", False),
        (f"/dns4/internal/tcp/80/p2p/{FIRST}", False),
        (f"/ip4/127.0.0.1/tcp/70000/p2p/{FIRST}", False),
        (f"/ip4/127.0.0.1/tcp/٤/p2p/{FIRST}", False),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{FIRST}/p2p-circuit/p2p/{FIRST}", False),
        ("/ip4/127.0.0.1/tcp/1", False),
        ("", False),
    ],
)
def test_only_plain_addresses_are_dialled_for_others(multiaddr: str, direct: bool) -> None:
    assert is_direct(multiaddr) == direct


def test_a_bootstrap_address_needs_a_peer_id() -> None:
    with pytest.raises(ValueError, match="must end in"):
        DialBook(FIRST, ["/ip4/127.0.0.1/tcp/1"], 1, lambda: 0.0)
