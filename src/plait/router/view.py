"""What the router sees: signed offers and link measurements, as plain values.

A View is a value: its mappings must not change after it was made, because the link table
built from them is remembered. Times are integer microseconds or milliseconds since the
epoch, bandwidth is bytes per second.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from plait.types import Digest, PeerId, Prices, Span

OfferState = Literal["ready", "draining", "withdrawn"]
Evidence = Literal["stage-receipts", "fronting-node"]
Integers = npt.NDArray[np.int64]

_FIGURE_MAX = 2**40
"""Larger round trips and bandwidths are taken to be this, to stay in 64 bits."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A peer's signed advert. ``digest`` is the SHA-256 of the signed payload.

    ``decode_us`` is one decode step through the whole span at batch size one and
    ``prefill_us_per_token`` one prompt token through it; 0 means not measured. Energy
    figures are declared by the operator; 0 means not declared.
    """

    peer: PeerId
    model_digest: Digest
    span: Span
    incarnation: int
    sequence: int
    issued_ms: int
    expires_ms: int
    state: OfferState
    evidence: Evidence
    prices: Prices
    numeric_class: str
    region: str
    kv_tokens_total: int
    kv_tokens_free: int
    sessions_active: int
    decode_us: int
    prefill_us_per_token: int
    public_address: str
    peer_address: str
    certificate: bytes = field(repr=False)
    multiaddrs: tuple[str, ...]
    digest: Digest = field(repr=False)
    millijoules_per_token_layer: int = 0
    grams_co2_per_kwh: int = 0


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """One line of a link report; ``bandwidth`` 0 means not measured."""

    peer: PeerId
    rtt_us: int
    bandwidth: int = 0


@dataclass(frozen=True, slots=True)
class LinkReport:
    """A peer's signed round trips to the peers it may be a neighbour of."""

    peer: PeerId
    incarnation: int
    sequence: int
    issued_ms: int
    expires_ms: int
    links: tuple[MeasuredLink, ...]


@dataclass(frozen=True, slots=True)
class LinkTable:
    """All measured links as arrays, both directions, sorted by source.

    ``source`` and ``target`` index ``peers``; ``rtt_us`` and ``bandwidth`` are parallel to
    them, ``bandwidth`` 0 where nobody measured it.
    """

    peers: Mapping[PeerId, int]
    source: Integers
    target: Integers
    rtt_us: Integers
    bandwidth: Integers


@dataclass(frozen=True, slots=True)
class View:
    """Valid offers by peer, and measured links by (measuring peer, measured peer)."""

    offers: Mapping[PeerId, Offer]
    rtt_us: Mapping[tuple[PeerId, PeerId], int]
    bandwidth: Mapping[tuple[PeerId, PeerId], int] = field(default_factory=dict)
    _tables: list[LinkTable] = field(default_factory=list, init=False, repr=False, compare=False)

    def link_rtt_us(self, a: PeerId, b: PeerId) -> int | None:
        """The smaller of the two ends' measurements; 0 to oneself, None if unknown."""
        if a == b:
            return 0
        there, back = self.rtt_us.get((a, b)), self.rtt_us.get((b, a))
        if there is None or back is None:
            known = there if back is None else back
        else:
            known = min(there, back)
        return None if known is None else min(known, _FIGURE_MAX)

    def link_bandwidth(self, a: PeerId, b: PeerId) -> int | None:
        """The smaller of the two ends' measurements in bytes per second; None if unknown."""
        there, back = self.bandwidth.get((a, b), 0), self.bandwidth.get((b, a), 0)
        return min(min(there, back) or max(there, back), _FIGURE_MAX) or None

    def link_table(self) -> LinkTable:
        """The measured links as arrays; built once."""
        if not self._tables:
            self._tables.append(_link_table(self))
        return self._tables[0]


def _link_table(view: View) -> LinkTable:
    pairs = [(a, b) for a, b in view.rtt_us if a != b]
    peers: dict[PeerId, int] = {}
    first = np.array([peers.setdefault(a, len(peers)) for a, _ in pairs], dtype=np.int64)
    second = np.array([peers.setdefault(b, len(peers)) for _, b in pairs], dtype=np.int64)
    rtt_us = np.array([min(view.rtt_us[pair], _FIGURE_MAX) for pair in pairs], dtype=np.int64)
    bandwidth = np.zeros_like(rtt_us)
    if view.bandwidth:
        known = (view.link_bandwidth(a, b) or 0 for a, b in pairs)
        bandwidth = np.fromiter(known, dtype=np.int64, count=len(pairs))
    source, target = np.concatenate((first, second)), np.concatenate((second, first))
    rtt_us, bandwidth = np.tile(rtt_us, 2), np.tile(bandwidth, 2)
    order = np.lexsort((rtt_us, target, source))
    # Of two measurements of one link the smaller comes first: keep that.
    repeated = np.zeros(len(order), dtype=bool)
    repeated[1:] = np.diff(source[order]) == 0
    repeated[1:] &= np.diff(target[order]) == 0
    order = order[~repeated]
    return LinkTable(peers, source[order], target[order], rtt_us[order], bandwidth[order])
