"""onnxruntime's parts of a layer: true to the file's weights, each row alike in any company.

Slow because torch and onnxruntime take seconds to import.
"""

import sys
from collections.abc import Sequence

import numpy as np
import pytest

from plait.compute.ort_graph import (
    Dense,
    Matrix,
    Quantised,
    head_graph,
    layer_end_graph,
    projection_graph,
    quantised,
)
from plait.model.gguf_types import BY_NAME, Nibbles

pytestmark = pytest.mark.slow

CODED = ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q6_K", "Q8_0")
FORMATS = (*CODED, "F16", "F32")
INPUTS, OUTPUTS, WIDTH = 256, 80, 96
ROUNDED = 0.012
"""Relative error of a product whose inputs are rounded to 8 bits in groups of 32."""


def weights(name: str, outputs: int, inputs: int, seed: int = 1) -> tuple[Matrix, np.ndarray]:
    """A random matrix in a format, and its exact expansion."""
    kind, chance = BY_NAME[name], np.random.default_rng(seed)
    if name in ("F32", "F16"):
        exact = chance.normal(size=(outputs, inputs)).astype(np.float16).astype(np.float32)
        return Dense(exact), exact
    groups = outputs * inputs // kind.group
    raw = chance.integers(0, 256, (groups, kind.group_bytes), dtype=np.uint8)
    for start in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(name, (0,)):
        scales = chance.uniform(-0.1, 0.1, size=(groups, 1)).astype(np.float16)
        raw[:, start : start + 2] = scales.view(np.uint8)
    exact = kind.to_fp32(raw.reshape(-1), (outputs, inputs))
    found = quantised(kind.to_nibbles(raw.reshape(-1), (outputs, inputs)))
    return (Dense(exact) if found is None else found), exact


def rows(count: int, width: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width), np.float32)


def computed(graph: bytes, *given: np.ndarray) -> np.ndarray:
    import torch

    from plait.compute.ort import Part

    return Part(graph, 1).rows(*(torch.from_numpy(one) for one in given)).numpy()


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_of_each_format_is_the_files(name: str) -> None:
    matrix, exact = weights(name, OUTPUTS, INPUTS)
    assert isinstance(matrix, Quantised) == (name in CODED)
    given = rows(7, INPUTS)
    assert error(computed(head_graph(matrix), given), given @ exact.T) < ROUNDED


@pytest.mark.parametrize("name", CODED)
def test_codes_scales_and_offsets_are_taken_as_they_are(name: str) -> None:
    """Inputs of one 1 a group survive rounding: so the weights themselves come out."""
    matrix, exact = weights(name, OUTPUTS, INPUTS)
    found = computed(head_graph(matrix), np.eye(INPUTS, dtype=np.float32))
    np.testing.assert_allclose(found, exact.T, rtol=0, atol=2e-6 * np.abs(exact).max() * 128)


def test_planes_that_are_no_halves_of_codes_are_not_taken() -> None:
    chance = np.random.default_rng(3)
    low, high = (
        Nibbles(
            chance.integers(0, 16, (16, 32), np.uint8),
            scale := np.full((16, 1), 0.1 + index, np.float32),
            -scale,
        )
        for index in range(2)
    )
    assert quantised([high, low]) is None
    assert quantised([]) is None


def test_weights_are_not_held_twice() -> None:
    from plait.compute.ort import Part

    graph = head_graph(weights("Q4_0", OUTPUTS, INPUTS)[0])
    before = sys.getrefcount(graph)
    part = Part(graph, 1)
    assert sys.getrefcount(graph) == before, part


def silu(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / (1 + np.exp(-values)))


def normed(hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.asarray(hidden / np.sqrt((hidden**2).mean(1, keepdims=True) + 1e-5) * weight)


def test_a_projection_is_of_the_normed_rows() -> None:
    kinds = [("Q4_1", 64), ("Q4_K", 32), ("Q8_0", 32), ("F16", 16)]
    made = [weights(name, outputs, INPUTS, seed) for seed, (name, outputs) in enumerate(kinds)]
    hidden, weight = rows(5, INPUTS), rows(1, INPUTS, 9)[0]
    graph = projection_graph(weight, 1e-5, [matrix for matrix, _ in made])
    wanted = normed(hidden, weight) @ np.concatenate([exact for _, exact in made]).T
    found = computed(graph, hidden)
    assert found.shape == (5, 144)
    assert error(found, wanted) < ROUNDED
    assert error(found[:, -16:], wanted[:, -16:]) < 1e-5  # fp32 ones are not rounded


def layer_end(seed: int = 4) -> tuple[bytes, Sequence[np.ndarray]]:
    output, exact_output = weights("Q4_1", WIDTH, 64, seed)
    gate, exact_gate = weights("Q4_0", 128, WIDTH, seed + 1)
    up, exact_up = weights("Q4_1", 128, WIDTH, seed + 2)
    down, exact_down = weights("Q8_0", WIDTH, 128, seed + 3)
    weight = rows(1, WIDTH, 9)[0]
    graph = layer_end_graph(output, weight, 1e-5, [gate, up], down)
    return graph, (exact_output, weight, exact_gate, exact_up, exact_down)


def test_the_end_of_a_layer_is_attention_output_and_feed_forward() -> None:
    graph, (output, weight, gate, up, down) = layer_end()
    attended, hidden = rows(6, 64), rows(6, WIDTH, 3)
    summed = hidden + attended @ output.T
    inner = normed(summed, weight)
    wanted = summed + (silu(inner @ gate.T) * (inner @ up.T)) @ down.T
    assert error(computed(graph, attended, hidden), wanted) < 3 * ROUNDED


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_its_company(name: str, threads: int) -> None:
    """Alone, in any batch, and across the tiles of a long prompt."""
    import torch

    from plait.compute.ort import Part

    part = Part(head_graph(weights(name, 320, 768)[0]), threads)
    given = torch.from_numpy(rows(300, 768))
    together = part.rows(given)
    for start, end in [(0, 1), (1, 3), (7, 10), (30, 47), (100, 229), (171, 299), (299, 300)]:
        assert torch.equal(part.rows(given[start:end]), together[start:end])
    assert torch.equal(part.rows(given[:257]), together[:257])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_layer_does_not_depend_on_its_company(threads: int) -> None:
    import torch

    from plait.compute.ort import Part

    part = Part(layer_end()[0], threads)
    attended, hidden = torch.from_numpy(rows(200, 64)), torch.from_numpy(rows(200, WIDTH, 3))
    together = part.rows(attended, hidden)
    for start, end in [(0, 1), (1, 3), (7, 10), (30, 47), (60, 189), (199, 200)]:
        alone = part.rows(attended[start:end], hidden[start:end])
        assert torch.equal(alone, together[start:end])


def test_a_row_that_overflows_harms_no_other() -> None:
    import torch

    from plait.compute.ort import Part

    part = Part(layer_end()[0], 1)
    attended, hidden = torch.from_numpy(rows(20, 64)), torch.from_numpy(rows(20, WIDTH, 3))
    wanted = part.rows(attended, hidden)
    attended[3], hidden[8] = 3e38, float("nan")
    found = part.rows(attended, hidden)
    others = [row for row in range(20) if row not in (3, 8)]
    assert torch.equal(found[others], wanted[others])
    assert not torch.isfinite(found[8]).any()
