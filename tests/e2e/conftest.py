"""Real testnets for end-to-end tests: processes on loopback, driven by the command line."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plait.testing.testnets import Testnet, running_testnet

TINY = "tiny-random"

StartTestnet = Callable[..., Testnet]


@pytest.fixture(scope="package")
def testnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartTestnet]:
    """Give ``testnet(model, stages, replicas)``: a testnet of that shape, shared by this folder.

    Without ``stages`` it is the default: three spans and a second host of the first. A test
    that leaves a testnet other than it found it asks ``own_testnet`` for one. All end with the
    folder's last test: nodes that nobody uses would slow down what comes after.
    """
    started: dict[tuple[str, int | None, int, int], Testnet] = {}
    with contextlib.ExitStack() as ends:

        def start(
            model: str = TINY, stages: int | None = None, replicas: int = 1, *, authorities: int = 1
        ) -> Testnet:
            shape = (model, stages, replicas, authorities)
            if shape not in started:
                folder = tmp_path_factory.mktemp("testnet")
                started[shape] = ends.enter_context(_running(folder, *shape))
            return started[shape]

        yield start


@pytest.fixture(scope="module")
def own_testnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartTestnet]:
    """Give ``own_testnet(…)``: as ``testnet``, another one each time; all end with the module."""
    with contextlib.ExitStack() as ends:

        def start(
            model: str = TINY, stages: int | None = None, replicas: int = 1, *, authorities: int = 1
        ) -> Testnet:
            folder = tmp_path_factory.mktemp("own_testnet")
            return ends.enter_context(_running(folder, model, stages, replicas, authorities))

        yield start


def _running(
    folder: Path, model: str, stages: int | None, replicas: int, authorities: int
) -> contextlib.AbstractContextManager[Testnet]:
    shape = ["--authorities", str(authorities)]
    if stages is not None:
        shape += ["--stages", str(stages), "--replicas", str(replicas)]
    return running_testnet(model, *shape, folder=folder)
