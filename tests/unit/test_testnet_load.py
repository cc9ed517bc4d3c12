"""What the load of a chaos run calls wrong."""

from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.client import Answer, Options
from plait.client.answer import TextDelta
from plait.errors import SessionLost
from plait.router.cost import Prediction
from plait.testnet.load import Case, ask, wrong_tokens
from plait.types import Microcredits

IDS = (5, 6, 7)
CASE = Case("why?", Options(max_tokens=3), IDS, "<5><6><7>")


def text_of(ids: Sequence[int]) -> str:
    return "".join(f"<{number}>" for number in ids)


def finished(ids: Sequence[int]) -> Answer:
    return Answer(
        text=text_of(ids),
        token_ids=tuple(ids),
        logprobs=(-0.1,) * len(ids),
        prompt_tokens=1,
        finish_reason="length",
        route=(),
        epochs=2,
        ttft_s=0.1,
        tpot_s=0.1,
        predicted=Prediction(ttft_s=0.1, tpot_s=0.1, price_microcredits=Microcredits(9)),
        cost_microcredits=Microcredits(7),
        receipts_verified=4,
        seed=1,
    )


class Client:
    """Delivers these ids one by one and then, if it ends, an answer that names ``final``."""

    def __init__(self, delivered: Sequence[int], final: Sequence[int] | None) -> None:
        self.delivered = delivered
        self.final = final

    async def stream(
        self, model: str, prompt: str, options: Options
    ) -> AsyncIterator[TextDelta | Answer]:
        for number in self.delivered:
            yield TextDelta(text_of([number]), (number,))
        if self.final is None:
            raise SessionLost("the stage is gone")
        yield finished(self.final)


@pytest.mark.parametrize(
    ("delivered", "final", "wrong"),
    [
        (IDS, IDS, 0),
        ((5, 9, 7), IDS, 1),
        ((5, 6, 6, 7), IDS, 2),
        ((5, 6), IDS, 1),
        ((5, 9, 7), (5, 9, 7), 1),
        ((5, 6), (5, 6), 1),
        ((5, 6), None, 0),
        ((5, 9), None, 1),
        ((5, 6, 7, 7), None, 1),
    ],
    ids=[
        "right",
        "a wrong token streamed, the right ids at the end",
        "a token repeated, the right ids at the end",
        "a token never streamed",
        "a wrong answer",
        "too short an answer",
        "lost, right so far",
        "lost, wrong before",
        "lost, more than there is",
    ],
)
async def test_what_was_streamed_counts_whatever_the_answer_says_at_its_end(
    delivered: Sequence[int], final: Sequence[int] | None, wrong: int
) -> None:
    outcome = await ask(Client(delivered, final), "tiny", CASE)  # type: ignore[arg-type]
    assert outcome.wrong == wrong
    assert outcome.tokens == len(outcome.arrivals_s) == len(delivered)
    assert outcome.code == ("session-lost" if final is None else "")


def test_text_that_is_wrong_although_its_ids_are_right_counts_once() -> None:
    assert wrong_tokens(CASE, IDS, "<5><5><7>", IDS) == 1
    assert wrong_tokens(CASE, IDS[:2], "<5><5>", None) == 1
    assert wrong_tokens(CASE, IDS[:2], "<5>", None) == 0, "a character may be incomplete"


@given(st.lists(st.integers(5, 8), max_size=5), st.lists(st.integers(5, 8), max_size=5))
def test_only_the_undisturbed_answer_delivered_as_it_is_named_is_right(
    delivered: list[int], final: list[int]
) -> None:
    wrong = wrong_tokens(CASE, delivered, text_of(delivered), final)
    assert (wrong == 0) == (tuple(delivered) == tuple(final) == IDS)
