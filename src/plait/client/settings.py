"""What a client is told when it is made; stated once, for the blocking one, too."""

from pathlib import Path
from typing import TypedDict

from plait.ledger.sub_accounts import BudgetPeriod


class ClientSettings(TypedDict, total=False):
    """The keyword arguments of ``AsyncClient`` and ``Client``; all have defaults."""

    account: Path | str | None
    """The folder with the client's keys; by default the one that the commands use."""
    audits: bool
    """Hold the network's audit lottery over its own sessions, in the background, but for
    those that name their peers; see ``client.lottery_keeper``. On by default."""
    host: str | None
    """Layers, such as ``"0:2"`` or ``"0:2,28:30"``, that every route leaves on this machine:
    nodes of the client's own serve them, one process for each span (this needs plait[node]
    and the model's weights), from the first request for a model until the client is left."""
    host_dtype: str
    """The number format of these nodes; ``fp32`` by default."""
    host_device: str
    """Where they compute: ``cpu`` (by default), ``cuda``, …"""
    host_address: str
    """Where the others' nodes reach them; loopback by default."""
    draft: str | None
    """A small local model that drafts for those with its tokenizer (needs torch)."""


class SubAccountLimits(TypedDict, total=False):
    """The terms of a sub-account: microcredits, 0 is no limit."""

    limit: int
    """The most that it may take in all."""
    period: BudgetPeriod | None
    period_limit: int
    """The most that it may take in each period."""
    closed: bool
    """Whether nothing may draw on it any more."""
