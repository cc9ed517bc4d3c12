"""Sub-accounts: named shares of an account, each with limits of its own. Pure.

A sub-account has no pot: credit stays the account's until a reservation takes it, so that
limits may together be more than the balance, and opening and closing move nothing. What a
reservation sets aside counts against the limits at once, and what a void gives back counts
no more. A period is a calendar day, week or month in UTC, and credit counts in the one in
which it was reserved.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from plait.types import AccountId
from plait.v1.ledger_pb2 import SubAccountTerms

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SUB_ACCOUNTS_MAX = 4_096
"""Open ones of one account."""
_DAY_MS = 86_400_000
_MONTH_DAYS_MAX = 31


class BudgetPeriod(IntEnum):
    """What a period limit is for; the numbers of the protocol."""

    DAY = 1
    WEEK = 2
    MONTH = 3


@dataclass(frozen=True, slots=True)
class SubAccount:
    """Terms as the owner last ordered them, microcredits; a limit of 0 is none."""

    account: AccountId
    name: str
    sequence: int
    limit: int = 0
    period: BudgetPeriod | None = None
    period_limit: int = 0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class SubAccountUse:
    """A sub-account's terms and what it has used: spent and held together, microcredits."""

    terms: SubAccount
    used: int
    period_used: int
    pending: int = 0
    """What of it is still held."""


@dataclass(slots=True)
class _Used:
    total: int = 0
    by_day: dict[int, int] = field(default_factory=dict)
    """By the day on which it was reserved, counted from 1970."""

    def add(self, amount: int, at_ms: int) -> None:
        day = at_ms // _DAY_MS
        self.total += amount
        self.by_day[day] = self.by_day.get(day, 0) + amount
        for old in [one for one in self.by_day if one < day - 2 * _MONTH_DAYS_MAX]:
            del self.by_day[old]  # no period reaches so far back

    def since(self, day: int) -> int:
        return sum(amount for one, amount in self.by_day.items() if one >= day)


class SubAccounts:
    """All sub-accounts of a network, and what each has used."""

    def __init__(self) -> None:
        self._terms: dict[AccountId, dict[str, SubAccount]] = {}
        self._used: dict[tuple[AccountId, str], _Used] = {}

    def of(self, account: AccountId) -> Mapping[str, SubAccount]:
        """An account's sub-accounts by name, closed ones too."""
        return self._terms.get(account, {})

    def used(self, account: AccountId, name: str, now_ms: int) -> SubAccountUse:
        """One's terms and use; raises ``KeyError`` if there is none of this name."""
        terms = self._terms[account][name]
        used = self._used.get((account, name), _Used())
        day = now_ms // _DAY_MS
        since = day if terms.period is None else period_start(terms.period, day)
        return SubAccountUse(terms, used.total, used.since(since) if terms.period else 0)

    def order_refused(self, terms: SubAccount) -> str | None:
        """Why an order cannot be booked, if it cannot."""
        if not NAME.fullmatch(terms.name):
            return (
                "a name has 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with one of a-z, 0-9"
            )
        if (terms.period is None) != (terms.period_limit == 0):
            return "a period and its limit come together"
        known = self.of(terms.account)
        expected = known[terms.name].sequence + 1 if terms.name in known else 1
        if terms.sequence != expected:
            return f"the next order for this sub-account has the number {expected}"
        opened = sum(not one.closed for one in known.values())
        if terms.name not in known and (terms.closed or opened >= SUB_ACCOUNTS_MAX):
            return f"it is not open, or the account has {SUB_ACCOUNTS_MAX} open ones already"
        return None

    def refusal(self, account: AccountId, name: str, amount: int, now_ms: int) -> str | None:
        """Why a reservation may not draw on a sub-account, if it may not."""
        if name not in self.of(account):
            return f"the account has no sub-account {name[:64]!r}"
        use = self.used(account, name, now_ms)
        terms = use.terms
        if terms.closed:
            return f"the sub-account {name} is closed"
        if terms.limit and use.used + amount > terms.limit:
            left = max(0, terms.limit - use.used)
            return f"{amount} asked, {left} left of the limit of the sub-account {name}"
        if terms.period is not None and use.period_used + amount > terms.period_limit:
            left = max(0, terms.period_limit - use.period_used)
            period = terms.period.name.lower()
            return f"{amount} asked, {left} left in this {period} of the sub-account {name}"
        return None

    def set(self, terms: SubAccount) -> None:
        """Take an order's terms over."""
        self._terms.setdefault(terms.account, {})[terms.name] = terms

    def use(self, account: AccountId, name: str, amount: int, reserved_ms: int) -> None:
        """Count what a reservation took; below zero what a void of it gave back."""
        self._used.setdefault((account, name), _Used()).add(amount, reserved_ms)


def period_start(period: BudgetPeriod, day: int) -> int:
    """The first day of the period that a day is in; days are counted from 1970."""
    match period:
        case BudgetPeriod.DAY:
            return day
        case BudgetPeriod.WEEK:
            return day - (day + 3) % 7  # 1970 began on a Thursday
        case BudgetPeriod.MONTH:
            return day - _day_of_month(day)


def terms_message(terms: SubAccount) -> SubAccountTerms:
    """The protocol's form of the terms."""
    return SubAccountTerms(
        account=terms.account,
        name=terms.name,
        sequence=terms.sequence,
        limit=terms.limit,
        period=int(terms.period or 0),  # type: ignore[arg-type]
        period_limit=terms.period_limit,
        closed=terms.closed,
    )


def terms_from(message: SubAccountTerms) -> SubAccount:
    """Raises ``ValueError`` for an unknown period."""
    return SubAccount(
        AccountId(message.account),
        message.name,
        message.sequence,
        message.limit,
        BudgetPeriod(message.period) if message.period else None,
        message.period_limit,
        message.closed,
    )


def _day_of_month(day: int) -> int:
    """From 0, in the Gregorian calendar.

    H. Hinnant, "chrono-Compatible Low-Level Date Algorithms": years begin in March.
    """
    day_of_era = (day + 719_468) % 146_097
    year_of_era = (
        day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096
    ) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month = (5 * day_of_year + 2) // 153
    return day_of_year - (153 * month + 2) // 5
