"""Keys and values in pages: sharing, copying on write, keeping on disk, and a bound that holds.

Slow because torch takes seconds to import.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from plait.compute.load import load_stage
from plait.compute.pages import PAGE_TOKENS, prefix_hashes
from plait.compute.port import Drawn, Work
from plait.compute.spill import DiskRoom
from plait.errors import CapacityError, LocalProtocolError
from plait.model import catalog
from plait.model.local import LocalModel
from plait.types import Sampling, SessionId, Span

if TYPE_CHECKING:
    import torch

    from plait.compute.kv import KvCache
    from plait.compute.stage import TorchStage

pytestmark = pytest.mark.slow

ONE, TWO, THREE, OTHER = (SessionId(bytes([digit]) * 16) for digit in (49, 50, 51, 52))
ALICE, BOB = "12D3KooWalice", "12D3KooWbob"
PROMPT = tuple(range(40, 93))  # three pages and five tokens
HASHES = prefix_hashes(PROMPT)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        return catalog.load("tiny-random")


@pytest.fixture(params=["fp32", "int4"])
def stage(local: LocalModel, request: pytest.FixtureRequest) -> "TorchStage":
    stage = load_stage(local, Span(0, 8), request.param, kv_tokens_max=20 * PAGE_TOKENS)
    stage.reserve(ONE, 80, Sampling())
    return stage


def step(stage: "TorchStage", session: SessionId, at: int, ids: tuple[int, ...]) -> Drawn:
    (done,) = stage.step([Work(session, at, ids, None, sample=True)])
    assert done.drawn is not None, done.error
    return done.drawn


def prefilled(stage: "TorchStage", session: SessionId) -> Drawn:
    """As one that reuses pages computes: whole pages first, then the rest."""
    step(stage, session, 0, PROMPT[:48])
    return step(stage, session, 48, PROMPT[48:])


def test_a_published_prefix_is_used_by_the_same_tenant_only(stage: "TorchStage") -> None:
    wanted = prefilled(stage, ONE)
    stage.publish_prefix(ONE, ALICE, HASHES)
    stage.free(ONE)
    for tenant, tokens in ((ALICE, 48), (BOB, 0)):
        stage.reserve(TWO, 80, Sampling())
        assert stage.adopt_prefix(TWO, tenant, HASHES) == tokens
        if tokens:
            assert step(stage, TWO, 48, PROMPT[48:]) == wanted
        stage.free(TWO)
    assert stage.kv_tokens_free == stage.kv_tokens_total


def make_scarce(stage: "TorchStage") -> None:
    """Leave less than half of the pages to two sessions of five."""
    stage.reserve(OTHER, PAGE_TOKENS, Sampling())


def test_shared_pages_are_stored_once_when_room_is_scarce(stage: "TorchStage") -> None:
    make_scarce(stage)
    prefilled(stage, ONE)
    stage.publish_prefix(ONE, ALICE, HASHES)
    stage.reserve(TWO, 80, Sampling())
    assert stage.kv_tokens_free == (20 - 11) * PAGE_TOKENS
    stage.adopt_prefix(TWO, ALICE, HASHES)
    step(stage, TWO, 48, PROMPT[48:])
    assert stage.kv_tokens_free == (20 - 8) * PAGE_TOKENS


def test_where_there_is_room_a_prefix_is_copied_next_to_what_follows(stage: "TorchStage") -> None:
    wanted = prefilled(stage, ONE)
    stage.publish_prefix(ONE, ALICE, HASHES)
    stage.reserve(TWO, 80, Sampling())
    assert stage.adopt_prefix(TWO, ALICE, HASHES) == 48
    assert step(stage, TWO, 48, PROMPT[48:]) == wanted
    assert stage.kv_tokens_free == (20 - 10) * PAGE_TOKENS
    kv = stage._kv.get(TWO)
    assert kv is not None
    assert kv.views(53) is not None
    stage.free(TWO)
    stage.free(ONE)
    assert stage.kv_tokens_free == stage.kv_tokens_total


def test_writing_into_a_shared_prefix_copies_it(stage: "TorchStage") -> None:
    make_scarce(stage)
    prefilled(stage, ONE)
    following = [step(stage, ONE, 53 + index, (60 + index,)) for index in range(3)]
    stage.publish_prefix(ONE, ALICE, HASHES)
    stage.reserve(TWO, 80, Sampling())
    stage.adopt_prefix(TWO, ALICE, HASHES)
    step(stage, TWO, 48, PROMPT[48:])
    step(stage, TWO, 20, (7,) * 30)  # in the middle of the second page
    assert [step(stage, ONE, 53 + index, (60 + index,)) for index in range(3)] == following
    stage.reserve(THREE, 80, Sampling())
    prefilled(stage, THREE)
    alone = step(stage, THREE, 20, (7,) * 30)
    assert step(stage, TWO, 20, (7,) * 30) == alone


def test_less_of_a_prefix_may_be_used_than_was_found(stage: "TorchStage") -> None:
    make_scarce(stage)
    prefilled(stage, ONE)
    stage.publish_prefix(ONE, ALICE, HASHES)
    stage.reserve(TWO, 80, Sampling())
    assert stage.adopt_prefix(TWO, ALICE, HASHES) == 48
    shorter = step(stage, TWO, 21, PROMPT[21:])
    assert stage.kv_tokens_free == (20 - 10) * PAGE_TOKENS
    step(stage, ONE, 21, PROMPT[21:])
    assert step(stage, ONE, 21, PROMPT[21:]) == shorter


def test_a_session_that_publishes_may_write_there_again(stage: "TorchStage") -> None:
    prefilled(stage, ONE)
    stage.publish_prefix(ONE, ALICE, HASHES)
    free = stage.kv_tokens_free
    step(stage, ONE, 20, (7,) * 30)
    assert stage.kv_tokens_free == free
    stage.reserve(TWO, 80, Sampling())
    assert stage.adopt_prefix(TWO, ALICE, HASHES) == 16  # the rest was overwritten


def test_prefixes_make_room_for_sessions(stage: "TorchStage") -> None:
    prefilled(stage, ONE)
    stage.publish_prefix(ONE, ALICE, HASHES)
    stage.free(ONE)
    stage.reserve(TWO, 19 * PAGE_TOKENS, Sampling())
    stage.reserve(THREE, PAGE_TOKENS, Sampling())
    assert stage.adopt_prefix(THREE, ALICE, HASHES) == 0


def test_what_is_not_cached_can_neither_be_published_nor_adopted_over(stage: "TorchStage") -> None:
    with pytest.raises(LocalProtocolError, match="not cached"):
        stage.publish_prefix(ONE, ALICE, HASHES)
    step(stage, ONE, 0, PROMPT)
    with pytest.raises(LocalProtocolError, match="cannot adopt"):
        stage.adopt_prefix(ONE, ALICE, HASHES)


def test_scattered_pages_hold_what_neighbouring_ones_do(local: LocalModel) -> None:
    stage = load_stage(local, Span(0, 8), "int4", kv_tokens_max=6 * PAGE_TOKENS)
    small = [SessionId(bytes([index]) * 16) for index in range(6)]
    stage.reserve(ONE, 64, Sampling())
    wanted = [prefilled(stage, ONE), step(stage, ONE, 53, (9,)), step(stage, ONE, 50, (1, 2, 3))]
    stage.free(ONE)
    for session in small:
        stage.reserve(session, PAGE_TOKENS, Sampling())
    for session in (small[0], small[2], small[3], small[5]):
        stage.free(session)
    stage.reserve(ONE, 64, Sampling())
    again = [prefilled(stage, ONE), step(stage, ONE, 53, (9,)), step(stage, ONE, 50, (1, 2, 3))]
    assert again == wanted


def kept(cache: "KvCache", session: SessionId, names: tuple[bytes, ...]) -> None:
    """A session of as many pages as names, kept for a second, that has ended."""
    tokens = len(names) * PAGE_TOKENS
    cache.reserve(session, tokens, Sampling())
    kv = cache.get(session)
    assert kv is not None
    kv.prepare(0, tokens)
    cache.data[..., : cache.tokens_total, :] = torch_rows(cache)
    kv.length = tokens
    cache.publish(session, ALICE, names, keep_ms=1000)
    cache.free(session)


def torch_rows(cache: "KvCache") -> "torch.Tensor":
    import torch

    return torch.arange(cache.data.numel(), dtype=torch.float32).reshape(cache.data.shape)


def test_a_kept_prefix_comes_back_from_disk_when_its_room_was_needed(stage: "TorchStage") -> None:
    wanted = prefilled(stage, ONE)
    stage.publish_prefix(ONE, ALICE, HASHES, keep_ms=60_000)
    stage.park_prefixes()
    assert stage.prefixes.cached_tokens == stage.prefixes.parked_tokens == 48
    stage.free(ONE)
    stage.reserve(TWO, 20 * PAGE_TOKENS, Sampling())
    step(stage, TWO, 0, tuple(range(100, 260)))
    assert (stage.prefixes.cached_tokens, stage.prefixes.parked_tokens) == (0, 48)
    stage.free(TWO)
    stage.reserve(THREE, 80, Sampling())
    assert stage.adopt_prefix(THREE, BOB, HASHES) == 0
    assert stage.adopt_prefix(THREE, ALICE, HASHES) == 48
    assert step(stage, THREE, 48, PROMPT[48:]) == wanted
    assert stage.prefixes.cached_tokens == 48  # and is in memory again
    stage.free(THREE)
    assert stage.kv_tokens_free == stage.kv_tokens_total


def test_kept_prefixes_expire_and_the_room_on_disk_is_bounded() -> None:
    from plait.compute.kv import PREFIX_IDLE_MS, KvCache, KvLayout

    now_ms = [0]
    layout = KvLayout(Span(0, 2), 2, 8)
    page_bytes = layout.position_bytes * PAGE_TOKENS
    cache = KvCache(
        layout, 8 * PAGE_TOKENS, disk=DiskRoom(bytes_max=3 * page_bytes), clock_ms=lambda: now_ms[0]
    )
    kept(cache, ONE, (b"a", b"b"))
    cache.park()
    assert cache.prefixes.parked_bytes == 2 * page_bytes
    now_ms[0] = 500
    kept(cache, TWO, (b"c", b"d"))
    cache.park()
    assert cache.prefixes.parked_bytes == 3 * page_bytes  # the longest unused page made room
    now_ms[0] = 1000
    cache.park()
    assert cache.prefixes.parked_bytes == 2 * page_bytes
    now_ms[0] = 1500
    cache.park()
    assert cache.prefixes.parked_bytes == 0
    assert cache.prefixes.cached_tokens == 4 * PAGE_TOKENS
    now_ms[0] = PREFIX_IDLE_MS + 501
    cache.park()
    assert cache.prefixes.cached_tokens == 0


def test_a_slot_that_is_being_read_is_not_given_away() -> None:
    from plait.compute.kv import KvCache, KvLayout

    layout = KvLayout(Span(0, 1), 1, 2)
    disk = DiskRoom(bytes_max=layout.position_bytes * PAGE_TOKENS)
    cache = KvCache(layout, 4 * PAGE_TOKENS, disk=disk)
    kept(cache, ONE, (b"a",))
    cache.park()
    cache.reserve(THREE, 4 * PAGE_TOKENS, Sampling())
    cache.free(THREE)
    cache.reserve(TWO, 2 * PAGE_TOKENS, Sampling())
    assert cache.adopt(TWO, ALICE, (b"a",)) == PAGE_TOKENS
    kept(cache, THREE, (b"b",))
    cache.park()
    kv = cache.get(TWO)
    assert kv is not None
    kv.prepare(PAGE_TOKENS, 1)
    rows = torch_rows(cache)[..., :PAGE_TOKENS, :]
    at = kv.pages[0] * PAGE_TOKENS
    assert cache.data[..., at : at + PAGE_TOKENS, :].equal(rows)


def test_a_disk_that_fails_ends_the_session_and_nothing_else(tmp_path: Path) -> None:
    from plait.compute.kv import KvCache, KvLayout

    cache = KvCache(KvLayout(Span(0, 1), 1, 2), 4 * PAGE_TOKENS, disk=DiskRoom(tmp_path))
    kept(cache, ONE, (b"a",))
    cache.park()
    cache.reserve(THREE, 4 * PAGE_TOKENS, Sampling())
    cache.free(THREE)
    cache.reserve(TWO, 2 * PAGE_TOKENS, Sampling())
    assert cache.adopt(TWO, ALICE, (b"a",)) == PAGE_TOKENS
    os.ftruncate(cache._file._descriptor, 0)
    kv = cache.get(TWO)
    assert kv is not None
    with pytest.raises(CapacityError, match="too short"):
        kv.prepare(PAGE_TOKENS, 1)
    assert kv.length == 0
    cache.free(TWO)
    assert cache.tokens_free == cache.tokens_total
    assert cache.prefixes.parked_bytes == 0


def test_pages_freed_during_a_step_are_given_back_after_it() -> None:
    from plait.compute.kv import KvCache, KvLayout

    cache = KvCache(KvLayout(Span(0, 1), 1, 2), 64)
    cache.reserve(ONE, 64, Sampling())
    with cache.computing([ONE]):
        cache.free(ONE)
        with pytest.raises(CapacityError):
            cache.reserve(TWO, 1, Sampling())
    cache.reserve(TWO, 64, Sampling())


FLOOD = """
import resource, sys
import torch
from plait.compute.kv import KvCache, KvLayout
from plait.errors import CapacityError
from plait.types import Sampling, SessionId, Span

def used_kb(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

layout = KvLayout(Span(0, 30), 3, 64)
cache = KvCache(layout, 2048)
rows = torch.ones(1, 3, 48, 64)
before_kb = used_kb("VmRSS")
limit = used_kb("VmSize") * 1024 + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
granted = refused = 0
for number in range(1000):
    session = SessionId(number.to_bytes(16, "big"))
    try:
        cache.reserve(session, 64, Sampling())
    except CapacityError:
        refused += 1
        if refused % 20 == 0:
            cache.free(SessionId((granted - 1).to_bytes(16, "big")))
        continue
    kv = cache.get(session)
    kv.prepare(0, 48)
    for layer in range(30):
        kv.write(layer, 0, rows, rows)
    kv.length = 48
    granted += 1
print(granted, refused, layout.position_bytes * 2048 // 1024, used_kb("VmRSS") - before_kb)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_a_flood_of_sessions_stays_within_the_limit() -> None:
    """A process that may take 64 MB more than its cache of 92 MB; the sessions asked for
    2.8 GB."""
    finished = subprocess.run(
        [sys.executable, "-c", FLOOD], capture_output=True, text=True, check=True
    )
    granted, refused, limit_kb, grown_kb = map(int, finished.stdout.split())
    assert granted >= 32
    assert granted + refused == 1000
    assert grown_kb <= limit_kb + 32 * 1024


@pytest.mark.parametrize("first", [0, 5, 16, 40, 63])
def test_rows_are_read_where_they_were_written(first: int) -> None:
    """In pages that lie apart, row by row through ``slots`` or at once through ``write``."""
    import torch

    from plait.compute.kv import KvCache, KvLayout

    def made() -> KvCache:
        cache = KvCache(KvLayout(Span(4, 7), 2, 8), 6 * PAGE_TOKENS)
        cache.data.zero_()
        for session in (ONE, TWO):
            cache.reserve(session, PAGE_TOKENS, Sampling())
        cache.free(ONE)
        cache.reserve(THREE, 80, Sampling())  # all that is left, on both sides of TWO
        return cache

    chance = torch.Generator().manual_seed(first)
    keys, values = (torch.randn(2, 80 - first, 8, generator=chance) for _ in range(2))
    by_slot, at_once = made(), made()
    apart, together = by_slot.get(THREE), at_once.get(THREE)
    assert apart is not None and together is not None
    assert apart.views(80) is None
    slots = apart.slots(first, 80 - first)
    apart.of_layer(1).index_copy_(1, slots, torch.cat([keys, values]))
    wanted = together.write(1, first, keys[None], values[None])
    assert torch.equal(by_slot.data, at_once.data)
    assert all(map(torch.equal, apart.read(1, 80), wanted))
    assert torch.equal(wanted[0][0, :, first:], keys)
    assert torch.equal(wanted[1][0, :, first:], values)


def test_views_show_what_is_written_later() -> None:
    import torch

    from plait.compute.kv import KvCache, KvLayout

    cache = KvCache(KvLayout(Span(0, 2), 2, 8), 4 * PAGE_TOKENS)
    cache.reserve(ONE, 40, Sampling())
    kv = cache.get(ONE)
    assert kv is not None
    views = kv.views(20)
    assert views is not None
    rows = torch.randn(1, 2, 20, 8)
    kv.write(1, 0, rows, rows + 1)
    for found, wanted in zip((views[0][1], views[1][1]), kv.read(1, 20), strict=True):
        assert torch.equal(found, wanted)
        assert found.shape == (1, 2, 20, 8)
