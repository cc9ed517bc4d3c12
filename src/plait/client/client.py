"""The asynchronous client: a view of the network, and generations over it."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from plait.client.account import Account, open_account
from plait.client.answer import Answer, Embedding
from plait.client.audit_spool import AuditSpool, BackgroundSpool
from plait.client.auditing import Audited, audit_bundle
from plait.client.children import Child
from plait.client.connection import Connection, connected
from plait.client.demand import Demand
from plait.client.drafting import DraftModel
from plait.client.driver import Deliver
from plait.client.generation import Surroundings
from plait.client.hosting import Hosting, HostTerms, parse_spans
from plait.client.lottery_keeper import LotteryKeeper, report_of
from plait.client.openai_client import address_of, gateway_arguments, openai_classes
from plait.client.options import Options
from plait.client.planning import Planner
from plait.client.prefix import WarmRoutes
from plait.client.prompt import Prompt
from plait.client.settings import ClientSettings, SubAccountLimits
from plait.client.starting import Starter
from plait.client.streaming import Begun, TextStream, Tokens
from plait.client.sub_accounts import order_sub_account, read_sub_accounts
from plait.clock import clock_ms
from plait.errors import ConfigError, LocalProtocolError, NoRoute, PeerUnreachable
from plait.ledger.lottery import Lot
from plait.ledger.service.committee import Ledger
from plait.ledger.sub_accounts import SubAccount, SubAccountUse
from plait.locate import client_dir, network_path
from plait.model.catalog import load
from plait.net.watch import NetworkWatch
from plait.network_file import NetworkFile, load_network_file
from plait.router.plan import Plan
from plait.router.view import View
from plait.types import PeerId, SessionId
from plait.v1.stage_pb2 import AuditEvidence

T = TypeVar("T")

NOT_ENTERED = "use the client as a context manager: with Client(…), async with AsyncClient(…)"


class AsyncClient:
    """A client of one network; an async context manager.

    ``network`` is the path of a network file, by default the last testnet's; for the other
    arguments see ``ClientSettings``. Needs neither torch nor libp2p: it learns offers from
    nodes' public ports and checks every signature.
    """

    def __init__(
        self, network: Path | str | None = None, **settings: Unpack[ClientSettings]
    ) -> None:
        if unknown := settings.keys() - ClientSettings.__annotations__.keys():
            raise TypeError(f"a client has no setting {', '.join(sorted(unknown))}")
        path = network_path(Path(network) if network is not None else None)
        self._path = path
        self.network: NetworkFile = load_network_file(path)
        self._hosting = self._hosting_of(settings)
        account = settings.get("account")
        self._folder = Path(account) if account is not None else client_dir(path)
        self.audit_spool = AuditSpool(self._folder / "audits")
        self._audits = settings.get("audits", True) and self.network.audit_rate_percent > 0
        draft = settings.get("draft")
        self._draft = None if draft is None else load(draft)
        serial = len(self.network.authorities) > 1
        self.account: Account = open_account(self._folder, serial=serial)
        self._demand = Demand()
        self._planner = Planner(
            self.account.peer, self.audit_spool, self._watch, self._hosting, self._demand
        )
        self._stack = AsyncExitStack()
        self._connection: Connection | None = None
        self._starter: Starter | None = None
        self._gateway: Child | None = None
        self._keeping: BackgroundSpool | None = None

    def _hosting_of(self, settings: ClientSettings) -> Hosting | None:
        host = settings.get("host")
        if host is None:
            return None
        terms = HostTerms(
            spans=parse_spans(host),
            dtype=settings.get("host_dtype", "fp32"),
            device=settings.get("host_device", "cpu"),
            address=settings.get("host_address", "127.0.0.1"),
        )
        return Hosting(terms, self._path, self.view, self.changed)

    async def __aenter__(self) -> Self:
        try:
            await self._enter()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave()

    async def _enter(self) -> None:
        made = connected(self.network, self.account, self._folder)
        self._connection = connection = await self._stack.enter_async_context(made)
        if self._audits:
            keeper = LotteryKeeper(self.audit_spool, self.audit, clock_ms, self._report)
            connection.tasks.create_task(keeper.run(), name="audits")
            self._keeping = BackgroundSpool(self.audit_spool)
            self._stack.push_async_callback(self._keeping.close)
        if self._hosting is not None:
            self._stack.push_async_callback(self._hosting.close)
        drafts = None
        if self._draft is not None:
            drafts = await DraftModel.load(self._draft, connection.tasks.create_task)
            self._stack.callback(drafts.close)
        around = self._surroundings(connection)
        self._starter = Starter(self._planner, connection.watch, around, drafts)

    async def _leave(self) -> None:
        try:
            await self._stack.aclose()
        finally:
            self._connection = self._starter = None

    def _surroundings(self, connection: Connection) -> Surroundings:
        return Surroundings(
            account=self.account,
            network=self.network,
            dialer=connection.dialer,
            ledger=connection.ledger,
            tasks=connection.tasks,
            view=connection.watch.view,
            envelopes=connection.watch.envelopes,
            changed=connection.watch.changed,
            revoked=lambda: connection.notices.board.revoked,
            demand=self._demand,
            clock_ms=clock_ms,
            monotonic_s=time.monotonic,
            keep_for_audit=self._keep_for_audit if self._audits else None,
            warm=WarmRoutes(),
        )

    # What is known ------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The ledger's service."""
        return _entered(self._connection).ledger

    def view(self) -> View:
        """The offers and links known now."""
        return self._watch().view()

    async def changed(self) -> None:
        """Return after the next change of what is known of the network."""
        await self._watch().changed()

    async def wait_settled(self) -> None:
        """Return once the first offers are in and their links are measured, or after 3 s."""
        await self._watch().settled()

    async def wait_ready(self, model: str, timeout_s: float = 30.0) -> None:
        """Return once a complete pipeline exists; raises the error that still holds."""
        options = Options(max_tokens=1)
        await self._planner.pinned(model, options)
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
                        await self.changed()

    def plan(self, model: str, prompt_tokens: int, options: Options | None = None) -> Plan:
        """The route that would be taken now; raises ``NoRoute`` or ``PeerUnreachable``."""
        return self._planner.plan(model, prompt_tokens, _given(options))

    def explain(
        self, model: str, prompt_tokens: int, options: Options | None = None
    ) -> dict[str, Any]:
        """The route that would be taken now, or why there is none; JSON-ready."""
        return self._planner.explain(model, prompt_tokens, _given(options))

    def check_model(self, model: str) -> None:
        """Raise ``ModelError`` unless the model is known and its tokenizer is here."""
        self._planner.model(model)

    # Answers ------------------------------------------------------------------------

    async def generate(self, model: str, prompt: Prompt, options: Options | None = None) -> Answer:
        """Answer a prompt. Raises ``PlaitError`` subclasses, ``NoRoute`` among them."""
        starter = _entered(self._starter)
        begun = await starter.begin(model, prompt, _given(options), _discard)
        return await begun.generation.run(begun.tokenizer.decode)

    def stream(self, model: str, prompt: Prompt, options: Options | None = None) -> TextStream:
        """Yield each token as it comes, then the ``Answer``.

        Closing the stream cancels the session; ``finish`` ends it in good order. Iterating
        raises what ``generate`` raises.
        """

        async def begin(tokens: Tokens) -> Begun:
            starter = _entered(self._starter)
            return await starter.begin(model, prompt, _given(options), tokens.emit)

        return TextStream(begin)

    async def embed(
        self, model: str, text: str | Sequence[int], options: Options | None = None
    ) -> Embedding:
        """The embedding of a text, without chat template, or of token ids.

        It is the model's final hidden state at the last token, which has seen them all,
        scaled to length 1. Costs the prompt and one token. Raises what ``generate`` raises.
        """
        asked = replace(_given(options), max_tokens=1, raw=True, drafts=False)
        begun = await _entered(self._starter).begin(model, text, asked, _discard, embed=True)
        answer = await begun.generation.run(begun.tokenizer.decode)
        return Embedding(_unit(begun.generation.embedding), answer)

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

    # Account ------------------------------------------------------------------------

    async def sub_accounts(self) -> Sequence[SubAccountUse]:
        """The account's sub-accounts by name, with what each has used."""
        return await read_sub_accounts(
            self.ledger, self._newest(), self.network.network_id, clock_ms()
        )

    async def set_sub_account(self, name: str, **limits: Unpack[SubAccountLimits]) -> SubAccount:
        """Open, change or close a sub-account; see ``client.sub_accounts``."""
        return await order_sub_account(
            self.ledger, self._newest(), self.network.network_id, clock_ms(), name, **limits
        )

    async def audit(
        self, bundle: bytes, only: Collection[PeerId] = (), skip: Collection[Lot] = ()
    ) -> list[Audited]:
        """Have what the lottery drew of a bundle audited; see ``client.auditing``."""
        connection = _entered(self._connection)
        await connection.watch.settled()
        return await audit_bundle(
            bundle,
            self.network,
            self.account,
            connection.ledger,
            connection.dialer,
            self,
            only,
            skip,
        )

    def _keep_for_audit(self, session: SessionId, bundle: Callable[[], bytes]) -> None:
        _entered(self._keeping).put(session, bundle, clock_ms())

    def _report(self, evidence: AuditEvidence) -> None:
        """Tell others of an exposure."""
        told = report_of(evidence, self._newest(), self.network.network_id, clock_ms())
        _entered(self._connection).notices.take(told)

    def _newest(self) -> Account:
        """The account with the ledger key that counts now: it may have been rotated."""
        self.account = self.account.renewed()
        return self.account

    def _watch(self) -> NetworkWatch:
        return _entered(self._connection).watch


def _given(options: Options | None) -> Options:
    if options is None:
        return Options()
    if not isinstance(options, Options):
        raise ConfigError(
            f"options are an Options, not of type {type(options).__name__}",
            remedy="Options(max_tokens=64)",
        )
    return options


def _discard(token: Deliver) -> None:
    """Nobody listens."""


def _unit(values: Sequence[float]) -> tuple[float, ...]:
    """The vector of length 1 in the same direction."""
    length = math.hypot(*values) or 1.0
    return tuple(value / length for value in values)


def _entered(value: T | None) -> T:
    if value is None:
        raise LocalProtocolError(NOT_ENTERED)
    return value
