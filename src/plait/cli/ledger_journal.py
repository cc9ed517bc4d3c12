"""``plait ledger audit | export``: the whole journal, live or from a file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from plait.cli.ledger_connection import (
    AuthorityName,
    Json,
    Network,
    NoWitnesses,
    ask,
    authority_named,
    authority_of,
    network_file,
    newest_checkpoint,
    uncosigned,
    witnesses_of,
)
from plait.errors import BadProof, ConfigError

if TYPE_CHECKING:
    from plait.ledger.journal_audit import JournalPage, JournalReport
    from plait.ledger.journal_file import JournalFile
    from plait.ledger.service.remote import RemoteLedger

Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=64,
        help="Processes that verify signatures; by default one per core, or one for a small log.",
    ),
]
Output = Annotated[Path | None, typer.Option(help="A file; by default stdout.")]


def audit(
    journal: Annotated[
        Path | None, typer.Argument(help="An exported journal; by default the ledger's.")
    ] = None,
    authority: AuthorityName = None,
    no_witnesses: NoWitnesses = False,
    network: Network = None,
    jobs: Jobs = None,
    json_output: Json = False,
) -> None:
    """Recompute the whole journal from what was signed, down to the log's signed root.

    Every entry is checked against the order, reservation, voucher or releases that caused
    it, and of a file (plait ledger export, no network is used) each line's members for readers
    against its payload. Exit code 1 if anything does not hold, or if the checkpoint lacks the
    quorum of witnesses that the network asks for.
    """
    from dataclasses import asdict, replace

    from plait.cli.output import emit_json

    file = network_file(network)
    source, report = audited(journal, network, jobs, authority)
    named = authority_of(network, source.checkpoint)
    lacking, cosigned = uncosigned(source.checkpoint, file), witnesses_of(source.checkpoint, file)
    if lacking and not no_witnesses:
        report = replace(report, violations=(*report.violations, lacking))
    if json_output:
        seen = {"witnesses": cosigned, "witness_quorum": file.witness_quorum}
        whose = {"authority": named.peer, "origin": named.log_origin}
        emit_json({**asdict(report), **whose, **seen, "witnessed": not lacking})
    else:
        print(f"{report.entries} entries, {'balanced' if report.balanced else 'NOT balanced'}")
        print(f"{report.causes} of them follow from what was signed")
        print(f"root of the first {report.tree_size}: {report.root_hash.hex()}")
        print("\n".join(report.violations) or "the signed checkpoint holds")
        if lacking and no_witnesses:
            print(f"but {lacking} (--no-witnesses)")
    if report.violations:
        raise typer.Exit(1)


def export(
    format: Annotated[
        Literal["csv", "jsonl"],
        typer.Option(help="csv has a row per line, without what was signed."),
    ] = "jsonl",
    output: Output = None,
    authority: AuthorityName = None,
    network: Network = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="The same as --format jsonl.")
    ] = False,
) -> None:
    """Write an authority's whole journal, for accountants and auditors.

    It has everybody's entries, and whoever can reach an authority can have it.
    """
    as_json = json_output or format == "jsonl"
    trusted = network_file(network)
    note, size = "", 0

    async def write(ledger: "RemoteLedger") -> None:
        nonlocal note, size
        if as_json:
            note = await newest_checkpoint(ledger, trusted)
            size = int(note.split("\n")[1])
        with written(output) as file:
            write_page = _json_writer(file, size, note) if as_json else _csv_writer(file)
            async for page in ledger.export_pages():
                write_page(page)

    ask(network, authority, write)


def audited(
    journal: Path | None, network: Path | None, jobs: int | None, authority: str | None
) -> "tuple[JournalFile, JournalReport]":
    """A journal and what its audit finds; raises ``VerificationError`` without a checkpoint
    that the network's log signed."""
    from dataclasses import replace

    from plait.ledger.checkpoint import open_checkpoint
    from plait.ledger.exposure import judging_of
    from plait.ledger.journal_audit import JournalAuditor, audit_journal
    from plait.ledger.service.verify_ahead import processes_for, verified_ahead
    from plait.ledger.withheld import quorum_time_ms

    file = network_file(network)
    source = read_journal_file(journal) if journal else _fetch(network, authority)
    if not source.checkpoint:
        raise BadProof(f"{journal} has no checkpoint", remedy="export it again, whole")
    named = authority_of(network, source.checkpoint)
    if authority is not None and authority_named(network, authority) != named:
        raise ConfigError(f"{journal} is the journal of {named.log_origin}")
    signed = open_checkpoint(source.checkpoint, named.log_origin, named.log_key)
    auditor = JournalAuditor(
        file.network_id,
        file.issuer_key,
        committee=len(file.authorities) > 1,
        judging=judging_of(file),
    )
    pages = verified_ahead(source.pages, jobs or processes_for(source.pages))
    times = quorum_time_ms(source.checkpoint, file) if file.witnesses else []
    report = audit_journal(auditor, pages, signed, *times)
    if source.forged:
        report = replace(report, violations=(source.forged, *report.violations))
    return source, report


def read_journal_file(path: Path) -> "JournalFile":
    """An exported journal; raises ``ConfigError`` if it cannot be read."""
    from plait.ledger.journal_file import read_journal

    try:
        with path.open(encoding="utf-8") as lines:
            return read_journal(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _fetch(network: Path | None, authority: str | None) -> "JournalFile":
    from plait.ledger.journal_file import JournalFile

    trusted = network_file(network)

    async def fetch(ledger: "RemoteLedger") -> JournalFile:
        note = await newest_checkpoint(ledger, trusted)
        return JournalFile(tuple([page async for page in ledger.export_pages()]), note)

    _, source = ask(network, authority, fetch)
    return source


@contextmanager
def written(path: Path | None) -> Iterator[TextIO]:
    """A file to write, or stdout; raises ``ConfigError`` if it cannot be written."""
    import sys

    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("w", newline="") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _json_writer(file: TextIO, size: int, checkpoint: str) -> "Callable[[JournalPage], None]":
    from plait.ledger.journal_file import journal_lines

    def write(page: "JournalPage") -> None:
        file.writelines(line + "\n" for line in journal_lines(page, size, checkpoint))

    return write


def _csv_writer(file: TextIO) -> "Callable[[JournalPage], None]":
    import csv

    from plait.ledger.balances import entry_from_payload
    from plait.ledger.journal_file import plain_entry

    columns = ["index", "kind", "posted_ms", "session_id", "cause_digest"]
    writer = csv.writer(file)
    writer.writerow([*columns, "account", "debit", "credit", "credit_limit", "sub_account"])

    def write(page: "JournalPage") -> None:
        for payload in page.entries:
            entry = entry_from_payload(payload)
            plain = plain_entry(entry)
            head = [plain[column] for column in columns]
            if entry.limit is not None:
                writer.writerow([*head, entry.limit.account, 0, 0, entry.limit.credit_limit, ""])
            if entry.terms is not None:
                writer.writerow([*head, entry.terms.account, 0, 0, "", entry.terms.name])
            for line in entry.lines:
                writer.writerow(
                    [*head, line.account, line.debit, line.credit, "", entry.sub_account]
                )

    return write
