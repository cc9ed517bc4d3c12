"""What a key may do and has left. Pure: values and ``now``, no store and no clock."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from plait.types import Qos

Period = Literal["day", "week", "month", "total"]
_RATE_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Team:
    """Keys that share a budget: microcredits per period, for all of them together."""

    name: str
    budget: int
    period: Period = "month"


@dataclass(frozen=True, slots=True)
class Share:
    """A budget as the ledger keeps it: a sub-account, and its limit."""

    name: str
    budget: int
    period: Period


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key's terms. ``budget`` is microcredits per period, ``rate`` requests a minute;
    None is no limit. ``models`` and ``peers`` empty: all. ``pool`` is its team's budget, which
    bounds it too."""

    id: str
    label: str = ""
    team: str = ""
    budget: int | None = None
    period: Period = "month"
    rate: int | None = None
    models: frozenset[str] = frozenset()
    peers: frozenset[str] = frozenset()
    qos: Qos = "standard"
    created_ms: int = 0
    revoked_ms: int | None = None
    pool: Team | None = None

    @property
    def budgeted(self) -> bool:
        """Whether what it may spend is limited."""
        return self.budget is not None or self.pool is not None

    @property
    def share(self) -> Share | None:
        """Its own budget at the ledger, or else its team's: a session draws on one."""
        if self.budget is not None:
            return Share(self.id, self.budget, self.period)
        if self.pool is None:
            return None
        # The ledger's log is public: it gets no team's name.
        number = hashlib.sha256(self.pool.name.encode()).hexdigest()[:12]
        return Share(f"team-{number}", self.pool.budget, self.pool.period)

    def allows(self, model: str) -> bool:
        """Whether the key may use a model."""
        return not self.models or model in self.models


def day_of(now_ms: int) -> str:
    """The day in UTC, as ``2026-11-25``."""
    return datetime.fromtimestamp(now_ms / 1000, UTC).date().isoformat()


def period_start(period: Period, now_ms: int) -> str:
    """The first day of the period that ``now_ms`` is in (weeks begin on Monday)."""
    today = datetime.fromtimestamp(now_ms / 1000, UTC).date()
    match period:
        case "day":
            return today.isoformat()
        case "week":
            return (today - timedelta(days=today.weekday())).isoformat()
        case "month":
            return today.replace(day=1).isoformat()
        case "total":
            return "0000-00-00"


@dataclass(slots=True)
class Rate:
    """Requests a minute: a bucket that holds ``limit`` and fills evenly."""

    limit: int
    level: float
    at_s: float

    @classmethod
    def full(cls, limit: int, now_s: float) -> "Rate":
        """A bucket nobody has taken from."""
        return cls(limit, float(limit), now_s)

    def take(self, now_s: float) -> bool:
        """Take one request, if there is one left."""
        filled = self.level + (now_s - self.at_s) * self.limit / _RATE_WINDOW_S
        self.level, self.at_s = min(float(self.limit), filled), now_s
        if self.level < 1:
            return False
        self.level -= 1
        return True

    @property
    def remaining(self) -> int:
        """Whole requests left."""
        return int(self.level)

    @property
    def next_s(self) -> float:
        """Seconds until there is one more."""
        return max(0.0, 1 - self.level) * _RATE_WINDOW_S / self.limit

    @property
    def reset_s(self) -> float:
        """Seconds until the bucket is full."""
        return (self.limit - self.level) * _RATE_WINDOW_S / self.limit
