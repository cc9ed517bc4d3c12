"""``plait ledger``: accounts, history and the log."""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar

import typer

from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.ledger.balances import Entry
    from plait.ledger.service.remote import RemoteLedger
    from plait.network_file import Authority, NetworkFile
    from plait.types import Digest
    from plait.v1.identity_pb2 import SignedEnvelope

app = typer.Typer(help="Accounts, history and the log.", no_args_is_help=True)

Network = Annotated[
    Path | None, typer.Option(help="Network file; by default the last testnet started.")
]
Account = Annotated[
    str | None, typer.Argument(help="A peer id; by default your own. Others need the issuer's key.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]

CERT_TTL_MS = 600_000

Result = TypeVar("Result")


@app.command()
def balance(account: Account = None, network: Network = None, json_output: Json = False) -> None:
    """Show what an account may spend and what is set aside in sessions, in microcredits."""
    from plait.cli.output import emit_json

    name, query, cert = _query(network, account)
    state = _ask(network, lambda ledger: ledger.account(query, cert))
    if json_output:
        emit_json(
            {
                "account": name,
                "available_microcredits": state.available,
                "pending_microcredits": state.pending,
                "next_sequence": state.next_sequence,
            }
        )
    else:
        print(f"{name}: {state.available} microcredits available, {state.pending} set aside")


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
    import secrets

    from plait.cli.output import emit_json
    from plait.envelope import seal
    from plait.types import checked_u64
    from plait.v1.ledger_pb2 import IssueOrder

    try:
        number = bytes.fromhex(order_id) if order_id else secrets.token_bytes(16)
        checked_u64(amount, "the amount")
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"the order cannot be signed: {error}") from error
    order = IssueOrder(
        network_id=_network_file(network).network_id,
        account=_peer(account),
        amount=amount,
        order_id=number,
        memo=memo,
        issued_ms=_now_ms(),
    )
    envelope = seal(_issuer_key(network), order)
    index = _ask(network, lambda ledger: ledger.issue(envelope))
    if json_output:
        emit_json(
            {
                "account": account,
                "amount_microcredits": amount,
                "order_id": number,
                "entry_index": index,
            }
        )
    else:
        print(f"entry {index}: {amount} microcredits to {account} (order {number.hex()})")


@app.command()
def history(
    account: Account = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most entries to show.")] = 20,
    network: Network = None,
    json_output: Json = False,
) -> None:
    """List the newest entries that touch an account or its sessions, newest first."""
    from plait.cli.output import emit_json, table
    from plait.envelope import encode
    from plait.ledger.balances import entry_from_payload

    name, query, cert = _query(network, account)
    messages = _ask(network, lambda ledger: ledger.history(query, cert, limit))
    entries = [entry_from_payload(encode(message)) for message in messages]
    if json_output:
        emit_json({"account": name, "entries": [_plain(entry) for entry in entries]})
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

    paid = _ask(network, present)
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

    authority = _authority(network)
    note = _ask(network, lambda ledger: ledger.checkpoint())
    opened = open_checkpoint(note, authority.log_origin, authority.log_key)
    cosignatures = open_cosignatures(note, _network_file(network).witnesses)
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

    authority = _authority(network)
    origin, log_key = authority.log_origin, authority.log_key
    saved = _read_bytes(earlier).decode(errors="replace")
    known = open_checkpoint(saved, origin, log_key)

    async def fetch(ledger: "RemoteLedger") -> "tuple[str, list[Digest]]":
        note = await ledger.checkpoint()
        size = open_checkpoint(note, origin, log_key).size
        grown = 0 < known.size < size
        return note, await ledger.consistency(known.size, size) if grown else []

    note, hashes = _ask(network, fetch)
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
    verdict = check_fork_proof(opened, _network_file(network))
    if json_output:
        emit_json({"culprit": verdict.culprit, "statement": verdict.statement})
    else:
        print(f"proven: {verdict.culprit} {verdict.statement}")


@app.command()
def audit(network: Network = None, json_output: Json = False) -> None:
    """Recompute the whole journal: debits, credits, balances, and the signed root.

    Exit code 1 if anything does not hold.
    """
    from plait.cli.output import emit_json
    from plait.ledger.checkpoint import open_checkpoint
    from plait.ledger.journal_audit import audit_journal

    file, authority = _network_file(network), _authority(network)

    async def fetch(ledger: "RemoteLedger") -> tuple[str, list[bytes]]:
        note = await ledger.checkpoint()
        return note, [payload async for payload in ledger.export()]

    note, payloads = _ask(network, fetch)
    signed = open_checkpoint(note, authority.log_origin, authority.log_key)
    report = audit_journal(file.network_id, payloads, signed)
    if json_output:
        emit_json(report)
    else:
        print(f"{report.entries} entries, {'balanced' if report.balanced else 'NOT balanced'}")
        print(f"root of the first {report.tree_size}: {report.root_hash.hex()}")
        print("\n".join(report.violations) or "the signed checkpoint holds")
    if report.violations:
        raise typer.Exit(1)


@app.command()
def export(
    format: Annotated[
        Literal["csv", "jsonl"], typer.Option(help="csv has a row per line.")
    ] = "jsonl",
    output: Annotated[Path | None, typer.Option(help="A file; by default stdout.")] = None,
    network: Network = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="The same as --format jsonl.")
    ] = False,
) -> None:
    """Write the whole journal, for accountants and auditors."""
    from plait.ledger.balances import entry_from_payload

    async def write(ledger: "RemoteLedger") -> None:
        with _output(output) as file:
            as_json = json_output or format == "jsonl"
            write_entry = _json_writer(file) if as_json else _csv_writer(file)
            async for payload in ledger.export():
                write_entry(entry_from_payload(payload))

    _ask(network, write)


@app.command()
def serve(
    data_dir: Annotated[
        Path | None, typer.Option(help="Keys and journal; by default in the XDG data folder.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: the one in the network file.")] = 0,
    network: Network = None,
) -> None:
    """Run a ledger authority in the foreground until SIGTERM or Ctrl-C."""
    from plait.identity import load_key
    from plait.locate import network_path, node_dir
    from plait.node.config import NodeConfig
    from plait.node.daemon import main

    folder = data_dir or node_dir()
    peer = load_key(folder / "identity.key").peer_id
    for authority in _network_file(network).authorities:
        if authority.peer == peer:
            port = port or int(authority.address.rpartition(":")[2])
    config = NodeConfig(
        name="ledger",
        network_file=network_path(network),
        data_dir=folder,
        roles=frozenset({"ledger"}),
        host=host,
        ledger_port=port,
    )
    raise typer.Exit(main(config))


def _ask(
    network: Path | None, question: "Callable[[RemoteLedger], Coroutine[Any, Any, Result]]"
) -> Result:
    """Put one question to the network's first authority."""
    import asyncio

    async def run() -> Result:
        async with _connection(_authority(network)) as ledger:
            return await question(ledger)

    return asyncio.run(run())


@asynccontextmanager
async def _connection(authority: "Authority") -> "AsyncIterator[RemoteLedger]":
    from plait.ledger.service.remote import RemoteLedger

    ledger = RemoteLedger(authority)
    try:
        yield ledger
    finally:
        await ledger.close()


def _network_file(network: Path | None) -> "NetworkFile":
    from plait.locate import network_path
    from plait.network_file import load_network_file

    return load_network_file(network_path(network))


def _authority(network: Path | None) -> "Authority":
    authorities = _network_file(network).authorities
    if not authorities:
        raise ConfigError("the network file names no ledger authority")
    return authorities[0]


def _query(
    network: Path | None, account: str | None
) -> "tuple[str, SignedEnvelope, SignedEnvelope | None]":
    """The account asked for, a signed query, and the certificate when we are its owner."""
    from plait.envelope import seal
    from plait.identity import load_key
    from plait.ledger.certs import make_key_cert
    from plait.locate import client_dir
    from plait.v1.ledger_pb2 import AccountQuery

    network_id, folder = _network_file(network).network_id, client_dir(network)
    own = load_key(folder / "identity.key")
    name = _peer(account) if account else own.peer_id
    message = AccountQuery(network_id=network_id, account=name, issued_ms=_now_ms())
    if name != own.peer_id:
        return name, seal(_issuer_key(network), message), None
    key = load_key(folder / "ledger.key")
    cert = make_key_cert(own, key.public, network_id, _now_ms(), CERT_TTL_MS, 1)
    return name, seal(key, message), cert


def _issuer_key(network: Path | None) -> Any:
    from plait.identity import load_key
    from plait.locate import issuer_dir

    return load_key(issuer_dir(network) / "issuer.key")


def _peer(account: str) -> str:
    from plait.identity import public_key_of

    try:
        public_key_of(account)
    except ValueError as error:
        raise ConfigError(f"not a peer id: {account}", remedy="plait ledger balance") from error
    return account


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


def _now_ms() -> int:
    import time

    return time.time_ns() // 1_000_000


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    import sys

    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("w", newline="") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _json_writer(file: TextIO) -> "Callable[[Entry], None]":
    import json

    def write(entry: "Entry") -> None:
        # The leaf's bytes too: whoever holds the file can recompute the root.
        file.write(json.dumps({**_plain(entry), "payload": entry.payload.hex()}) + "\n")

    return write


def _csv_writer(file: TextIO) -> "Callable[[Entry], None]":
    import csv

    columns = ["index", "kind", "posted_ms", "session_id", "cause_digest"]
    writer = csv.writer(file)
    writer.writerow([*columns, "account", "debit", "credit"])

    def write(entry: "Entry") -> None:
        plain = _plain(entry)
        head = [plain[column] for column in columns]
        for line in entry.lines:
            writer.writerow([*head, line.account, line.debit, line.credit])

    return write


def _plain(entry: "Entry") -> dict[str, Any]:
    return {
        "index": entry.index,
        "kind": entry.kind.name.lower(),
        "posted_ms": entry.posted_ms,
        "session_id": entry.session_id.hex(),
        "cause_digest": entry.cause.hex(),
        "lines": [
            {"account": line.account, "debit": line.debit, "credit": line.credit}
            for line in entry.lines
        ],
    }
