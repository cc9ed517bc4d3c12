"""How much a stage takes on: refused early, with a reason and a time to come back. Pure.

A session that would wait too long, or that the KV cache cannot hold, is refused when it is
opened: what has been let in is then served at full speed, and the refused client goes
elsewhere at once. Batch work leaves room for standard work, and that for interactive work.
"""

from dataclasses import dataclass

from plait.types import Qos

PRIORITY: dict[Qos, int] = {"interactive": 0, "standard": 1, "batch": 2}
"""Of live frames; lower is computed first."""
REPLAY_PRIORITY = 3
"""Rebuilding a cache lets every live session go first."""

RETRY_MS_MIN = 250
RETRY_MS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Threshold:
    """``wait_ms_max`` is the longest predicted queue wait, ``kv_share_max`` the part of the
    KV cache that may be in use afterwards unless nobody else uses it."""

    wait_ms_max: int
    kv_share_max: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What one stage takes on at most."""

    sessions_max: int = 64
    sessions_per_client_max: int = 48
    frames_queued_max: int = 16
    """Frames of one session that wait, replayed ones not counted: their rows are bounded."""
    peer_queued_bytes_max: int = 128 * 1024 * 1024
    """Of frames that came from one peer and wait."""
    interactive: Threshold = Threshold(wait_ms_max=2_000, kv_share_max=1.0)
    standard: Threshold = Threshold(wait_ms_max=5_000, kv_share_max=0.95)
    batch: Threshold = Threshold(wait_ms_max=30_000, kv_share_max=0.75)

    def threshold(self, qos: Qos) -> Threshold:
        """Of a QoS class."""
        match qos:
            case "interactive":
                return self.interactive
            case "standard":
                return self.standard
            case "batch":
                return self.batch


@dataclass(frozen=True, slots=True)
class Load:
    """A stage's load when somebody asks. ``soonest_free_ms`` is when the next session is
    predicted to give its pages back."""

    kv_tokens_total: int
    kv_tokens_free: int
    wait_ms: int
    sessions: int
    sessions_of_client: int
    soonest_free_ms: int


@dataclass(frozen=True, slots=True)
class TooMuch:
    """An early refusal."""

    reason: str
    retry_after_ms: int


def too_much(load: Load, limits: Limits, qos: Qos, tokens: int) -> TooMuch | None:
    """Why a session of ``tokens`` positions is not taken now; None if it is."""
    threshold = limits.threshold(qos)
    later_ms = _within(load.soonest_free_ms)
    if load.sessions >= limits.sessions_max:
        return TooMuch(f"all {limits.sessions_max} sessions are taken", later_ms)
    if load.sessions_of_client >= limits.sessions_per_client_max:
        return TooMuch(
            f"one client has at most {limits.sessions_per_client_max} sessions here", later_ms
        )
    if tokens > load.kv_tokens_free:
        return TooMuch(
            f"{tokens} KV tokens were asked for, {load.kv_tokens_free} are free", later_ms
        )
    used = load.kv_tokens_total - load.kv_tokens_free
    if used and used + tokens > load.kv_tokens_total * threshold.kv_share_max:
        return TooMuch(f"the KV tokens left are kept for sessions above class {qos}", later_ms)
    if load.wait_ms > threshold.wait_ms_max:
        return TooMuch(
            f"it would wait about {load.wait_ms} ms", _within(load.wait_ms - threshold.wait_ms_max)
        )
    return None


def _within(time_ms: int) -> int:
    return max(RETRY_MS_MIN, min(time_ms, RETRY_MS_MAX))
