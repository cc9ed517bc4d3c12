"""ggml, the library of llama.cpp, through its C interface: weights, graphs, and running them.

The shared object comes in the wheel ``xllamacpp``; its Python module is never imported. Of
ggml's interface (``ggml.h``, ``ggml-backend.h``) only functions over opaque pointers are used, and
one struct. A graph's tensors lie in an ``Arena`` that all graphs of a stage share, as they run one
after the other on its one compute thread; what a graph gives must be copied out before the next.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.errors import LocalProtocolError

PACKAGE = "xllamacpp"
F32, I32, BF16 = 0, 26, 30
"""ggml's codes of types are GGUF's."""
ALIGNMENT = 64
"""Of each tensor in an arena, bytes."""
NODES_MAX = 64
"""Of a graph."""
_ENUM = c_int


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, _ENUM, c_int64]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, _ENUM, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
    "ggml_out_prod": (c_void_p, [c_void_p] * 3),
    "ggml_mul": (c_void_p, [c_void_p] * 3),
    "ggml_add": (c_void_p, [c_void_p] * 3),
    "ggml_concat": (c_void_p, [c_void_p] * 3 + [c_int]),
    "ggml_rms_norm": (c_void_p, [c_void_p] * 2 + [c_float]),
    "ggml_swiglu": (c_void_p, [c_void_p] * 2),
    "ggml_sum_rows": (c_void_p, [c_void_p] * 2),
    "ggml_transpose": (c_void_p, [c_void_p] * 2),
    "ggml_reshape_2d": (c_void_p, [c_void_p] * 2 + [c_int64] * 2),
    "ggml_reshape_3d": (c_void_p, [c_void_p] * 2 + [c_int64] * 3),
    "ggml_cast": (c_void_p, [c_void_p] * 2 + [_ENUM]),
    "ggml_view_3d": (c_void_p, [c_void_p] * 2 + [c_int64] * 3 + [c_size_t] * 3),
    "ggml_rope_ext_inplace": (c_void_p, [c_void_p] * 4 + [c_int] * 3 + [c_float] * 6),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p] * 2),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p] * 2),
    "ggml_backend_tensor_alloc": (_ENUM, [c_void_p] * 3),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_view_init": (_ENUM, [c_void_p]),
    "ggml_backend_graph_compute": (_ENUM, [c_void_p] * 2),
}


def shared_object() -> Path | None:
    """The library's file, if the package is here; nothing of it is run."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))), None)


@cache
def library() -> Any:
    """The functions, typed, and silent; loaded once. Raises ``LocalProtocolError``."""
    path = shared_object()
    if path is None:
        raise LocalProtocolError(f"ggml is not here: the package {PACKAGE} is missing")
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.ggml_log_set(ctypes.cast(_SILENT, c_void_p), None)
    return loaded


_SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


@cache
def _repacking() -> c_void_p | None:
    """The kind of buffer that lays weights out for the fast kernels; None if there is none."""
    lib = library()
    registry = lib.ggml_backend_cpu_reg()
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(_device())
    index = 0
    while kinds[index]:
        if lib.ggml_backend_buft_name(kinds[index]) == b"CPU_REPACK":
            return c_void_p(kinds[index])
        index += 1
    return None


@cache
def _device() -> c_void_p:
    lib = library()
    return c_void_p(lib.ggml_backend_reg_dev_get(lib.ggml_backend_cpu_reg(), 0))


class Constant:
    """A weight in ggml's memory: [outputs, inputs] of a type, or one row of fp32."""

    def __init__(self, raw: npt.NDArray[Any], kind: int, inputs: int, outputs: int = 1) -> None:
        """``raw`` are the bytes as GGUF stores them; they are copied.

        Raises ``LocalProtocolError`` if there is no memory.
        """
        self._context: int | None = None
        self._buffer: int | None = None
        lib = self._lib = library()
        self.inputs = inputs
        fast = _repacking()
        if fast is not None:
            self._allocate(fast, kind, inputs, outputs)
        if fast is None or not self._is_fast():
            self._allocate(lib.ggml_backend_cpu_buffer_type(), kind, inputs, outputs)
        flat = np.ascontiguousarray(raw)
        assert flat.nbytes == lib.ggml_nbytes(self.tensor), (flat.nbytes, kind, inputs, outputs)
        lib.ggml_backend_tensor_set(self.tensor, flat.ctypes.data, 0, flat.nbytes)

    def __del__(self) -> None:
        self._free()

    def _allocate(self, where: c_void_p, kind: int, inputs: int, outputs: int) -> None:
        """Have the tensor in this kind of buffer, and nowhere else."""
        self._free()
        lib = self._lib
        self._context = lib.ggml_init(_InitParams(4 * lib.ggml_tensor_overhead(), None, True))
        self.tensor: int = lib.ggml_new_tensor_2d(self._context, kind, inputs, outputs)
        self._buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(self._context, where)
        if not self._buffer:
            raise LocalProtocolError(f"no memory for a weight of {outputs} by {inputs}")

    def _free(self) -> None:
        if self._buffer:
            self._lib.ggml_backend_buffer_free(self._buffer)
        if self._context:
            self._lib.ggml_free(self._context)
        self._buffer = self._context = None

    def _is_fast(self) -> bool:
        """Whether products with the weights laid out anew exist here."""
        rows = self._lib.ggml_new_tensor_2d(self._context, F32, self.inputs, 1)
        product = self._lib.ggml_mul_mat(self._context, self.tensor, rows)
        return bool(self._lib.ggml_backend_dev_supports_op(_device(), product))


class Arena:
    """Memory that the graphs of a stage share, and the threads that compute them."""

    def __init__(self, size: int, threads: int) -> None:
        lib = self._lib = library()
        self.size = size
        self.buffer = lib.ggml_backend_buft_alloc_buffer(lib.ggml_backend_cpu_buffer_type(), size)
        if not self.buffer:
            raise LocalProtocolError(f"no memory for {size} bytes of activations")
        self.base: int = lib.ggml_backend_buffer_get_base(self.buffer)
        self._backend = lib.ggml_backend_cpu_init()
        lib.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def compute(self, graph: int) -> None:
        """Run a graph. Raises ``LocalProtocolError`` if ggml fails."""
        status = self._lib.ggml_backend_graph_compute(self._backend, graph)
        if status:
            raise LocalProtocolError(f"ggml failed with {status}")

    def __del__(self) -> None:
        if getattr(self, "_backend", None):
            self._lib.ggml_backend_free(self._backend)
            self._lib.ggml_backend_buffer_free(self.buffer)


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary embedding of the first ``heads`` heads of a row.

    Neighbours turn together, as llama's files have them (ggml's mode 0).
    """

    heads: int
    head_size: int
    base: float
    factors: Constant | None


class Graph:
    """A graph over ``rows`` rows while it is built; then run by ``Arena.compute``.

    Methods add an operation and give its tensor. Tensors are [width, rows] in ggml's order of
    dimensions, which is numpy's [rows, width].
    """

    def __init__(self, arena: Arena, rows: int) -> None:
        lib = self._lib = library()
        self.rows = rows
        self._arena = arena
        self._used = 0
        size = NODES_MAX * lib.ggml_tensor_overhead()
        size += lib.ggml_graph_overhead_custom(NODES_MAX, False)
        self._context = lib.ggml_init(_InitParams(size, None, True))
        self.graph: int = lib.ggml_new_graph_custom(self._context, NODES_MAX, False)
        self.places: dict[int, int] = {}
        """Addresses of the tensors' data."""

    def __del__(self) -> None:
        self._lib.ggml_free(self._context)

    def given(self, width: int) -> int:
        """An input, [rows, width] in fp32; positions, [rows] in int32, if ``width`` is 0."""
        if not width:
            return self._placed(self._lib.ggml_new_tensor_1d(self._context, I32, self.rows))
        return self._placed(self._lib.ggml_new_tensor_2d(self._context, F32, width, self.rows))

    def finished(self, result: int) -> None:
        """``result`` is what the graph computes."""
        self._lib.ggml_build_forward_expand(self.graph, result)

    def product(self, weight: int, rows: int) -> int:
        """Rows times a weight."""
        return self._placed(self._lib.ggml_mul_mat(self._context, weight, rows))

    def group_sums(self, rows: int, width: int, group: int) -> int:
        """[rows, width / group]."""
        lib, context, groups = self._lib, self._context, width // group
        split = self._view(lib.ggml_reshape_3d(context, rows, group, groups, self.rows))
        sums = self._placed(lib.ggml_sum_rows(context, split))
        return self._view(lib.ggml_reshape_2d(context, sums, groups, self.rows))

    def outer(self, weight: int, rows: int) -> int:
        """Rows times a weight of fp32 that is stored [inputs, outputs]."""
        turned = self._view(self._lib.ggml_transpose(self._context, rows))
        return self._placed(self._lib.ggml_out_prod(self._context, weight, turned))

    def added(self, one: int, other: int) -> int:
        """The sum; ``other`` may be one row."""
        return self._placed(self._lib.ggml_add(self._context, one, other))

    def normed(self, rows: int, weight: int, epsilon: float) -> int:
        """RMS norm, times a row of weights."""
        mean = self._placed(self._lib.ggml_rms_norm(self._context, rows, epsilon))
        return self._placed(self._lib.ggml_mul(self._context, mean, weight))

    def gated(self, rows: int) -> int:
        """silu of the first half of each row, times the second."""
        return self._placed(self._lib.ggml_swiglu(self._context, rows))

    def turned(self, rows: int, width: int, positions: int, rotary: Rotary) -> int:
        """The rotary embedding of the first heads of rows, which are changed in their place."""
        lib, size, number = self._lib, rotary.head_size, 4
        strides = (size * number, width * number, 0)
        view = lib.ggml_view_3d(self._context, rows, size, rotary.heads, self.rows, *strides)
        factors = None if rotary.factors is None else rotary.factors.tensor
        plain = (rotary.base, 1.0, 0.0, 1.0, 0.0, 0.0)  # no scaling of positions
        return self._view(
            lib.ggml_rope_ext_inplace(
                self._context, self._view(view), positions, factors, size, 0, 0, *plain
            )
        )

    def rounded(self, rows: int) -> int:
        """Rounded to bf16, to the nearest, ties to even; in fp32 again."""
        half = self._placed(self._lib.ggml_cast(self._context, rows, BF16))
        return self._placed(self._lib.ggml_cast(self._context, half, F32))

    def joined(self, parts: Sequence[int]) -> int:
        """Rows side by side."""
        whole = parts[0]
        for part in parts[1:]:
            whole = self._placed(self._lib.ggml_concat(self._context, whole, part, 0))
        return whole

    def _placed(self, tensor: int) -> int:
        place = self._arena.base + self._used
        self._used += -(-self._lib.ggml_nbytes(tensor) // ALIGNMENT) * ALIGNMENT
        if self._used > self._arena.size:
            raise LocalProtocolError(f"{self.rows} rows do not fit {self._arena.size} bytes")
        self._lib.ggml_backend_tensor_alloc(self._arena.buffer, tensor, place)
        self.places[tensor] = place
        return tensor

    def _view(self, tensor: int) -> int:
        self._lib.ggml_backend_view_init(tensor)
        return tensor
