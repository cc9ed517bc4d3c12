"""Layers hosted by the client: what is asked of them, and processes that end with it."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from plait.client.children import Child
from plait.client.hosting import Hosting, HostTerms, parse_spans
from plait.client.openai_client import address_of, gateway_arguments
from plait.errors import ConfigError
from plait.router.view import View
from plait.testing.compute import FAKE_SHAPE
from plait.types import Span


@pytest.mark.parametrize("text", ["0:2", "0:2,3:4", " 0:2 , 2:3"])
def test_spans_are_told_apart_by_commas(text: str) -> None:
    spans = parse_spans(text)
    assert spans[0] == Span(0, 2)
    assert len(spans) == 1 + text.count(",")


@pytest.mark.parametrize("text", ["", "0", "a:b", "2:1", "0:3,2:4", "3:4,0:1", ",", "0:1," * 9])
def test_spans_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="host="):
        parse_spans(text)


def hosting(spans: str, network: Path) -> Hosting:
    async def changed() -> None:
        raise AssertionError("nobody waits for a node that is not there")

    terms = HostTerms(spans=parse_spans(spans))
    return Hosting(terms, network, lambda: View({}, {}), changed)


async def test_a_model_without_such_layers_is_refused_before_anything_starts() -> None:
    subject = hosting("0:9", Path("none"))
    with pytest.raises(ConfigError, match="4 layers"):
        await subject.pins(FAKE_SHAPE)
    assert subject.known(FAKE_SHAPE) is None
    await subject.close()


@pytest.mark.slow
async def test_a_child_that_cannot_start_says_why(tmp_path: Path) -> None:
    child = Child.start(gateway_arguments(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"the gateway ended: error: there is no network file"):
        await address_of(child)
    await child.close()
    assert child.ended


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""
CHILD = """
import asyncio
from plait.parent import watching_parent

async def main():
    ended = asyncio.Event()
    with watching_parent(ended.set):
        await ended.wait()
    print("ended with its parent", flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_child_ends_even_if_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert int(parent.stdout.readline()) > 0
    parent.kill()
    parent.wait()
    # The child has the same output, and says so last.
    assert parent.stdout.read() == "ended with its parent\n"
    assert parent.stdin is not None
    parent.stdin.close()
    parent.stdout.close()


async def test_a_childs_folder_goes_with_it() -> None:
    folder = tempfile.TemporaryDirectory(prefix="plait-")
    child = Child(folder, ["--help"])
    await child.close()
    assert not Path(folder.name).exists()
