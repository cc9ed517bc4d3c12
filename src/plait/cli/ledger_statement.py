"""``plait ledger statement | invoice``: documents from an audited journal, live or from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.ledger_connection import (
    AuthorityName,
    Network,
    OfSubAccount,
    authority_of,
    network_file,
    uncosigned,
)
from plait.cli.ledger_journal import Output, audited, written
from plait.errors import BadProof, ConfigError

if TYPE_CHECKING:
    from plait.ledger.balances import Entry
    from plait.ledger.statement import Coverage, Invoice, Period, Statement
    from plait.types import AccountId

Journal = Annotated[
    Path | None, typer.Option(help="An exported journal (JSON lines) instead of the ledger.")
]
From = Annotated[str, typer.Option("--from", help="First day or time, ISO 8601, UTC.")]
Until = Annotated[str, typer.Option("--until", help="The first day or time after it, UTC.")]
OfAccount = Annotated[
    str | None,
    typer.Argument(help="A peer id, anybody's: the log is open to all. By default your own."),
]
TreeSize = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of the log's first entries only, so many: makes again what named this tree size.",
    ),
]


def statement(
    first: From,
    until: Until,
    account: OfAccount = None,
    sub_account: OfSubAccount = "",
    journal: Journal = None,
    tree_size: TreeSize = None,
    output: Output = None,
    authority: AuthorityName = None,
    network: Network = None,
) -> None:
    """Write an account's balances and movements in a period: canonical JSON.

    The journal is audited first (see plait ledger audit): exit code 1 if it is false. The
    document names the tree it was made from and until when it is complete. Anybody with the
    log gets the same bytes for the same --tree-size.

    Example: plait ledger statement --from 2026-11-01 --until 2026-12-01
    """
    from plait.ledger.statement import make_statement

    name, period = _account(account, network), _period(first, until)
    entries, coverage = _entries(journal, network, tree_size, authority)
    document = make_statement(entries, name, period, sub_account)
    _write(output, document, coverage)


def invoice(
    first: From,
    until: Until,
    account: OfAccount = None,
    sub_account: OfSubAccount = "",
    journal: Journal = None,
    tree_size: TreeSize = None,
    output: Output = None,
    authority: AuthorityName = None,
    network: Network = None,
) -> None:
    """Write what an account was charged in a period, per session and payee: canonical JSON.

    The journal is audited first (see plait ledger audit): exit code 1 if it is false. The
    document names the tree it was made from and until when it is complete. Anybody with the
    log gets the same bytes for the same --tree-size.
    """
    from plait.ledger.statement import make_invoice

    name, period = _account(account, network), _period(first, until)
    entries, coverage = _entries(journal, network, tree_size, authority)
    document = make_invoice(entries, name, period, sub_account)
    _write(output, document, coverage)


def _account(account: str | None, network: Path | None) -> "AccountId":
    from plait.cli.ledger_connection import own_peer, peer
    from plait.types import AccountId

    return AccountId(peer(account) if account else own_peer(network))


def _period(first: str, until: str) -> "Period":
    from plait.ledger.statement import Period

    period = Period(_milliseconds(first), _milliseconds(until))
    if period.from_ms >= period.until_ms:
        raise ConfigError(f"the period from {first} until {until} is empty")
    return period


def _milliseconds(text: str) -> int:
    from datetime import UTC, datetime, timedelta

    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"not a date or time: {text}", remedy="write 2026-11-30") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def _entries(
    journal: Path | None, network: Path | None, tree_size: int | None, authority: str | None
) -> "tuple[list[Entry], Coverage]":
    """The log's first entries, audited; all that its checkpoint signs, or fewer if asked."""
    from plait.cli.output import status
    from plait.ledger.balances import entry_from_payload
    from plait.ledger.merkle import leaf_hash, root_of
    from plait.ledger.statement import Coverage

    source, report = audited(journal, network, None, authority)
    if report.violations:
        raise BadProof(f"the journal is false: {report.violations[0]}", remedy="plait ledger audit")
    size = report.tree_size if tree_size is None else tree_size
    if size > report.tree_size:
        raise ConfigError(f"the checkpoint covers {report.tree_size} entries, not {size}")
    leaves = [payload for page in source.pages for payload in page.entries][:size]
    entries, root = [*map(entry_from_payload, leaves)], root_of(map(leaf_hash, leaves))
    if lacking := uncosigned(source.checkpoint, network_file(network)):
        status(f"note: {lacking}")
    origin = authority_of(network, source.checkpoint).log_origin
    return entries, Coverage.of(entries, origin, root)


def _write(output: Path | None, document: "Statement | Invoice", coverage: "Coverage") -> None:
    import sys

    try:
        encoded = document.encoded(coverage)
    except ValueError as error:
        raise BadProof(f"the journal's numbers cannot be written: {error}") from error
    with written(output) as file:
        file.write(encoded.decode() + "\n")
    if not coverage.covers(document.period):
        print(
            f"note: not complete: the log's first {coverage.tree_size} entries reach until "
            f"{_time(coverage.complete_until_ms)}, the period goes on",
            file=sys.stderr,
        )


def _time(at_ms: int) -> str:
    from datetime import UTC, datetime, timedelta

    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at_ms)
    except OverflowError:  # whatever an authority wrote
        return f"{at_ms} ms"
    return moment.isoformat(timespec="milliseconds")
