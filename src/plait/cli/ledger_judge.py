"""``plait ledger judge``: what a bundle or a fork proof proves against who signed it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from plait.cli.ledger_connection import Json, Network, connection, network_file
from plait.errors import (
    ConfigError,
    LedgerError,
    NetworkError,
    PeerUnreachable,
    ProtocolError,
    VerificationError,
)

if TYPE_CHECKING:
    from plait.ledger.journal_file import JournalFile
    from plait.ledger.withheld import GrantVerdict
    from plait.network_file import Authority, NetworkFile
    from plait.v1.identity_pb2 import SignedEnvelope


@dataclass(frozen=True, slots=True)
class _NoVerdict:
    """An authority whose journal could not be had, or is not what it signed (``false``)."""

    finding: Literal["unanswered", "false"]
    authority: "Authority"
    reason: str


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

    Of a fork proof: that somebody signed twice. Exit code 1: proven. Exit code 2: nothing is
    proven, but not every authority that granted answered.
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
        print(_line(verdict))
    raise typer.Exit(_exit_code(verdicts))


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
) -> "list[GrantVerdict | _NoVerdict]":
    verdicts: list[GrantVerdict | _NoVerdict] = []
    source = None if path is None else _read(path)
    for authority in network.authorities:
        own = [grant for grant in grants if grant.signer == authority.ledger_key]
        if own and source is None:
            verdicts += _live_verdicts(own, authority, network)
        elif own and source and authority.log_origin == source.checkpoint.partition("\n")[0]:
            # Of a committee, each has a log of its own.
            verdicts += _judge_all(own, source, network)
    if not verdicts:
        raise ConfigError("no grant of the bundle is by the authority of this journal")
    return verdicts


def _live_verdicts(
    grants: "list[SignedEnvelope]", authority: "Authority", network: "NetworkFile"
) -> "list[GrantVerdict | _NoVerdict]":
    """What one authority's journal of now says; whatever it answers, others are judged too."""
    try:
        return [*_judge_all(grants, _fetch(authority), network)]
    except NetworkError as error:
        return [_NoVerdict("unanswered", authority, str(error))]
    except (LedgerError, ProtocolError, VerificationError) as error:
        return [_NoVerdict("false", authority, str(error))]


def _judge_all(
    grants: "list[SignedEnvelope]", source: "JournalFile", network: "NetworkFile"
) -> "list[GrantVerdict]":
    from plait.ledger.withheld import judge_grant

    leaves = [leaf for page in source.pages for leaf in page.entries]
    return [judge_grant(grant, leaves, source.checkpoint, network) for grant in grants]


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


def _exit_code(verdicts: "Sequence[GrantVerdict | _NoVerdict]") -> int:
    """1: something is proven or false; 2: some did not answer. Raises if nobody did."""
    findings = {verdict.finding for verdict in verdicts}
    if findings & {"withheld", "false"}:
        return 1
    if findings == {"unanswered"}:
        raise PeerUnreachable("no authority that granted answers")
    return 2 if "unanswered" in findings else 0


def _line(verdict: "GrantVerdict | _NoVerdict") -> str:
    origin = verdict.authority.log_origin
    if isinstance(verdict, _NoVerdict):
        return f"{verdict.finding}: {origin} ({verdict.reason})"
    where = "" if verdict.index is None else f" as entry {verdict.index}"
    return f"{verdict.finding}{where}: {origin}, {verdict.tree_size}"


def _plain(verdict: "GrantVerdict | _NoVerdict") -> dict[str, Any]:
    if isinstance(verdict, _NoVerdict):
        origin = verdict.authority.log_origin
        return {"finding": verdict.finding, "origin": origin, "reason": verdict.reason}
    return {
        "finding": verdict.finding,
        "origin": verdict.authority.log_origin,
        "entry_index": verdict.index,
        "due_ms": verdict.due_ms,
        "seen_ms": verdict.seen_ms,
        "tree_size": verdict.tree_size,
    }
