"""Requests a minute of each key, and the headers that tell of them."""

import math
import time
from dataclasses import dataclass, field

from plait.gateway.budgets import Key, Rate
from plait.gateway.failure import ApiError


@dataclass(slots=True)
class Rates:
    """One bucket per key; forgotten when the gateway ends."""

    _rates: dict[str, Rate] = field(default_factory=dict)

    def take(self, key: Key) -> dict[str, str]:
        """Count a request; the headers that tell what is left. Raises ``ApiError`` (429)."""
        rate = self._rate(key)
        if rate is None:
            return {}
        if not rate.take(time.monotonic()):
            raise ApiError(
                429,
                f"this key may ask {rate.limit} times a minute",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(rate.next_s),
            )
        return _headers(rate)

    def told(self, key: Key | None) -> dict[str, str]:
        """The headers, without counting."""
        rate = self._rate(key) if key is not None else None
        return {} if rate is None else _headers(rate)

    def _rate(self, key: Key) -> Rate | None:
        if key.rate is None:
            return None
        known = self._rates.get(key.id)
        if known is None or known.limit != key.rate:
            known = self._rates[key.id] = Rate.full(key.rate, time.monotonic())
        return known


def _headers(rate: Rate) -> dict[str, str]:
    return {
        "x-ratelimit-limit-requests": str(rate.limit),
        "x-ratelimit-remaining-requests": str(rate.remaining),
        "x-ratelimit-reset-requests": f"{rate.reset_s:.3f}s",
    }
