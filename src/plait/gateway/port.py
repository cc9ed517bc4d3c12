"""What the gateway needs of a client of the network: ``AsyncClient``, or a fake in tests."""

from collections.abc import AsyncGenerator
from typing import Protocol

from plait.client import Answer, Options, TextDelta
from plait.client.prompt import Prompt
from plait.router.plan import Plan
from plait.router.view import View


class Upstream(Protocol):
    """A client of one network. Each method is as in ``AsyncClient``."""

    def view(self) -> View:
        """The offers and links known now."""
        ...

    def plan(self, model: str, prompt_tokens: int, options: Options) -> Plan:
        """The route that would be taken now; raises ``NoRoute`` or ``PeerUnreachable``."""
        ...

    def stream(
        self, model: str, prompt: Prompt, options: Options | None = None
    ) -> AsyncGenerator[TextDelta | Answer, None]:
        """Yield text as it comes, then the ``Answer``; closing it cancels the session."""
        ...
