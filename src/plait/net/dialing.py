"""Whom to dial when: bootstrap peers for ever, others while there are too few links.

Pure: the caller passes the time and a source of jitter.
"""

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from plait.net.port import peer_of_multiaddr
from plait.types import PeerId

LEARNED_MAX = 1024
BACKOFF_S_MIN = 0.5
BACKOFF_S_MAX = 15.0


@dataclass(slots=True)
class Target:
    """An address worth dialling, and how dialling it has gone."""

    multiaddr: str
    peer: PeerId
    bootstrap: bool
    due_s: float = 0.0
    failures: int = 0
    dialling: bool = False
    problem: str = "not dialled yet"


class DialBook:
    """The addresses a peer knows, and their back-off.

    ``jitter`` returns values in [0, 1): two peers that lose each other must not redial in
    step.
    """

    def __init__(
        self, peer: PeerId, bootstrap: Iterable[str], degree: int, jitter: Callable[[], float]
    ) -> None:
        self._peer = peer
        self._degree = degree
        self._jitter = jitter
        self._bootstrap = [
            Target(multiaddr, peer_of_multiaddr(multiaddr), bootstrap=True)
            for multiaddr in dict.fromkeys(bootstrap)
            if peer_of_multiaddr(multiaddr) != peer
        ]
        self._learned: dict[PeerId, Target] = {}

    def learn(self, multiaddrs: Iterable[str], now_s: float) -> None:
        """Note addresses of members: the latest of each peer counts; odd ones are skipped."""
        for multiaddr in multiaddrs:
            if not is_direct(multiaddr):
                continue
            peer = peer_of_multiaddr(multiaddr)
            known = self._learned.get(peer)
            if peer == self._peer or (known is not None and known.multiaddr == multiaddr):
                continue
            if known is None and len(self._learned) >= LEARNED_MAX:
                del self._learned[next(iter(self._learned))]
            # The smaller id dials first, so that two peers rarely dial each other at once.
            wait_s = 1.0 if self._peer > peer else 0.0
            self._learned[peer] = Target(multiaddr, peer, bootstrap=False, due_s=now_s + wait_s)

    def due(self, now_s: float, linked: Set[PeerId]) -> list[Target]:
        """Take the targets to dial now; each must be given back to ``dialled``."""
        taken = [t for t in self._bootstrap if _is_due(t, now_s, linked)]
        everybody = (*self._bootstrap, *self._learned.values())
        busy = {t.peer for t in (*taken, *(t for t in everybody if t.dialling))}
        candidates = [
            t for t in self._learned.values() if t.peer not in busy and _is_due(t, now_s, linked)
        ]
        candidates.sort(key=lambda target: (target.failures, self._jitter()))
        taken += candidates[: max(0, self._degree - len(linked | busy))]
        for target in taken:
            target.dialling = True
        return taken

    def dialled(self, target: Target, problem: str | None, now_s: float) -> bool:
        """Note how a dial ended; True when the peer became unreachable just now."""
        target.dialling = False
        if problem is None:
            target.failures, target.problem = 0, "the link was lost"
            target.due_s = now_s + BACKOFF_S_MIN * self._jitter()
            return False
        target.failures, target.problem = target.failures + 1, problem
        backoff_s = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** min(target.failures - 1, 10))
        target.due_s = now_s + backoff_s * (0.75 + 0.5 * self._jitter())
        return target.failures == 1

    def unreachable(self, linked: Set[PeerId]) -> Mapping[str, str]:
        """Bootstrap addresses without a link, and why."""
        return {t.multiaddr: t.problem for t in self._bootstrap if t.peer not in linked}


def is_direct(multiaddr: str) -> bool:
    """Whether it reads ``/ip4|ip6/<address>/tcp/<port>/p2p/<peer id>``: all we dial for others."""
    parts = multiaddr.split("/")
    if len(parts) != 7 or parts[0] or parts[3] != "tcp" or parts[5] != "p2p":
        return False
    family, port = {"ip4": 4, "ip6": 6}.get(parts[1]), parts[4]
    try:
        version = ipaddress.ip_address(parts[2]).version
    except ValueError:
        return False
    return version == family and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536


def _is_due(target: Target, now_s: float, linked: Set[PeerId]) -> bool:
    return not target.dialling and target.due_s <= now_s and target.peer not in linked
