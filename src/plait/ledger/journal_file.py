"""An exported journal as JSON lines: one line per entry, complete enough to be audited.

A line's ``payload`` is the leaf of the log in hexadecimal; the other members say the same
for readers, and a file in which they say anything else is false. ``objects`` are the signed
objects behind this entry and the next ones without that member. The line of the last entry
that the log's checkpoint covers has ``checkpoint``.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from plait.errors import PlaitError, RemoteProtocolError
from plait.ledger.balances import Entry, entry_from_payload
from plait.ledger.bundle_fields import read_envelopes, write_envelope
from plait.ledger.journal_audit import JournalPage
from plait.ledger.sub_accounts import SubAccount
from plait.v1.identity_pb2 import SignedEnvelope


@dataclass(frozen=True, slots=True)
class JournalFile:
    """What was read from an exported journal; ``checkpoint`` is "" if it has none."""

    pages: tuple[JournalPage, ...]
    checkpoint: str
    forged: str = ""
    """The first line that says something else to readers than its payload does, if any."""


def plain_entry(entry: Entry) -> dict[str, Any]:
    """An entry for readers, as JSON has it."""
    plain: dict[str, Any] = {
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
    if entry.limit is not None:
        plain["account"] = entry.limit.account
        plain["credit_limit"] = entry.limit.credit_limit
    if entry.sub_account:
        plain["sub_account"] = entry.sub_account
    if entry.terms is not None:
        plain["account"] = entry.terms.account
        plain["sub_account"] = entry.terms.name
        plain["terms"] = plain_terms(entry.terms)
    return plain


def plain_terms(terms: SubAccount) -> dict[str, Any]:
    """A sub-account's terms for readers; None is no limit."""
    return {
        "limit_microcredits": terms.limit or None,
        "period": None if terms.period is None else terms.period.name.lower(),
        "period_limit_microcredits": terms.period_limit or None,
        "closed": terms.closed,
    }


def journal_lines(page: JournalPage, size: int, checkpoint: str) -> Iterator[str]:
    """A page as lines; ``checkpoint`` is the signed note of the first ``size`` entries."""
    for number, payload in enumerate(page.entries):
        entry = entry_from_payload(payload)
        line = {**plain_entry(entry), "payload": payload.hex()}
        if number == 0:
            line["objects"] = [write_envelope(item) for item in page.objects]
        if entry.index == size - 1:
            line["checkpoint"] = checkpoint
        yield json.dumps(line)


def read_journal(lines: Iterable[str]) -> JournalFile:
    """Read an exported journal; raises ``RemoteProtocolError`` if it is none.

    Nothing that was signed is verified here. What a line says to readers is compared with its
    payload; whether the payload is an entry at all is for the audit to say.
    """
    pages: list[JournalPage] = []
    checkpoint = forged = ""
    entries: list[bytes] = []
    objects: list[SignedEnvelope] = []
    try:
        for number, text in enumerate(lines):
            line = json.loads(text, object_pairs_hook=_members)
            if "objects" in line and number:
                pages.append(JournalPage(tuple(entries), tuple(objects)))
                entries, objects = [], []
            objects += read_envelopes(line.pop("objects", []), f"line {number + 1}")
            entries.append(bytes.fromhex(line.pop("payload")))
            checkpoint = str(line.pop("checkpoint", checkpoint))
            if not forged and not _says(line, entries[-1]):
                forged = f"line {number + 1} says something else to readers than its payload does"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RemoteProtocolError(f"this is no exported journal: {error}") from error
    pages.append(JournalPage(tuple(entries), tuple(objects)))
    return JournalFile(tuple(pages), checkpoint, forged)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which no two readers may see different members."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member of an object is there twice")
    return members


def _says(members: dict[str, Any], payload: bytes) -> bool:
    """Whether a line's members for readers are those of its payload, or that is no entry."""
    try:
        return members == plain_entry(entry_from_payload(payload))
    except PlaitError:
        return True
