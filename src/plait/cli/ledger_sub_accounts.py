"""``plait ledger sub-account`` and ``sub-accounts``: shares of an account with limits."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from plait.cli.ledger_connection import (
    Account,
    Json,
    Network,
    ask_quorum,
    checked_amount,
    network_file,
    now_ms,
    query,
)
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.ledger.sub_accounts import SubAccount, SubAccountUse


def sub_account(
    name: Annotated[str, typer.Argument(help="a-z, 0-9, '.', '_', '-'. It is public in the log.")],
    limit: Annotated[
        int, typer.Option(min=0, help="Most microcredits it may ever use; 0: no such limit.")
    ] = 0,
    period: Annotated[
        Literal["day", "week", "month"] | None, typer.Option(help="Of --period-limit; in UTC.")
    ] = None,
    period_limit: Annotated[
        int, typer.Option(min=0, help="Most microcredits it may use in a period.")
    ] = 0,
    close: Annotated[
        bool, typer.Option("--close", help="Nothing may draw on it any more.")
    ] = False,
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Open, change or close a share of your account with limits of its own.

    Sessions draw on it with plait run --sub-account NAME. The ledger refuses what would go
    beyond a limit, however many sessions run at once. Each order replaces all the terms.

    Example: plait ledger sub-account team-a --period month --period-limit 5000000
    """
    from plait.cli.output import emit_json

    if (period is None) != (period_limit == 0):
        raise ConfigError("--period and --period-limit come together")
    terms = _order(
        network, name, checked_amount(limit), period, checked_amount(period_limit), close
    )
    if json_output:
        emit_json(_plain(terms))
    else:
        print(f"{name}: {_words(terms)}")


def sub_accounts(
    account: Account = None, network: Network = None, json_output: Json = False
) -> None:
    """List an account's shares: limits, and what each has used."""
    from plait.cli.output import emit_json
    from plait.ledger.service.committee import newest_uses

    name, asked, cert = query(network, account)
    poll = ask_quorum(network, "sub-accounts", lambda ledger: ledger.sub_accounts(asked, cert))
    uses = newest_uses(poll.results)
    if json_output:
        emit_json({"account": name, "sub_accounts": [plain_use(use) for use in uses]})
    for use in () if json_output else uses:
        print(sub_account_line(use))


def sub_account_line(use: "SubAccountUse") -> str:
    """One sub-account for readers."""
    period = use.terms.period
    within = "" if period is None else f", {use.period_used} in this {period.name.lower()}"
    return (
        f"{use.terms.name}: {use.used} used{within}, {use.pending} of it set aside"
        f" ({_words(use.terms)})"
    )


def plain_use(use: "SubAccountUse") -> dict[str, Any]:
    """One sub-account as JSON has it."""
    return {
        **_plain(use.terms),
        "used_microcredits": use.used,
        "period_used_microcredits": use.period_used,
        "pending_microcredits": use.pending,
    }


def _plain(terms: "SubAccount") -> dict[str, Any]:
    from plait.ledger.journal_file import plain_terms

    return {"name": terms.name, "sequence": terms.sequence, **plain_terms(terms)}


def _words(terms: "SubAccount") -> str:
    parts = ["closed"] if terms.closed else []
    if terms.limit:
        parts.append(f"at most {terms.limit} microcredits")
    if terms.period is not None:
        parts.append(f"at most {terms.period_limit} a {terms.period.name.lower()}")
    return ", ".join(parts) or "no limit of its own"


def _order(
    network: "Network", name: str, limit: int, period: str | None, period_limit: int, close: bool
) -> "SubAccount":
    import asyncio

    from plait.client.account import open_account
    from plait.client.sub_accounts import order_sub_account
    from plait.ledger.notices import NoticeBoard
    from plait.ledger.service.committee import connect
    from plait.ledger.service.notices import NoticeExchange
    from plait.ledger.sub_accounts import BudgetPeriod
    from plait.locate import client_dir

    file, folder = network_file(network), client_dir(network)
    account = open_account(folder, serial=len(file.authorities) > 1)

    async def run() -> "SubAccount":
        notices = NoticeExchange(NoticeBoard(file), file, tuple)
        ledger = await connect(file, notices, folder / "missed")
        try:
            return await order_sub_account(
                ledger,
                account,
                file.network_id,
                now_ms(),
                name,
                limit=limit,
                period=None if period is None else BudgetPeriod[period.upper()],
                period_limit=period_limit,
                closed=close,
            )
        finally:
            await ledger.close()

    return asyncio.run(run())
