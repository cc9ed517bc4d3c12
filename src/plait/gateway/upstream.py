"""``Upstream`` over ``AsyncClient``: a generation from ids and a full sampling, with an
orderly end. The one place where the gateway reaches into the client."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from plait.client import Answer, AsyncClient, Options
from plait.client.epoch import Order
from plait.client.generation import Generation, Surroundings
from plait.errors import LocalProtocolError, PlaitError
from plait.gateway.port import Ask, Delta, NotServed, Stream
from plait.model import catalog
from plait.model.local import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.router.plan import Plan
from plait.router.view import View


class ClientUpstream:
    """A client that is entered, as the gateway sees it."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._models: dict[str, tuple[LocalModel, Tokenizer]] = {}

    def view(self) -> View:
        """The offers and links known now."""
        return self._client.view()

    def plan(self, model: str, prompt_tokens: int, options: Options) -> Plan:
        """The route that would be taken now; raises ``NoRoute`` or ``PeerUnreachable``."""
        return self._client.plan(model, prompt_tokens, options)

    def stream(self, ask: Ask) -> Stream:
        """Begin a generation."""
        if ask.model not in self._models:
            local = catalog.load(ask.model)
            self._models[ask.model] = (local, Tokenizer.load(local))
        return _ClientStream(self._client, ask, *self._models[ask.model])

    async def embed(self, model: str, ids: Sequence[int]) -> Sequence[float]:
        """Raises ``NotServed``: no stage gives out its final hidden state yet."""
        raise NotServed(f"the network computes no embeddings of {model} yet")


class _ClientStream:
    """``Stream`` of one generation."""

    def __init__(
        self, client: AsyncClient, ask: Ask, local: LocalModel, tokenizer: Tokenizer
    ) -> None:
        self._client, self._ask = client, ask
        self._local, self._tokenizer = local, tokenizer
        self._tokens: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue()
        self._generation: Generation | None = None
        self._items = self._run()

    def __aiter__(self) -> AsyncIterator[Delta | Answer]:
        return self._items

    def finish(self) -> None:
        """End the answer with the token that is due."""
        if self._generation is not None:
            self._generation.stop()

    async def aclose(self) -> None:
        """Cancel what still runs."""
        await self._items.aclose()

    async def _run(self) -> AsyncGenerator[Delta | Answer, None]:
        client, decoder = self._client, self._tokenizer.stream()
        watch, tasks = client._watch, client._tasks
        if watch is None or tasks is None:
            raise LocalProtocolError("the client is not entered")
        await watch.settled()
        watch.check_reachable()
        self._generation = Generation(
            self._order(), self._around(), lambda *token: self._tokens.put_nowait(token)
        )
        work = tasks.create_task(self._outcome(self._generation), name="generation")
        try:
            ids, logprobs = list[int](), list[float]()
            while (token := await self._tokens.get()) is not None:
                ids.append(token[0])
                logprobs.append(token[1])
                if text := decoder.push(token[0]):
                    yield Delta(text, tuple(ids), tuple(logprobs))
                    ids.clear()
                    logprobs.clear()
            text = decoder.flush()
            if ids or text:
                yield Delta(text, tuple(ids), tuple(logprobs))
            outcome = await work
            if isinstance(outcome, PlaitError):
                raise outcome
            yield outcome
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _outcome(self, generation: Generation) -> Answer | PlaitError:
        # An error is returned, not raised: the task group must outlive one failed answer.
        try:
            return await generation.run(self._tokenizer.decode)
        except PlaitError as error:
            return error
        finally:
            self._tokens.put_nowait(None)

    def _order(self) -> Order:
        manifest, ask = self._local.manifest, self._ask
        return Order(
            model=manifest.shape,
            prompt_ids=ask.prompt_ids,
            sampling=ask.sampling,
            route=ask.options.route_request(len(ask.prompt_ids)),
            vocabulary_size=manifest.vocabulary_size,
            manifest=manifest.payload,
            want_bundle=ask.options.bundle,
            qos=ask.qos,
        )

    def _around(self) -> Surroundings:
        client = self._client
        watch, tasks, dialer = client._watch, client._tasks, client._dialer
        notices = client._notices
        if watch is None or tasks is None or dialer is None or notices is None:
            raise LocalProtocolError("the client is not entered")
        return Surroundings(
            account=client.account,
            network=client.network,
            dialer=dialer,
            ledger=client.ledger,
            tasks=tasks,
            view=watch.view,
            envelopes=watch.envelopes,
            changed=watch.changed,
            revoked=lambda: notices.revoked,
            clock_ms=lambda: time.time_ns() // 1_000_000,
            monotonic_s=time.monotonic,
        )
