"""One answer on its way to an async iterator."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from plait.client.answer import Answer, RouteStep, TextDelta
from plait.client.driver import Deliver
from plait.client.hedged import Running
from plait.errors import PlaitError
from plait.model.tokenizer import Tokenizer
from plait.router.cost import Prediction
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


@dataclass(slots=True)
class _Course:
    """What the stream and what runs for it share. It does not know the stream."""

    begin: Callable[[Tokens], Coroutine[Any, Any, Begun]]
    generation: Running | None = None
    finishing: bool = False

    def finish(self) -> None:
        self.finishing = True
        if self.generation is not None:
            self.generation.stop()


class TextStream:
    """Every token as a ``TextDelta``, then the ``Answer``; an async iterator.

    ``begin`` starts the generation at the first look. Closing the stream cancels the session.
    So does leaving the loop early: nothing but the loop holds the stream, so it goes with it,
    and the event loop closes what it ran. Where a stream is kept, close it: it is a context
    manager.
    """

    def __init__(self, begin: Callable[[Tokens], Coroutine[Any, Any, Begun]]) -> None:
        self._course = _Course(begin)
        # No reference to self may be in there: only the cycle collector would end it then.
        self._items = _run(self._course)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextDelta | Answer:
        return await anext(self._items)

    @property
    def cost_microcredits(self) -> int:
        """What the session's vouchers promise by now, microcredits; final once the stream has
        ended or is closed, whether or not there was an ``Answer``."""
        generation = self._course.generation
        return generation.cost_microcredits if generation is not None else 0

    @property
    def route(self) -> tuple[RouteStep, ...]:
        """The stages at work; empty before they are. From the first token on it is known."""
        generation = self._course.generation
        return generation.route if generation is not None else ()

    @property
    def predicted(self) -> Prediction | None:
        """What was predicted of the first route; None as long as there is none."""
        generation = self._course.generation
        return generation.predicted if generation is not None else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def finish(self) -> None:
        """No more tokens are wanted: those that are due still come, then the ``Answer``.

        Its chunk is closed and paid for in good order. Nothing happens when it has ended.
        """
        self._course.finish()

    async def aclose(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        await self._items.aclose()


async def _run(course: _Course) -> AsyncGenerator[TextDelta | Answer, None]:
    tokens = Tokens()
    begun = await course.begin(tokens)
    course.generation = begun.generation
    if course.finishing:
        begun.generation.stop()
    decoder = begun.tokenizer.stream()
    work = begun.tasks.create_task(_outcome(begun, tokens), name="generation")
    try:
        while (token := await tokens.queue.get()) is not None:
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
        await asyncio.wait((work,))


async def _outcome(begun: Begun, tokens: Tokens) -> Answer | PlaitError:
    # An error is returned, not raised: the task group must outlive one failed answer.
    try:
        return await begun.generation.run(begun.tokenizer.decode)
    except PlaitError as error:
        return error
    finally:
        tokens.queue.put_nowait(None)
