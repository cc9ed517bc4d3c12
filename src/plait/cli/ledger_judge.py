"""``plait ledger judge``: what a bundle or a fork proof proves against who signed it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.ledger_connection import Json, Network, connection, network_file
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.ledger.journal_file import JournalFile
    from plait.ledger.withheld import GrantVerdict
    from plait.network_file import Authority, NetworkFile
    from plait.v1.identity_pb2 import SignedEnvelope


def judge(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle, whose grants are judged, or a fork proof.")
    ],
    journal: Annotated[
        Path | None, typer.Option(help="An exported journal; by default the ledger's, now.")
    ] = None,
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Check that what was granted is in the log. Exit code 1: proven that it was kept out.

    Of a fork proof: that somebody signed twice. Exit code 1: proven.
    A grant promises its entry within a delay. The journal under a later checkpoint without
    that entry is proof against the authority; bundle and exported journal carry it to others.
    """
    from plait.cli.output import emit_json

    file = network_file(network)
    if _is_fork_proof(bundle):
        _judge_fork(bundle, file, json_output=json_output)
        raise typer.Exit(1)
    verdicts = _verdicts(_grants(bundle), file, journal)
    if json_output:
        emit_json({"verdicts": [_plain(verdict) for verdict in verdicts]})
    for verdict in () if json_output else verdicts:
        where = "" if verdict.index is None else f" as entry {verdict.index}"
        print(f"{verdict.finding}{where}: {verdict.authority.log_origin}, {verdict.tree_size}")
    if any(verdict.finding == "withheld" for verdict in verdicts):
        raise typer.Exit(1)


def _is_fork_proof(path: Path) -> bool:
    from plait.cli.bundle_file import read_bundle_file
    from plait.ledger.fork import FORK_BYTES_MAX, FORK_FORMAT

    data = read_bundle_file(path)
    return len(data) <= FORK_BYTES_MAX and f'"format":"{FORK_FORMAT}"'.encode() in data


def _judge_fork(path: Path, network: "NetworkFile", *, json_output: bool) -> None:
    from plait.cli.bundle_file import read_bundle_file
    from plait.cli.output import emit_json
    from plait.errors import BadProof
    from plait.ledger.fork import check_fork_proof, read_fork_proof

    try:
        proof = read_fork_proof(read_bundle_file(path))
    except ValueError as error:
        raise BadProof(f"{path} is no fork proof: {error}") from error
    verdict = check_fork_proof(proof, network)
    if json_output:
        emit_json({"culprit": verdict.culprit, "statement": verdict.statement})
    else:
        print(f"proven: {verdict.culprit} {verdict.statement}")


def _verdicts(
    grants: "list[SignedEnvelope]", network: "NetworkFile", path: Path | None
) -> "list[GrantVerdict]":
    from plait.ledger.withheld import judge_grant

    verdicts = []
    for authority in network.authorities:
        own = [grant for grant in grants if grant.signer == authority.ledger_key]
        if not own:
            continue
        source = _read(path) if path else _fetch(authority)
        if path and authority.log_origin != source.checkpoint.partition("\n")[0]:
            continue  # of a committee, each has a log of its own
        leaves = [leaf for page in source.pages for leaf in page.entries]
        verdicts += [judge_grant(grant, leaves, source.checkpoint, network) for grant in own]
    if not verdicts:
        raise ConfigError("no grant of the bundle is by the authority of this journal")
    return verdicts


def _grants(path: Path) -> "list[SignedEnvelope]":
    from plait.cli.bundle_file import read_bundle_file
    from plait.errors import RemoteProtocolError
    from plait.ledger.bundle import read_bundle
    from plait.ledger.committee import grants_in

    try:
        parts = read_bundle(read_bundle_file(path)).parts
    except ValueError as error:
        raise RemoteProtocolError(f"this is no bundle: {error}") from error
    return [
        one for epoch in parts.epochs if epoch.grant is not None for one in grants_in(epoch.grant)
    ]


def _read(path: Path) -> "JournalFile":
    from plait.cli.ledger_journal import read_journal_file

    source = read_journal_file(path)
    if not source.checkpoint:
        raise ConfigError(f"{path} has no checkpoint", remedy="export it again, whole")
    return source


def _fetch(authority: "Authority") -> "JournalFile":
    import asyncio

    from plait.ledger.journal_file import JournalFile

    async def fetch() -> "JournalFile":
        async with connection(authority) as ledger:
            note = await ledger.checkpoint()
            return JournalFile(tuple([page async for page in ledger.export_pages()]), note)

    return asyncio.run(fetch())


def _plain(verdict: "GrantVerdict") -> dict[str, Any]:
    return {
        "finding": verdict.finding,
        "origin": verdict.authority.log_origin,
        "entry_index": verdict.index,
        "due_ms": verdict.due_ms,
        "seen_ms": verdict.seen_ms,
        "tree_size": verdict.tree_size,
    }
