"""ggml, the library of llama.cpp, through its C interface: weights, memory, and running graphs.

The shared object comes in the wheel ``xllamacpp``; its Python module is never imported. Of
ggml's interface (``ggml.h``, ``ggml-backend.h``) functions over opaque pointers are used, one
struct, and, where graphs read the KV cache, fields of tensors that are looked for
(``ggml_graph.py``). Tensors of graphs lie in an ``Arena``, which many share: they run one after
the other on a stage's one compute thread, and what a graph gives must be copied out before the
next.
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.errors import LocalProtocolError

PACKAGE = "xllamacpp"
F32, I32, I64, BF16 = 0, 26, 27, 30
"""ggml's codes of types are GGUF's."""
ALIGNMENT = 64
"""Of each tensor in an arena, bytes."""
_ENUM = c_int


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_used_mem": (c_size_t, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, _ENUM, c_int64]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, _ENUM, c_int64, c_int64]),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, _ENUM, c_int64, c_int64, c_int64]),
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
    "ggml_get_rows": (c_void_p, [c_void_p] * 3),
    "ggml_set_rows": (c_void_p, [c_void_p] * 4),
    "ggml_soft_max_ext_inplace": (c_void_p, [c_void_p] * 3 + [c_float] * 2),
    "ggml_view_3d": (c_void_p, [c_void_p] * 2 + [c_int64] * 3 + [c_size_t] * 3),
    "ggml_rope_ext_inplace": (c_void_p, [c_void_p] * 4 + [c_int] * 3 + [c_float] * 6),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
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
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:  # it needs OpenMP's library, which small systems lack
        message = f"ggml cannot be loaded ({error}); --dtype int4/mlas does without it"
        raise LocalProtocolError(message) from error
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
        self._context = lib.ggml_init(InitParams(4 * lib.ggml_tensor_overhead(), None, True))
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


class Foreign:
    """Somebody else's memory, which has to stay where it is, for ggml to read and to write."""

    def __init__(self, address: int, size: int) -> None:
        self._lib = library()
        self.buffer: int = self._lib.ggml_backend_cpu_buffer_from_ptr(address, size)
        if not self.buffer:
            raise LocalProtocolError(f"ggml takes no memory at {address}")

    def __del__(self) -> None:
        if getattr(self, "buffer", None):
            self._lib.ggml_backend_buffer_free(self.buffer)
