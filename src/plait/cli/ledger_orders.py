"""``plait ledger issue | limit | settle``: what is booked with every authority of a network."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from plait.cli.ledger_connection import (
    Json,
    Network,
    ask_quorum,
    authorities,
    checked_amount,
    issuer_key,
    network_file,
    now_ms,
    order_number,
    peer,
)
from plait.errors import ConfigError, NetworkError, PlaitError

if TYPE_CHECKING:
    from plait.ledger.service.polling import Poll
    from plait.ledger.service.remote import RemoteLedger
    from plait.v1.ledger_pb2 import SettleRequest

OrderId = Annotated[
    str | None,
    typer.Option(
        help="Hexadecimal; the same id is booked once, so it can be given again. Random if absent."
    ),
]
Memo = Annotated[str, typer.Option(help="A note in the signed order.")]

Result = TypeVar("Result")


def issue(
    account: Annotated[str, typer.Argument(help="The peer id to credit.")],
    amount: Annotated[int, typer.Argument(min=1, help="Microcredits.")],
    order_id: OrderId = None,
    memo: Memo = "",
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Give an account new credit. Only the network's issuer can.

    In a committee a quorum of authorities must book it. Repeat the command with the same
    --order-id for those that did not: it is booked once at each.
    """
    from plait.envelope import seal
    from plait.v1.ledger_pb2 import IssueOrder

    number = order_number(order_id)
    order = IssueOrder(amount=checked_amount(amount), **_common(network, account, number, memo))
    _warn_of_new(network, account)
    envelope = seal(issuer_key(network), order)
    poll = _booked(network, "issue", number, lambda ledger: ledger.issue(envelope))
    figures = {"account": account, "amount_microcredits": amount}
    text = f"{amount} microcredits to {account}"
    _tell_order(poll, number, figures, text, as_json=json_output)


def limit(
    account: Annotated[str, typer.Argument(help="The peer id that may owe.")],
    amount: Annotated[int, typer.Argument(min=0, help="Microcredits below zero; 0: prepaid.")],
    order_id: OrderId = None,
    memo: Memo = "",
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Let an account stand below zero (mutual credit). Only the network's issuer can.

    In a committee a quorum of authorities must book it. Repeat the command with the same
    --order-id for those that did not: it is booked once at each.
    """
    from plait.envelope import seal
    from plait.v1.ledger_pb2 import LimitOrder

    number, credit_limit = order_number(order_id), checked_amount(amount)
    order = LimitOrder(credit_limit=credit_limit, **_common(network, account, number, memo))
    envelope = seal(issuer_key(network), order)
    poll = _booked(network, "limit", number, lambda ledger: ledger.set_limit(envelope))
    figures = {"account": account, "credit_limit_microcredits": amount}
    text = f"{account} may owe {amount} microcredits"
    _tell_order(poll, number, figures, text, as_json=json_output)


def settle(
    folder: Annotated[Path, typer.Argument(help="Where a node keeps its unsettled vouchers.")],
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Present the vouchers of a node that no longer runs. Settling twice pays once.

    In a committee a quorum of authorities must book each; what is refused does not keep the
    others from being paid, and ends the command with the refusal's exit code.
    """
    from plait.cli.output import emit_json, status

    polls = {
        name: ask_everybody(network, _presented(message))
        for name, message in _vouchers_in(folder).items()
    }
    refused = {
        name: error
        for name, poll in polls.items()
        if (error := poll.shortfall(f"settle {name}")) is not None
    }
    paid = {name: poll.confirmed() for name, poll in polls.items() if name not in refused}
    if json_output:
        emit_json(
            {
                "paid_microcredits": paid,
                "booked": {name: len(polls[name].answers) for name in paid},
                "authorities": len(authorities(network)),
                "refused": {name: str(error) for name, error in refused.items()},
            }
        )
    for name, amount in () if json_output else paid.items():
        print(f"{name}: {amount} microcredits paid in all{_count(polls[name])}")
    for name in paid:
        tell_missing(polls[name], "settle again")
    for error in refused.values():
        status(str(error))
    if refused:
        raise typer.Exit(next(iter(refused.values())).exit_code)


def ask_everybody(
    network: Path | None, question: "Callable[[RemoteLedger], Coroutine[Any, Any, Result]]"
) -> "Poll[Result]":
    """Put one question to all authorities, and wait for each."""
    import asyncio

    from plait.ledger.service.polling import ask_all

    return asyncio.run(ask_all(authorities(network), question))


def tell_missing(poll: "Poll[Any]", remedy: str) -> None:
    """Say on stderr which authorities have not booked what a quorum has, and what to do."""
    from plait.cli.output import status

    for authority, error in poll.failures:
        status(f"not booked by {authority.log_origin}: {error}")
    if poll.failures:
        status(f"try: {remedy}")


def plain_poll(poll: "Poll[Any]") -> dict[str, Any]:
    """Who booked, as JSON has it."""
    return {
        "booked": len(poll.answers),
        "authorities": poll.asked,
        "missing": [
            {"authority": authority.log_origin, "peer": authority.peer, "reason": str(error)}
            for authority, error in poll.failures
        ],
    }


def _common(network: Path | None, account: str, order_id: bytes, memo: str) -> dict[str, Any]:
    """What every order says."""
    return {
        "network_id": network_file(network).network_id,
        "account": peer(account),
        "order_id": order_id,
        "memo": memo,
        "issued_ms": now_ms(),
    }


def _booked(
    network: Path | None,
    what: str,
    order_id: bytes,
    question: "Callable[[RemoteLedger], Coroutine[Any, Any, int]]",
) -> "Poll[int]":
    """Have an order booked by all; raises unless a quorum has."""
    poll = ask_everybody(network, question)
    error = poll.shortfall(what)
    if error is None:
        return poll
    if poll.answers or _unheard(poll.failures):
        # Some have it, or may: the same order must be given again, not another.
        error.remedy = error.remedy or _again(order_id)
    raise error


def _unheard(failures: tuple[tuple[Any, PlaitError], ...]) -> bool:
    return any(isinstance(error, NetworkError) for _, error in failures)


def _tell_order(
    poll: "Poll[int]", order_id: bytes, figures: dict[str, Any], text: str, *, as_json: bool
) -> None:
    from plait.cli.output import emit_json

    index = poll.results[0]
    if as_json:
        entries = {authority.log_origin: entry for authority, entry in poll.answers}
        emit_json(
            {
                **figures,
                "order_id": order_id,
                "entry_index": index,
                "entries": entries,
                **plain_poll(poll),
            }
        )
    else:
        print(f"entry {index}: {text} (order {order_id.hex()}){_count(poll)}")
    tell_missing(poll, _again(order_id))


def _again(order_id: bytes) -> str:
    return f"the same command again with --order-id {order_id.hex()}"


def _count(poll: "Poll[Any]") -> str:
    many = poll.asked > 1
    return f", booked by {len(poll.answers)} of {poll.asked} authorities" if many else ""


def _warn_of_new(network: Path | None, account: str) -> None:
    """A peer id has no checksum: say so if nobody has ever heard of the account."""
    from plait.cli.ledger_connection import query_by_issuer
    from plait.cli.output import status

    asked = query_by_issuer(network, account)
    try:
        poll = ask_quorum(network, "history", lambda ledger: ledger.history(asked, None, 1))
    except PlaitError:
        return  # booking fails for the same reason, and says it
    if not any(poll.results):
        status(f"the account {account} is new to the ledger: check that it is the right peer id")


def _vouchers_in(folder: Path) -> "dict[str, SettleRequest]":
    from google.protobuf.message import DecodeError

    from plait.v1.ledger_pb2 import SettleRequest

    try:
        return {
            path.name: SettleRequest.FromString(path.read_bytes())
            for path in sorted(folder.iterdir())
            if path.suffix in ("", ".refused")
        }
    except (OSError, DecodeError) as error:
        raise ConfigError(f"cannot read the vouchers in {folder}: {error}") from error


def _presented(
    message: "SettleRequest",
) -> "Callable[[RemoteLedger], Coroutine[Any, Any, int]]":
    from plait.ledger.service.remote import voucher_in

    return lambda ledger: ledger.settle(message.request, message.payee_cert, voucher_in(message))
