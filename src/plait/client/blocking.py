"""The same client without async: an event loop in a thread, every call waits for it."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from plait.client.answer import Answer, Embedding, TextDelta
from plait.client.background import background_loop, in_background
from plait.client.client import NOT_ENTERED, AsyncClient
from plait.client.openai_client import openai_classes
from plait.client.options import Options
from plait.client.prompt import Prompt
from plait.client.settings import ClientSettings, SubAccountLimits
from plait.client.streaming import TextStream
from plait.errors import LocalProtocolError
from plait.ledger.sub_accounts import SubAccount, SubAccountUse
from plait.router.plan import Plan
from plait.router.view import View
from plait.types import PeerId

ResultT = TypeVar("ResultT")

CANCEL_TIMEOUT_S = 8.0
NOT_HERE = "a blocking client cannot wait on the thread that answers it"


class BlockingStream:
    """``TextStream`` without async; an iterator and a context manager.

    Closing it cancels the session and waits for that. Leaving the loop early cancels it at
    once too, without waiting: the stream goes with the loop, and the ``TextStream`` with it.
    """

    def __init__(self, client: "Client", source: TextStream) -> None:
        self._client = client
        self._source: TextStream | None = source

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TextDelta | Answer:
        item = None if self._source is None else self._client._call(_next(self._source))
        if item is None:
            raise StopIteration
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def finish(self) -> None:
        """No more tokens are wanted: those that are due still come, then the ``Answer``."""
        if self._source is not None:
            self._client._call(_finish(self._source))

    def close(self) -> None:
        """Cancel what still runs."""
        source, self._source = self._source, None
        # A client that was left has ended its sessions itself. Whoever closes on the event
        # loop's own thread (a collector may) must not wait for it: dropping cancels as well.
        if source is not None and self._client.is_open and not in_background():
            self._client._call(source.aclose())


class Client:
    """A client of one network; a context manager. See ``AsyncClient`` for the arguments."""

    def __init__(
        self, network: Path | str | None = None, **settings: Unpack[ClientSettings]
    ) -> None:
        self._client = AsyncClient(network, **settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._living: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> Self:
        loop = background_loop()
        self._stop = asyncio.Event()
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._living = asyncio.run_coroutine_threadsafe(self._live(started), loop)
        try:
            started.result()
        except BaseException:
            self._living.cancel()
            raise
        self._loop = loop
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._living is not None:
            loop.call_soon_threadsafe(self._stop.set)
            self._living.result()

    @property
    def peer(self) -> PeerId:
        """Our own peer id, which is also our account."""
        return self._client.account.peer

    def view(self) -> View:
        """The offers and links known now."""
        return self._client.view()

    def wait_ready(self, model: str, timeout_s: float = 30.0) -> None:
        """Return once a complete pipeline exists; raises the ``NoRoute`` that still holds."""
        self._call(self._client.wait_ready(model, timeout_s))

    def plan(self, model: str, prompt_tokens: int, options: Options | None = None) -> Plan:
        """The route that would be taken now; raises ``NoRoute``."""
        return self._client.plan(model, prompt_tokens, options)

    def explain(
        self, model: str, prompt_tokens: int, options: Options | None = None
    ) -> dict[str, Any]:
        """The route that would be taken now, or why there is none; JSON-ready."""
        return self._client.explain(model, prompt_tokens, options)

    def check_model(self, model: str) -> None:
        """Raise ``ModelError`` unless the model is known and its tokenizer is here."""
        self._client.check_model(model)

    def wait_settled(self) -> None:
        """Return once the first offers are in and their links are measured, or after 3 s."""
        self._call(self._client.wait_settled())

    def generate(self, model: str, prompt: Prompt, options: Options | None = None) -> Answer:
        """Answer a prompt. Ctrl-C cancels the session."""
        return self._call(self._client.generate(model, prompt, options))

    def stream(self, model: str, prompt: Prompt, options: Options | None = None) -> BlockingStream:
        """Yield each token as it comes, then the ``Answer``."""
        return BlockingStream(self, self._client.stream(model, prompt, options))

    def openai(self) -> Any:
        """An ``openai.OpenAI`` over this network and account; see ``AsyncClient.openai``."""
        url = self._call(self._client.gateway_url())
        return openai_classes()[0](base_url=url, api_key="none")

    def embed(
        self, model: str, text: str | Sequence[int], options: Options | None = None
    ) -> Embedding:
        """The embedding of a text; see ``AsyncClient.embed``."""
        return self._call(self._client.embed(model, text, options))

    def sub_accounts(self) -> Sequence[SubAccountUse]:
        """The account's sub-accounts by name, with what each has used."""
        return self._call(self._client.sub_accounts())

    def set_sub_account(self, name: str, **limits: Unpack[SubAccountLimits]) -> SubAccount:
        """Open, change or close a sub-account; see ``client.sub_accounts``."""
        return self._call(self._client.set_sub_account(name, **limits))

    @property
    def is_open(self) -> bool:
        """Whether the client is in its ``with``."""
        return self._loop is not None

    def _call(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        if self._loop is None or in_background():
            work.close()
            raise LocalProtocolError(NOT_ENTERED if self._loop is None else NOT_HERE)
        ended = threading.Event()

        async def attended() -> ResultT:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(attended(), self._loop)
        try:
            return self._result(future)
        except BaseException:
            # Ctrl-C, say. The session must be closed before anything else is asked of it.
            if future.cancel():
                ended.wait(CANCEL_TIMEOUT_S)
            raise

    def _result(self, future: "concurrent.futures.Future[ResultT]") -> ResultT:
        """What a call gives. A client whose background work broke answers nothing more."""
        assert self._living is not None
        either: set[concurrent.futures.Future[Any]] = {future, self._living}
        concurrent.futures.wait(either, return_when=concurrent.futures.FIRST_COMPLETED)
        if not future.done():
            raise LocalProtocolError("the client ended before it answered")
        return future.result()

    async def _live(self, started: "concurrent.futures.Future[None]") -> None:
        try:
            async with self._client:
                started.set_result(None)
                await self._stop.wait()
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)


async def _next(source: TextStream) -> TextDelta | Answer | None:
    return await anext(source, None)


async def _finish(source: TextStream) -> None:
    source.finish()
