"""ggml's parts of a layer: true to the file's weights, each row alike in any company.

Slow because torch takes seconds to import.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from plait.compute.ggml import shared_object
from plait.errors import LocalProtocolError
from plait.model.gguf_types import BY_NAME

if TYPE_CHECKING:
    from plait.compute.ggml_layers import Matrix, Program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shared_object() is None, reason="ggml's package is not installed"),
]

FORMATS = ("Q4_0", "Q4_1", "Q4_K")
INPUTS, OUTPUTS, WIDTH = 512, 80, 96
ROUNDED = 0.015
"""Relative error of a product whose inputs are rounded to 8 bits in groups."""


def weights(name: str, outputs: int, inputs: int, seed: int = 1) -> "tuple[Matrix, np.ndarray]":
    """A random matrix in a format, and its exact expansion."""
    from plait.compute.ggml_layers import Matrix

    kind, chance = BY_NAME[name], np.random.default_rng(seed)
    groups = outputs * inputs // kind.group
    raw = chance.integers(0, 256, (groups, kind.group_bytes), dtype=np.uint8)
    for start in (0,) if name == "Q4_0" else (0, 2):
        scales = chance.uniform(-0.1, 0.1, size=(groups, 1)).astype(np.float16)
        raw[:, start : start + 2] = scales.view(np.uint8)
    return Matrix(raw.reshape(outputs, -1), kind, inputs), kind.to_fp32(
        raw.reshape(-1), (outputs, inputs)
    )


def rows(count: int, width: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width), np.float32)


def computed(program: "Program", *given: np.ndarray, threads: int = 1) -> np.ndarray:
    import torch

    from plait.compute.ggml import Arena
    from plait.compute.ggml_layers import Part

    part = Part(program, Arena(8 << 20, threads), None)
    return part.rows(*(torch.from_numpy(one) for one in given)).numpy()


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def normed(hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.asarray(hidden / np.sqrt((hidden**2).mean(1, keepdims=True) + 1e-5) * weight)


def constant(values: np.ndarray) -> Any:
    from plait.compute.ggml import F32, Constant

    return Constant(values, F32, len(values))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 3, 7, 130])
def test_a_matrix_of_each_format_is_the_files(name: str, count: int) -> None:
    import torch

    from plait.compute.ggml_layers import bare_part

    matrix, exact = weights(name, OUTPUTS, INPUTS)
    given = rows(count, INPUTS)
    found = bare_part(matrix, 1).rows(torch.from_numpy(given)).numpy()
    assert error(found, given @ exact.T) < ROUNDED


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1"])
def test_codes_scales_and_offsets_are_taken_as_they_are(name: str) -> None:
    """Inputs of one 127 a group survive rounding: so the weights themselves come out."""
    import torch

    from plait.compute.ggml_layers import bare_part

    matrix, exact = weights(name, OUTPUTS, INPUTS)
    found = bare_part(matrix, 1).rows(127 * torch.eye(INPUTS)).numpy() / 127
    np.testing.assert_allclose(found, exact.T, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_the_same_in_any_company(name: str, threads: int) -> None:
    import torch

    from plait.compute.ggml_layers import bare_part

    part = bare_part(weights(name, OUTPUTS, INPUTS)[0], threads)
    given = torch.from_numpy(rows(150, INPUTS))
    whole = part.rows(given)
    for count in (1, 2, 3, 4, 5, 7, 16, 17, 30, 129):
        for first in (0, 1, 150 - count):
            assert torch.equal(part.rows(given[first : first + count]), whole[first:][:count])


def turned(rows: np.ndarray, positions: np.ndarray, heads: int, factors: np.ndarray) -> np.ndarray:
    """The first ``heads`` heads of 16, neighbours turned together."""
    frequencies = 10_000.0 ** (-np.arange(0, 16, 2) / 16) / factors
    angles = (positions[:, None] * frequencies)[:, None]
    result = rows.reshape(len(rows), -1, 16).copy()
    pairs = result[:, :heads].reshape(len(rows), heads, 8, 2)
    complex_ = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    result[:, :heads] = np.stack([complex_.real, complex_.imag], -1).reshape(len(rows), heads, 16)
    return np.asarray(result.reshape(rows.shape))


@pytest.mark.parametrize("kinds", [("Q4_1", "Q4_1"), ("Q4_0", "Q4_K", "Q4_1")])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_a_projection_is_of_the_normed_rows_its_heads_turned(
    kinds: Sequence[str], biased: bool, divided: bool
) -> None:
    from plait.compute.ggml_graph import Rotary
    from plait.compute.ggml_layers import Projection

    made = [weights(name, 32, INPUTS, seed) for seed, name in enumerate(kinds)]
    hidden, weight = rows(5, INPUTS), rows(1, INPUTS, 9)[0]
    bias = rows(1, 32 * len(kinds), 10)[0]
    matrices = [matrix for matrix, _ in made]
    factors = np.linspace(1, 8, 8, dtype=np.float32) if divided else np.ones(8, np.float32)
    width, heads = 32 * len(kinds), 3
    rotary = Rotary(heads, 16, 10_000.0, constant(factors) if divided else None)
    program = Projection(
        constant(weight), 1e-5, matrices, constant(bias) if biased else None, rotary
    )
    positions = np.array([0, 7, 1, 300, 2_000], np.int32)
    wanted = normed(hidden, weight) @ np.concatenate([exact for _, exact in made]).T
    wanted = turned(wanted + bias if biased else wanted, positions, heads, factors)
    found = computed(program, hidden, positions)
    assert found.shape == (5, width)
    assert error(found, wanted) < ROUNDED


def test_the_end_of_a_layer_is_attention_output_and_feed_forward_in_bf16() -> None:
    import torch

    from plait.compute.ggml_layers import LayerEnd

    output, exact_output = weights("Q4_1", WIDTH, 64, 4)
    gate, exact_gate = weights("Q4_0", 128, WIDTH, 5)
    up, exact_up = weights("Q4_1", 128, WIDTH, 6)
    down, exact_down = weights("Q4_1", WIDTH, 128, 7)
    weight = rows(1, WIDTH, 9)[0]
    program = LayerEnd(output, constant(weight), 1e-5, [gate, up], down)
    attended, hidden = rows(6, 64), rows(6, WIDTH, 3)
    summed = hidden + attended @ exact_output.T
    inner = normed(summed, weight)
    gated = inner @ exact_gate.T
    wanted = summed + (gated / (1 + np.exp(-gated)) * (inner @ exact_up.T)) @ exact_down.T
    found = computed(program, attended, hidden)
    assert error(found, wanted) < 3 * ROUNDED
    assert torch.equal(torch.from_numpy(found).bfloat16().float(), torch.from_numpy(found))
    last = rows(1, WIDTH, 10)[0]
    closing = LayerEnd(output, constant(weight), 1e-5, [gate, up], down, constant(last))
    np.testing.assert_allclose(
        computed(closing, attended, hidden), normed(found, last), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("alike_from", "pads"),
    [(1, {1: 1, 2: 2, 17: 20}), (2, {1: 2, 3: 3, 17: 20}), (4, {1: 4, 5: 8, 16: 16, 17: 20})],
)
def test_rows_are_filled_up_where_company_matters(
    alike_from: int, pads: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from plait.compute.ggml_layers import Part, bare_part

    def by_company(part: Part, count: int, given: Sequence[torch.Tensor]) -> torch.Tensor:
        alone = count < 2 if alike_from == 2 else count % alike_from
        return given[0] + float(alone)

    monkeypatch.setattr(Part, "_computed", by_company)
    part = bare_part(weights("Q4_0", OUTPUTS, INPUTS)[0], 1)
    assert {count: part.pad(count) for count in pads} == pads


def test_products_that_depend_on_company_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.compute.ggml_layers import Part, bare_part

    monkeypatch.setattr(Part, "_computed", lambda part, count, given: given[0] + float(count))
    with pytest.raises(LocalProtocolError, match="depend on the rows beside"):
        bare_part(weights("Q4_0", OUTPUTS, INPUTS)[0], 1)


def test_a_graph_larger_than_its_arena_is_refused() -> None:
    from plait.compute.ggml import Arena
    from plait.compute.ggml_layers import LayerEnd, Part

    square, _ = weights("Q4_0", INPUTS, INPUTS)
    double, _ = weights("Q4_0", 2 * INPUTS, INPUTS)
    program = LayerEnd(square, constant(rows(1, INPUTS)[0]), 1e-5, [double], square)
    with pytest.raises(LocalProtocolError, match="128 rows do not fit"):
        Part(program, Arena(400_000, 1), None)


def test_a_library_that_cannot_be_loaded_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from plait.compute import ggml

    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(ggml, "shared_object", lambda: broken)
    ggml.library.cache_clear()
    with pytest.raises(LocalProtocolError, match=r"broken\.so.*int4/mlas does without"):
        ggml.library()
    ggml.library.cache_clear()


def test_without_its_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.compute import ggml

    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    assert ggml.shared_object() is None
    ggml.library.cache_clear()
    with pytest.raises(LocalProtocolError, match="xllamacpp is missing"):
        ggml.library()
    ggml.library.cache_clear()
