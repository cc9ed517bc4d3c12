"""``plait ledger``: accounts, history and the log."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.ledger_compare import compare, fork
from plait.cli.ledger_connection import (
    Account,
    AuthorityName,
    Json,
    Network,
    OfSubAccount,
    ask,
    ask_quorum,
    network_file,
    newest_checkpoint,
    query,
    uncosigned,
    witnesses_of,
)
from plait.cli.ledger_journal import audit, export
from plait.cli.ledger_judge import judge
from plait.cli.ledger_orders import issue, limit, settle
from plait.cli.ledger_statement import invoice, statement
from plait.cli.ledger_sub_accounts import plain_use, sub_account, sub_account_line, sub_accounts

if TYPE_CHECKING:
    from plait.ledger.service.remote import AccountState, RemoteLedger
    from plait.ledger.sub_accounts import SubAccountUse

app = typer.Typer(help="Accounts, history and the log.", no_args_is_help=True)


@app.command()
def balance(
    account: Account = None,
    authority: AuthorityName = None,
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Show what an account may spend and what is set aside in sessions, in microcredits.

    In a committee these are figures that one honest authority at least confirms; with
    --authority they are that one's word.
    """
    from plait.cli.output import emit_json

    name, asked, cert = query(network, account)

    async def read(ledger: "RemoteLedger") -> "tuple[AccountState, list[SubAccountUse]]":
        return await ledger.account(asked, cert), await ledger.sub_accounts(asked, cert)

    source, state, shares = _balances(network, authority, read)
    if json_output:
        emit_json(
            {
                "account": name,
                "available_microcredits": state.available,
                "pending_microcredits": state.pending,
                "credit_limit_microcredits": state.credit_limit,
                "escrow_microcredits": state.escrow,
                "next_sequence": state.next_sequence,
                "sub_accounts": [plain_use(use) for use in shares],
                **source,
            }
        )
    else:
        print(
            f"{name}: {state.available} microcredits available, {state.pending} set aside, "
            f"{state.escrow} earned and in escrow"
        )
        for use in shares:
            print(sub_account_line(use))


@app.command("rotate-key")
def rotate_key(network: Network = None, json_output: Json = False) -> None:
    """Make your account's next ledger key. Running clients use it from their next session on.

    Sessions under way keep the old key; for two minutes more it may also begin something, so
    that no request fails.
    """
    from plait.cli.output import emit_json
    from plait.ledger.service.key_store import rotate_ledger_key
    from plait.locate import client_dir

    serial = rotate_ledger_key(client_dir(network))
    if json_output:
        emit_json({"serial": serial})
    else:
        print(f"the ledger key has the serial {serial} now")


@app.command()
def history(
    account: Account = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most entries to show.")] = 20,
    sub_account: OfSubAccount = "",
    authority: AuthorityName = None,
    network: Network = None,
    json_output: Json = False,
) -> None:
    """List the newest entries that touch an account or its sessions, newest first.

    Of one authority's log: in a committee each has its own.
    """
    from plait.cli.output import emit_json, table
    from plait.envelope import encode
    from plait.ledger.balances import entry_from_payload
    from plait.ledger.journal_file import plain_entry

    name, asked, cert = query(network, account, sub_account)
    named, messages = ask(network, authority, lambda ledger: ledger.history(asked, cert, limit))
    entries = [entry_from_payload(encode(message)) for message in messages]
    if json_output:
        shown = [plain_entry(entry) for entry in entries]
        emit_json({"account": name, "authority": named.peer, "entries": shown})
        return
    rows = [
        (
            entry.index,
            entry.kind.name.lower(),
            line.account,
            line.debit or None,
            line.credit or None,
        )
        for entry in entries
        for line in entry.lines
    ]
    table(["entry", "kind", "account", "debit", "credit"], rows)


@app.command()
def checkpoint(
    authority: AuthorityName = None, network: Network = None, json_output: Json = False
) -> None:
    """Show a log's last signed checkpoint, checked against the network file's keys.

    What it lacks of the witnesses' cosignatures that the network asks for is said on stderr.
    """
    from plait.cli.output import emit_json, status
    from plait.ledger.checkpoint import open_checkpoint

    file = network_file(network)
    named, note = ask(network, authority, lambda ledger: newest_checkpoint(ledger, file))
    opened = open_checkpoint(note, named.log_origin, named.log_key)
    lacking = uncosigned(note, file)
    if json_output:
        emit_json(
            {
                "authority": named.peer,
                "origin": opened.origin,
                "tree_size": opened.size,
                "root_hash": opened.root,
                "witnesses": witnesses_of(note, file),
                "witness_quorum": file.witness_quorum,
                "witnessed": not lacking,
                "note": note,
            }
        )
    else:
        print(note, end="")
    if lacking:
        status(lacking)


@app.command()
def serve(
    data_dir: Annotated[
        Path | None, typer.Option(help="Keys and journal; by default in the XDG data folder.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: the one in the network file.")] = 0,
    database: Annotated[
        str, typer.Option(help="A PostgreSQL database for the journal; by default a file.")
    ] = "",
    network: Network = None,
) -> None:
    """Run a ledger authority in the foreground until SIGTERM or Ctrl-C."""
    from plait.identity import load_key
    from plait.locate import network_path, node_dir
    from plait.node.config import NodeConfig
    from plait.node.daemon import main

    folder = data_dir or node_dir()
    own = load_key(folder / "identity.key").peer_id
    for named in network_file(network).authorities:
        if named.peer == own:
            port = port or int(named.address.rpartition(":")[2])
    config = NodeConfig(
        name="ledger",
        network_file=network_path(network),
        data_dir=folder,
        roles=frozenset({"ledger"}),
        host=host,
        ledger_port=port,
        ledger_database=database,
    )
    raise typer.Exit(main(config))


def _balances(
    network: Path | None,
    authority: str | None,
    read: "Callable[[RemoteLedger], Coroutine[Any, Any, tuple[AccountState, list[SubAccountUse]]]]",
) -> "tuple[dict[str, object], AccountState, list[SubAccountUse]]":
    """Of the named authority, or of a quorum; and whose word it is, as JSON says it."""
    from plait.ledger.committee import faults_max
    from plait.ledger.service.committee import confirmed_state, newest_uses

    if authority is not None:
        named, (state, shares) = ask(network, authority, read)
        return {"authority": named.peer, "answers": 1}, state, shares
    poll = ask_quorum(network, "balance", read)
    state = confirmed_state([state for state, _ in poll.results], faults_max(poll.asked))
    only = poll.answers[0][0].peer if poll.asked == 1 else None
    source: dict[str, object] = {"authority": only, "answers": len(poll.answers)}
    return source, state, newest_uses([uses for _, uses in poll.results])


app.command()(issue)
app.command()(limit)
app.command()(settle)
app.command()(compare)
app.command()(fork)
app.command()(sub_account)
app.command()(sub_accounts)
app.command()(judge)
app.command()(audit)
app.command()(export)
app.command()(statement)
app.command()(invoice)
