"""A testnet's WAN: who carries it, what it is told, and that nothing of it is left behind."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from plait.errors import ConfigError
from plait.task_scope import TaskScope
from plait.testnet import disks, launch, tun
from plait.testnet.carrier import _owner
from plait.testnet.chaos_plan import Fault
from plait.testnet.cluster import create
from plait.testnet.control import await_node, request
from plait.testnet.faults import Injector, Skipped
from plait.testnet.folder import data_dir
from plait.testnet.layout import place
from plait.testnet.leaks import grown, holdings
from plait.testnet.rtt import measure_links
from plait.testnet.shape import changes
from plait.testnet.wan import PROFILES, Wan

STANDIN = (sys.executable, "-P", "-m", "plait.testing.standin")
PLACED = place(8, nodes=4)
TUN = Wan("metro", "tun", "a test", 7)
FORWARDER = Wan("metro", "forwarder", "a test", 7)

MISSING = tun.missing()
privileged = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def test_every_profile_can_be_chosen_without_privileges_but_nat() -> None:
    for profile in PROFILES.keys() - {"nat"}:
        wan = launch.choose_wan(profile, PLACED, unprivileged=True)
        assert (wan.backend, wan.why) == ("forwarder", "asked for")
    with pytest.raises(ConfigError, match="needs network namespaces"):
        launch.choose_wan("nat", PLACED, unprivileged=True)
    with pytest.raises(ConfigError, match="no WAN profile 'moon'; there are lan, metro"):
        launch.choose_wan("moon", PLACED)
    with pytest.raises(ConfigError, match="two hosts"):
        launch.choose_wan("nat", place(8, stages=3))


def test_named_round_trips_are_halved_per_direction() -> None:
    rtt_ms = {name: shape.delay_s * 2000 for name, shape in PROFILES.items()}
    assert rtt_ms["lan"] == 0
    assert (rtt_ms["metro"], rtt_ms["continental"], rtt_ms["global"]) == (5, 25, 100)


def test_nodes_listen_where_others_find_them(tmp_path: Path) -> None:
    plain = create(tmp_path / "a", PLACED, model="tiny")
    node = plain.members[1]
    config = plain.config(tmp_path, node)
    assert (node.host, config.host, config.announce_host) == ("127.0.0.1", "127.0.0.1", "")
    between = create(tmp_path / "b", PLACED, model="tiny", wan=FORWARDER)
    config = between.config(tmp_path, between.members[1])
    assert (config.host, config.announce_host) == ("127.0.0.1", "127.18.7.2")
    apart = create(tmp_path / "c", PLACED, model="tiny", wan=TUN)
    config = apart.config(tmp_path, apart.members[1])
    assert (config.host, config.announce_host) == ("198.18.7.2", "")


def test_a_node_behind_nat_listens_inside_and_bootstraps_nobody(tmp_path: Path) -> None:
    wan = launch.choose_wan("nat", PLACED) if not MISSING else None
    hidden = Wan("nat", "tun", "a test", 7, behind_nat=wan.behind_nat if wan else "node-4")
    cluster = create(tmp_path / "net", PLACED, model="tiny", wan=hidden)
    node = cluster.member("node-4")
    assert cluster.config(tmp_path, node).host == "10.18.7.4"
    text = (tmp_path / "net" / "network.toml").read_text()
    assert "198.18.7.3" in text
    assert "198.18.7.4" not in text


@pytest.mark.parametrize(
    ("profile", "figures", "cut", "expected"),
    [
        (None, {"delay_ms": 20.0}, None, {"delay_s": 0.02}),
        (None, {"rate_mbit": 8.0, "loss": 0.1}, True, {"rate_bps": 8e6, "loss": 0.1, "cut": True}),
        (None, {}, False, {"cut": False}),
        (
            "lossy",
            {"delay_ms": 1.0, "jitter_ms": 0.0},
            None,
            {"delay_s": 0.001, "jitter_s": 0.0, "rate_bps": 5e7, "loss": 0.01, "cut": False},
        ),
    ],
)
def test_a_change_is_said_in_si_units(
    profile: str | None,
    figures: dict[str, float | None],
    cut: bool | None,
    expected: dict[str, Any],
) -> None:
    found = changes(profile, ["node-1"], [], figures, cut=cut)
    assert found == expected | {"sources": ["node-1"], "targets": []}


def test_no_change_is_a_question_and_ends_alone_are_a_mistake() -> None:
    assert changes(None, [], [], {"delay_ms": None}, cut=None) is None
    with pytest.raises(ConfigError, match="nothing to change"):
        changes(None, ["node-1"], [], {}, cut=None)


def test_who_dials_is_known_by_the_process_that_holds_the_socket() -> None:
    with socket.create_server(("127.0.0.2", 0)) as listener:
        door = listener.getsockname()
        with socket.create_connection(door) as dialling:
            address = dialling.getsockname()
            own = {"node-1": 1, "node-2": os.getpid()}
            assert _owner(own, address, door) == "node-2"
            assert _owner({"node-1": os.getppid()}, address, door) == "client"
        assert _owner(own, ("127.0.0.1", 9), door) == "client"


# --- with processes ---


class Testnet:
    """A testnet of stand-ins with a WAN."""

    __test__ = False

    def __init__(self, directory: Path, wan: Wan | None, disk_mb: int = 0) -> None:
        self.directory = directory
        self.process = launch.start(
            directory, PLACED, model="tiny", wan=wan, disk_mb=disk_mb, command=STANDIN
        )
        launch.wait_until_ready(directory, self.process, timeout_s=30, tell=lambda message: None)

    def status(self) -> dict[str, Any]:
        return request(self.directory, "status")

    def end(self) -> None:
        launch.abandon(self.directory, self.process)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Testnet]]:
    started: list[Testnet] = []

    def make(wan: Wan | None = None, disk_mb: int = 0) -> Testnet:
        started.append(Testnet(tmp_path / "net", wan, disk_mb))
        return started[-1]

    yield make
    for testnet in started:
        testnet.end()


def namespace_of(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@privileged
def test_every_node_has_a_namespace_and_the_network_between_them_is_slow(
    start: Callable[..., Testnet],
) -> None:
    testnet = start(launch.choose_wan("metro", PLACED))
    nodes = testnet.status()["nodes"]
    namespaces = {namespace_of(node["pid"]) for node in nodes} | {namespace_of(os.getpid())}
    assert len(namespaces) == len(nodes) + 1
    rows = measure_links(testnet.directory, repeats=1)
    assert len(rows) == 5 * 5, "five processes and the client, each to the five"
    floor_ms = PROFILES["metro"]
    least_ms = (floor_ms.delay_s - floor_ms.jitter_s) * 2000
    assert all(row["rtt_ms"] is not None and row["rtt_ms"] >= least_ms for row in rows)
    assert testnet.status()["wan"]["backend"] == "tun"


@pytest.mark.slow
@privileged
def test_links_are_changed_and_cut_live(start: Callable[..., Testnet]) -> None:
    testnet = start(launch.choose_wan("lan", PLACED))
    change = {"targets": ["node-2"], "delay_s": 0.05}
    assert request(testnet.directory, "shape", change=change)["links_changed"] == 5
    rtt_ms = {
        (row["source"], row["target"]): row["rtt_ms"]
        for row in measure_links(testnet.directory, repeats=1)
    }
    assert rtt_ms["node-1", "node-2"] >= 50
    assert rtt_ms["client", "node-2"] >= 50
    with pytest.raises(ConfigError, match="there is no end 'node-9'"):
        request(testnet.directory, "shape", change={"sources": ["node-9"], "cut": True})
    with pytest.raises(ConfigError, match="not a change"):
        request(testnet.directory, "shape", change={"cut": "very"})


@pytest.mark.slow
@privileged
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_it_outlives_the_supervisor(
    start: Callable[..., Testnet], number: signal.Signals
) -> None:
    before = interfaces()
    testnet = start(launch.choose_wan("metro", PLACED))
    assert interfaces() > before, "the host has a leg of its own"
    testnet.process.send_signal(number)
    eventually(lambda: interfaces() == before)


@pytest.mark.slow
@privileged
def test_a_node_disk_can_be_filled_and_emptied(start: Callable[..., Testnet]) -> None:
    testnet = start(disk_mb=1)
    host_folder = data_dir(testnet.directory, "node-1")
    folder = disks.seen_by(testnet.status()["supervisor_pid"], host_folder)
    assert (folder / "identity.key").read_bytes() == (host_folder / "identity.key").read_bytes()
    assert 0 < disks.fill(folder) < 1 << 20
    with pytest.raises(OSError, match="No space"), (folder / "more").open("wb") as file:
        file.write(bytes(4096))
    assert not (host_folder / "filler").exists(), "the host's disk is not touched"
    disks.empty(folder)
    (folder / "more").write_bytes(bytes(4096))


@pytest.mark.slow
def test_without_a_wan_there_is_nothing_to_shape(start: Callable[..., Testnet]) -> None:
    testnet = start()
    assert testnet.status()["wan"] is None
    with pytest.raises(ConfigError, match="no WAN to shape"):
        request(testnet.directory, "shape")


@pytest.mark.slow
def test_the_forwarder_is_told_of_changes_too(start: Callable[..., Testnet]) -> None:
    testnet = start(launch.choose_wan("metro", PLACED, unprivileged=True))
    assert testnet.status()["wan"]["backend"] == "forwarder"
    request(testnet.directory, "shape", change={"sources": ["client"], "cut": True})
    links = request(testnet.directory, "shape")["links"]
    assert {link["source"] for link in links if link["cut"]} == {"client"}
    request(testnet.directory, "kill", "node-1")
    request(testnet.directory, "restart", "node-1")
    await_node(testnet.directory, "node-1", ("ready",), starts=2)


@pytest.mark.slow
def test_faults_are_done_and_all_of_them_undone(start: Callable[..., Testnet]) -> None:
    testnet = start()
    before = testnet.status()

    async def main() -> None:
        async with TaskScope() as tasks:
            injector = Injector(testnet.directory, tasks)
            assert await injector.apply(Fault(0, "kill", "node-1")) == "applied"
            await injector.apply(Fault(0, "hang", "node-2"))
            await injector.apply(Fault(0, "drain", "node-3"))
            assert "applied by" in await injector.apply(Fault(0, "slow", "node-4"))
            with pytest.raises(Skipped, match="--wan"):
                await injector.apply(Fault(0, "cut", "ledger-1"))
            with pytest.raises(Skipped, match="--disk-mb"):
                await injector.apply(Fault(0, "fill", "ledger-1"))
            eventually(lambda: testnet.status()["nodes"][0]["state"] == "dead")
            hung = [node["name"] for node in testnet.status()["nodes"] if node["hung"]]
            assert hung == ["node-2"]
            await injector.heal_everything()

    asyncio.run(main())
    nodes = testnet.status()["nodes"]
    assert {node["state"] for node in nodes} == {"ready"}
    assert not any(node["hung"] for node in nodes)
    assert [node["starts"] for node in nodes] == [2, 1, 2, 1, 1]
    assert not list(Path("/sys/fs/cgroup").glob("**/plait-slow-*"))
    leaked = grown(
        holdings(testnet.directory, before), holdings(testnet.directory, testnet.status())
    )
    assert not any(leaked.values()), leaked


@pytest.mark.slow
def test_a_hung_node_still_ends_when_told_to(start: Callable[..., Testnet]) -> None:
    testnet = start()
    request(testnet.directory, "hang", "node-1")
    request(testnet.directory, "stop", "node-1")
    assert await_node(testnet.directory, "node-1", ("stopped", "dead"))["state"] == "stopped"
    with pytest.raises(ConfigError, match="not running"):
        request(testnet.directory, "hang", "node-1")
