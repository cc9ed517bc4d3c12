"""llama.cpp on the same file, to compare with: one or many sequences in a step.

Through the C interface of the package ``llama_cpp``, where that is installed: the package's
own ``Llama`` class takes one sequence at a time.
"""

import importlib
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plait.errors import LocalProtocolError

_POSITIONS = 512  # of each sequence


def is_installed() -> bool:
    """Whether the package is there."""
    return find_spec("llama_cpp") is not None


class LlamaCpp:
    """A model in llama.cpp with room for ``sequences``, computed by ``threads``."""

    def __init__(self, weights: Path, sequences: int, threads: int) -> None:
        self._c: Any = importlib.import_module("llama_cpp")
        # Keeps it quiet; the callback must outlive the library's use of it.
        self._silence = self._c.llama_log_callback(lambda level, text, data: None)
        self._c.llama_log_set(self._silence, None)
        self._c.llama_backend_init()
        self._model = self._c.llama_model_load_from_file(
            str(weights).encode(), self._c.llama_model_default_params()
        )
        parameters = self._c.llama_context_default_params()
        parameters.n_ctx = _POSITIONS * sequences
        parameters.n_batch = parameters.n_ubatch = _POSITIONS
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = self._c.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise LocalProtocolError("llama.cpp did not take the model")
        self._batch = self._c.llama_batch_init(_POSITIONS, 0, 1)

    def close(self) -> None:
        """Give the memory back."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)

    def prefill_s(self, sequence: int, ids: Sequence[int]) -> float:
        """Seconds of one sequence's rows from position 0, the last one with logits."""
        memory = self._c.llama_get_memory(self._context)
        self._c.llama_memory_seq_rm(memory, sequence, 0, -1)
        last = len(ids) - 1
        return self._decode([(token, at, sequence, at == last) for at, token in enumerate(ids)])

    def step_s(self, position: int, ids: Sequence[int]) -> float:
        """Seconds of one row each of the first ``len(ids)`` sequences, with logits."""
        memory = self._c.llama_get_memory(self._context)
        for sequence in range(len(ids)):
            self._c.llama_memory_seq_rm(memory, sequence, position, -1)
        return self._decode([(token, position, at, True) for at, token in enumerate(ids)])

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> float:
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, logits) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = logits
        started = time.perf_counter()
        failed = self._c.llama_decode(self._context, batch)
        self._c.llama_synchronize(self._context)
        if failed:
            raise LocalProtocolError(f"llama.cpp failed with {failed}")
        return time.perf_counter() - started
