"""How much a stage takes on: refused early, with a reason and a time to come back. Pure.

A session that would wait too long, or that the KV cache cannot hold, is refused when it is
opened: what has been let in is then served at full speed, and the refused client goes
elsewhere at once. Batch work leaves room for standard work, and that for interactive work.
How many sessions a stage serves at once follows from what a token takes, as it is measured:
one more is taken while a token stays within a multiple of what it takes alone.
"""

from dataclasses import dataclass

from plait.types import Qos

PRIORITY: dict[Qos, int] = {"interactive": 0, "standard": 1, "batch": 2}
"""Of live frames; lower is computed first."""
REPLAY_PRIORITY = 3
"""Rebuilding a cache lets every live session go first."""

RETRY_MS_MIN = 250
RETRY_MS_MAX = 10_000
SESSIONS_ALWAYS = 2
"""So many are taken however slow a token was: else nobody would ever measure it again."""
TOKEN_US_UNNOTICED = 10_000
"""A stage may take so long for a token however fast it is alone."""
BELOW_SHARE = 1.25
"""By how much a client that has fewer sessions here than its equal part of them may lengthen a
token further: those who have many must not shut others out."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """``wait_ms_max`` is the longest predicted queue wait, ``kv_share_max`` the part of the
    KV cache that may be in use afterwards unless nobody else uses it, ``stretch_max`` how
    many times what it takes alone a token may take afterwards."""

    wait_ms_max: int
    kv_share_max: float
    stretch_max: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What one stage takes on at most."""

    sessions_max: int = 64
    sessions_per_client_max: int = 48
    frames_queued_max: int = 16
    """Frames of one session that wait, replayed ones not counted: their rows are bounded."""
    peer_queued_bytes_max: int = 128 * 1024 * 1024
    """Of frames that came from one peer and wait."""
    keep_alive_s_max: int = 3_600
    """For so long at most a prefix is kept although its room is needed."""
    interactive: Threshold = Threshold(2_000, 1.0, stretch_max=4.0)
    standard: Threshold = Threshold(5_000, 0.95, stretch_max=10.0)
    batch: Threshold = Threshold(30_000, 0.75, stretch_max=40.0)

    def threshold(self, qos: Qos) -> Threshold:
        """Of a QoS class."""
        match qos:
            case "interactive":
                return self.interactive
            case "standard":
                return self.standard
            case "batch":
                return self.batch


@dataclass(slots=True)
class CostLine:
    """What it costs to serve several at once: a line, fitted to what is measured.

    ``one_us`` is the cost of one, ``more_us`` what each further one adds. Both are
    exponentially weighted means; while there is only one, ``more_us`` goes back to the
    guess it began with, so that one bad moment is not believed for ever.
    """

    WEIGHT = 0.05
    WEIGHT_TOGETHER = 0.1
    """Shared by those served together: their costs are one measurement, not many."""
    FORGETTING = 0.005
    GUESS = 0.25

    one_us: float
    more_us: float

    @classmethod
    def guess(cls, one_us: float) -> "CostLine":
        """Before anything was measured but the cost of one."""
        return cls(one_us, one_us * cls.GUESS)

    def note(self, count: int, cost_us: float) -> None:
        """Note what one of ``count`` that were served at once has cost."""
        if count <= 1:
            self.one_us += self.WEIGHT * (cost_us - self.one_us)
            self.more_us += self.FORGETTING * (self.one_us * self.GUESS - self.more_us)
            return
        more_us = max(0.0, cost_us - self.one_us) / (count - 1)
        self.more_us += self.WEIGHT_TOGETHER / count * (more_us - self.more_us)

    def cost_us(self, count: int) -> float:
        """The expected cost of one of ``count``."""
        return self.one_us + self.more_us * max(0, count - 1)


@dataclass(frozen=True, slots=True)
class Load:
    """A stage's load when somebody asks. ``soonest_free_ms`` is when the next session is
    predicted to give its pages back; ``token_us`` what a token is predicted to take with one
    session more, ``token_alone_us`` with one alone."""

    kv_tokens_total: int
    kv_tokens_free: int
    wait_ms: int
    sessions: int
    sessions_of_client: int
    clients: int
    """Who have sessions here, and who asks."""
    soonest_free_ms: int
    token_us: float
    token_alone_us: float


@dataclass(frozen=True, slots=True)
class TooMuch:
    """An early refusal."""

    reason: str
    retry_after_ms: int


def too_much(
    load: Load, limits: Limits, qos: Qos, tokens: int, *, resumes: bool = False
) -> TooMuch | None:
    """Why a session of ``tokens`` positions is not taken now; None if it is.

    One that ``resumes`` has begun elsewhere and lost its stage: it is only refused for want
    of room, since what was begun should end.
    """
    later_ms = _within(load.soonest_free_ms)
    reason = _no_room(load, limits, tokens)
    if reason is None and not resumes:
        reason = _kept_for_others(load, limits, qos, tokens)
    if reason is not None:
        return TooMuch(reason, later_ms)
    wait_ms_max = limits.threshold(qos).wait_ms_max
    if load.wait_ms > wait_ms_max and not resumes:
        reason = f"it would wait about {load.wait_ms} ms"
        return TooMuch(reason, _within(load.wait_ms - wait_ms_max))
    return None


def _no_room(load: Load, limits: Limits, tokens: int) -> str | None:
    if load.sessions >= limits.sessions_max:
        return f"all {limits.sessions_max} sessions are taken"
    if load.sessions_of_client >= limits.sessions_per_client_max:
        return f"one client has at most {limits.sessions_per_client_max} sessions here"
    if tokens > load.kv_tokens_free:
        return f"{tokens} KV tokens were asked for, {load.kv_tokens_free} are free"
    return None


def _kept_for_others(load: Load, limits: Limits, qos: Qos, tokens: int) -> str | None:
    threshold = limits.threshold(qos)
    used = load.kv_tokens_total - load.kv_tokens_free
    if used and used + tokens > load.kv_tokens_total * threshold.kv_share_max:
        return f"the KV tokens left are kept for sessions above class {qos}"
    if load.sessions >= SESSIONS_ALWAYS and load.token_us > token_us_max(load, threshold):
        return f"a token would take about {load.token_us / 1000:.0f} ms here"
    return None


def token_us_max(load: Load, threshold: Threshold) -> float:
    """What a token may take here once the session is taken.

    Above what is taken of anybody, only clients with less than their equal part are: so two that
    go on asking come to equal parts, however much more often one of them asks.
    """
    most_us = max(TOKEN_US_UNNOTICED, load.token_alone_us * threshold.stretch_max)
    below = load.sessions_of_client * load.clients < load.sessions
    return most_us * (BELOW_SHARE if below else 1.0)


def _within(time_ms: int) -> int:
    return max(RETRY_MS_MIN, min(time_ms, RETRY_MS_MAX))
