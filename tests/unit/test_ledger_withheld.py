"""A grant that its authority kept out of the log is proven, and nothing else is."""

from dataclasses import replace
from pathlib import Path

import pytest

from plait.cli.root import invoke
from plait.envelope import decode, open_envelope, seal
from plait.errors import VerificationError
from plait.ledger.balances import EntryKind, entry_from_payload
from plait.ledger.bundle import build_bundle
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.cosignature import cosign
from plait.ledger.journal_audit import JournalPage
from plait.ledger.journal_file import journal_lines
from plait.ledger.merkle import leaf_hash, root_of
from plait.ledger.withheld import judge_grant
from plait.network_file import Witness
from plait.testing.accounting import NOW_MS, PaperSession, Plot, key_of, paper_network
from plait.v1.ledger_pb2 import JournalEntry, ReservationGrant

NETWORK = paper_network()
ORIGIN = NETWORK.authorities[0].log_origin
SESSION = PaperSession(Plot()).play()
GRANT = SESSION.grant
DUE_MS = NOW_MS + 1_000


def journal(*posted_ms: int, granted: bool = False) -> list[bytes]:
    """A journal of strangers' entries posted at these times, with our session's if granted."""
    own = SESSION.settle().entries[0]
    assert entry_from_payload(own).kind is EntryKind.RESERVE
    leaves = []
    for index, at_ms in enumerate(posted_ms):
        entry = decode(own, JournalEntry)
        entry.index, entry.posted_ms = index, at_ms
        if not (granted and index == 0):
            entry.cause_digest = bytes([index + 1]) * 32
        leaves.append(entry.SerializeToString(deterministic=True))
    return leaves


def signed(leaves: list[bytes], size: int | None = None) -> str:
    covered = leaves if size is None else leaves[:size]
    root = root_of(map(leaf_hash, covered))
    return sign_checkpoint(key_of("authority log"), ORIGIN, len(covered), root)


def test_what_is_in_the_log_is_found() -> None:
    leaves = journal(NOW_MS, NOW_MS + 90_000, granted=True)
    verdict = judge_grant(GRANT, leaves, signed(leaves), NETWORK)
    assert (verdict.finding, verdict.index, verdict.tree_size) == ("included", 0, 2)


def test_a_later_tree_without_it_is_proof() -> None:
    leaves = journal(NOW_MS, DUE_MS + 1)
    verdict = judge_grant(GRANT, leaves, signed(leaves), NETWORK)
    assert (verdict.finding, verdict.due_ms, verdict.seen_ms) == ("withheld", DUE_MS, DUE_MS + 1)
    # The entry may come afterwards: this checkpoint lacks it all the same.
    late = [*leaves, *journal(DUE_MS, granted=True)]
    assert judge_grant(GRANT, late, signed(late, 2), NETWORK).finding == "withheld"


def test_a_tree_that_is_not_proven_to_be_late_proves_nothing() -> None:
    for leaves in (journal(), journal(DUE_MS), journal(NOW_MS)):
        assert judge_grant(GRANT, leaves, signed(leaves), NETWORK).finding == "not yet due"


def test_a_quorum_of_witnesses_dates_a_tree_and_fewer_do_not() -> None:
    names = [f"w{number}.example" for number in range(3)]
    witnesses = tuple(Witness(name, key_of(name).public) for name in names)
    network = replace(NETWORK, witnesses=witnesses, witness_quorum=2)
    leaves = journal(NOW_MS)
    note = signed(leaves)
    late_s, soon_s = DUE_MS // 1000 + 5, NOW_MS // 1000
    lines = [cosign(key_of(name), name, note, late_s) for name in names]
    early = cosign(key_of(names[1]), names[1], note, soon_s)
    findings = [
        judge_grant(GRANT, leaves, note + "".join(some), network).finding
        for some in ([], lines[:1], [lines[0], early], lines[:2], lines)
    ]
    assert findings == ["not yet due"] * 3 + ["withheld"] * 2


def test_evidence_of_somebody_else_proves_nothing() -> None:
    leaves = journal(NOW_MS, DUE_MS + 1)
    note, root = signed(leaves), root_of(map(leaf_hash, leaves))
    granted = open_envelope(GRANT, ReservationGrant)
    foreign = ReservationGrant.FromString(GRANT.payload)
    foreign.network_id = "another"
    forged = sign_checkpoint(key_of("stranger"), ORIGIN, 2, root)
    for grant, rows, head in (
        (seal(key_of("stranger"), granted), leaves, note),
        (seal(key_of("authority ledger"), foreign), leaves, note),
        (GRANT, leaves[:1], note),
        (GRANT, leaves[::-1], note),
        (GRANT, leaves, forged),
    ):
        with pytest.raises(VerificationError):
            judge_grant(grant, rows, head, NETWORK)


@pytest.mark.parametrize(
    ("granted", "code", "said"), [(True, 0, "included as entry 0"), (False, 1, "withheld: ")]
)
def test_the_command_judges_a_bundle_by_an_exported_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], granted: bool, code: int, said: str
) -> None:
    bundle, exported, network = (tmp_path / name for name in ("b.json", "j.jsonl", "n.toml"))
    NETWORK.save(network, key_of("founder"))
    bundle.write_bytes(build_bundle(SESSION.bundle_parts(), key_of("client")))
    leaves = journal(NOW_MS, DUE_MS + 1, granted=granted)
    page = JournalPage(tuple(leaves))
    exported.write_text("\n".join(journal_lines(page, len(leaves), signed(leaves))))
    arguments = ["ledger", "judge", str(bundle), "--journal", str(exported)]
    assert invoke([*arguments, "--network", str(network)]) == code
    assert capsys.readouterr().out.startswith(said)
