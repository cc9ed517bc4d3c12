"""What ``--dtype auto`` stands for. Slow because torch takes seconds to import."""

import platform
from pathlib import Path

import pytest

from plait.compute.load import check_loadable, load_stage
from plait.errors import ConfigError
from plait.model import catalog
from plait.types import Span

pytestmark = pytest.mark.slow


def test_the_cheapest_row_decides_by_how_often_it_is_seen() -> None:
    from plait.compute.choice import Timing, fastest

    one = Timing("int4", "cpu", {1: 100.0, 4: 200.0, 16: 1600.0})
    many = Timing("bf16", "cpu", {1: 400.0, 4: 400.0, 16: 400.0})
    assert one.row_us == pytest.approx(0.5 * 100 + 0.3 * 50 + 0.2 * 100)
    assert fastest([many, one]) is one
    crowded = Timing("fp32", "cpu", {1: 1.0, 4: 1.0, 16: 10_000.0})
    assert fastest([many, one, crowded]) is one


@pytest.mark.parametrize("kernel", ["torch", "mlas-w4a8", "ggml-w4a8-v2"])
@pytest.mark.parametrize("planes", [1, 2])
def test_every_dtype_is_timed_for_every_number_of_rows(
    planes: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.compute import choice
    from plait.compute.choice import SHARES, measured

    monkeypatch.setattr(choice, "int4_kernel", lambda: kernel)
    table = measured(["fp32", "bf16", "int4"], 64, 128, planes=planes)
    assert [timing.dtype for timing in table] == ["fp32", "bf16", "int4"]
    for timing in table:
        assert timing.step_us.keys() == SHARES.keys()
        assert all(us > 0 for us in timing.step_us.values())


@pytest.mark.parametrize(
    ("has_bf16", "machine", "capability", "here", "kernel"),
    [
        (True, "x86_64", "AVX512", True, "torch"),
        (False, "x86_64", "AVX2", True, "ggml-w4a8-v2"),
        (False, "x86_64", "AVX2", False, "mlas-w4a8"),
        (False, "x86_64", "DEFAULT", True, "mlas-w4a8"),
        (False, "aarch64", "DEFAULT", True, "mlas-w4a8"),
    ],
)
def test_the_int4_kernel_follows_from_the_processor(
    has_bf16: bool,
    machine: str,
    capability: str,
    here: bool,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from plait.compute import choice, ggml

    monkeypatch.setattr(choice, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(ggml, "shared_object", lambda: Path("ggml.so") if here else None)
    assert choice.int4_kernel() == kernel


@pytest.mark.parametrize("kernel", ["ggml", "mlas", "torch"])
def test_a_kernel_can_be_named(
    kernel: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
    local = catalog.load("tiny-random")
    _, dtype, named, *_ = load_stage(local, Span(0, 1), f"int4/{kernel}").numeric_class().split("/")
    assert dtype == "int4" and kernel in named
    with pytest.raises(ConfigError, match="int4/ggml"):
        check_loadable(local, None, "int4/none")


def test_auto_loads_one_of_the_good_dtypes_and_says_which(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.compute import choice
    from plait.compute.choice import Timing

    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
    local = catalog.load("tiny-random")
    check_loadable(local, Span(0, 8), "auto")
    for wanted in ("fp32", "bf16", "int4"):
        table = [
            Timing(dtype, "cpu", dict.fromkeys(choice.SHARES, 1.0 if dtype == wanted else 2.0))
            for dtype in ("fp32", "bf16", "int4")
        ]
        monkeypatch.setattr(choice, "measured", lambda *_, table=table, **__: table)
        stage = load_stage(local, Span(0, 1), "auto")
        assert stage.numeric_class().split("/")[1] == wanted


def test_a_kernel_named_as_a_dtype_is_the_one_that_is_loaded() -> None:
    """The names stand apart, as torch is not imported for them."""
    from plait.compute import choice, ggml_parts, load, ort

    kernels = {"ggml": ggml_parts.KERNEL, "mlas": ort.KERNEL, "torch": choice.TORCH_INT4}
    assert kernels == load.INT4_KERNELS
