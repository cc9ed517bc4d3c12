"""A testnet of ``plait.testing.testnets`` is gone when its owner is, and is not remembered."""

import subprocess
import sys
from pathlib import Path

import pytest

from plait.testing.testnets import CommandFailed, running_testnet
from plait.testnet.control import is_live

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

OWNER = """
import signal
from plait.testing.testnets import running_testnet
with running_testnet("tiny-random", "-n", "1") as net:
    print(net.directory, net.run("Hello", "--max-tokens", "2")["completion_tokens"], flush=True)
    signal.pause()
"""


def test_sigterm_to_its_owner_ends_a_testnet() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        directory, tokens = owner.stdout.readline().split()
        assert (is_live(Path(directory)), tokens) == (True, "2")
        owner.terminate()
        owner.communicate(timeout=60)
    assert not Path(directory).exists()
    assert not is_live(Path(directory))


def test_what_does_not_start_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(CommandFailed, match="no model 'nonesuch'"),
        running_testnet("nonesuch", folder=tmp_path),
    ):
        pytest.fail("it did not start")
    assert not is_live(tmp_path / "net")
