"""An answer in a notebook."""

from plait.client import Answer, RouteStep
from plait.router.cost import Prediction
from plait.types import Microcredits, PeerId, Span


def test_the_card_shows_text_route_and_cost_and_no_markup_of_the_model() -> None:
    answer = Answer(
        text="<script>alert(1)</script>",
        token_ids=(1, 2),
        logprobs=(-0.1, -0.2),
        prompt_tokens=3,
        finish_reason="stop",
        route=(RouteStep(PeerId("12D3KooWabcdef"), Span(0, 5)),),
        epochs=1,
        ttft_s=0.1,
        tpot_s=0.1,
        predicted=Prediction(ttft_s=0.1, tpot_s=0.1, price_microcredits=Microcredits(9)),
        cost_microcredits=Microcredits(7),
        receipts_verified=4,
        seed=1,
    )
    card = answer._repr_html_()
    assert "&lt;script&gt;" in card
    assert "<script" not in card
    for shown in ("abcdef 0:5", "2 tokens", "7 microcredits", "4 receipts"):
        assert shown in card
