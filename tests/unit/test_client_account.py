"""The account folder: keys stay private, sequence numbers survive, lanes do not collide."""

import asyncio
import stat
import threading
from pathlib import Path

import pytest

from plait.client.account import LANES, Lane, open_account
from plait.envelope import seal
from plait.errors import CapacityError, ConfigError
from plait.testing.accounting import key_of
from plait.v1.identity_pb2 import SignedEnvelope
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
