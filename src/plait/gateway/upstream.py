"""``Upstream`` over ``AsyncClient``."""

from dataclasses import replace

from plait.client import AsyncClient, Embedding, Options
from plait.gateway.port import Ask, Stream
from plait.router.plan import Plan
from plait.router.view import View


class ClientUpstream:
    """A client that is entered, as the gateway sees it."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def view(self) -> View:
        """The offers and links known now."""
        return self._client.view()

    def plan(self, model: str, prompt_tokens: int, options: Options) -> Plan:
        """The route that would be taken now; raises ``NoRoute`` or ``PeerUnreachable``."""
        return self._client.plan(model, prompt_tokens, options)

    def stream(self, ask: Ask) -> Stream:
        """Begin a generation."""
        return self._client.stream(ask.model, ask.prompt_ids, _options(ask))

    async def embed(self, ask: Ask) -> Embedding:
        """The embedding of what is asked. Raises ``PlaitError`` subclasses."""
        return await self._client.embed(ask.model, ask.prompt_ids, _options(ask))


def _options(ask: Ask) -> Options:
    return replace(ask.options, sampling=ask.sampling, qos=ask.qos)
