"""Commands and gateways of ``plait.testing.testnets``: they end with their context."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plait.errors import NetworkError
from plait.testing.testnets import CommandFailed, Testnet, run_plait, serving

pytestmark = pytest.mark.slow

STAYS = """
import signal
print("loading\\nhttp://127.0.0.1:4711/v1", flush=True)
print("x" * 1_000_000, flush=True)
signal.pause()
"""
OWNER = """
import signal, sys
from plait.testing.testnets import serving
with serving(command=(sys.executable, "-c", sys.argv[1])) as gateway:
    print(gateway.process.pid, flush=True)
    signal.pause()
"""


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_a_command_gives_its_output_and_its_exit_code(tmp_path: Path) -> None:
    done = run_plait("testnet", "down", "--dir", str(tmp_path), environment={})
    assert (done.returncode, done.stdout) == (3, "")
    assert "no testnet is running" in done.stderr


def test_another_exit_code_than_expected_is_an_error_with_the_words(tmp_path: Path) -> None:
    net = Testnet(tmp_path, "tiny-random", {"XDG_STATE_HOME": str(tmp_path)})
    net.plait("testnet", "down", "--dir", str(tmp_path), expect=3)
    with pytest.raises(CommandFailed, match=r"exit code 3, not 0\n(.|\n)*no testnet is running"):
        net.control("down")


def test_a_gateway_is_read_from_its_output_and_ends_with_the_context() -> None:
    with serving(command=script(STAYS)) as gateway:
        assert (gateway.url, gateway.port) == ("http://127.0.0.1:4711/v1", 4711)
        assert gateway.process.poll() is None
    assert gateway.process.returncode == -signal.SIGTERM


def test_one_that_does_not_start_is_an_error_with_its_words() -> None:
    with (
        pytest.raises(NetworkError, match="no such port"),
        serving(command=script("print('no such port')")),
    ):
        pytest.fail("it did not start")


def test_sigterm_to_the_owner_ends_what_it_owns() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with subprocess.Popen(
        [*script(OWNER), STAYS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.terminate()
        owner.communicate(timeout=30)
    assert not Path(f"/proc/{pid}").exists()
    assert signal.getsignal(signal.SIGTERM) is before
