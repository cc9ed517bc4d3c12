"""Clients at work while a testnet suffers: every answer is compared with the undisturbed one."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from plait.client import Answer, AsyncClient, Options
from plait.errors import PlaitError

REQUEST_TIMEOUT_S = 120.0
RETRY_S = 0.5
"""After a failure: what a patient client waits, so that an outage is not counted a thousandfold."""

PROMPTS = (
    "Explain in a few sentences why the sky is blue and sunsets are red.",
    "List the first ten prime numbers and say what a prime number is.",
    "Write a short letter from a lighthouse keeper to the sea.",
    "What is the difference between a ledger and a diary?",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One question and its undisturbed answer."""

    prompt: str
    options: Options
    token_ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(slots=True)
class Outcome:
    """How one request went; ``code`` and ``failure``, the error's, are empty if it ended well.

    Times are of the monotonic clock; ``arrivals_s`` are the moments at which text reached the
    user. ``tokens`` counts what was delivered, ``wrong`` is of ``wrong_tokens``.
    """

    started_s: float
    ended_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: int = 0
    epochs: int = 1
    code: str = ""
    failure: str = ""

    def longest_gap_s(self, after_s: float, until_s: float) -> float | None:
        """The longest pause that ends after a moment and begins before another."""
        gaps = [
            later - earlier
            for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
            if later > after_s and earlier < until_s
        ]
        return max(gaps, default=None)


async def undisturbed(client: AsyncClient, model: str, max_tokens: int) -> tuple[Case, ...]:
    """Ask every question once, in peace, greedily and by seeded draws; raises ``PlaitError``."""
    cases = []
    for number, prompt in enumerate(PROMPTS):
        options = Options(max_tokens=max_tokens, seed=number, temperature=0.8 * (number % 2))
        answer = await client.generate(model, prompt, options)
        cases.append(Case(prompt, options, answer.token_ids, answer.text))
    return tuple(cases)


async def work(
    client: AsyncClient,
    model: str,
    cases: Sequence[Case],
    first: int,
    outcomes: list[Outcome],
    is_over: Callable[[], bool],
) -> None:
    """Ask one question after the other until told that it is over."""
    number = first
    while not is_over():
        outcome = await ask(client, model, cases[number % len(cases)])
        outcomes.append(outcome)
        number += 1
        if outcome.failure:
            await asyncio.sleep(RETRY_S)


async def ask(client: AsyncClient, model: str, case: Case) -> Outcome:
    """One request, timed and compared; a failure is an outcome, not an exception."""
    outcome = Outcome(time.monotonic())
    text, delivered, final = "", list[int](), None
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            # A fresh copy: what a session may remember of its options must not be shared.
            async for item in client.stream(model, case.prompt, replace(case.options)):
                if isinstance(item, Answer):
                    final, outcome.epochs = item.token_ids, item.epochs
                    continue
                outcome.arrivals_s.append(time.monotonic())
                text += item.text
                delivered += item.token_ids
    except TimeoutError:
        outcome.code, outcome.failure = "timeout", f"no end within {REQUEST_TIMEOUT_S:g} s"
    except PlaitError as error:
        outcome.code, outcome.failure = error.code, str(error)
    outcome.ended_s = time.monotonic()
    outcome.tokens = len(delivered)
    outcome.wrong = wrong_tokens(case, delivered, text, final)
    return outcome


def wrong_tokens(
    case: Case, delivered: Sequence[int], text: str, final: Sequence[int] | None
) -> int:
    """How many tokens are wrong of what a user was given piece by piece, and at the end.

    ``final`` are the ids that the finished answer names, None if it did not finish: what was
    delivered must then begin the undisturbed answer. A finished answer must be what was
    delivered as well as the undisturbed one; each difference counts. Text that is wrong
    although every id is right counts as one.
    """
    if final is None:
        wrong = _differing(delivered, case.token_ids[: len(delivered)])
        return wrong or int(not case.text.startswith(text))
    wrong = _differing(final, delivered) + _differing(final, case.token_ids)
    return wrong or int(text != case.text)


def _differing(got: Sequence[int], wanted: Sequence[int]) -> int:
    return sum(a != b for a, b in zip_longest(got, wanted))
