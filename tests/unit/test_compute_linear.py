"""The matrices of each dtype: true to the file's weights, and to each row in any company.

Slow because torch takes seconds to import.
"""

from typing import TYPE_CHECKING

import numpy as np
import pytest

from plait.model.gguf_types import BY_NAME, Nibbles

if TYPE_CHECKING:
    import torch

    from plait.compute.linear import Linear

pytestmark = pytest.mark.slow

OUTPUTS, INPUTS = 48, 512
BF16_ROUNDING = 2.0**-8
"""Largest relative error of rounding to bf16, twice over for good measure."""


def stored(name: str, seed: int = 5) -> np.ndarray:
    """Random bytes of a tensor whose scales are plausible numbers."""
    kind, chance = BY_NAME[name], np.random.default_rng(seed)
    groups = OUTPUTS * INPUTS // kind.group
    raw = chance.integers(0, 256, (groups, kind.group_bytes), dtype=np.uint8)
    halves = (0, 2) if name in ("Q4_1", "Q4_K") else (0,)
    for start in halves:
        scales = chance.uniform(-0.1, 0.1, size=(groups, 1)).astype(np.float16)
        raw[:, start : start + 2] = scales.view(np.uint8)
    return raw.reshape(-1)


def planes(name: str) -> tuple[Nibbles, ...]:
    return BY_NAME[name].to_nibbles(stored(name), (OUTPUTS, INPUTS))


def fp32(name: str) -> np.ndarray:
    return BY_NAME[name].to_fp32(stored(name), (OUTPUTS, INPUTS))


def spread(groups: np.ndarray) -> np.ndarray:
    return np.repeat(groups, 32, axis=1)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_other_formats_have_no_planes(name: str) -> None:
    assert planes(name) == ()


def identity() -> "torch.Tensor":
    import torch

    return torch.eye(INPUTS)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
def test_int4_kernels_see_the_files_weights_but_for_bf16_rounding(name: str) -> None:
    """Against gguf's own expansion: multiplying with the identity gives the weights."""
    from plait.compute.linear import Int4Linear, SumLinear

    linear = SumLinear([Int4Linear(plane) for plane in planes(name)])
    bound = np.zeros((OUTPUTS, INPUTS), np.float32)
    for plane in planes(name):
        zero = plane.offset + 8 * plane.scale  # rounded, like the scale and the result
        away = np.abs(plane.codes.astype(np.float32) - 8) * np.abs(spread(plane.scale))
        bound += BF16_ROUNDING * (2 * away + 2 * np.abs(spread(zero)))
    for found in (linear.rows(identity()), linear.item(identity())):
        assert (np.abs(found.t().numpy() - fp32(name)) <= bound + 1e-6).all()


def kernels() -> dict[str, "Linear"]:
    import torch

    from plait.compute.linear import Bf16Linear, Int4Linear, Int8Linear, JoinedLinear

    dense, four = torch.from_numpy(fp32("Q4_1")), Int4Linear(planes("Q4_1")[0])
    return {
        "bf16": Bf16Linear(dense),
        "int8": Int8Linear(dense),
        "int4": four,
        "joined": JoinedLinear([four, Int8Linear(dense)]),
    }


def inputs(rows: int) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.random.default_rng(rows).normal(size=(rows, INPUTS))).float()


@pytest.mark.parametrize(("kernel", "error"), [("bf16", 5e-3), ("int4", 5e-3), ("int8", 1e-2)])
@pytest.mark.parametrize("rows", [1, 5, 40, 150])
def test_products_are_close_to_fp32(kernel: str, error: float, rows: int) -> None:
    import torch

    linear, given = kernels()[kernel], inputs(rows)
    wanted = given @ torch.from_numpy(fp32("Q4_1")).t()
    for found in (linear.rows(given), linear.item(given)):
        assert found.dtype == torch.float32
        assert float((found - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize("kernel", ["bf16", "int4", "int8", "joined"])
def test_a_row_does_not_depend_on_its_company(kernel: str) -> None:
    import torch

    linear, given = kernels()[kernel], inputs(100)
    together = linear.rows(given)
    for start, end in [(0, 1), (7, 9), (30, 34), (99, 100), (60, 100)]:
        assert torch.equal(linear.rows(given[start:end]), together[start:end])


def test_a_row_that_overflows_harms_no_other() -> None:
    import torch

    for name, linear in kernels().items():
        given = inputs(20)
        wanted = linear.rows(given)
        given[3] = 3e38
        found = linear.rows(given)
        others = [row for row in range(20) if row != 3]
        assert torch.equal(found[others], wanted[others]), name


def test_where_no_kernel_adds_up_alike_rows_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.nn import functional

    from plait.compute import linear
    from plait.compute.linear import Fp32Linear, Int4Linear, kernel_of

    weight = torch.from_numpy(fp32("Q4_1"))
    given = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1))
    assert kernel_of("fp32", [Fp32Linear(weight)]) == "onednn-packed"
    monkeypatch.setattr(linear, "packs_alike", lambda outputs, inputs: False)
    single = Fp32Linear(weight)
    assert kernel_of("fp32", [single, Int4Linear(planes("Q4_1")[0])]) == "torch-rows"
    found = single.rows(given)
    assert torch.equal(found[2:4], single.rows(given[2:4]))
    assert torch.equal(found[2], functional.linear(given[2], weight))


@pytest.mark.parametrize("bf16", [True, False])
def test_int4_does_without_bf16_where_the_machine_has_none(
    monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    import torch

    from plait.compute import linear
    from plait.compute.linear import Int4Linear, kernel_of

    monkeypatch.setattr(linear, "has_bf16", lambda: bf16)
    four = Int4Linear(planes("Q4_1")[0])
    assert four.expanded().dtype == (torch.bfloat16 if bf16 else torch.float32)
    wanted = "torch-int4pack32" if bf16 else "torch-int4pack32+onednn-packed"
    assert kernel_of("int4", [four]) == wanted
    assert kernel_of("bf16", [four]) == "onednn-bf16"


@pytest.mark.parametrize(("bf16", "kind"), [(True, "SumLinear"), (False, "Fp32Linear")])
def test_an_8_bit_head_is_fp32_where_the_machine_has_no_bf16(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, kind: str
) -> None:
    import torch

    from plait.compute import linear
    from plait.compute.linear import load_head, load_linear

    monkeypatch.setattr(linear, "has_bf16", lambda: bf16)
    head = load_head(StoredWeights("Q8_0"), "head", "int4")  # type: ignore[arg-type]
    assert type(head).__name__ == kind
    given = inputs(3)
    wanted = given @ torch.from_numpy(fp32("Q8_0")).t()
    assert float((head.rows(given) - wanted).norm() / wanted.norm()) < 5e-3
    layer = load_linear(StoredWeights("Q8_0"), ["layer"], "int4")  # type: ignore[arg-type]
    assert type(layer).__name__ == "SumLinear"
    other = load_linear(StoredWeights("F32"), ["layer"], "int4")  # type: ignore[arg-type]
    assert type(other).__name__ == ("Bf16Linear" if bf16 else "Fp32Linear")


class StoredWeights:
    """Tensors of one format; the part of ``Weights`` that linear layers read."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def nibbles(self, name: str) -> tuple[Nibbles, ...]:
        return planes(self._kind)

    def fp32(self, name: str) -> np.ndarray:
        return fp32(self._kind)
