"""What the gateway needs of a client of the network: ``ClientUpstream``, or a fake in tests."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from plait.client import Answer, Options
from plait.router.plan import Plan
from plait.router.view import View
from plait.types import Qos, Sampling

Top = tuple[tuple[int, float], ...]
"""(id, log-probability) of the likeliest tokens, most likely first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One generation: what is asked, how tokens are drawn, how to route."""

    model: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    options: Options
    qos: Qos = "standard"


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that is complete UTF-8, and the tokens since the last one with what is known of
    each; ``tops`` is empty unless the sampling asks for it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    tops: tuple[Top, ...] = ()


class Stream(Protocol):
    """Deltas, then the ``Answer``. Closing it cancels the session."""

    def __aiter__(self) -> AsyncIterator[Delta | Answer]:
        """The items; raises ``PlaitError`` subclasses."""
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

    async def embed(self, model: str, ids: Sequence[int]) -> Sequence[float]:
        """The embedding of a text; raises ``NotServed`` where the network has none."""
        ...


class NotServed(Exception):
    """The network cannot do this yet."""
