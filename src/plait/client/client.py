"""The asynchronous client: a view of the network, and generations over it."""

import asyncio
import contextlib
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from plait.client.account import Account, open_account
from plait.client.answer import Answer, Embedding
from plait.client.audit_spool import AuditSpool, trust_of
from plait.client.auditing import Audited, audit_bundle
from plait.client.children import Child
from plait.client.demand import Demand
from plait.client.dialer import Dialer
from plait.client.drafting import DraftModel
from plait.client.driver import Deliver, Drafter
from plait.client.epoch import Order
from plait.client.generation import Generation, Surroundings
from plait.client.hedged import HedgedGeneration
from plait.client.hedging import HedgeBudget, has_room, late_after_s
from plait.client.hosting import Hosting, HostTerms, parse_spans
from plait.client.lottery_keeper import LotteryKeeper
from plait.client.openai_client import address_of, gateway_arguments, openai_classes
from plait.client.prefix import Reuse, WarmRoutes
from plait.client.prompt import Prompt, check_ids, check_lengths, prompt_ids
from plait.client.streaming import Begun, TextStream, Tokens
from plait.client.sub_accounts import order_sub_account, read_sub_accounts
from plait.compute.drafts import AdaptiveDrafter
from plait.errors import ConfigError, LocalProtocolError, NoRoute, PeerUnreachable, PlaitError
from plait.ledger.lottery import Lot
from plait.ledger.notices import NoticeBoard
from plait.ledger.service.committee import Ledger, connect
from plait.ledger.service.notices import NoticeExchange, NoticeFile, Post, posts_of
from plait.ledger.sub_accounts import BudgetPeriod, SubAccount, SubAccountUse
from plait.locate import client_dir, network_path
from plait.model.catalog import LocalModel, load
from plait.model.tokenizer import Tokenizer
from plait.net.watch import NetworkWatch, targets_of
from plait.network_file import NetworkFile, load_network_file
from plait.router.explain import explain, explain_failure
from plait.router.plan import Plan, plan
from plait.router.request import RouteRequest, Sort
from plait.router.view import View
from plait.task_scope import TaskScope
from plait.types import MILLION, Microcredits, PeerId, Qos, Sampling, SessionId, Span, WireDtype

T = TypeVar("T")

_NOT_ENTERED = "use the client as a context manager: async with AsyncClient(…)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to generate and how to route. ``seed`` None draws a fresh one.

    ``sampling`` gives every setting of the sampler and replaces temperature, top_p, top_k
    and seed; without end ids it ends where the model ends. ``max_price`` is microcredits for
    the whole request; ``pin`` keeps layers on a peer.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    sampling: Sampling | None = None
    raw: bool = False
    sort: Sort = "latency"
    max_price: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    pin: tuple[tuple[Span, PeerId], ...] = ()
    only: frozenset[PeerId] = frozenset()
    ignore: frozenset[PeerId] = frozenset()
    audited_min: int = 0
    """Use only peers that passed so many audited chunks in this account's own audits."""
    bundle: bool = False
    drafts: bool = True
    """Guess what follows from the text so far: faster where it repeats, never another text."""
    score_prompt: bool = False
    """Also give the log-probability of each of the prompt's tokens (``Answer.prompt_scores``)."""
    qos: Qos = "standard"
    sub_account: str = ""
    """The share of the account whose limits the ledger keeps for this request; empty: none."""
    hedge_share: float = 0.0
    """The share of the client's prompt tokens that may be asked of a second pipeline when the
    first token is late (0 to 1; 0: never). See ``client.hedging``."""
    wire: WireDtype | None = None
    """How activations cross hops; None: fp32 between stages that compute in fp32, else bf16, or
    int8 where a slow link is most of the time."""
    replica_wait_s: float = 20.0
    """How long to wait for a host when a stage is lost and nobody can take its place."""
    reuse: bool = True
    """Start from what the stages still have of earlier prompts and answers of this client, and
    let them keep this one's while they have room."""
    tenant: str = ""
    """For whom this client asks, if it serves several: nothing is shared between them. Empty:
    for who has the sub-account."""
    keep_alive_s: int = 0
    """Have prompt and answer kept so long even if the stages need their room, for the next
    turn of a conversation. Each stage has its own limit."""

    def route_request(self, prompt_tokens: int) -> RouteRequest:
        """The router's part of the options; raises ``ConfigError`` for one out of range."""
        if self.max_tokens < 1:
            raise ConfigError("max_tokens must be at least 1")
        if not 0 <= self.hedge_share <= 1:
            raise ConfigError("hedge_share must be from 0 to 1")
        try:
            return RouteRequest(
                prompt_tokens=prompt_tokens,
                max_tokens=self.max_tokens,
                max_price=None if self.max_price is None else Microcredits(self.max_price),
                ttft_s=self.ttft_s,
                tpot_s=self.tpot_s,
                sort=self.sort,
                pin=self.pin,
                only=self.only,
                ignore=self.ignore,
                wire=self.wire,
            )
        except ValueError as error:
            raise ConfigError(f"bad routing option: {error}") from error

    def reusing(self) -> Reuse | None:
        """What may be kept; raises ``ConfigError`` for a time that cannot be."""
        if not 0 <= self.keep_alive_s < 2**31:
            raise ConfigError("keep_alive_s is a number of seconds")
        if not self.reuse:
            return None
        return Reuse(
            hashlib.sha256((self.tenant or self.sub_account).encode()).digest(), self.keep_alive_s
        )

    def drawing(self, end_ids: Sequence[int]) -> Sampling:
        """The last stage's part; raises ``ConfigError`` for a value out of range."""
        if self.sampling is not None:
            return replace(self.sampling, end_ids=self.sampling.end_ids or tuple(end_ids))
        try:
            return Sampling(
                temperature_micros=round(self.temperature * MILLION),
                top_p_micros=round(self.top_p * MILLION),
                top_k=self.top_k,
                seed=secrets.randbits(63) if self.seed is None else self.seed,
                end_ids=tuple(end_ids),
            )
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"bad sampling: {error}") from error


class AsyncClient:
    """A client of one network; an async context manager.

    ``network`` is the path of a network file, by default the last testnet's; ``account`` is
    the folder with the client's keys, by default the one that the commands use. Needs neither
    torch nor libp2p: it learns offers from nodes' public ports and checks every signature.
    With ``audits`` it holds the network's audit lottery over its own sessions, in the
    background, but for those that name their peers; see ``client.lottery_keeper``.

    ``host`` names layers, such as ``"0:2"`` or ``"0:2,28:30"``, that every route leaves on this
    machine: nodes of the client's own serve them, one process for each span (this needs
    plait[node] and the model's weights), from the first request for a model until the
    client is left. ``host_device`` is where they compute (``cpu``,
    ``cuda``, …), ``host_address`` where the others' nodes reach them.

    ``draft`` names a small local model that drafts for those with its tokenizer (needs torch).
    """

    def __init__(
        self,
        network: Path | str | None = None,
        *,
        account: Path | str | None = None,
        audits: bool = True,
        host: str | None = None,
        host_dtype: str = "fp32",
        host_device: str = "cpu",
        host_address: str = "127.0.0.1",
        draft: str | None = None,
    ) -> None:
        path = network_path(Path(network) if network is not None else None)
        self._path = path
        self.network: NetworkFile = load_network_file(path)
        self._hosting: Hosting | None = None
        if host is not None:
            terms = HostTerms(
                spans=parse_spans(host),
                dtype=host_dtype,
                device=host_device,
                address=host_address,
            )
            self._hosting = Hosting(terms, path, self.view, self.changed)
        self._folder = Path(account) if account is not None else client_dir(path)
        self._warm = WarmRoutes()
        self._models: dict[str, tuple[LocalModel, Tokenizer]] = {}
        self._stack = AsyncExitStack()
        self._tasks: TaskScope | None = None
        self._watch: NetworkWatch | None = None
        self._ledger: Ledger | None = None
        self._dialer: Dialer | None = None
        self._demand = Demand()
        self._hedges = HedgeBudget()
        self._notices: NoticeBoard | None = None
        self.audit_spool = AuditSpool(self._folder / "audits")
        self._audits = audits and self.network.audit_rate_percent > 0
        self._gateway: Child | None = None
        self._draft = None if draft is None else load(draft)
        self._draft_model: DraftModel | None = None
        serial = len(self.network.authorities) > 1
        self.account: Account = open_account(self._folder, serial=serial)

    async def __aenter__(self) -> Self:
        if not self.network.authorities:
            raise ConfigError("the network file names no ledger authority")
        self._notices = NoticeBoard(self.network)
        notices = NoticeExchange(
            self._notices,
            self.network,
            self._posts,
            file=NoticeFile(self._folder / "notices"),
        )
        self._ledger = await connect(self.network, notices, self._folder / "missed")
        self._stack.push_async_callback(self._ledger.close)
        self._dialer = Dialer(self.account, self.network.network_id, _clock_ms)
        self._stack.push_async_callback(self._dialer.close)
        self._tasks = await self._stack.enter_async_context(TaskScope())
        self._watch = await self._stack.enter_async_context(
            NetworkWatch(self.network, self.account.peer)
        )
        self._tasks.create_task(notices.run(), name="notices")
        if self._audits:
            keeper = LotteryKeeper(self.audit_spool, self.audit, _clock_ms)
            self._tasks.create_task(keeper.run(), name="audits")
        if self._hosting is not None:
            self._stack.push_async_callback(self._hosting.close)
        if self._draft is not None:
            self._draft_model = await DraftModel.load(self._draft, self._tasks.create_task)
            self._stack.callback(self._draft_model.close)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    @property
    def ledger(self) -> Ledger:
        """The ledger's service."""
        if self._ledger is None:
            raise LocalProtocolError(_NOT_ENTERED)
        return self._ledger

    def view(self) -> View:
        """The offers and links known now."""
        return _entered(self._watch).view()

    def _posts(self) -> list[Post]:
        """Whom to exchange notices with: the nodes in view, and the ledger."""
        nodes = targets_of(self.view(), self.account.peer)
        posts = [Post(target.address, target.certificate) for target in nodes]
        return posts + posts_of(self.network.authorities)

    async def changed(self) -> None:
        """Return after the next change of what is known of the network."""
        await _entered(self._watch).changed()

    async def wait_ready(self, model: str, timeout_s: float = 30.0) -> None:
        """Return once a complete pipeline exists; raises the error that still holds."""
        options = Options(max_tokens=1)
        await self._pinned(model, options)
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self.plan(model, 1, options)
                return
            except (NoRoute, PeerUnreachable):
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    raise
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(remaining_s, 1.0)):
                        await _entered(self._watch).changed()

    def plan(self, model: str, prompt_tokens: int, options: Options) -> Plan:
        """The route that would be taken now; raises ``NoRoute`` or ``PeerUnreachable``."""
        local, _ = self._load(model)
        _entered(self._watch).check_reachable()
        if self._hosting is not None:
            pins = self._hosting.known(local.manifest.shape)
            if pins is None:
                raise LocalProtocolError(f"no layers of {model} are hosted yet: wait_ready first")
            options = replace(options, pin=options.pin + pins)
        return plan(
            self.view(),
            local.manifest.shape,
            self._route_request(options, prompt_tokens),
            source=self.account.peer,
            now_ms=_clock_ms(),
        )

    def explain(self, model: str, prompt_tokens: int, options: Options) -> dict[str, Any]:
        """The route that would be taken now, or why there is none; JSON-ready."""
        local, _ = self._load(model)
        try:
            return explain(self.plan(model, prompt_tokens, options))
        except NoRoute as error:
            request = self._route_request(options, prompt_tokens)
            shape = local.manifest.shape
            return explain_failure(error, self.view(), shape, request, _clock_ms())

    def check_model(self, model: str) -> None:
        """Raise ``ModelError`` unless the model is known and its tokenizer is here."""
        self._load(model)

    async def wait_settled(self) -> None:
        """Return once the first offers are in and their links are measured, or after 3 s."""
        await _entered(self._watch).settled()

    async def generate(self, model: str, prompt: Prompt, options: Options | None = None) -> Answer:
        """Answer a prompt. Raises ``PlaitError`` subclasses, ``NoRoute`` among them."""
        begun = await self._begin(model, prompt, options or Options(), _discard)
        return await begun.generation.run(begun.tokenizer.decode)

    def stream(self, model: str, prompt: Prompt, options: Options | None = None) -> TextStream:
        """Yield each token as it comes, then the ``Answer``.

        Closing the stream cancels the session; ``finish`` ends it in good order. Iterating
        raises what ``generate`` raises.
        """

        async def begin(tokens: Tokens) -> Begun:
            return await self._begin(model, prompt, options or Options(), tokens.emit)

        return TextStream(begin)

    async def embed(
        self, model: str, text: str | Sequence[int], options: Options | None = None
    ) -> Embedding:
        """The embedding of a text, without chat template, or of token ids.

        It is the model's final hidden state at the last token, which has seen them all,
        scaled to length 1. Costs the prompt and one token. Raises what ``generate`` raises.
        """
        asked = replace(options or Options(), max_tokens=1, raw=True, drafts=False)
        begun = await self._begin(model, text, asked, _discard, embed=True)
        answer = await begun.generation.run(begun.tokenizer.decode)
        return Embedding(_unit(begun.generation.embedding), answer)

    async def sub_accounts(self) -> Sequence[SubAccountUse]:
        """The account's sub-accounts by name, with what each has used."""
        return await read_sub_accounts(
            self.ledger, self.account, self.network.network_id, _clock_ms()
        )

    async def set_sub_account(
        self,
        name: str,
        *,
        limit: int = 0,
        period: BudgetPeriod | None = None,
        period_limit: int = 0,
        closed: bool = False,
    ) -> SubAccount:
        """Open, change or close a sub-account; see ``client.sub_accounts``."""
        return await order_sub_account(
            self.ledger,
            self.account,
            self.network.network_id,
            _clock_ms(),
            name,
            limit=limit,
            period=period,
            period_limit=period_limit,
            closed=closed,
        )

    async def audit(
        self, bundle: bytes, only: Collection[PeerId] = (), skip: Collection[Lot] = ()
    ) -> list[Audited]:
        """Have what the lottery drew of a bundle audited; see ``client.auditing``."""
        await _entered(self._watch).settled()
        return await audit_bundle(
            bundle,
            self.network,
            self.account,
            self.ledger,
            _entered(self._dialer),
            self,
            only,
            skip,
        )

    async def _begin(
        self,
        model: str,
        prompt: Prompt,
        options: Options,
        emit: Callable[[Deliver], None],
        *,
        embed: bool = False,
    ) -> Begun:
        local, tokenizer = self._load(model)
        options = await self._pinned(model, options)
        ids = prompt_ids(tokenizer, prompt, raw=options.raw)
        check_ids(ids, local.manifest.vocabulary_size)
        check_lengths(len(ids), options.max_tokens, local.manifest.context_length)
        reuse = options.reusing()
        order = Order(
            model=local.manifest.shape,
            prompt_ids=ids,
            sampling=options.drawing(tokenizer.end_ids),
            route=self._route_request(options, len(ids)),
            vocabulary_size=local.manifest.vocabulary_size,
            manifest=local.manifest.payload,
            want_bundle=options.bundle,
            embed=embed,
            score=options.score_prompt,
            qos=options.qos,
            wire=options.wire,
            replica_wait_ms=round(options.replica_wait_s * 1000),
            reuse=reuse,
            warm=self._warm.find(reuse.names(ids)) if reuse is not None else None,
            sub_account=options.sub_account,
            may_audit=not (options.pin or options.only),
        )
        watch = _entered(self._watch)
        await watch.settled()
        watch.check_reachable()
        around = self._surroundings(watch)

        def make(avoid: frozenset[PeerId], take: Callable[[Deliver], None]) -> Generation:
            drafts = self._drafts(local, order, lambda: made.drafted()) if options.drafts else ()
            route = replace(order.route, ignore=order.route.ignore | avoid)
            made = Generation(replace(order, route=route), around, take, *drafts)
            return made

        self._hedges.prompted(len(ids), _clock_ms())
        hedged = self._hedged(model, len(ids), options, make, emit)
        generation = hedged or make(frozenset(), emit)
        return Begun(generation, tokenizer, _entered(self._tasks))

    def _hedged(
        self,
        model: str,
        prompt_tokens: int,
        options: Options,
        make: Callable[[frozenset[PeerId], Callable[[Deliver], None]], Generation],
        emit: Callable[[Deliver], None],
    ) -> HedgedGeneration | None:
        """A generation that may be hedged; None if that is not wished for, or not possible."""
        if not options.hedge_share:
            return None
        try:
            planned = self.plan(model, prompt_tokens, options)
        except PlaitError:
            return None  # the session will say so itself

        def allowed(peers: frozenset[PeerId]) -> bool:
            if self._demand.is_short(_clock_ms()):
                return False
            try:
                without = replace(options, ignore=options.ignore | peers)
                second = self.plan(model, prompt_tokens, without)
            except PlaitError:
                return False
            return has_room(second) and self._hedges.take(
                prompt_tokens, options.hedge_share, _clock_ms()
            )

        return HedgedGeneration(
            make,
            emit,
            lambda work: _entered(self._tasks).create_task(work, name="hedged"),
            late_s=late_after_s(planned.predicted.ttft_s),
            allowed=allowed,
        )

    async def _pinned(self, model: str, options: Options) -> Options:
        """The options with the layers that we host ourselves; starts their nodes."""
        if self._hosting is None:
            return options
        _entered(self._watch)
        pins = await self._hosting.pins(self._load(model)[0].manifest.shape)
        return replace(options, pin=options.pin + pins)

    async def openai(self) -> Any:
        """An ``openai.AsyncOpenAI`` over this network and account, until the client is left.

        It talks to a gateway in a process of its own (this needs plait[gateway]). Raises
        ``ConfigError`` if a package is missing, or if we host layers: that gateway's routes
        would not keep to them.
        """
        url = await self.gateway_url()
        return openai_classes()[1](base_url=url, api_key="none")

    async def gateway_url(self) -> str:
        """The base URL of a gateway of our own; raises what ``openai`` raises."""
        if self._hosting is not None:
            raise ConfigError("the gateway would not keep to the layers that are hosted here")
        openai_classes()
        if self._gateway is None or self._gateway.ended:
            self._gateway = Child.start(gateway_arguments(self._path))
            self._stack.push_async_callback(self._gateway.close)
        return await address_of(self._gateway)

    def _drafts(
        self, local: LocalModel, order: Order, ready: Callable[[], None]
    ) -> tuple[Drafter] | tuple[Drafter, Callable[[], None]]:
        """Who guesses for an order and, if it is a model, what to call when that has ended."""
        model, ids = self._draft_model, order.prompt_ids
        if model is not None and model.fits(local):
            return model.drafter(ids, order.route.max_tokens, order.sampling, ready)
        return (AdaptiveDrafter(ids),)

    def _surroundings(self, watch: NetworkWatch) -> Surroundings:
        return Surroundings(
            account=self.account,
            network=self.network,
            dialer=_entered(self._dialer),
            ledger=self.ledger,
            tasks=_entered(self._tasks),
            view=watch.view,
            envelopes=watch.envelopes,
            changed=watch.changed,
            revoked=lambda: _entered(self._notices).revoked,
            demand=self._demand,
            clock_ms=_clock_ms,
            monotonic_s=time.monotonic,
            keep_for_audit=self._keep_for_audit if self._audits else None,
            warm=self._warm,
        )

    def _route_request(self, options: Options, prompt_tokens: int) -> RouteRequest:
        request = options.route_request(prompt_tokens)
        if options.audited_min <= 0:
            return request
        passed = trust_of(self.audit_spool.records(), _clock_ms())
        trusted = {peer for peer, count in passed.items() if count >= options.audited_min}
        only = trusted & request.only if request.only else trusted
        if not only:
            raise ConfigError(
                f"no peer has passed {options.audited_min} audited chunks of yours",
                remedy="plait audit ls",
            )
        return replace(request, only=frozenset(only))

    def _keep_for_audit(self, session: SessionId, bundle: bytes) -> None:
        self.audit_spool.put(session, bundle, _clock_ms())

    def _load(self, model: str) -> tuple[LocalModel, Tokenizer]:
        if model not in self._models:
            local = load(model)
            self._models[model] = (local, Tokenizer.load(local))
        return self._models[model]


def _discard(token: Deliver) -> None:
    """Nobody listens."""


def _unit(values: Sequence[float]) -> tuple[float, ...]:
    """The vector of length 1 in the same direction."""
    length = math.hypot(*values) or 1.0
    return tuple(value / length for value in values)


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000


def _entered(value: T | None) -> T:
    if value is None:
        raise LocalProtocolError(_NOT_ENTERED)
    return value
