"""What the ``plait ledger`` commands share: options, keys and the way to the authority."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from plait.errors import BadProof, ConfigError, NetworkError, PeerUnreachable

if TYPE_CHECKING:
    from plait.identity import SigningKey
    from plait.ledger.service.polling import Poll
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

AuthorityName = Annotated[
    str | None,
    typer.Option(
        "--authority",
        metavar="NAME|PEER",
        help="The one to ask, by its log's name or its peer id; by default the first that answers.",
    ),
]
NoWitnesses = Annotated[
    bool, typer.Option("--no-witnesses", help="Look also at what no quorum of witnesses cosigned.")
]

CERT_TTL_MS = 600_000
WITNESSES_S, _AGAIN_S = 3.0, 0.1
"""How long to wait for a quorum's cosignatures under the newest checkpoint."""

Result = TypeVar("Result")


def ask(
    network: Path | None,
    name: str | None,
    question: "Callable[[RemoteLedger], Coroutine[Any, Any, Result]]",
) -> "tuple[Authority, Result]":
    """Put one question to the named authority, or to the first of the network file that answers.

    Which one it was is told on stderr where there are several and none was named. Raises
    ``PeerUnreachable`` if none answers.
    """
    import asyncio

    from plait.cli.output import status

    choice = authorities(network) if name is None else (authority_named(network, name),)

    async def run() -> "tuple[Authority, Result]":
        away = []
        for one in choice:
            async with connection(one) as ledger:
                try:
                    if len(choice) > 1:
                        await ledger.checkpoint()  # is it there at all?
                except NetworkError as error:
                    away.append(str(error))
                    continue
                if len(choice) > 1:
                    status(f"asking the authority {one.log_origin} (--authority names another)")
                return one, await question(ledger)
        raise PeerUnreachable(f"no ledger authority answers ({'; '.join(away)})")

    return asyncio.run(run())


def ask_quorum(
    network: Path | None,
    what: str,
    question: "Callable[[RemoteLedger], Coroutine[Any, Any, Result]]",
) -> "Poll[Result]":
    """Put one question to all authorities until a quorum has answered; raises if none can."""
    import asyncio

    from plait.ledger.committee import quorum_of
    from plait.ledger.service.polling import ask_all

    members = authorities(network)
    poll = asyncio.run(ask_all(members, question, enough=quorum_of(len(members))))
    if (error := poll.shortfall(what)) is not None:
        raise error
    return poll


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


def authorities(network: Path | None) -> "tuple[Authority, ...]":
    """The network's authorities; raises ``ConfigError`` if it has none."""
    named = network_file(network).authorities
    if not named:
        raise ConfigError("the network file names no ledger authority")
    return named


def authority_named(network: Path | None, name: str) -> "Authority":
    """The authority of a peer id, of a log's name or of its last part; raises ``ConfigError``."""
    known = authorities(network)
    for names in (
        lambda one: (one.peer, one.log_origin),
        lambda one: (one.log_origin.rpartition("/")[2],),
    ):
        found = [one for one in known if name in names(one)]
        if len(found) == 1:
            return found[0]
    choice = ", ".join(one.log_origin for one in known)
    raise ConfigError(f"the network has no authority {name!r}", remedy=f"choose from: {choice}")


def authority_of(network: Path | None, note: str) -> "Authority":
    """The authority whose log a checkpoint says it is of; raises ``BadProof`` for another's."""
    known = authorities(network)
    origin = note.partition("\n")[0]
    for one in known:
        if one.log_origin == origin:
            return one
    raise BadProof(
        f"this checkpoint is of {origin[:80]!r}, and no log of the network "
        f"{network_file(network).network_id}",
        remedy="name its network file with --network",
    )


async def newest_checkpoint(ledger: "RemoteLedger", network: "NetworkFile") -> str:
    """The newest checkpoint, with the quorum's cosignatures if they come within 3 s."""
    import asyncio

    for _ in range(round(WITNESSES_S / _AGAIN_S)):
        note = await ledger.checkpoint()
        if not uncosigned(note, network):
            return note
        await asyncio.sleep(_AGAIN_S)
    return await ledger.checkpoint()


def uncosigned(note: str, network: "NetworkFile") -> str:
    """What a checkpoint lacks by the network file's policy; empty if it lacks nothing.

    Raises ``VerificationError`` if the checkpoint is not one of the network's logs.
    """
    from plait.ledger.cosignature import open_cosignatures
    from plait.ledger.policy import check_policy, policy_of, read_policy

    try:
        check_policy(note, read_policy(policy_of(network).encode()))
    except BadProof:
        found = len(open_cosignatures(note, network.witnesses))
        if found >= network.witness_quorum:
            raise  # it is something else
        return (
            f"the checkpoint has {found} of the {network.witness_quorum} witnesses' cosignatures "
            "that the network asks for"
        )
    return ""


def witnesses_of(note: str, network: "NetworkFile") -> list[str]:
    """The names of the network's witnesses that cosigned a checkpoint."""
    from plait.ledger.cosignature import open_cosignatures

    return [one.name for one in open_cosignatures(note, network.witnesses)]


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
        return name, query_by_issuer(network, name, sub_account), None
    key, serial = newest_ledger_key(folder)
    cert = make_key_cert(own, key.public, network_id, now_ms(), CERT_TTL_MS, serial)
    return name, seal(key, message), cert


def query_by_issuer(network: Path | None, account: str, sub_account: str = "") -> "SignedEnvelope":
    """A fresh query about anybody's account, signed by the issuer."""
    from plait.envelope import seal
    from plait.v1.ledger_pb2 import AccountQuery

    message = AccountQuery(
        network_id=network_file(network).network_id,
        account=account,
        issued_ms=now_ms(),
        sub_account=sub_account,
    )
    return seal(issuer_key(network), message)


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
