"""The page table: nothing is lost, held twice unawares, or seen by another tenant."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from plait.compute.pages import PageTable, pages_for, prefix_hashes, prefix_key, runs
from plait.errors import CapacityError, LocalProtocolError
from plait.types import Span

SECRET, SPAN = b"s" * 32, Span(0, 4)
TOTAL = 12


def test_pages_come_in_runs_where_they_can() -> None:
    table = PageTable(8)
    a, b, c = table.allocate(2), table.allocate(2), table.allocate(2)
    assert (a, b, c) == ((0, 1), (2, 3), (4, 5))
    table.release(a)
    table.release(c)
    assert table.allocate(3) == (4, 5, 6)
    assert table.allocate(3) == (0, 1, 7)
    with pytest.raises(CapacityError, match="16 tokens of KV cache were asked for, 0 are free"):
        table.allocate(1)


def test_neighbours_are_joined() -> None:
    assert runs((4, 5, 6, 2, 8, 9)) == [(4, 3), (2, 1), (8, 2)]
    assert runs(()) == []
    assert [pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_prefix_outlives_its_session_until_the_room_is_needed() -> None:
    table, keys = PageTable(4), [b"a", b"b", b"c"]
    pages = table.allocate(3)
    table.file(keys, pages)
    assert all(map(table.shared, pages))
    table.release(pages)
    assert table.available == 4
    assert [table.page_of(key) for key in (b"a", b"b", b"x")] == [*pages[:2], None]
    assert len(table.allocate(2)) == 2
    # The end of the prefix went first.
    assert [table.page_of(key) for key in keys] == [*pages[:2], None]
    table.hold(pages[:2])
    with pytest.raises(CapacityError):
        table.allocate(1)


def test_the_longest_unused_prefix_goes_first() -> None:
    table = PageTable(4)
    for key in (b"a", b"b", b"c"):
        pages = table.allocate(1)
        table.file([key], pages)
        table.release(pages)
    table.used([b"a"])
    table.allocate(2)
    assert [table.page_of(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]


def test_a_prefix_that_is_of_no_use_for_long_expires() -> None:
    table = PageTable(4)
    old, new = table.allocate(2), table.allocate(1)
    table.file([b"a", b"b"], old, now_ms=10)
    table.file([b"c"], new, now_ms=20)
    table.release(old[:1])
    table.used([b"b"], now_ms=30)
    table.expire(20)
    assert [table.page_of(key) for key in (b"a", b"b", b"c")] == [None, old[1], new[0]]
    table.expire(31)
    assert table.filed == 0
    assert table.available == 2  # the session that holds the page keeps it
    table.release((*old[1:], *new))
    assert table.available == 4


def test_what_is_not_held_cannot_be_released_or_shared() -> None:
    table = PageTable(2)
    for call in (table.hold, table.release):
        with pytest.raises(LocalProtocolError):
            call((0,))
    with pytest.raises(LocalProtocolError):
        table.file([b"a"], [1])
    pages = table.allocate(1)
    table.file([b"a"], pages)
    table.release(pages)
    with pytest.raises(LocalProtocolError):
        table.release(pages)  # that would take the table's own


def test_a_hash_names_all_ids_up_to_its_page() -> None:
    ids = list(range(40))
    hashes = prefix_hashes(ids)
    assert len(hashes) == 2
    assert prefix_hashes(ids[:32]) == hashes
    assert prefix_hashes(ids[:31]) == hashes[:1]
    changed = prefix_hashes([7, *ids[1:]])
    assert not set(changed) & set(hashes)


def test_chains_of_different_salts_have_nothing_in_common() -> None:
    chains = [prefix_hashes(range(64), salt) for salt in (b"", b"one user", b"another")]
    assert len({name for chain in chains for name in chain}) == 12


def test_keys_differ_by_tenant_span_and_node() -> None:
    keys = {
        prefix_key(secret, tenant, span, name)
        for secret in (SECRET, b"t" * 32)
        for tenant in ("12D3KooA", "12D3KooB")
        for span in (Span(0, 4), Span(0, 3))
        for name in prefix_hashes(range(32))
    }
    assert len(keys) == 16


class Sessions(RuleBasedStateMachine):
    """Sessions that come, share, publish and go, against plain counting."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(TOTAL)
        self.held: list[tuple[int, ...]] = []
        self.names = 0
        self.published: list[tuple[list[bytes], tuple[int, ...]]] = []

    @initialize()
    def start(self) -> None:
        assert self.table.available == TOTAL

    @rule(count=st.integers(1, TOTAL))
    def open(self, count: int) -> None:
        available = self.table.available
        try:
            pages = self.table.allocate(count)
        except CapacityError:
            assert count > available
            return
        assert len(set(pages)) == count <= available
        assert not set(pages) & {page for held in self.held for page in held}
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.table.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        keys = [b"%d" % (self.names + index) for index in range(len(pages))]
        self.names += len(pages)
        self.table.file(keys, pages)
        self.published.append((keys, pages))

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        keys, pages = data.draw(st.sampled_from(self.published))
        known = [self.table.page_of(key) for key in keys]
        found = tuple(page for page in known if page is not None)
        assert set(found) <= set(pages)
        self.table.used(keys)
        if found:
            self.table.hold(found)
            self.held.append(found)

    @rule(page=st.integers(0, TOTAL - 1))
    def withdraw(self, page: int) -> None:
        self.table.withdraw(page)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = Counter(page for pages in self.held for page in pages)
        assert self.table.available == TOTAL - len(held)
        assert all(self.table.shared(page) for page, count in held.items() if count > 1)
        assert self.table.filed <= TOTAL


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
