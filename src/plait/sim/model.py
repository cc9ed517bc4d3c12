"""The model of the simulation: its tokens depend on every position, layer and token before.

A stage computes by hashing (``plait.testing.compute``), so that a replay that is off by one
row, a position that is missing or a stale epoch's row changes what is drawn.
"""

from dataclasses import dataclass

from plait.compute.port import Work
from plait.testing.accounting import Plot
from plait.testing.compute import FakeStage
from plait.types import ModelShape, Sampling, SessionId, Span

SPANS = (Span(0, 2), Span(2, 4), Span(4, 6))
"""The layers' groups; each has several hosts."""

_PLOT = Plot(spans=SPANS)
SHAPE: ModelShape = _PLOT.shape
MANIFEST = _PLOT.manifest
CONTEXT_TOKENS = 2_048
KV_TOKENS = 4_096


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and how it is to be answered."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling

    def reference(self) -> tuple[int, ...]:
        """The undisturbed answer, without its end token: one stage of all layers."""
        session = SessionId(bytes(16))
        stage = FakeStage(Span(0, SHAPE.layers), SHAPE)
        stage.reserve(session, len(self.prompt_ids) + self.max_tokens, self.sampling)
        answer: list[int] = []
        fed, position = self.prompt_ids, 0
        while len(answer) < self.max_tokens:
            (done,) = stage.step([Work(session, position, fed, None, sample=True)])
            assert done.drawn is not None, done.error
            if done.drawn.ids[0] in self.sampling.end_ids:
                break
            answer.append(done.drawn.ids[0])
            position += len(fed)
            fed = done.drawn.ids
        return tuple(answer)
