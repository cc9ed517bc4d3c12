"""``plait ledger``: accounts, history and the log."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.ledger_connection import (
    Account,
    Json,
    Network,
    OfSubAccount,
    ask,
    authority,
    checked_amount,
    issuer_key,
    network_file,
    now_ms,
    order_number,
    peer,
    query,
)
from plait.cli.ledger_journal import audit, export
from plait.cli.ledger_judge import judge
from plait.cli.ledger_statement import invoice, statement
from plait.cli.ledger_sub_accounts import plain_use, sub_account, sub_account_line, sub_accounts
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.ledger.service.remote import AccountState, RemoteLedger
    from plait.ledger.sub_accounts import SubAccountUse
    from plait.types import Digest

app = typer.Typer(help="Accounts, history and the log.", no_args_is_help=True)


@app.command()
def balance(account: Account = None, network: Network = None, json_output: Json = False) -> None:
    """Show what an account may spend and what is set aside in sessions, in microcredits."""
    from plait.cli.output import emit_json

    name, asked, cert = query(network, account)

    async def read(ledger: "RemoteLedger") -> "tuple[AccountState, list[SubAccountUse]]":
        return await ledger.account(asked, cert), await ledger.sub_accounts(asked, cert)

    state, shares = ask(network, read)
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
def issue(
    account: Annotated[str, typer.Argument(help="The peer id to credit.")],
    amount: Annotated[int, typer.Argument(min=1, help="Microcredits.")],
    order_id: Annotated[
        str | None, typer.Option(help="Hexadecimal; the same id is booked once. Random if absent.")
    ] = None,
    memo: Annotated[str, typer.Option(help="A note in the signed order.")] = "",
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Give an account new credit. Only the network's issuer can."""
    from plait.cli.output import emit_json
    from plait.envelope import seal
    from plait.v1.ledger_pb2 import IssueOrder

    order = IssueOrder(
        network_id=network_file(network).network_id,
        account=peer(account),
        amount=checked_amount(amount),
        order_id=order_number(order_id),
        memo=memo,
        issued_ms=now_ms(),
    )
    envelope = seal(issuer_key(network), order)
    index = ask(network, lambda ledger: ledger.issue(envelope))
    if json_output:
        emit_json(
            {
                "account": account,
                "amount_microcredits": amount,
                "order_id": order.order_id,
                "entry_index": index,
            }
        )
    else:
        print(f"entry {index}: {amount} microcredits to {account} (order {order.order_id.hex()})")


@app.command()
def limit(
    account: Annotated[str, typer.Argument(help="The peer id that may owe.")],
    amount: Annotated[int, typer.Argument(min=0, help="Microcredits below zero; 0: prepaid.")],
    order_id: Annotated[
        str | None, typer.Option(help="Hexadecimal; the same id is booked once. Random if absent.")
    ] = None,
    memo: Annotated[str, typer.Option(help="A note in the signed order.")] = "",
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Let an account stand below zero (mutual credit). Only the network's issuer can."""
    from plait.cli.output import emit_json
    from plait.envelope import seal
    from plait.v1.ledger_pb2 import LimitOrder

    order = LimitOrder(
        network_id=network_file(network).network_id,
        account=peer(account),
        credit_limit=checked_amount(amount),
        order_id=order_number(order_id),
        memo=memo,
        issued_ms=now_ms(),
    )
    envelope = seal(issuer_key(network), order)
    index = ask(network, lambda ledger: ledger.set_limit(envelope))
    if json_output:
        emit_json(
            {
                "account": account,
                "credit_limit_microcredits": amount,
                "order_id": order.order_id,
                "entry_index": index,
            }
        )
    else:
        print(f"entry {index}: {account} may owe {amount} microcredits")


@app.command()
def history(
    account: Account = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most entries to show.")] = 20,
    sub_account: OfSubAccount = "",
    network: Network = None,
    json_output: Json = False,
) -> None:
    """List the newest entries that touch an account or its sessions, newest first."""
    from plait.cli.output import emit_json, table
    from plait.envelope import encode
    from plait.ledger.balances import entry_from_payload
    from plait.ledger.journal_file import plain_entry

    name, asked, cert = query(network, account, sub_account)
    messages = ask(network, lambda ledger: ledger.history(asked, cert, limit))
    entries = [entry_from_payload(encode(message)) for message in messages]
    if json_output:
        emit_json({"account": name, "entries": [plain_entry(entry) for entry in entries]})
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
def settle(
    folder: Annotated[Path, typer.Argument(help="Where a node keeps its unsettled vouchers.")],
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Present the vouchers of a node that no longer runs. Settling twice pays once."""
    from google.protobuf.message import DecodeError

    from plait.cli.output import emit_json
    from plait.v1.ledger_pb2 import SettleRequest

    try:
        messages = {
            path.name: SettleRequest.FromString(path.read_bytes())
            for path in sorted(folder.iterdir())
            if path.suffix in ("", ".refused")
        }
    except (OSError, DecodeError) as error:
        raise ConfigError(f"cannot read the vouchers in {folder}: {error}") from error

    async def present(ledger: "RemoteLedger") -> dict[str, int]:
        return {
            name: await ledger.settle(message.request, message.payee_cert, message.voucher)
            for name, message in messages.items()
        }

    paid = ask(network, present)
    if json_output:
        emit_json({"paid_microcredits": paid})
    for name, amount in () if json_output else paid.items():
        print(f"{name}: {amount} microcredits paid in all")


@app.command()
def checkpoint(network: Network = None, json_output: Json = False) -> None:
    """Show the log's last signed checkpoint, checked against the network file's keys."""
    from plait.cli.output import emit_json
    from plait.ledger.checkpoint import open_checkpoint
    from plait.ledger.cosignature import open_cosignatures

    named = authority(network)
    note = ask(network, lambda ledger: ledger.checkpoint())
    opened = open_checkpoint(note, named.log_origin, named.log_key)
    cosignatures = open_cosignatures(note, network_file(network).witnesses)
    if json_output:
        emit_json(
            {
                "origin": opened.origin,
                "tree_size": opened.size,
                "root_hash": opened.root,
                "witnesses": [cosignature.name for cosignature in cosignatures],
                "note": note,
            }
        )
    else:
        print(note, end="")


@app.command()
def compare(
    earlier: Annotated[Path, typer.Argument(help="A checkpoint saved before, or got elsewhere.")],
    proof: Annotated[Path, typer.Option(help="Where to write the proof of a fork.")] = Path(
        "fork-proof.json"
    ),
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Check that the log only grew since a checkpoint. Exit code 1 if it did not."""
    from plait.cli.output import emit_json
    from plait.errors import BadProof
    from plait.ledger.checkpoint import open_checkpoint
    from plait.ledger.merkle import verify_consistency

    named = authority(network)
    origin, log_key = named.log_origin, named.log_key
    saved = _read_bytes(earlier).decode(errors="replace")
    known = open_checkpoint(saved, origin, log_key)

    async def fetch(ledger: "RemoteLedger") -> "tuple[str, list[Digest]]":
        note = await ledger.checkpoint()
        size = open_checkpoint(note, origin, log_key).size
        grown = 0 < known.size < size
        return note, await ledger.consistency(known.size, size) if grown else []

    note, hashes = ask(network, fetch)
    current = open_checkpoint(note, origin, log_key)
    if known.size == current.size and known.root != current.root:
        _write_log_fork(proof, origin, saved, note)
        raise BadProof(f"the log forked at size {known.size}: the proof is in {proof}")
    if current.size < known.size:
        raise BadProof(f"the log shrank from {known.size} to {current.size} entries")
    if known.size > 0:
        verify_consistency(known.size, current.size, known.root, current.root, hashes)
    if json_output:
        emit_json({"origin": origin, "earlier_size": known.size, "tree_size": current.size})
    else:
        print(f"{origin} only grew: from {known.size} to {current.size} entries")


@app.command()
def fork(
    proof: Annotated[Path, typer.Argument(help="A fork proof, as a file.")],
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Check offline that somebody signed twice. Exit code 1 if the file proves nothing."""
    from plait.cli.output import emit_json
    from plait.errors import BadProof
    from plait.ledger.fork import check_fork_proof, read_fork_proof

    try:
        opened = read_fork_proof(_read_bytes(proof))
    except ValueError as error:
        raise BadProof(f"{proof} is no fork proof: {error}") from error
    verdict = check_fork_proof(opened, network_file(network))
    if json_output:
        emit_json({"culprit": verdict.culprit, "statement": verdict.statement})
    else:
        print(f"proven: {verdict.culprit} {verdict.statement}")


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


def _write_log_fork(path: Path, origin: str, first: str, second: str) -> None:
    from plait.ledger.fork import LogFork, write_fork_proof

    try:
        path.write_bytes(write_fork_proof(LogFork(origin, (first, second))))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _read_bytes(path: Path) -> bytes:
    from plait.ledger.fork import FORK_BYTES_MAX

    try:
        with path.open("rb") as file:
            return file.read(FORK_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


app.command()(sub_account)
app.command()(sub_accounts)
app.command()(judge)
app.command()(audit)
app.command()(export)
app.command()(statement)
app.command()(invoice)
