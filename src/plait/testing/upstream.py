"""A scripted client for the gateway: fixed pieces of text, at a fixed rate, with faults."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import cache

from plait.client import Answer, Embedding, Options, RouteStep, Score, TextDelta, Top
from plait.gateway.budgets import Share
from plait.gateway.port import Ask, Stream
from plait.model import catalog
from plait.router.cost import Prediction
from plait.router.plan import Plan, plan
from plait.router.view import Offer, View
from plait.testing.accounting import NOW_MS, key_of
from plait.testing.offers import paper_offer
from plait.types import Microcredits, PeerId, Span

PREDICTED = Prediction(ttft_s=0.1, tpot_s=0.01, price_microcredits=Microcredits(50))
FIRST_ID = 97


@cache
def peer_at(span: Span) -> PeerId:
    """Who serves a span."""
    return key_of(f"node {span}").peer_id


@dataclass
class FakeUpstream:
    """Streams the same pieces for every prompt, one token each; fails and waits when told to.

    ``interval_s`` is the time between tokens, and before the first; without it everything
    comes at once. ``pieces`` are repeated or cut to ``max_tokens`` if ``endless``; ``script``
    makes them for each prompt, and ``max_tokens`` cuts them. A session that does not end well
    promises ``vouched`` microcredits from its beginning, and ``cut`` more once it is closed.
    ``hush`` is waited for before the first token.
    """

    model: str = "tiny-random"
    pieces: tuple[str, ...] = ("Hel", "lo", " there")
    endless: bool = False
    script: Callable[[Ask], tuple[str, ...]] | None = None
    interval_s: float = 0.0
    error: Exception | None = None
    after: int = 0
    bundle: bytes | None = None
    gate: asyncio.Event | None = None
    hush: asyncio.Event | None = None
    graceful: bool = True
    vector: tuple[float, ...] = (0.5, -0.25, 0.125, 1.0)
    cost: int = 7
    cached_tokens: int = 0
    vouched: int = 0
    cut: int = 0
    spans: tuple[Span, ...] = (Span(0, 5), Span(5, 8))
    asked: list[Ask] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    cancelled: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._shape = catalog.load(self.model).manifest.shape
        offers = [self._offer(span) for span in self.spans]
        self._view = View({offer.peer: offer for offer in offers}, {})

    @property
    def route(self) -> tuple[RouteStep, ...]:
        """Who serves the spans."""
        return tuple(RouteStep(peer_at(span), span) for span in self.spans)

    def view(self) -> View:
        """The same offers always."""
        return self._view

    def plan(self, model: str, prompt_tokens: int, options: Options) -> Plan:
        """A real plan over them."""
        request = options.route_request(prompt_tokens)
        return plan(self._view, self._shape, request, source=key_of("me").peer_id, now_ms=NOW_MS)

    def stream(self, ask: Ask) -> Stream:
        """Begin a generation."""
        self.asked.append(ask)
        self.started.set()
        return FakeStream(self, ask)

    async def set_share(self, share: Share) -> None:
        """Note it."""
        self.shares.append(share)

    async def embed(self, ask: Ask) -> Embedding:
        """The vector, whatever is asked; the error after as many as ``after`` says."""
        self.asked.append(ask)
        if self.error is not None and len(self.asked) > self.after:
            raise self.error
        return Embedding(self.vector, self.answer(ask, self.pieces[:1]))

    def answer(self, ask: Ask, pieces: tuple[str, ...], *, finished: bool = False) -> Answer:
        """What a generation of these pieces ends with."""
        count = len(pieces)
        cut = self.endless or (self.script is not None and count == ask.options.max_tokens)
        return Answer(
            text="".join(pieces),
            token_ids=tuple(FIRST_ID + number % 100 for number in range(count)),
            logprobs=tuple(-0.5 * number for number in range(count)),
            prompt_tokens=len(ask.prompt_ids),
            finish_reason="ended" if finished else "length" if cut else "stop",
            route=self.route,
            epochs=1,
            ttft_s=0.1,
            tpot_s=0.01,
            predicted=PREDICTED,
            cost_microcredits=Microcredits(self.cost),
            receipts_verified=4,
            cached_tokens=self.cached_tokens,
            seed=ask.sampling.seed,
            bundle=self.bundle if ask.options.bundle else None,
            prompt_scores=_scores(ask) if ask.options.score_prompt else (),
        )

    def _offer(self, span: Span) -> Offer:
        return replace(paper_offer(f"node {span}", span), model_digest=self._shape.digest)


def _scores(ask: Ask) -> tuple[Score, ...]:
    """A quarter less for each id; another one that is likelier, if such are asked for."""
    return tuple(
        Score(token, -0.25 * number, ((FIRST_ID, 0.0),) if ask.sampling.top_logprobs else ())
        for number, token in enumerate(ask.prompt_ids[1:], 1)
    )


class FakeStream:
    """One generation of a ``FakeUpstream``."""

    def __init__(self, upstream: FakeUpstream, ask: Ask) -> None:
        self._upstream, self._ask = upstream, ask
        self._finished = False
        self.cost_microcredits = 0
        self.route: tuple[RouteStep, ...] = ()
        self.predicted: Prediction | None = None
        self._items = self._run()

    def __aiter__(self) -> AsyncIterator[TextDelta | Answer]:
        return self._items

    def finish(self) -> None:
        """End after the token that is due; a fake that is not graceful ends without answer."""
        self._finished = True

    async def aclose(self) -> None:
        """End it."""
        await self._items.aclose()

    async def _run(self) -> AsyncGenerator[TextDelta | Answer, None]:
        upstream, ended, count = self._upstream, False, 0
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        pieces = upstream.pieces if upstream.script is None else upstream.script(self._ask)
        most = self._ask.options.max_tokens
        if upstream.script is not None:
            pieces = pieces[:most]
        if upstream.endless:
            pieces = (pieces * (most // len(pieces) + 1))[:most]
        self.cost_microcredits = upstream.vouched
        try:
            if upstream.hush is not None:
                await upstream.hush.wait()
            for number, piece in enumerate(pieces):
                if upstream.error is not None and number == upstream.after:
                    raise upstream.error
                if upstream.interval_s:
                    due_s = started_s + (number + 1) * upstream.interval_s
                    await asyncio.sleep(max(0.0, due_s - loop.time()))
                self.route, self.predicted = upstream.route, PREDICTED
                yield self._delta(number, piece)
                count += 1
                if upstream.gate is not None:
                    await upstream.gate.wait()
                if self._finished:
                    break
            if self._finished and not upstream.graceful:
                return
            ended = True
            # A session is closed and paid first: its answer never comes with the last token.
            await asyncio.sleep(0)
            self.cost_microcredits = upstream.cost
            yield upstream.answer(self._ask, pieces[:count], finished=self._finished)
        finally:
            upstream.cancelled += not ended
            self.cost_microcredits += 0 if ended else upstream.cut

    def _delta(self, number: int, piece: str) -> TextDelta:
        wanted = self._ask.sampling.top_logprobs
        top: Top = tuple((FIRST_ID + rank, -0.5 * (number + rank)) for rank in range(wanted))
        tops = (top,) if top else ()
        return TextDelta(piece, (FIRST_ID + number % 100,), (-0.5 * number,), tops)
