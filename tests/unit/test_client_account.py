"""The account folder: keys stay private, sequence numbers survive, lanes do not collide."""

import asyncio
import stat
import threading
from pathlib import Path

import pytest

from plait.client.account import LANES, Lane, open_account
from plait.client.actions import Event, Granted, Reserve
from plait.client.reserving import Reserving
from plait.envelope import decode, seal
from plait.errors import CapacityError, ConfigError
from plait.ledger.certs import check_key_cert
from plait.ledger.service.key_store import rotate_ledger_key
from plait.testing.accounting import PaperSession, Plot, key_of
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation


def test_keys_are_made_once_and_are_private(tmp_path: Path) -> None:
    first, again = open_account(tmp_path / "account"), open_account(tmp_path / "account")
    assert first.peer == again.peer
    assert first.ledger_key.public == again.ledger_key.public != first.peer_key.public
    for name in ("identity.key", "ledger.key", "tls.key"):
        assert stat.S_IMODE((tmp_path / "account" / name).stat().st_mode) == 0o600


def test_a_lane_remembers_what_was_signed_and_not_answered(tmp_path: Path) -> None:
    reservation = seal(key_of("client ledger"), BudgetReservation(sequence=7))
    with open_account(tmp_path).lane() as lane:
        assert lane.load() == (1, None)
        lane.save(7, reservation)
        number = lane.number
    with open_account(tmp_path).lane() as lane:
        assert lane.load() == (7, reservation)
        assert lane.number == number
        lane.save(8, None)
        assert lane.load() == (8, None)


def test_lost_lane_files_start_lanes_that_were_never_used(tmp_path: Path) -> None:
    with open_account(tmp_path).lane() as lane:
        lane.save(7, None)
        number = lane.number
    (tmp_path / "lanes" / "0.json").unlink()
    with open_account(tmp_path).lane() as lane:
        assert lane.load() == (1, None)
        assert lane.number != number


def test_concurrent_sessions_take_different_lanes_until_all_are_taken(tmp_path: Path) -> None:
    account = open_account(tmp_path)
    held = [account.lane() for _ in range(LANES)]
    assert len({lane.__enter__().number for lane in held}) == LANES
    with pytest.raises(CapacityError, match="lanes"), account.lane():
        pass
    for lane in held:
        lane.__exit__(None, None, None)


def test_a_damaged_lane_file_is_named(tmp_path: Path) -> None:
    account = open_account(tmp_path)
    with account.lane() as lane:
        (tmp_path / "lanes" / "0.json").write_text("{")
        with pytest.raises(ConfigError, match=r"0\.json"):
            lane.load()


class _SlowDisk(Lane):
    """A lane whose disk answers when it is told to."""

    answers = threading.Event()

    def save(self, next_sequence: int, pending: SignedEnvelope | None) -> None:
        self.answers.wait()
        super().save(next_sequence, pending)


async def test_a_save_that_is_cancelled_still_waits_for_the_disk(tmp_path: Path) -> None:
    lane = _SlowDisk(5, tmp_path / "0.json")
    async with asyncio.TaskGroup() as tasks:
        saving = tasks.create_task(lane.save_soon(7, None))
        await asyncio.sleep(0)
        saving.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        waits = not saving.done()
        lane.answers.set()  # before any assertion: the disk's thread would wait for ever
    assert waits and saving.cancelled()
    assert lane.load() == (7, None)


def test_a_disk_that_takes_nothing_is_one_clear_error(tmp_path: Path) -> None:
    with open_account(tmp_path).lane() as lane:
        (tmp_path / "lanes" / "0.part").mkdir()
        with pytest.raises(ConfigError, match="cannot write"):
            lane.save(7, None)


def test_a_rotated_key_is_for_the_next_session_and_the_old_one_is_found(tmp_path: Path) -> None:
    account = open_account(tmp_path)
    assert account.renewed() is account
    assert rotate_ledger_key(tmp_path) == 2
    newer = account.renewed()
    assert (newer.key_serial, newer.peer) == (2, account.peer)
    assert newer.ledger_key.public != account.ledger_key.public
    assert open_account(tmp_path).ledger_key.public == newer.ledger_key.public
    for one in (account, newer):
        cert = one.certificate("net", 1_000)
        _, key = check_key_cert(cert, "net", 1_000, one.peer)
        assert key == one.ledger_key.public
        assert decode(cert.payload, NodeKeyCert).serial == one.key_serial
    assert newer.with_key(newer.ledger_key.public) is newer
    old = newer.with_key(account.ledger_key.public)
    assert (old.ledger_key.public, old.key_serial) == (account.ledger_key.public, 1)
    with pytest.raises(ConfigError, match="does not have"):
        newer.with_key(key_of("stranger").public)


async def test_what_waits_from_before_a_rotation_is_sent_under_its_own_key(tmp_path: Path) -> None:
    account = open_account(tmp_path)
    pending = seal(account.ledger_key, BudgetReservation(sequence=1))
    with account.lane() as lane:
        lane.save(1, pending)
    rotate_ledger_key(tmp_path)
    newer = account.renewed()
    ledger = SeenLedger()
    cert = newer.certificate("net", 5)
    reserving = Reserving(newer, ledger, cert, lambda: 5)  # type: ignore[arg-type]
    events: list[Event] = []
    session = PaperSession(Plot())
    await reserving.reserve(Reserve(session.terms, 1_000), events.append)
    assert isinstance(events[-1], Granted)
    (first, its_cert), (second, _) = ledger.seen
    assert first == pending
    assert decode(its_cert.payload, NodeKeyCert).ledger_key == first.signer
    assert second.signer == newer.ledger_key.public


class SeenLedger:
    """Grants everything, and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[SignedEnvelope, SignedEnvelope]] = []

    async def reserve(self, reservation: SignedEnvelope, cert: SignedEnvelope) -> SignedEnvelope:
        self.seen.append((reservation, cert))
        return SignedEnvelope()
