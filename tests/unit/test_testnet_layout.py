"""Which node hosts which span, for every size of testnet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import ConfigError
from plait.testnet.layout import (
    equal_spans,
    ledger_names,
    place,
    witness_quorum,
    witnesses_among,
)
from plait.types import Span


@given(layers=st.integers(1, 200), data=st.data())
def test_equal_spans_tile_the_model_and_differ_by_one_at_most(
    layers: int, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, layers))
    spans = equal_spans(layers, stages)
    assert [layer for span in spans for layer in range(span.start, span.end)] == list(range(layers))
    lengths = [len(span) for span in spans]
    assert lengths == sorted(lengths, reverse=True), "the remainder goes to the earlier spans"
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("stages", [0, -1, 31])
def test_a_model_cannot_be_cut_in_no_stage_or_more_than_its_layers(stages: int) -> None:
    with pytest.raises(ConfigError, match="30 layers"):
        equal_spans(30, stages)


def test_by_default_three_spans_and_a_second_host_of_the_first() -> None:
    assert [(item.name, item.span) for item in place(30)] == [
        ("node-1", Span(0, 10)),
        ("node-2", Span(10, 20)),
        ("node-3", Span(20, 30)),
        ("node-4", Span(0, 10)),
    ]


@given(layers=st.integers(1, 100), nodes=st.integers(1, 64))
def test_any_number_of_nodes_covers_the_model_evenly(layers: int, nodes: int) -> None:
    placed = place(layers, nodes=nodes)
    assert len({item.name for item in placed}) == len(placed) == nodes
    spans = [item.span for item in placed]
    assert set(spans) == set(equal_spans(layers, min(3, nodes, layers)))
    hosts = [spans.count(span) for span in set(spans)]
    assert max(hosts) - min(hosts) <= 1


@given(layers=st.integers(8, 100), stages=st.integers(1, 8), replicas=st.integers(1, 8))
def test_stages_and_replicas_give_their_product(layers: int, stages: int, replicas: int) -> None:
    spans = [item.span for item in place(layers, stages=stages, replicas=replicas)]
    assert sorted(spans) == sorted(equal_spans(layers, stages) * replicas)


def test_stages_alone_are_hosted_once_and_replicas_alone_have_three_spans() -> None:
    assert [item.span for item in place(10, stages=2)] == [Span(0, 5), Span(5, 10)]
    assert len(place(10, replicas=2)) == 6


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"nodes": 4, "stages": 2}, "-n cannot be combined"),
        ({"nodes": 4, "replicas": 2}, "-n cannot be combined"),
        ({"nodes": 0}, "at least one node"),
        ({"stages": 2, "replicas": 0}, "at least one node"),
        ({"stages": -1, "replicas": -1}, "cannot be cut"),
        ({"nodes": 65}, "at most 64"),
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(30, **numbers)


def test_a_committee_has_three_f_and_one_authorities() -> None:
    assert ledger_names(1) == ("ledger-1",)
    assert ledger_names(4) == ("ledger-1", "ledger-2", "ledger-3", "ledger-4")
    for number in (0, 2, 3, 5, 19, -2):
        with pytest.raises(ConfigError, match="no committee"):
            ledger_names(number)


def test_one_witness_may_fail_where_there_are_several() -> None:
    assert [witness_quorum(count) for count in range(6)] == [0, 1, 1, 2, 3, 3]
    assert [witnesses_among(nodes, None) for nodes in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert witnesses_among(9, 5) == 5
    with pytest.raises(ConfigError, match="witnesses"):
        witnesses_among(2, 3)
