"""Which device a name means, what may run there, and how much KV cache fits. Pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.compute.device import (
    CPU,
    KV_SHARE,
    Accelerators,
    Device,
    check_dtype,
    kernel_on,
    kv_tokens_within,
    resolve,
)
from plait.errors import BadProof, ConfigError
from plait.ledger.audit_rules import TOLERANCES, tolerance_of
from plait.ledger.terms import accelerator_of

AMPERE = Device("cuda", 0, (8, 6))
TURING = Device("cuda", 1, (7, 5))
MPS = Device("mps")
BOTH = Accelerators(cuda=((8, 6), (7, 5)), mps=True)


@pytest.mark.parametrize(
    ("name", "found", "device"),
    [
        ("cpu", BOTH, CPU),
        ("auto", Accelerators(), CPU),
        ("auto", BOTH, AMPERE),
        ("auto", Accelerators(mps=True), MPS),
        ("cuda", BOTH, AMPERE),
        ("cuda:0", BOTH, AMPERE),
        ("cuda:1", BOTH, TURING),
        ("mps", BOTH, MPS),
    ],
)
def test_a_name_finds_its_device(name: str, found: Accelerators, device: Device) -> None:
    assert resolve(name, found) == device


@pytest.mark.parametrize(
    ("name", "found", "says"),
    [
        ("cuda", Accelerators(), "0 CUDA cards"),
        ("cuda:2", BOTH, "2 CUDA cards"),
        ("mps", Accelerators(cuda=((9, 0),)), "no MPS"),
        ("gpu", BOTH, "there is no device 'gpu'"),
        ("cuda:-1", BOTH, "there is no device"),
        ("cuda:x", BOTH, "there is no device"),
        ("cuda:0\n", BOTH, "there is no device"),
        ("", BOTH, "there is no device"),
    ],
)
def test_a_device_that_is_not_there_is_named(name: str, found: Accelerators, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        resolve(name, found)
    assert caught.value.exit_code == 3
    assert "--device cpu" in caught.value.remedy


@pytest.mark.parametrize(
    ("device", "refused"),
    [(CPU, {"fp16"}), (AMPERE, set()), (TURING, {"bf16"}), (MPS, {"bf16"})],
)
def test_a_device_takes_the_dtypes_it_computes_in(device: Device, refused: set[str]) -> None:
    for dtype in ("fp32", "bf16", "fp16", "int4", "int8", "auto"):
        if dtype in refused:
            with pytest.raises(ConfigError):
                check_dtype(device, dtype)
        else:
            check_dtype(device, dtype)
    check_dtype(device, device.half)  # what auto takes there


def test_the_kernel_names_what_decides_the_last_bits() -> None:
    assert kernel_on(AMPERE, "int4") == "cuda-sm86-tinygemm32"
    assert kernel_on(AMPERE, "int8") == "cuda-sm86-bf16-tiles"
    assert kernel_on(TURING, "int4") == "cuda-sm75-fp16-tiles"
    assert kernel_on(TURING, "fp32") == "cuda-sm75-tiles"
    assert kernel_on(MPS, "fp16") == "mps-tiles"


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_no_accelerator_is_judged_by_what_was_measured_on_cpus(dtype: str) -> None:
    assert tolerance_of(f"00ff/{dtype}/torch-int4pack32/f32/t2") == TOLERANCES[dtype]
    for device in (AMPERE, TURING, MPS):
        numeric_class = f"00ff/{dtype}/{kernel_on(device, dtype)}/f32/t0"
        assert accelerator_of(numeric_class) == device.kind
        with pytest.raises(BadProof, match="no tolerance is published"):
            tolerance_of(numeric_class)


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 22), st.integers(0, 1 << 40))
def test_the_kv_cache_stays_within_the_device(wanted: int, position: int, free: int) -> None:
    try:
        tokens = kv_tokens_within(wanted, position, free)
    except ConfigError:
        assert free * KV_SHARE < min(wanted, 16) * position
        return
    assert tokens <= wanted
    assert tokens * position <= free * KV_SHARE
    assert tokens == wanted or (tokens + 1) * position > free * KV_SHARE - 1


def test_on_the_cpu_the_cache_is_what_the_operator_says() -> None:
    assert kv_tokens_within(16_384, 1 << 40, None) == 16_384
