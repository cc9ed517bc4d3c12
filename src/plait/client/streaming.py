"""One answer on its way to an async iterator."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Self

from plait.client.answer import Answer, TextDelta
from plait.client.driver import Deliver
from plait.client.hedged import Running
from plait.errors import PlaitError
from plait.model.tokenizer import Tokenizer
from plait.task_scope import TaskScope


@dataclass(frozen=True, slots=True)
class Begun:
    """A generation about to run, and what it takes to read it."""

    generation: Running
    tokenizer: Tokenizer
    tasks: TaskScope


@dataclass(slots=True)
class Tokens:
    """Delivered tokens, then None; ``max_tokens`` bounds them."""

    queue: "asyncio.Queue[Deliver | None]" = field(default_factory=asyncio.Queue)

    def emit(self, token: Deliver) -> None:
        """Add a token."""
        self.queue.put_nowait(token)


class TextStream:
    """Every token as a ``TextDelta``, then the ``Answer``; an async iterator.

    ``begin`` starts the generation at the first look. Closing the iterator cancels the session.
    """

    def __init__(self, begin: Callable[[Tokens], Coroutine[Any, Any, Begun]]) -> None:
        self._begin = begin
        self._tokens = Tokens()
        self._generation: Running | None = None
        self._finishing = False
        self._items = self._run()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextDelta | Answer:
        return await anext(self._items)

    @property
    def cost_microcredits(self) -> int:
        """What the session's vouchers promise by now, microcredits; final once the stream has
        ended or is closed, whether or not there was an ``Answer``."""
        return self._generation.cost_microcredits if self._generation is not None else 0

    def finish(self) -> None:
        """No more tokens are wanted: those that are due still come, then the ``Answer``.

        Its chunk is closed and paid for in good order. Nothing happens when it has ended.
        """
        self._finishing = True
        if self._generation is not None:
            self._generation.stop()

    async def aclose(self) -> None:
        """Cancel what still runs."""
        await self._items.aclose()

    async def _run(self) -> AsyncGenerator[TextDelta | Answer, None]:
        begun = await self._begin(self._tokens)
        self._generation = begun.generation
        if self._finishing:
            begun.generation.stop()
        decoder = begun.tokenizer.stream()
        work = begun.tasks.create_task(self._outcome(begun), name="generation")
        try:
            while (token := await self._tokens.queue.get()) is not None:
                text = decoder.push(token.token_id)
                tops = (token.top,) if token.top else ()
                yield TextDelta(text, (token.token_id,), (token.logprob,), tops)
            if text := decoder.flush():
                yield TextDelta(text, ())
            outcome = await work
            if isinstance(outcome, PlaitError):
                raise outcome
            yield outcome
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _outcome(self, begun: Begun) -> Answer | PlaitError:
        # An error is returned, not raised: the task group must outlive one failed answer.
        try:
            return await begun.generation.run(begun.tokenizer.decode)
        except PlaitError as error:
            return error
        finally:
            self._tokens.queue.put_nowait(None)
