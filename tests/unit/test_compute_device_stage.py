"""A stage on an accelerator, of which torch's CPU plays the part, and placement on fake CUDA
tensors, which refuse to meet the host's. Slow because torch takes seconds to import."""

from typing import TYPE_CHECKING

import numpy as np
import pytest

from plait.compute.device import Device
from plait.compute.load import load_stage
from plait.compute.pages import PAGE_TOKENS, prefix_hashes
from plait.compute.port import Done, Work
from plait.errors import ConfigError
from plait.model import catalog
from plait.model.local import LocalModel
from plait.types import Sampling, SessionId, Span

if TYPE_CHECKING:
    from plait.compute.stage import TorchStage

pytestmark = pytest.mark.slow

ONE, TWO, THREE = (SessionId(bytes([digit]) * 16) for digit in (49, 50, 51))
PROMPT = tuple(range(40, 93))
FAKE_CUDA = Device("cuda", 0, (8, 0))
TURING = Device("cuda", 0, (7, 5))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        return catalog.load("tiny-random")


def stage_on(local: LocalModel, dtype: str, device: Device = TURING) -> "TorchStage":
    from plait.testing.devices import fake_memory

    return load_stage(local, Span(0, 8), dtype, kv_tokens_max=640, memory=fake_memory(device))


def reserved(stage: "TorchStage", *sessions: SessionId) -> "TorchStage":
    for session in sessions:
        stage.reserve(session, 120, Sampling())
    return stage


def answer(stage: "TorchStage", session: SessionId, count: int) -> list[int]:
    """The ids of a greedy answer."""
    ids, at, drawn = PROMPT, 0, list[int]()
    for _ in range(count):
        (done,) = stage.step([Work(session, at, ids, None, sample=True)])
        assert done.drawn is not None, done.error
        drawn += done.drawn.ids
        at, ids = at + len(ids), done.drawn.ids
    return drawn


def hidden(done: Done) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    assert done.hidden is not None, done.error
    return np.asarray(done.hidden)


def test_fp32_draws_what_the_cpu_draws(local: LocalModel) -> None:
    cpu = reserved(load_stage(local, Span(0, 8), kv_tokens_max=640), ONE)
    assert answer(reserved(stage_on(local, "fp32"), ONE), ONE, 12) == answer(cpu, ONE, 12)


@pytest.mark.parametrize(
    ("dtype", "device", "off_max"),
    [
        ("fp16", TURING, 0.03),
        ("bf16", FAKE_CUDA, 0.25),
        ("int4", TURING, 0.2),
        ("int8", TURING, 0.2),
        ("int8", FAKE_CUDA, 0.2),
    ],
)
def test_every_dtype_is_near_fp32(
    local: LocalModel, dtype: str, device: Device, off_max: float
) -> None:
    exact = reserved(load_stage(local, Span(0, 8), kv_tokens_max=640), ONE)
    rounded = reserved(stage_on(local, dtype, device), ONE)
    work = [Work(ONE, 0, PROMPT, None, sample=True)]
    (one,), (other,) = exact.step(work), rounded.step(work)
    off = np.linalg.norm(hidden(one) - hidden(other)) / np.linalg.norm(hidden(one))
    assert 0 < off < off_max


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int4", "int8"])
def test_a_row_does_not_depend_on_its_company(local: LocalModel, dtype: str) -> None:
    stage = reserved(stage_on(local, dtype), ONE, TWO, THREE)
    alone = stage.step([Work(ONE, 0, PROMPT[:20], None, sample=True)])[0]
    works = [Work(TWO, 0, PROMPT[20:27], None), Work(ONE, 0, PROMPT[:20], None, sample=True)]
    together = stage.step([*works, Work(THREE, 0, PROMPT[:40], None)])[1]
    assert np.array_equal(hidden(alone), hidden(together))
    one_by_one = [
        hidden(stage.step([Work(TWO, at, (token,), None)])[0])
        for at, token in enumerate(PROMPT[:20])
    ]
    assert np.array_equal(np.concatenate(one_by_one), hidden(alone))


def test_the_device_is_waited_for_once_a_step_and_buffers_are_used_again(
    local: LocalModel,
) -> None:
    from plait.testing.devices import FakeDriver, fake_memory

    driver = FakeDriver()
    stage = load_stage(local, Span(0, 8), memory=fake_memory(TURING, driver), kv_tokens_max=640)
    reserved(stage, ONE, TWO)
    batch = [Work(ONE, 0, PROMPT, None, sample=True), Work(TWO, 0, PROMPT[:9], None, sample=True)]
    stage.step(batch)
    warm = len(driver.buffers)
    waits = driver.waits
    for _ in range(5):
        stage.step(batch)
    assert driver.waits == waits + 5
    assert len(driver.buffers) == warm


def test_results_are_not_overwritten_by_the_next_step(local: LocalModel) -> None:
    stage = reserved(stage_on(local, "fp16"), ONE, TWO)
    first = hidden(stage.step([Work(ONE, 0, PROMPT, None)])[0])
    kept = first.copy()
    stage.step([Work(TWO, 0, PROMPT[::-1], None)])
    assert np.array_equal(first, kept)


def test_a_failed_wait_is_its_own_works_error_and_the_next_step_goes_on(
    local: LocalModel,
) -> None:
    from plait.testing.devices import FakeDriver, fake_memory

    broken = [False]

    def fail() -> None:
        if broken[0]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    driver = FakeDriver(on_wait=fail)
    stage = load_stage(local, Span(0, 8), memory=fake_memory(TURING, driver), kv_tokens_max=640)
    reserved(stage, ONE)
    broken[0] = True
    (done,) = stage.step([Work(ONE, 0, PROMPT, None)])
    assert isinstance(done.error, RuntimeError)
    broken[0] = False
    after = hidden(stage.step([Work(ONE, 0, PROMPT, None)])[0])
    fresh = reserved(stage_on(local, "fp32"), ONE)
    assert np.array_equal(after, hidden(fresh.step([Work(ONE, 0, PROMPT, None)])[0]))


def test_keys_and_values_take_half_the_memory_in_half_precision(local: LocalModel) -> None:
    import torch

    exact, half = stage_on(local, "fp32"), stage_on(local, "int4")
    assert exact.kv_bytes_total == 2 * half.kv_bytes_total
    assert half._kv.data.dtype == torch.float16


def test_the_cache_is_as_large_as_the_device_allows(local: LocalModel) -> None:
    from plait.testing.devices import FakeDriver, fake_memory

    position = stage_on(local, "fp32")._kv.layout.position_bytes
    room = fake_memory(TURING, FakeDriver(free_bytes=position * 100))
    stage = load_stage(local, Span(0, 8), memory=room, kv_tokens_max=640)
    assert stage.kv_tokens_total == 80  # 0.8 of 100
    with pytest.raises(ConfigError, match="no room for a KV cache"):
        tight = fake_memory(TURING, FakeDriver(free_bytes=position * 2))
        load_stage(local, Span(0, 8), memory=tight)


def test_prefixes_go_to_disk_and_come_back(local: LocalModel) -> None:
    stage = reserved(stage_on(local, "int4"), ONE)
    hashes = prefix_hashes(PROMPT)
    stage.step([Work(ONE, 0, PROMPT[:48], None)])
    stage.step([Work(ONE, 48, PROMPT[48:], None)])
    wanted = hidden(stage.step([Work(ONE, 48, PROMPT[48:], None)])[0])
    stage.publish_prefix(ONE, "alice", hashes, keep_ms=60_000)
    stage.park_prefixes()
    stage.free(ONE)
    stage._kv._table.expire(stage._kv._clock_ms() + 1)  # now it is on disk alone
    stage._kv.data.zero_()
    reserved(stage, TWO)
    assert stage.adopt_prefix(TWO, "alice", hashes) == 3 * PAGE_TOKENS
    got = hidden(stage.step([Work(TWO, 48, PROMPT[48:], None)])[0])
    assert np.array_equal(got, wanted)


def test_the_class_names_the_device_and_no_threads(local: LocalModel) -> None:
    stage = stage_on(local, "int8", FAKE_CUDA)
    assert stage.numeric_class().split("/")[1:] == ["int8", "cuda-sm80-bf16-tiles", "f32", "t0"]
    assert stage.device == "cuda:0"
    assert load_stage(local, Span(0, 1)).device == "cpu"


def test_auto_is_the_16_bit_type_of_the_accelerator(local: LocalModel) -> None:
    assert stage_on(local, "auto").numeric_class().split("/")[1] == "fp16"
    assert stage_on(local, "auto", FAKE_CUDA).numeric_class().split("/")[1] == "bf16"
    with pytest.raises(ConfigError, match="no bf16"):
        stage_on(local, "bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int4", "int8"])
def test_on_cuda_nothing_meets_a_tensor_of_the_host(
    local: LocalModel, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where torch checks devices and shapes and computes nothing."""
    import torch

    from plait.compute.attention import Item
    from plait.compute.kv import KvCache
    from plait.compute.load import load_model
    from plait.compute.ragged import RaggedModel
    from plait.testing.devices import ShapeMemory

    kernel_rows: list[int] = []

    def shapes_of_kernel(
        rows: torch.Tensor, packed: torch.Tensor, group: int, pairs: torch.Tensor
    ) -> torch.Tensor:
        """What the CUDA kernel's own source checks; torch cannot do it without a card."""
        kernel_rows.append(len(rows))
        inputs, outputs, inner = rows.shape[1], len(packed) * 8, packed.shape[3] * 2
        assert rows.dtype == torch.bfloat16 and rows.is_contiguous()
        assert packed.shape[1] == inputs // (inner * 16) and packed.shape[2] == 32
        assert pairs.shape == (inputs // group, outputs, 2) and pairs.dtype == torch.bfloat16
        assert packed.device == pairs.device == rows.device
        return rows.new_empty(len(rows), outputs)

    monkeypatch.setattr(torch, "_weight_int4pack_mm", shapes_of_kernel)
    memory = ShapeMemory(FAKE_CUDA)
    model = load_model(local, Span(0, 8), dtype, memory=memory)
    assert isinstance(model, RaggedModel)
    cache = KvCache(model.layout, 256, device=memory.torch_device)
    items = []
    for session, rows, at in ((ONE, 5, 0), (TWO, 40, 0), (THREE, 40, 3)):
        cache.reserve(session, 64, Sampling())
        kv = cache.get(session)
        assert kv is not None
        items.append(Item(memory.carry(model.embed(PROMPT[:rows])), at, kv))
    outputs = model.run(items)
    logits = model.logits(outputs[0])
    assert [tuple(output.shape) for output in outputs] == [(5, 64), (40, 64), (40, 64)]
    assert {tensor.device.type for tensor in [*outputs, logits, cache.data]} == {"meta"}
    assert logits.shape == (5, local.manifest.vocabulary_size)
    assert bool(kernel_rows) == (dtype == "int4")


def test_codes_are_packed_as_the_cuda_kernel_reads_them() -> None:
    """Even inputs in the upper half of a byte; code 8 stands for ``zero``."""
    import torch

    from plait.compute.device_linear import Int4Matrix, k_tiles, nibble_bytes, scale_and_zero
    from plait.compute.device_memory import HOST
    from plait.model.gguf_types import Nibbles

    chance = np.random.default_rng(3)
    codes = chance.integers(0, 16, (16, 64), np.uint8)
    scale, offset = (chance.random((16, 2), np.float32) for _ in range(2))
    weights = Nibbles(codes, scale, offset)
    packed = nibble_bytes(weights).numpy()
    assert packed.shape == (16, 32)
    assert np.array_equal(packed >> 4, codes[:, ::2])
    assert np.array_equal(packed & 15, codes[:, 1::2])
    exact = codes * scale.repeat(32, 1) + offset.repeat(32, 1)
    pairs = scale_and_zero(weights).float().numpy()
    read = (codes.astype(np.float32) - 8) * pairs[..., 0].T.repeat(32, 1)
    assert np.abs(read + pairs[..., 1].T.repeat(32, 1) - exact).max() < 0.1
    dense = Int4Matrix(weights, torch.float32, HOST).dense().numpy()
    assert np.allclose(dense, exact, atol=1e-5)
    assert [k_tiles(inputs) for inputs in (576, 1536, 96, 1024)] == [4, 8, 2, 8]
