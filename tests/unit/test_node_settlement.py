"""Settlement: on disk before it is sent, tried again until the ledger has it."""

import asyncio
from pathlib import Path

import pytest

from plait.errors import LedgerError, PeerUnreachable
from plait.identity import SigningKey
from plait.ledger.policy import Policy, policy_of, read_policy
from plait.ledger.service.remote import Evidence
from plait.ledger.settling import RESERVATION_WAIT_MS
from plait.ledger.stage_books import StageBooks
from plait.ledger.witnessed import Patience
from plait.node.sessions import StageSession
from plait.node.settlement import Settler
from plait.task_scope import TaskScope
from plait.testing.accounting import (
    NOW_MS,
    PaperSession,
    Plot,
    cert_of,
    cosigned_by,
    key_of,
    paper_network,
    witnessed_network,
)
from plait.types import Digest, Microcredits, Sampling, SessionId
from plait.v1.identity_pb2 import SignedEnvelope


class FakeLedger:
    """Fails as told, then pays."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.presented: list[SignedEnvelope | None] = []

    async def settle(
        self, request: SignedEnvelope, cert: SignedEnvelope, voucher: SignedEnvelope | None
    ) -> int:
        self.presented.append(voucher)
        if self.failures:
            raise self.failures.pop(0)
        return 5


class SlowLedger(FakeLedger):
    """Answers when told."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()

    async def settle(
        self, request: SignedEnvelope, cert: SignedEnvelope, voucher: SignedEnvelope | None
    ) -> int:
        self.asked.set()
        await self.answer.wait()
        return await super().settle(request, cert, voucher)


class WitnessedLedger(FakeLedger):
    """Pays, and shows the log under a checkpoint that ``witnesses`` have cosigned."""

    def __init__(self) -> None:
        super().__init__()
        self.witnesses: tuple[int, ...] = ()
        self.down = False
        self.asked = 0

    async def evidence(self, session_id: SessionId) -> Evidence:
        self.asked += 1
        if self.down:
            raise PeerUnreachable("down")
        log = PaperSession(Plot()).play().settle()
        note = cosigned_by(log.checkpoint, self.witnesses)
        proofs = tuple((index, tuple(map(Digest, hashes))) for index, hashes in log.proofs)
        return Evidence(log.entries, proofs, note, settled=True)


def session_with_voucher() -> StageSession:
    played = PaperSession(Plot()).play()
    terms = played.terms
    session = StageSession(terms, Sampling(), 0, cert_of("client"), NOW_MS)
    books = StageBooks(terms, 0, key_of("stage 0 ledger"), Microcredits(10**9))
    books._voucher = played.client.voucher
    session.books = books
    return session


def session_without_voucher() -> StageSession:
    session = session_with_voucher()
    session.books = StageBooks(session.terms, 0, key_of("stage 0 ledger"), Microcredits(10**9))
    return session


def settler(
    folder: Path,
    ledger: FakeLedger,
    tasks: TaskScope,
    policy: Policy | None = None,
) -> Settler:
    key: SigningKey = key_of("stage 0 ledger")
    return Settler(
        key=key,
        cert=cert_of("stage 0"),
        ledger=ledger,  # type: ignore[arg-type]
        spool_dir=folder / "settlements",
        clock_ms=lambda: NOW_MS,
        tasks=tasks,
        policy=policy,
        patience=Patience(Microcredits(0), 1_000),
    )


def spooled(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "settlements").iterdir())


async def test_what_the_disk_does_not_take_is_sent_all_the_same(tmp_path: Path) -> None:
    ledger = FakeLedger()
    async with TaskScope() as tasks:
        settling = settler(tmp_path, ledger, tasks)
        session = session_with_voucher()
        name = f"{session.id.hex()}-{session.terms.epoch}"
        (tmp_path / "settlements" / f"{name}.part").mkdir()  # nothing can be written there
        assert await settling.settle(session)
        settling.settle_later(session)
        await settling.idle(20)
    assert session.books is not None
    assert ledger.presented == [session.books.voucher] * 2


async def test_what_the_ledger_took_leaves_the_disk(tmp_path: Path) -> None:
    async with TaskScope() as tasks:
        assert await settler(tmp_path, FakeLedger(), tasks).settle(session_with_voucher())
    assert spooled(tmp_path) == []


async def test_an_unreachable_ledger_loses_nothing(tmp_path: Path) -> None:
    ledger = FakeLedger(PeerUnreachable("down"))
    async with TaskScope() as tasks:
        subject = settler(tmp_path, ledger, tasks)
        subject.settle_later(session_with_voucher())
        await subject.idle(1.0)
        assert spooled(tmp_path) == [""]
        await settler(tmp_path, ledger, tasks).retry_once()
    assert spooled(tmp_path) == []
    assert ledger.presented[0] == ledger.presented[1]


async def test_a_refused_settlement_is_kept_aside_for_a_person(tmp_path: Path) -> None:
    async with TaskScope() as tasks:
        subject = settler(tmp_path, FakeLedger(LedgerError("no hold")), tasks)
        assert not await subject.settle(session_with_voucher())
        await subject.retry_once()
    assert spooled(tmp_path) == [".refused"]


async def test_a_settlement_waits_for_a_reservation_that_is_late(tmp_path: Path) -> None:
    late = LedgerError("the ledger refuses: payee: nothing is reserved for this payee")
    ledger = FakeLedger(late, late)
    async with TaskScope() as tasks:
        subject = settler(tmp_path, ledger, tasks)
        assert not await subject.settle(session_with_voucher())
        await subject.retry_once()
        assert spooled(tmp_path) == [""]
        await subject.retry_once()
    assert spooled(tmp_path) == []


async def test_a_voucher_beyond_the_cap_waits_for_the_reservation_of_an_earlier_stint(
    tmp_path: Path,
) -> None:
    late = LedgerError("the ledger refuses: cap: 32 paid, and nothing more is reserved")
    async with TaskScope() as tasks:
        subject = settler(tmp_path, FakeLedger(late), tasks)
        assert not await subject.settle(session_with_voucher())
        assert spooled(tmp_path) == [""]
        await subject.retry_once()
    assert spooled(tmp_path) == []


async def test_a_reservation_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    late = LedgerError("the ledger refuses: session: no reservation is known for this session")
    async with TaskScope() as tasks:
        subject = settler(tmp_path, FakeLedger(late, late), tasks)
        await subject.settle(session_with_voucher())
        subject._clock_ms = lambda: NOW_MS + RESERVATION_WAIT_MS
        await subject.retry_once()
    assert spooled(tmp_path) == [".refused"]


async def test_a_settlement_under_way_is_not_presented_twice(tmp_path: Path) -> None:
    ledger = SlowLedger()
    async with TaskScope() as tasks:
        subject = settler(tmp_path, ledger, tasks)
        closing = tasks.create_task(subject.settle(session_with_voucher()))
        await ledger.asked.wait()
        await subject.retry_once()
        ledger.answer.set()
        assert await closing
        await subject.retry_once()
    assert len(ledger.presented) == 1
    assert spooled(tmp_path) == []


async def test_without_a_voucher_there_is_nothing_to_present(tmp_path: Path) -> None:
    session = session_with_voucher()
    session.books = None
    ledger = FakeLedger()
    async with TaskScope() as tasks:
        assert not await settler(tmp_path, ledger, tasks).settle(session)
    assert ledger.presented == []


@pytest.mark.parametrize("content", [b"", b"\xff\xff"])
async def test_a_damaged_spool_file_harms_nothing_else(tmp_path: Path, content: bytes) -> None:
    async with TaskScope() as tasks:
        subject = settler(tmp_path, FakeLedger(), tasks)
        (tmp_path / "settlements" / "0-1").write_bytes(content)
        await subject.retry_once()
    assert spooled(tmp_path) in ([], [".refused"])


QUORUM = read_policy(policy_of(witnessed_network()).encode())


async def test_evidence_is_kept_until_the_witnesses_have_seen_it(tmp_path: Path) -> None:
    ledger = WitnessedLedger()
    async with TaskScope() as tasks:
        subject = settler(tmp_path, ledger, tasks, QUORUM)
        assert await subject.settle(session_with_voucher())
        assert spooled(tmp_path) == [".settled"]
        for witnesses in ((), (1,)):
            ledger.witnesses = witnesses
            await subject.confirm_once()
            assert spooled(tmp_path) == [".settled"]
        assert len(subject.awaiting) == 1
        assert subject.awaiting.credit > 0
        ledger.witnesses = (1, 2)
        await subject.confirm_once()
    assert spooled(tmp_path) == []
    assert len(subject.awaiting) == subject.awaiting.credit == 0
    assert len(ledger.presented) == 1


async def test_a_ledger_that_does_not_answer_proves_nothing(tmp_path: Path) -> None:
    ledger = WitnessedLedger()
    ledger.witnesses, ledger.down = (0, 1), True
    async with TaskScope() as tasks:
        subject = settler(tmp_path, ledger, tasks, QUORUM)
        await subject.settle(session_with_voucher())
        await subject.confirm_once()
    assert spooled(tmp_path) == [".settled"]


async def test_what_waits_for_witnesses_outlives_the_process_and_refuses_in_time(
    tmp_path: Path,
) -> None:
    ledger = WitnessedLedger()
    async with TaskScope() as tasks:
        await settler(tmp_path, ledger, tasks, QUORUM).settle(session_with_voucher())
        subject = settler(tmp_path, ledger, tasks, QUORUM)
        assert subject.refusal == ""
        subject._clock_ms = lambda: NOW_MS + 1_001
        assert "witnesses have not seen it" in subject.refusal
        ledger.witnesses = (0, 2)
        await subject.confirm_once()
        assert subject.refusal == ""
    assert spooled(tmp_path) == []


async def test_a_network_without_a_quorum_trusts_the_authority(tmp_path: Path) -> None:
    ledger = WitnessedLedger()
    async with TaskScope() as tasks:
        policy = read_policy(policy_of(paper_network()).encode())
        subject = settler(tmp_path, ledger, tasks, policy)
        await subject.settle(session_with_voucher())
        await subject.confirm_once()
    assert spooled(tmp_path) == []
    assert ledger.asked == 0


@pytest.mark.parametrize("content", [b"", b"\xff\xff"])
async def test_a_damaged_settled_file_is_kept_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "settlements").mkdir()
    (tmp_path / "settlements" / "0-1.settled").write_bytes(content)
    async with TaskScope() as tasks:
        assert len(settler(tmp_path, WitnessedLedger(), tasks, QUORUM).awaiting) == 0
    assert spooled(tmp_path) == [".refused"]


async def test_what_was_reserved_and_not_used_is_given_back(tmp_path: Path) -> None:
    """A client that left in its prompt, before the first voucher."""
    ledger = FakeLedger(PeerUnreachable("down"))
    async with TaskScope() as tasks:
        subject = settler(tmp_path, ledger, tasks, QUORUM)
        subject.settle_later(session_without_voucher())
        await subject.idle(5)
        assert len(list((tmp_path / "settlements").iterdir())) == 1
        await subject.retry_once()
    assert ledger.presented == [None, None]
    assert list((tmp_path / "settlements").iterdir()) == []
