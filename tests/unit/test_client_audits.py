"""The lottery that nobody asks for: what is due on disk, what is recorded, whom to trust."""

import asyncio
import os
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from plait.client.audit_spool import (
    DUE_FILES_MAX,
    TRUST_AFTER_MS,
    AuditRecord,
    AuditSpool,
    BackgroundSpool,
    trust_of,
)
from plait.client.auditing import Audited, log_of
from plait.client.lottery_keeper import DUE_AFTER_MS, GIVE_UP_AFTER_MS, RETRY_MS, LotteryKeeper
from plait.errors import BadProof, ConfigError, PeerUnreachable
from plait.ledger.lottery import Lot
from plait.testing.accounting import key_of, paper_network
from plait.types import PeerId
from plait.v1.stage_pb2 import AuditEvidence

STAGE, AUDITOR = key_of("stage").peer_id, key_of("auditor").peer_id
NOW = 1_790_000_000_000


class Script:
    """Plays the auditors: one list of outcomes for each look, or an error."""

    def __init__(self, *looks: Sequence[Audited] | Exception) -> None:
        self.looks = list(looks)
        self.asked: list[tuple[bytes, frozenset[Lot]]] = []

    async def __call__(self, bundle: bytes, *, skip: Collection[Lot]) -> Sequence[Audited]:
        self.asked.append((bundle, frozenset(skip)))
        look = self.looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return look


def lot(chunk: int, outcome: str) -> Audited:
    looked = outcome in ("consistent", "exposed", "unresponsive")
    evidence = AuditEvidence() if looked else None
    auditor = AUDITOR if looked else None
    return Audited(Lot(1, chunk, 0), STAGE, outcome, auditor, "", evidence)


class World:
    """A spool with one session, an hour hand, and a keeper."""

    def __init__(self, folder: Path, *looks: Sequence[Audited] | Exception) -> None:
        self.now_ms = NOW
        self.exposed: list[AuditEvidence] = []
        self.spool = AuditSpool(folder / "audits")
        self.spool.put(b"s" * 16, b"a bundle", NOW)
        self.script = Script(*looks)
        self.keeper = LotteryKeeper(
            self.spool, self.script, lambda: self.now_ms, self.exposed.append
        )

    def look(self, after_ms: int = DUE_AFTER_MS) -> bool:
        self.now_ms += after_ms
        return asyncio.run(self.keeper.look_once())


async def test_no_answer_waits_for_the_spool_and_leaving_waits_for_it(tmp_path: Path) -> None:
    spool, sealed = AuditSpool(tmp_path), threading.Event()

    def seal_it() -> bytes:
        sealed.wait()
        return b"bundle"

    keeping = BackgroundSpool(spool)
    keeping.put(b"s" * 16, seal_it, 5)
    assert spool.take(10) is None
    sealed.set()
    await keeping.close()
    due = spool.take(10)
    assert due is not None and due[2] == b"bundle"


def test_a_session_is_audited_once_it_is_due_and_then_forgotten(tmp_path: Path) -> None:
    world = World(tmp_path, [lot(0, "consistent"), lot(1, "undrawn"), lot(2, "exposed")])
    assert not world.look(DUE_AFTER_MS - 1)
    assert world.look(1)
    assert not world.look(10 * GIVE_UP_AFTER_MS)
    found = world.spool.records()
    assert [(one.chunk, one.outcome, one.auditor) for one in found] == [
        (0, "consistent", AUDITOR),
        (2, "exposed", AUDITOR),
    ]
    assert found[0].evidence == ""
    assert Path(found[1].evidence).exists()
    assert len(world.exposed) == 1


def test_what_the_ledger_has_not_paid_is_tried_again_and_nothing_twice(tmp_path: Path) -> None:
    world = World(
        tmp_path,
        PeerUnreachable("no ledger"),
        [lot(0, "consistent"), lot(1, "unaudited")],
        [lot(1, "unaudited")],
        [lot(1, "consistent")],
    )
    assert world.look()
    assert not world.look(RETRY_MS)
    assert world.look(DUE_AFTER_MS)
    assert world.look(2 * RETRY_MS)
    assert world.look(4 * RETRY_MS)
    assert [len(skip) for _, skip in world.script.asked] == [0, 0, 1, 1]
    assert [one.chunk for one in world.spool.records()] == [0, 1]
    assert not world.look(10 * GIVE_UP_AFTER_MS)


def test_it_gives_up_when_the_stages_may_have_forgotten(tmp_path: Path) -> None:
    world = World(tmp_path, [lot(0, "unaudited")], [lot(0, "unaudited")])
    assert world.look()
    assert world.look(GIVE_UP_AFTER_MS)
    assert not world.look(10 * GIVE_UP_AFTER_MS)


def test_another_process_takes_over_what_one_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    first = world.spool.take(NOW)
    assert first is not None
    assert first[1:] == (NOW, b"a bundle")
    other = AuditSpool(tmp_path / "audits")
    assert other.take(NOW + 1) is None
    assert other.take(NOW + 600_000) is not None


def test_the_spool_is_bounded(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path)
    for number in range(DUE_FILES_MAX + 5):
        spool.put(number.to_bytes(16, "big"), b"x", NOW + number)
    assert len(list((tmp_path / "due").iterdir())) == DUE_FILES_MAX


def test_what_has_prompts_in_it_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        spool = AuditSpool(tmp_path / "audits")
        spool.put(b"s" * 16, b"a bundle", NOW)
        kept = spool.keep_evidence("one", b"evidence")
    finally:
        os.umask(before)
    files = [*(tmp_path / "audits" / "due").iterdir(), Path(kept)]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600, 0o600]


def test_a_full_disk_or_a_file_in_the_way_fails_no_answer(tmp_path: Path) -> None:
    (tmp_path / "due").write_text("in the way")
    spool = AuditSpool(tmp_path)
    spool.put(b"s" * 16, b"x", NOW)
    assert spool.take(NOW) is None


def record(outcome: str, at_ms: int = NOW, peer: PeerId = STAGE, chunk: int = 0) -> AuditRecord:
    return AuditRecord(at_ms, "aa", 1, chunk, 0, peer, outcome, AUDITOR)


def test_trust_counts_after_the_window_and_one_exposure_ends_it() -> None:
    late = NOW + TRUST_AFTER_MS
    passed = [record("consistent"), record("consistent", chunk=1)]
    assert trust_of(passed, late - 1) == {}
    assert trust_of(passed, late) == {STAGE: 2}
    assert trust_of([*passed, record("consistent")], late) == {STAGE: 2}, "one lot counts once"
    assert trust_of([*passed, record("unresponsive", chunk=2)], late) == {STAGE: 2}
    # The ratchet: always wrong, but paid in trust for every unaudited answer.
    assert trust_of([*passed * 50, record("exposed", chunk=3)], late) == {}
    other = record("exposed", peer=AUDITOR)
    assert trust_of([*passed, other], late) == {STAGE: 2}


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path)
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="damaged"):
        spool.records()


def test_what_another_process_has_just_finished_holds_up_nothing(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path)
    spool.put(b"s" * 16, b"a bundle", NOW)
    # Listed as taken, and gone when it is looked at.
    (tmp_path / "due" / "0-0-00.taken").symlink_to(tmp_path / "gone")
    taken = spool.take(NOW)
    assert taken is not None and taken[2] == b"a bundle"


def test_a_file_that_goes_while_they_are_counted_leaves_the_bound(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path)
    (tmp_path / "due").mkdir()
    (tmp_path / "due" / "0-0-00.bundle").symlink_to(tmp_path / "gone")
    for number in range(DUE_FILES_MAX + 5):
        spool.put(number.to_bytes(16, "big"), b"x", NOW + number)
    files = [path for path in (tmp_path / "due").iterdir() if path.exists()]
    assert len(files) == DUE_FILES_MAX


def test_a_checkpoint_names_whose_log_it_is_of() -> None:
    (one,) = paper_network().authorities
    other = replace(one, log_origin="other.example/log")
    committee = paper_network(authorities=(one, other))
    for authority in (one, other):
        assert log_of(f"{authority.log_origin}\n3\nroot\n", committee) is authority
    with pytest.raises(BadProof, match="no log"):
        log_of("another.example/log\n3\nroot\n", committee)
