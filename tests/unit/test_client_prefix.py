"""Where a session starts, and which route its client takes again."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from plait.client import Options
from plait.client.epoch import Order
from plait.client.prefix import PAGES_MAX, Reuse, Warm, WarmRoutes, agreed_start
from plait.client.reroute import Asked, plan_first
from plait.compute.pages import PAGE_TOKENS
from plait.ledger.terms import SessionTerms
from plait.router.plan import Plan
from plait.router.request import RouteRequest
from plait.router.view import View
from plait.testing.accounting import NOW_MS, Plot, key_of, terms_of
from plait.testing.compute import FAKE_SHAPE
from plait.testing.offers import paper_offer
from plait.types import PeerId, Prices, Sampling, Span

STAGES = ((Span(0, 2), PeerId("a")), (Span(2, 4), PeerId("b")))


def terms(prompt_tokens: int, prices: Prices = Prices(prompt=5)) -> SessionTerms:  # noqa: B008
    return terms_of(replace(Plot(), prompt_ids=tuple(range(3, 3 + prompt_tokens)), prices=prices))


@given(st.integers(1, 100), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
def test_the_start_is_whole_pages_that_everybody_has_and_leaves_a_token(
    prompt_tokens: int, reusable: list[int]
) -> None:
    start = agreed_start(reusable, terms(prompt_tokens))
    assert start % PAGE_TOKENS == 0
    assert 0 <= start < prompt_tokens
    assert start <= min(reusable) < start + PAGE_TOKENS or prompt_tokens - start <= PAGE_TOKENS


def test_cached_tokens_that_cost_more_are_not_taken() -> None:
    assert agreed_start([64], terms(65, Prices(prompt=5, cached_prompt=5))) == 64
    assert agreed_start([64], terms(65, Prices(prompt=5, cached_prompt=6))) == 0


def test_a_client_remembers_who_had_the_longest_part_of_a_prompt() -> None:
    warm, reuse = WarmRoutes(), Reuse(b"salt")
    ids = list(range(64))
    warm.note(reuse.names(ids[:32]), STAGES)
    longer = (*ids[:32], *range(500, 532))
    assert warm.find(reuse.names(longer)) == Warm(STAGES, 32)
    assert warm.find(Reuse(b"another").names(longer)) is None
    warm.note(reuse.names(longer), STAGES[:1])
    assert warm.find(reuse.names((*longer, 1))) == Warm(STAGES[:1], 64)
    for number in range(PAGES_MAX):
        warm.note((b"%d" % number,), STAGES)
    assert warm.find(reuse.names(longer)) is None


def test_a_prompt_that_is_scored_asks_for_no_cached_prefix() -> None:
    ids = tuple(range(PAGE_TOKENS + 1))
    plain = Order(
        model=FAKE_SHAPE,
        prompt_ids=ids,
        sampling=Sampling(),
        route=Options().route_request(len(ids)),
        vocabulary_size=1000,
        manifest=b"",
        want_bundle=False,
        reuse=Reuse(b"salt"),
    )
    assert plain.prefix == Reuse(b"salt").names(ids) != ()
    assert replace(plain, score=True).prefix == ()
    assert replace(plain, reuse=None).prefix == ()


ALL = Span(0, FAKE_SHAPE.layers)
QUICK, SLOW = key_of("quick").peer_id, key_of("slow").peer_id


def routed(warm: Warm | None) -> Plan:
    """Through one of two hosts of all layers, of which one takes half as long again."""
    offers = {
        key_of(name).peer_id: replace(
            paper_offer(name, ALL), decode_us=token_us, prefill_us_per_token=token_us
        )
        for name, token_us in (("quick", 1_000), ("slow", 1_500))
    }
    request = RouteRequest(prompt_tokens=512, max_tokens=8, sort="latency")
    me = key_of("me").peer_id
    return plan_first(Asked(FAKE_SHAPE, request, me), View(offers, {}), (), NOW_MS, warm)


def test_the_warm_route_is_taken_where_it_saves_more_than_it_costs() -> None:
    assert routed(None).stages[0].offer.peer == QUICK
    assert routed(Warm(((ALL, SLOW),), 448)).stages[0].offer.peer == SLOW
    assert routed(Warm(((ALL, SLOW),), 32)).stages[0].offer.peer == QUICK


def test_where_the_best_route_is_warm_it_is_planned_once() -> None:
    chosen = routed(Warm(((ALL, QUICK),), 448))
    assert chosen.stages[0].offer.peer == QUICK
    assert chosen.request.pin == ()  # nothing had to be compared with what is pinned
