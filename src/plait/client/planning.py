"""Which route a client would take: the models it knows, what it hosts, whom it trusts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from plait.client.audit_spool import AuditSpool, trust_of
from plait.client.demand import Demand
from plait.client.hosting import Hosting
from plait.client.options import Options
from plait.clock import clock_ms
from plait.errors import ConfigError, LocalProtocolError, NoRoute
from plait.model.catalog import LocalModel, load
from plait.model.tokenizer import Tokenizer
from plait.net.watch import NetworkWatch
from plait.router.explain import explain, explain_failure
from plait.router.plan import Plan, plan
from plait.router.request import RouteRequest
from plait.types import PeerId


class Planner:
    """Plans over what ``watch`` knows; ``watch`` raises while there is nothing to know from.

    ``source`` is the client's own peer; ``hosting`` its own nodes, if it has any; ``demand``
    knows whom it used a moment ago.
    """

    def __init__(
        self,
        source: PeerId,
        spool: AuditSpool,
        watch: Callable[[], NetworkWatch],
        hosting: Hosting | None,
        demand: Demand,
    ) -> None:
        self._source, self._spool, self._demand = source, spool, demand
        self._watch, self._hosting = watch, hosting
        self._models: dict[str, tuple[LocalModel, Tokenizer]] = {}

    def model(self, name: str) -> tuple[LocalModel, Tokenizer]:
        """A model and its tokenizer; raises ``ModelError`` unless both are here."""
        if not isinstance(name, str):
            raise ConfigError(f"a model has a name, not {name!r}")
        if name not in self._models:
            local = load(name)
            self._models[name] = (local, Tokenizer.load(local))
        return self._models[name]

    def plan(self, model: str, prompt_tokens: int, options: Options) -> Plan:
        """The route that would be taken now; raises ``NoRoute`` or ``PeerUnreachable``."""
        shape = self.model(model)[0].manifest.shape
        watch = self._watch()
        watch.check_reachable()
        if self._hosting is not None:
            pins = self._hosting.known(shape)
            if pins is None:
                raise LocalProtocolError(f"no layers of {model} are hosted yet: wait_ready first")
            options = replace(options, pin=options.pin + pins)
        request, view, now_ms = self.request(options, prompt_tokens), watch.view(), clock_ms()
        try:
            return plan(view, shape, request, source=self._source, now_ms=now_ms)
        except NoRoute as error:
            if error.missing and self._demand.misses(request, view, now_ms):
                error.options = ()
            raise

    def explain(self, model: str, prompt_tokens: int, options: Options) -> dict[str, Any]:
        """The route that would be taken now, or why there is none; JSON-ready."""
        shape = self.model(model)[0].manifest.shape
        try:
            return explain(self.plan(model, prompt_tokens, options))
        except NoRoute as error:
            request = self.request(options, prompt_tokens)
            return explain_failure(error, self._watch().view(), shape, request, clock_ms())

    async def pinned(self, model: str, options: Options) -> Options:
        """The options with the layers that the client hosts itself; starts their nodes."""
        if self._hosting is None:
            return options
        self._watch()
        pins = await self._hosting.pins(self.model(model)[0].manifest.shape)
        return replace(options, pin=options.pin + pins)

    def request(self, options: Options, prompt_tokens: int) -> RouteRequest:
        """What is asked of the router; raises ``ConfigError`` if nobody is trusted enough."""
        request = options.route_request(prompt_tokens)
        if options.audited_min <= 0:
            return request
        passed = trust_of(self._spool.records(), clock_ms())
        trusted = {peer for peer, count in passed.items() if count >= options.audited_min}
        only = trusted & request.only if request.only else trusted
        if not only:
            raise ConfigError(
                f"no peer has passed {options.audited_min} audited chunks of yours",
                remedy="plait audit ls",
            )
        return replace(request, only=frozenset(only))
