"""What the gateway needs of a client of the network: ``ClientUpstream``, or a fake in tests."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from plait.client import Answer, Embedding, Options, RouteStep, TextDelta
from plait.gateway.budgets import Share
from plait.router.cost import Prediction
from plait.router.plan import Plan
from plait.router.view import View
from plait.types import Qos, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One generation: what is asked, how tokens are drawn, how to route."""

    model: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    options: Options
    qos: Qos = "standard"


class Stream(Protocol):
    """Deltas, then the ``Answer``. Closing it cancels the session."""

    def __aiter__(self) -> AsyncIterator[TextDelta | Answer]:
        """The items; raises ``PlaitError`` subclasses."""
        ...

    @property
    def route(self) -> tuple[RouteStep, ...]:
        """The stages at work; known from the first token on."""
        ...

    @property
    def predicted(self) -> Prediction | None:
        """What was predicted of the first route; known from the first token on."""
        ...

    @property
    def cost_microcredits(self) -> int:
        """What the session's vouchers promise by now; final once it has ended or is closed."""
        ...

    def finish(self) -> None:
        """No more tokens are wanted: what was drawn is paid, and the ``Answer`` follows."""
        ...

    async def aclose(self) -> None:
        """End it, wherever it is."""
        ...


class Upstream(Protocol):
    """A client of one network."""

    def view(self) -> View:
        """The offers and links known now."""
        ...

    def plan(self, model: str, prompt_tokens: int, options: Options) -> Plan:
        """The route that would be taken now; raises ``NoRoute`` or ``PeerUnreachable``."""
        ...

    def stream(self, ask: Ask) -> Stream:
        """Begin a generation."""
        ...

    async def set_share(self, share: Share) -> None:
        """Give a share of the account its limit. Raises ``LedgerError`` or ``NetworkError``."""
        ...

    async def embed(self, ask: Ask) -> Embedding:
        """The embedding of what is asked. Raises ``PlaitError`` subclasses."""
        ...
