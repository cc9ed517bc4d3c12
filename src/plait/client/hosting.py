"""Layers that a client serves itself, so that they stay on the user's machine.

Each span is a node in a child process, with a fresh identity and no price; the client's
routes are pinned to it. It is a node like any other: it joins the network's gossip, and
others may route through it while it lasts.
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from plait.client.children import Child
from plait.errors import ConfigError, DeadlineExceeded
from plait.identity import load_or_create_key
from plait.router.view import View
from plait.types import ModelShape, PeerId, Span

START_S = 180.0
_LOOK_S = 0.5
SPANS_MAX = 8

Pin = tuple[Span, PeerId]


def parse_spans(text: str) -> tuple[Span, ...]:
    """Spans such as ``0:2`` or ``0:2,28:30``; raises ``ConfigError``."""
    try:
        spans = tuple(Span.parse(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"host={text!r}: {error}", remedy='host="0:2"') from error
    if len(spans) > SPANS_MAX or any(one.end > other.start for one, other in pairwise(spans)):
        raise ConfigError(f"host={text!r}: up to {SPANS_MAX} spans in order, none over another")
    return spans


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTerms:
    """What to host: spans of every model asked for, how, and where others reach it."""

    spans: tuple[Span, ...]
    dtype: str = "fp32"
    device: str = "cpu"
    address: str = "127.0.0.1"


@dataclass(slots=True)
class Hosting:
    """The nodes of one client, started when a model is first asked for. ``close`` it."""

    terms: HostTerms
    network: Path
    view: Callable[[], View]
    changed: Callable[[], Awaitable[None]]
    _children: dict[tuple[str, Span], tuple[PeerId, Child]] = field(default_factory=dict)
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def pins(self, model: ModelShape) -> tuple[Pin, ...]:
        """Start what is missing, and return what routes are pinned to.

        Raises ``ConfigError`` if a node does not start, ``DeadlineExceeded`` if its offer
        does not come.
        """
        if self.terms.spans[-1].end > model.layers:
            raise ConfigError(
                f"{model.name} has {model.layers} layers: it has no {self.terms.spans[-1]}"
            )
        async with self._starting:
            for span in self.terms.spans:
                await self._start(model.name, span)
            return tuple([(span, await self._ready(model, span)) for span in self.terms.spans])

    def known(self, model: ModelShape) -> tuple[Pin, ...] | None:
        """What routes are pinned to, or None as long as a node is not up."""
        pins = []
        for span in self.terms.spans:
            found = self._children.get((model.name, span))
            if found is None or found[1].ended or not self._offered(model, found[0]):
                return None
            pins.append((span, found[0]))
        return tuple(pins)

    async def close(self) -> None:
        """End every node."""
        children = [child for _, child in self._children.values()]
        self._children.clear()
        await asyncio.gather(*(child.close() for child in children))

    async def _start(self, model: str, span: Span) -> None:
        running = self._children.get((model, span))
        if running is not None and not running[1].ended:
            return
        if running is not None:
            del self._children[model, span]
            await running[1].close()
        folder = tempfile.TemporaryDirectory(prefix="plait-")
        peer = load_or_create_key(Path(folder.name) / "identity.key").peer_id
        child = Child(folder, self._arguments(model, span, folder.name))
        self._children[model, span] = peer, child

    def _arguments(self, model: str, span: Span, folder: str) -> Sequence[str]:
        terms = self.terms
        what = ["--model", model, "--span", str(span), "--dtype", terms.dtype]
        what += ["--device", terms.device]
        where = ["--network", str(self.network), "--host", terms.address, "--data-dir", folder]
        free = ["--price-prompt", "0", "--price-output", "0", "--drain-s", "1"]
        return ["node", "run", *what, *where, *free, "--with-parent"]

    async def _ready(self, model: ModelShape, span: Span) -> PeerId:
        peer, child = self._children[model.name, span]
        deadline_s = time.monotonic() + START_S
        while not self._offered(model, peer):
            if child.ended:
                raise ConfigError(f"the node for layers {span} ended: {child.last_words()}")
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"the node for layers {span} is not seen in the network")
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self.changed()
            except TimeoutError:
                continue
        return peer

    def _offered(self, model: ModelShape, peer: PeerId) -> bool:
        offer = self.view().offers.get(peer)
        return offer is not None and offer.model_digest == model.digest and offer.state == "ready"
