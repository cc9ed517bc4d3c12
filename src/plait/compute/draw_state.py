"""The draws of one session: penalties, biases, grammar, and the history they depend on.

Pure. A draw is a function of (logits, sampling, the ids before it, position), whoever made
the earlier ones: a stage that takes over is given the history and draws alike. In order:

1. Ids in prompt or answer: a positive logit is divided by the repetition penalty, a
   negative one multiplied (Keskar et al., 2019, arXiv:1909.05858).
2. Ids in the answer: minus the presence penalty, and minus the frequency penalty times
   their count (as OpenAI documents them).
3. Biases are added.
4. Ids that the grammar does not allow are left out.
5. ``sampling.choose``: temperature, top_k, top_p, min_p, the keyed noise.

Log-probabilities are the model's own, of the logits before any of this.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plait.compute.grammar import Matcher, Vocabulary
from plait.compute.judging import draw_margin
from plait.compute.sampling import F64, choose, exact_logits, log_total, top_logprobs
from plait.errors import LocalProtocolError, RemoteProtocolError
from plait.types import MILLION, Sampling

Top = tuple[tuple[int, float], ...]
"""(id, log-probability) of the likeliest tokens, most likely first."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token, the log-probability the model gave it, and the likeliest ones.

    ``total`` is the logarithm of the sum of exponentials of the model's logits; ``margin`` is
    how far off a token is that was taken for drawn.
    """

    token_id: int
    logprob: float
    top: Top = ()
    total: float = 0.0
    margin: float = 0.0


class DrawState:
    """Draws the tokens of one session.

    ``context_ids`` are the ids at positions 0, 1, …, of which the first ``prompt_tokens``
    are the prompt; they may be left out when the sampling needs no history. ``vocabulary``
    is needed for a grammar.
    """

    def __init__(
        self,
        sampling: Sampling,
        context_ids: Sequence[int] = (),
        prompt_tokens: int = 0,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._vocabulary = vocabulary
        self._ids = list(context_ids) if sampling.needs_history else []
        self._matcher: Matcher | None = None
        self._followed: list[int] = []
        """The ids that the matcher has taken."""
        self._bias_ids = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in sampling.logit_bias], np.float64) / MILLION

    def draw(self, logits: npt.NDArray[np.float32], position: int) -> Draw:
        """Draw the token at ``position``; what was known from there on is forgotten.

        Raises ``RemoteProtocolError`` for logits that are not finite, a history that does
        not reach up to ``position``, or an answer that does not follow its grammar.
        """
        sampling = self.sampling
        model = exact_logits(logits)
        total = log_total(model)
        wanted = self._wanted(model, position)
        token = choose(wanted, sampling, position)
        if sampling.needs_history:
            self._ids.append(token)
        top = top_logprobs(model, total, sampling.top_logprobs) if sampling.top_logprobs else ()
        return Draw(token, min(0.0, float(model[token] - total)), top, total)

    def take(self, logits: npt.NDArray[np.float32], position: int, token: int) -> Draw:
        """Take ``token`` for the one drawn at ``position``, and measure its margin.

        Raises what ``draw`` raises.
        """
        model = exact_logits(logits)
        margin = draw_margin(self._wanted(model, position), self.sampling, position, token)
        if self.sampling.needs_history:
            self._ids.append(token)
        total = log_total(model)
        known = 0 <= token < len(model)
        logprob = min(0.0, float(model[token] - total)) if known else -math.inf
        return Draw(token, logprob, (), total, margin)

    def _wanted(self, model: F64, position: int) -> F64:
        """The logits with penalties, biases and grammar, at the end of the history."""
        sampling, wanted = self.sampling, model
        if sampling.needs_history:
            self.truncate(position)
            if len(self._ids) < max(position, self._prompt_tokens):
                raise RemoteProtocolError("the ids before the drawn one are not known")
        if sampling.penalises:
            wanted = self._penalised(wanted)
        if len(self._bias_ids):
            wanted = self._biased(wanted)
        if sampling.grammar is not None:
            wanted = self._constrained(wanted)
        return wanted

    def truncate(self, position: int) -> None:
        """Forget the ids at ``position`` and after it; nothing happens if there are none."""
        del self._ids[position:]

    def _penalised(self, logits: F64) -> F64:
        sampling, known = self.sampling, np.array(self._ids, np.int64)
        if len(known) and (known.min() < 0 or known.max() >= len(logits)):
            raise RemoteProtocolError("the history has ids outside the vocabulary")
        logits = logits.copy()
        if sampling.repetition_penalty_micros != MILLION:
            penalty, ids = sampling.repetition_penalty_micros / MILLION, np.unique(known)
            seen = logits[ids]
            logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        ids, counts = np.unique(known[self._prompt_tokens :], return_counts=True)
        logits[ids] -= sampling.presence_penalty_micros / MILLION
        logits[ids] -= counts * (sampling.frequency_penalty_micros / MILLION)
        return logits

    def _biased(self, logits: F64) -> F64:
        if self._bias_ids[-1] >= len(logits):
            raise RemoteProtocolError("logit_bias names an id outside the vocabulary")
        logits = logits.copy()
        logits[self._bias_ids] += self._biases
        return logits

    def _constrained(self, logits: F64) -> F64:
        """Minus infinity for what the grammar forbids; at its end only end tokens remain."""
        allowed = self._follow().allowed()
        ends = [token for token in self.sampling.end_ids if token < len(logits)]
        if len(ends) and allowed[ends].any():
            allowed[ends] = True
        return np.where(allowed, logits, -np.inf)

    def _follow(self) -> Matcher:
        """The matcher, brought to the end of the history."""
        grammar = self.sampling.grammar
        if grammar is None or self._vocabulary is None:
            raise LocalProtocolError("this stage has no vocabulary for grammars")
        answer = [
            token
            for token in self._ids[self._prompt_tokens :]
            if token not in self.sampling.end_ids
        ]
        if self._matcher is None:
            self._matcher = self._vocabulary.matcher(grammar)
        same = 0
        for ours, theirs in zip(self._followed, answer, strict=False):
            if ours != theirs:
                break
            same += 1
        self._matcher.back(len(self._followed) - same)
        self._followed = self._followed[:same]
        self._matcher.take(answer[same:])
        self._followed = answer
        return self._matcher
