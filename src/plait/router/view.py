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
    peers: dict[PeerId, int] = {}
    merged: dict[tuple[int, int], tuple[int, int]] = {}
    for (a, b), rtt_us in view.rtt_us.items():
        if a == b:
            continue
        i, j = peers.setdefault(a, len(peers)), peers.setdefault(b, len(peers))
        known = merged.get((i, j))
        if known is None or rtt_us < known[0]:
            bandwidth = (view.link_bandwidth(a, b) or 0) if view.bandwidth else 0
            merged[i, j] = merged[j, i] = (min(rtt_us, _FIGURE_MAX), bandwidth)
    ends = np.array(list(merged), dtype=np.int64).reshape(-1, 2)
    figures = np.array(list(merged.values()), dtype=np.int64).reshape(-1, 2)
    order = np.lexsort((ends[:, 1], ends[:, 0]))
    return LinkTable(peers, ends[order, 0], ends[order, 1], figures[order, 0], figures[order, 1])
