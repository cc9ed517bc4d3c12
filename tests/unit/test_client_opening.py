"""The opening of a session, where the network is for a moment not all there."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import pytest

from plait.client.actions import (
    CloseStages,
    Failed,
    OpenStages,
    StageFailed,
    Started,
    Ticked,
    Viewed,
)
from plait.client.demand import ROUTE_LOST_MS, Demand
from plait.client.epoch import Order, Party
from plait.client.opening import OPEN_TIMEOUT_MS
from plait.client.pipeline import OPEN_TIMEOUT_S
from plait.client.reroute import Asked, plan_first
from plait.client.session import SessionCore
from plait.errors import CapacityError, NoRoute
from plait.node.sessions import HOLD_MS
from plait.router.request import RouteRequest
from plait.router.view import View
from plait.sim.model import MANIFEST, SHAPE, SPANS
from plait.testing.accounting import NETWORK_ID, NOW_MS, key_of
from plait.testing.compute import VOCABULARY_SIZE
from plait.testing.offers import paper_offer
from plait.types import Microcredits, PeerId, Sampling

EVERYBODY = ("a", "b", "c")
ORDER = Order(
    model=SHAPE,
    prompt_ids=(1, 2, 3),
    sampling=Sampling(),
    route=RouteRequest(prompt_tokens=3, max_tokens=4),
    vocabulary_size=VOCABULARY_SIZE,
    manifest=MANIFEST,
    want_bundle=False,
)


def view_of(names: Iterable[str]) -> View:
    """These hosts, one for each span."""
    offers = [
        replace(paper_offer(name, span), model_digest=SHAPE.digest, expires_ms=NOW_MS + 10**9)
        for name, span in zip(EVERYBODY, SPANS, strict=True)
        if name in names
    ]
    return View({offer.peer: offer for offer in offers}, {})


def core_with(demand: Demand, order: Order = ORDER) -> SessionCore:
    """A session of a client, begun."""
    client = key_of("client")
    party = Party(
        network_id=NETWORK_ID, authorities=(), peer=client.peer_id, ledger_key=key_of("ledger key")
    )
    core = SessionCore(order, party, lambda size: hashlib.sha256(b"").digest()[:size], None, demand)
    core.handle(Started(), NOW_MS)
    return core


def kinds(actions: Iterable[object]) -> list[str]:
    return [type(action).__name__ for action in actions]


def routed_before() -> Demand:
    """What a client knows that had a session a moment ago."""
    demand = Demand()
    core_with(demand).handle(Viewed(view_of(EVERYBODY)), NOW_MS)
    return demand


def test_a_host_that_falls_out_of_view_is_waited_for() -> None:
    core = core_with(routed_before())
    assert kinds(core.handle(Viewed(view_of("ac")), NOW_MS + 1)) == ["SetTimer"]
    assert kinds(core.handle(Ticked(), NOW_MS + 500)) == ["AskView"]
    (opened, _) = core.handle(Viewed(view_of(EVERYBODY)), NOW_MS + 501)
    assert isinstance(opened, OpenStages)


@pytest.mark.parametrize("wait_ms", [1_000, 10 * ROUTE_LOST_MS])
def test_it_is_not_waited_for_longer_than_it_needs_to_come_again(wait_ms: int) -> None:
    core = core_with(routed_before(), replace(ORDER, replica_wait_ms=wait_ms))
    last_ms = NOW_MS + min(wait_ms, ROUTE_LOST_MS) - 1
    core.handle(Viewed(view_of("ac")), NOW_MS)
    assert kinds(core.handle(Viewed(view_of("ac")), last_ms)) == ["SetTimer"]
    (failed,) = core.handle(Viewed(view_of("ac")), last_ms + 1)
    assert isinstance(failed, Failed) and isinstance(failed.error, NoRoute)


def test_where_there_never_was_a_host_the_answer_is_no_at_once() -> None:
    (failed,) = core_with(Demand()).handle(Viewed(view_of("ac")), NOW_MS)
    assert isinstance(failed, Failed) and isinstance(failed.error, NoRoute)


def test_a_bound_that_no_route_keeps_is_not_waited_for() -> None:
    bounded = replace(ORDER, route=replace(ORDER.route, max_price=Microcredits(0)))
    (failed,) = core_with(routed_before(), bounded).handle(Viewed(view_of(EVERYBODY)), NOW_MS)
    assert isinstance(failed, Failed) and isinstance(failed.error, NoRoute)


def names(*letters: str) -> frozenset[PeerId]:
    return frozenset(key_of(letter).peer_id for letter in letters)


@pytest.mark.parametrize("rule", ["only", "ignore"])
def test_a_rule_that_no_route_keeps_is_not_waited_for(rule: str) -> None:
    only = replace(ORDER.route, only=names("a", "c"))
    ruled = replace(
        ORDER, route=only if rule == "only" else replace(ORDER.route, ignore=names("b"))
    )
    (failed,) = core_with(routed_before(), ruled).handle(Viewed(view_of(EVERYBODY)), NOW_MS)
    assert isinstance(failed, Failed) and isinstance(failed.error, NoRoute)
    assert failed.error.options == (rule,)


def test_a_peer_of_the_rules_that_falls_out_of_view_is_waited_for() -> None:
    """Others have its layers, but the request may not use them."""
    spare = replace(paper_offer("spare", SPANS[1]), model_digest=SHAPE.digest)
    others = {**view_of("ac").offers, spare.peer: replace(spare, expires_ms=NOW_MS + 10**9)}
    ruled = replace(ORDER, route=replace(ORDER.route, only=names(*EVERYBODY)))
    core = core_with(routed_before(), ruled)
    assert kinds(core.handle(Viewed(View(others, {})), NOW_MS)) == ["SetTimer"]
    (failed,) = core.handle(Viewed(View(others, {})), NOW_MS + ROUTE_LOST_MS - 1)[-1:]
    assert not isinstance(failed, Failed)
    core = core_with(Demand(), ruled)
    (failed,) = core.handle(Viewed(View(others, {})), NOW_MS)
    assert isinstance(failed, Failed) and isinstance(failed.error, NoRoute)
    assert failed.error.options == ("only",)


def test_whom_the_client_avoids_itself_is_no_rule_of_the_request() -> None:
    asked = Asked(SHAPE, ORDER.route, key_of("client").peer_id)
    with pytest.raises(NoRoute) as caught:
        plan_first(asked, view_of(EVERYBODY), names("b"), NOW_MS)
    assert caught.value.missing and not caught.value.options


def test_a_stage_that_does_not_answer_is_given_up() -> None:
    core = core_with(Demand())
    core.handle(Viewed(view_of(EVERYBODY)), NOW_MS)
    given_up = core.handle(Ticked(), NOW_MS + OPEN_TIMEOUT_MS)
    assert kinds(given_up) == ["CloseStages", "SetTimer", "AskView"]


def test_a_connected_stage_is_waited_for_no_longer_than_the_others_hold() -> None:
    assert OPEN_TIMEOUT_S * 1000 <= HOLD_MS


def test_one_refusal_decides_although_others_have_not_answered() -> None:
    core = core_with(Demand())
    (opened, _) = core.handle(Viewed(view_of(EVERYBODY)), NOW_MS)
    assert isinstance(opened, OpenStages)
    first, second, third = (stage.peer for stage in opened.terms.stages)
    full = StageFailed(1, second, "open", "capacity", "full", gone=False, retry_after_ms=900)
    let_go = [action for action in core.handle(full, NOW_MS + 3) if isinstance(action, CloseStages)]
    assert [(action.peers, action.only_held) for action in let_go] == [((first, third), True)]
    (failed,) = core.handle(Viewed(view_of(EVERYBODY)), NOW_MS + 4)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, CapacityError)
    assert "full" in str(failed.error)


def test_a_stage_out_of_reach_does_not_speak_for_the_others() -> None:
    core = core_with(Demand())
    (opened, _) = core.handle(Viewed(view_of(EVERYBODY)), NOW_MS)
    assert isinstance(opened, OpenStages)
    lost = StageFailed(1, opened.terms.stages[0].peer, "open", "", "no answer", gone=True)
    assert core.handle(lost, NOW_MS + 3) == []
