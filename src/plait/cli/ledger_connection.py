"""What the ``plait ledger`` commands share: options, keys and the way to the authority."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.identity import SigningKey
    from plait.ledger.service.remote import RemoteLedger
    from plait.network_file import Authority, NetworkFile
    from plait.v1.identity_pb2 import SignedEnvelope

Network = Annotated[
    Path | None, typer.Option(help="Network file; by default the last testnet started.")
]
Account = Annotated[
    str | None, typer.Argument(help="A peer id; by default your own. Others need the issuer's key.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]

OfSubAccount = Annotated[str, typer.Option("--sub-account", help="Only this share of the account.")]

CERT_TTL_MS = 600_000

Result = TypeVar("Result")


def ask(
    network: Path | None, question: "Callable[[RemoteLedger], Coroutine[Any, Any, Result]]"
) -> Result:
    """Put one question to the network's first authority."""
    import asyncio

    async def run() -> Result:
        async with connection(authority(network)) as ledger:
            return await question(ledger)

    return asyncio.run(run())


@asynccontextmanager
async def connection(authority: "Authority") -> "AsyncIterator[RemoteLedger]":
    """A connection to an authority while the context is open."""
    from plait.ledger.service.remote import RemoteLedger

    ledger = RemoteLedger(authority)
    try:
        yield ledger
    finally:
        await ledger.close()


def network_file(network: Path | None) -> "NetworkFile":
    """The network file that an option names."""
    from plait.locate import network_path
    from plait.network_file import load_network_file

    return load_network_file(network_path(network))


def authority(network: Path | None) -> "Authority":
    """The network's first authority; raises ``ConfigError`` if it has none."""
    authorities = network_file(network).authorities
    if not authorities:
        raise ConfigError("the network file names no ledger authority")
    return authorities[0]


def query(
    network: Path | None, account: str | None, sub_account: str = ""
) -> "tuple[str, SignedEnvelope, SignedEnvelope | None]":
    """The account asked for, a signed query, and the certificate when we are its owner."""
    from plait.envelope import seal
    from plait.identity import load_key
    from plait.ledger.certs import make_key_cert
    from plait.ledger.service.key_store import newest_ledger_key
    from plait.locate import client_dir
    from plait.v1.ledger_pb2 import AccountQuery

    network_id, folder = network_file(network).network_id, client_dir(network)
    own = load_key(folder / "identity.key")
    name = peer(account) if account else own.peer_id
    message = AccountQuery(
        network_id=network_id, account=name, issued_ms=now_ms(), sub_account=sub_account
    )
    if name != own.peer_id:
        return name, seal(issuer_key(network), message), None
    key, serial = newest_ledger_key(folder)
    cert = make_key_cert(own, key.public, network_id, now_ms(), CERT_TTL_MS, serial)
    return name, seal(key, message), cert


def issuer_key(network: Path | None) -> "SigningKey":
    """The issuer's key; raises ``ConfigError`` where it is not at hand."""
    from plait.identity import load_key
    from plait.locate import issuer_dir

    return load_key(issuer_dir(network) / "issuer.key")


def peer(account: str) -> str:
    """The account, if it is a peer id; raises ``ConfigError`` if not."""
    from plait.identity import public_key_of

    try:
        public_key_of(account)
    except ValueError as error:
        raise ConfigError(f"not a peer id: {account}", remedy="plait ledger balance") from error
    return account


def own_peer(network: Path | None) -> str:
    """The peer id of the identity in use."""
    from plait.identity import load_key
    from plait.locate import client_dir

    return load_key(client_dir(network) / "identity.key").peer_id


def order_number(text: str | None) -> bytes:
    """An order id from hexadecimal, random if absent; raises ``ConfigError``."""
    import secrets

    try:
        return bytes.fromhex(text) if text else secrets.token_bytes(16)
    except ValueError as error:
        raise ConfigError(f"the order cannot be signed: {error}") from error


def checked_amount(amount: int) -> int:
    """The amount, if the ledger can count it; raises ``ConfigError`` if not."""
    from plait.types import checked_u64

    try:
        return checked_u64(amount, "the amount")
    except OverflowError as error:
        raise ConfigError(f"the order cannot be signed: {error}") from error


def now_ms() -> int:
    """Wall time."""
    import time

    return time.time_ns() // 1_000_000
