"""What a node asks of a compute backend. A backend is driven from one compute thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from plait.types import ModelShape, Sampling, SessionId, Span

Hidden = npt.NDArray[np.float32]
"""Activations, [rows, width]."""


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of one session at positions ``first_position``, ``first_position + 1``, ….

    The first stage is given ``ids``, every other stage ``hidden``. Writing at positions
    that were already written overwrites them and forgets what lay behind. ``sample`` makes
    the last stage draw the token that follows the last row; other stages ignore it.
    """

    session: SessionId
    first_position: int
    ids: tuple[int, ...] | None
    hidden: Hidden | None
    sample: bool = False

    @property
    def rows(self) -> int:
        """How many positions this work covers."""
        return len(self.ids or ()) if self.hidden is None else len(self.hidden)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Drawn tokens and the log-probability the model gave each, before any temperature."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """Outcome of one ``Work``: ``hidden`` from any stage but the last, ``drawn`` from the
    last one if it sampled, or ``error``."""

    hidden: Hidden | None = None
    drawn: Drawn | None = None
    error: Exception | None = None


class StageCompute(Protocol):
    """A span of a model's layers with its KV cache.

    ``reserve`` and ``free`` may be called from another thread while ``step`` runs.
    """

    @property
    def span(self) -> Span:
        """The layers this stage computes."""

    @property
    def shape(self) -> ModelShape:
        """The whole model's shape."""

    @property
    def width(self) -> int:
        """Length of one activation row."""

    @property
    def kv_tokens_total(self) -> int:
        """Capacity of the KV cache, in tokens of all sessions together."""

    @property
    def kv_tokens_free(self) -> int:
        """What is not reserved of it."""

    def reserve(
        self, session: SessionId, tokens: int, sampling: Sampling, span: Span | None = None
    ) -> None:
        """Hold KV pages for ``tokens`` positions. Doing it again for the same session keeps
        what is cached, takes the new sampling and grows the room if needed.

        ``span`` is the part of this stage's layers that the session runs; None is all.
        It takes ids if it starts at layer 0 and draws tokens if it ends at the last layer.

        Raises ``CapacityError`` when the pages are not free, ``RemoteProtocolError`` when
        the session is longer than the model's context.
        """

    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Compute; one outcome per item, in order. A fault in one item becomes its
        ``error`` (``RemoteProtocolError`` when the input is to blame) and leaves its
        session's cache as it was before."""

    def free(self, session: SessionId) -> None:
        """Forget a session and its cache; nothing happens if it is unknown."""

    def numeric_class(self) -> str:
        """Weights, precision, kernels and threads: equal classes agree to rounding."""

    def measure(self) -> tuple[int, int]:
        """(microseconds of one decode step, microseconds per prompt token) through the
        whole span, for the offer. Takes up to a second; needs 80 free KV tokens."""
