"""From a prompt to a generation about to run: checked, routed, drafted and, if wished, hedged."""

from collections.abc import Callable
from dataclasses import replace

from plait.client.drafting import DraftModel
from plait.client.driver import Deliver, Drafter
from plait.client.epoch import Order
from plait.client.generation import Generation, Surroundings
from plait.client.hedged import HedgedGeneration
from plait.client.hedging import HedgeBudget, has_room, late_after_s
from plait.client.options import Options
from plait.client.planning import Planner
from plait.client.prompt import Prompt, check_ids, check_lengths, prompt_ids
from plait.client.streaming import Begun
from plait.compute.drafts import AdaptiveDrafter
from plait.errors import PlaitError
from plait.model.catalog import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.net.watch import NetworkWatch
from plait.types import PeerId

Emit = Callable[[Deliver], None]
Make = Callable[[frozenset[PeerId], Emit], Generation]


class Starter:
    """Makes the generations of one client; ``draft_model`` drafts for those that it fits."""

    def __init__(
        self,
        planner: Planner,
        watch: NetworkWatch,
        around: Surroundings,
        draft_model: DraftModel | None,
    ) -> None:
        self._planner, self._watch, self._around = planner, watch, around
        self._draft_model = draft_model
        self._hedges = HedgeBudget()

    async def begin(
        self, model: str, prompt: Prompt, options: Options, emit: Emit, *, embed: bool = False
    ) -> Begun:
        """A generation; ``emit`` gets its tokens. Raises ``PlaitError`` subclasses."""
        # A session keeps the key that it begins with; the next one has the newest.
        self._around = replace(self._around, account=self._around.account.renewed())
        local, tokenizer = self._planner.model(model)
        options = await self._planner.pinned(model, options)
        order = self._order(local, tokenizer, prompt, options, embed=embed)
        await self._watch.settled()
        self._watch.check_reachable()

        def make(avoid: frozenset[PeerId], take: Emit) -> Generation:
            drafts = self._drafts(local, order, lambda: made.drafted()) if options.drafts else ()
            route = replace(order.route, ignore=order.route.ignore | avoid)
            made = Generation(replace(order, route=route), self._around, take, *drafts)
            return made

        prompt_tokens = len(order.prompt_ids)
        self._hedges.prompted(prompt_tokens, self._around.clock_ms())
        hedged = self._hedged(model, prompt_tokens, options, make, emit)
        return Begun(hedged or make(frozenset(), emit), tokenizer, self._around.tasks)

    def _order(
        self,
        local: LocalModel,
        tokenizer: Tokenizer,
        prompt: Prompt,
        options: Options,
        *,
        embed: bool,
    ) -> Order:
        manifest = local.manifest
        ids = prompt_ids(tokenizer, prompt, raw=options.raw)
        check_ids(ids, manifest.vocabulary_size)
        check_lengths(len(ids), options.max_tokens, manifest.context_length)
        reuse = options.reusing()
        return Order(
            model=manifest.shape,
            prompt_ids=ids,
            sampling=options.drawing(tokenizer.end_ids),
            route=self._planner.request(options, len(ids)),
            vocabulary_size=manifest.vocabulary_size,
            manifest=manifest.payload,
            want_bundle=options.bundle,
            embed=embed,
            score=options.score_prompt,
            qos=options.qos,
            wire=options.wire,
            replica_wait_ms=round(options.replica_wait_s * 1000),
            reuse=reuse,
            warm=self._around.warm.find(reuse.names(ids)) if reuse is not None else None,
            sub_account=options.sub_account,
            may_audit=not (options.pin or options.only),
        )

    def _hedged(
        self, model: str, prompt_tokens: int, options: Options, make: Make, emit: Emit
    ) -> HedgedGeneration | None:
        """A generation that may be hedged; None if that is not wished for, or not possible."""
        if not options.hedge_share:
            return None
        try:
            planned = self._planner.plan(model, prompt_tokens, options)
        except PlaitError:
            return None  # the session will say so itself

        def allowed(peers: frozenset[PeerId]) -> bool:
            now_ms = self._around.clock_ms()
            if self._around.demand.is_short(now_ms):
                return False
            try:
                without = replace(options, ignore=options.ignore | peers)
                second = self._planner.plan(model, prompt_tokens, without)
            except PlaitError:
                return False
            return has_room(second) and self._hedges.take(
                prompt_tokens, options.hedge_share, now_ms
            )

        return HedgedGeneration(
            make,
            emit,
            lambda work: self._around.tasks.create_task(work, name="hedged"),
            late_s=late_after_s(planned.predicted.ttft_s),
            allowed=allowed,
        )

    def _drafts(
        self, local: LocalModel, order: Order, ready: Callable[[], None]
    ) -> tuple[Drafter] | tuple[Drafter, Callable[[], None]]:
        """Who guesses for an order and, if it is a model, what to call when that has ended."""
        model, ids = self._draft_model, order.prompt_ids
        if model is not None and model.fits(local):
            return model.drafter(ids, order.route.max_tokens, order.sampling, ready)
        return (AdaptiveDrafter(ids),)
