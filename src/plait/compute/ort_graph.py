"""ONNX graphs of what a llama layer does between its attentions, over the file's own codes.

A matrix is an operator ``MatMulNBits`` (onnxruntime's): codes of 4 or 8 bits in groups of 32
(16 of Q6_K) with an fp32 scale, less a middle of 8 or 128; inputs are rounded to 8 bits per group
and multiplied as integers (``accuracy_level`` 4), as llama.cpp does. What a format's offset
has beyond that middle is a second, small product in fp32: the sums of each group of inputs
times the offsets. Other formats are fp32 matrices in the same graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from plait.model.gguf_types import Nibbles

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

F32 = npt.NDArray[np.float32]
_OPSET = 18
_IR_VERSION = 9
_CONTRIB = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Quantised:
    """``scale * (code - middle) + extra``, [outputs, inputs]; middle is 8 or 128 by bits."""

    bits: int
    codes: npt.NDArray[np.uint8]
    scale: F32
    """[outputs, inputs / group]; so is ``extra``, zero for formats without an offset."""
    extra: F32

    @property
    def inputs(self) -> int:
        """Length of a row."""
        return int(self.codes.shape[1])

    @property
    def group(self) -> int:
        """How many codes share a scale."""
        return self.inputs // int(self.scale.shape[1])


@dataclass(frozen=True, slots=True)
class Dense:
    """[outputs, inputs] in fp32."""

    weights: F32

    @property
    def inputs(self) -> int:
        """Length of a row."""
        return int(self.weights.shape[1])


Matrix = Quantised | Dense


def quantised(planes: Sequence[Nibbles]) -> Quantised | None:
    """What one plane is in 4 bits, or the two halves of an 8-bit code in 8; else None."""
    if len(planes) == 1:
        (only,) = planes
        return Quantised(4, only.codes, only.scale, only.offset + np.float32(8) * only.scale)
    if len(planes) != 2 or not np.array_equal(planes[0].scale, planes[1].scale * np.float32(16)):
        return None
    high, low = planes
    extra = high.offset + low.offset + np.float32(128) * low.scale
    return Quantised(8, high.codes << np.uint8(4) | low.codes, low.scale, extra)


def projection_graph(
    norm: F32, epsilon: float, matrices: Sequence[Matrix], bias: F32 | None = None
) -> bytes:
    """hidden [rows, inputs] -> the products of its norm with all matrices, side by side, with
    ``bias`` [outputs] added if there is one."""
    graph = _Graph()
    normed = graph.normed("hidden", norm, epsilon)
    found = graph.product(normed, matrices, result="projected" if bias is None else "")
    if bias is not None:
        (found,) = graph.node("Add", [found, graph.constant(bias)], ["projected"])
    return graph.finished({"hidden": len(norm)}, found)


def layer_end_graph(
    output: Matrix, norm: F32, epsilon: float, gate_up: Sequence[Matrix], down: Matrix
) -> bytes:
    """(attended, hidden) -> hidden behind the layer: attention output and feed-forward."""
    graph = _Graph()
    attended = graph.product("attended", [output])
    normed, summed = graph.added_and_normed(attended, "hidden", norm, epsilon)
    both = graph.product(normed, gate_up)
    gate, up = graph.node("Split", [both], ["gate", "up"], axis=1, num_outputs=2)
    (active,) = graph.node("QuickGelu", [gate], contrib=True, alpha=1.0)
    (given,) = graph.node("Mul", [active, up])
    graph.node("Add", [graph.product(given, [down]), summed], ["result"])
    return graph.finished({"attended": output.inputs, "hidden": len(norm)}, "result")


def head_graph(matrix: Matrix) -> bytes:
    """normed [rows, inputs] -> logits."""
    graph = _Graph()
    found = graph.product("normed", [matrix], result="logits")
    return graph.finished({"normed": matrix.inputs}, found)


@dataclass(slots=True)
class _Graph:
    nodes: "list[NodeProto]" = field(default_factory=list)
    constants: "list[TensorProto]" = field(default_factory=list)

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str] = (),
        *,
        contrib: bool = False,
        **attributes: float | int,
    ) -> Sequence[str]:
        from onnx import helper

        outputs = outputs or [f"value{len(self.nodes)}"]
        made = helper.make_node(kind, inputs, outputs, domain=_CONTRIB if contrib else "")
        made.attribute.extend(helper.make_attribute(*pair) for pair in attributes.items())
        self.nodes.append(made)
        return outputs

    def constant(self, array: npt.NDArray[np.generic]) -> str:
        from onnx import numpy_helper

        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def normed(self, hidden: str, weight: F32, epsilon: float) -> str:
        given = [hidden, self.constant(weight)]
        (result,) = self.node("SimplifiedLayerNormalization", given, epsilon=epsilon)
        return result

    def added_and_normed(
        self, one: str, other: str, weight: F32, epsilon: float
    ) -> tuple[str, str]:
        """The norm of a sum, and the sum."""
        self.node(
            "SkipSimplifiedLayerNormalization",
            [one, other, self.constant(weight)],
            ["normed", "", "", "summed"],
            contrib=True,
            epsilon=epsilon,
        )
        return "normed", "summed"

    def product(self, given: str, matrices: Sequence[Matrix], result: str = "") -> str:
        """``given`` times every matrix, side by side; those of one kind are one product."""
        joined = _joined(matrices)
        names = [result] if result else []
        if len(joined) == 1:
            return self._product(given, joined[0], names)
        parts = [self._product(given, matrix, []) for matrix in joined]
        (whole,) = self.node("Concat", parts, names, axis=1)
        return whole

    def _product(self, given: str, matrix: Matrix, names: Sequence[str]) -> str:
        if isinstance(matrix, Dense):
            (found,) = self.node("MatMul", [given, self.constant(matrix.weights.T)], names)
            return found
        extra = bool(matrix.extra.any())
        (found,) = self._integers(given, matrix, () if extra else names)
        if not extra:
            return found
        groups = self.constant(np.array([-1, matrix.scale.shape[1], matrix.group]))
        (grouped,) = self.node("Reshape", [given, groups])
        (sums,) = self.node("ReduceSum", [grouped, self.constant(np.array([2]))], keepdims=0)
        (whole,) = self.node("Gemm", [sums, self.constant(matrix.extra.T), found], names)
        return whole

    def _integers(self, given: str, matrix: Quantised, names: Sequence[str]) -> Sequence[str]:
        outputs, inputs = matrix.codes.shape
        return self.node(
            "MatMulNBits",
            [given, self.constant(_packed(matrix)), self.constant(matrix.scale.reshape(-1))],
            names,
            contrib=True,
            K=inputs,
            N=outputs,
            bits=matrix.bits,
            block_size=matrix.group,
            accuracy_level=4,
        )

    def finished(self, inputs: Mapping[str, int], output: str) -> bytes:
        """The model's bytes; ``inputs`` are names and widths of rows."""
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self.nodes,
            "part",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
                for name, width in inputs.items()
            ],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["rows", None])],
            self.constants,
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        data: bytes = model.SerializeToString()
        return data


def _joined(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Neighbours of one kind put together."""
    found: list[Matrix] = []
    for matrix in matrices:
        both = _put_together(found[-1], matrix) if found else None
        found[-1 if both else len(found) :] = [both or matrix]
    return found


def _put_together(one: Matrix, other: Matrix) -> Matrix | None:
    match one, other:
        case Quantised(), Quantised() if (one.bits, one.group) == (other.bits, other.group):
            return Quantised(
                one.bits,
                np.concatenate([one.codes, other.codes]),
                np.concatenate([one.scale, other.scale]),
                np.concatenate([one.extra, other.extra]),
            )
        case Dense(), Dense():
            return Dense(np.concatenate([one.weights, other.weights]))
        case _:
            return None


def _packed(matrix: Quantised) -> npt.NDArray[np.uint8]:
    """[outputs, groups, bytes of a group]; of 4-bit codes the even ones are the low halves."""
    codes = matrix.codes
    if matrix.bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return codes.reshape(*matrix.scale.shape, -1)
