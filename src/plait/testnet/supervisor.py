"""The process that owns a testnet's nodes.

It imports everything heavy once and then forks one child per node, so that n nodes start
in about the time of one and share the pages. It stays single-threaded, because a fork
copies only the calling thread. No node outlives it: each asks the kernel to be killed
when its parent dies.
"""

import argparse
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn

from plait.errors import ConfigError, PlaitError
from plait.node.config import NodeConfig
from plait.testnet import disks
from plait.testnet.carrier import Carrier
from plait.testnet.cluster import Cluster, Member, load
from plait.testnet.control import REQUEST_BYTES_MAX, STOP_GRACE_S, listen
from plait.testnet.folder import CONTROL_SOCKET, WAN_NAME, log_path
from plait.testnet.ports import check_free

RunNode = Callable[[NodeConfig], int]
"""Runs one daemon to its end and returns its exit code."""

State = Literal["starting", "ready", "draining", "stopped", "dead"]

# The daemon imports these only when its roles need them, which is after the fork.
_PRELOADED = (
    "uvloop",
    "plait.ledger.service.authority",
    "plait.net.libp2p",
    "plait.node.stage_start",
)
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_CAUGHT = _ENDING | {signal.SIGCHLD}
_ALIVE_STATES: dict[str, State] = {"starting": "starting", "ready": "ready", "draining": "draining"}


@dataclass(slots=True)
class Child:
    """One node and the process it runs in now, if any."""

    member: Member
    config: NodeConfig
    pid: int | None = None
    starts: int = 0
    asked_to_stop: bool = False
    restart: bool = False
    hung: bool = False
    kill_at: float | None = None
    end: Literal["stopped", "dead"] = "stopped"

    def state(self) -> State:
        """What the node says of itself while it lives, and how it ended after that."""
        if self.pid is None:
            return self.end
        if self.asked_to_stop:
            return "draining"
        with suppress(OSError):
            word = (self.config.data_dir / "state").read_text().strip()
            return _ALIVE_STATES.get(word, "draining" if word == "stopped" else "starting")
        return "starting"


class Supervisor:
    """Forks, watches and ends the nodes of one testnet."""

    def __init__(
        self, directory: Path, cluster: Cluster, run_node: RunNode, *, stop_grace_s: float
    ) -> None:
        self._directory = directory
        self._cluster = cluster
        self._run_node = run_node
        self._stop_grace_s = stop_grace_s
        self._children = {
            member.name: Child(member, cluster.config(directory, member))
            for member in cluster.members
        }
        self._carrier = Carrier(cluster, cluster.wan) if cluster.wan else None
        self._ending = False
        self._listener: socket.socket | None = None
        self._signals: tuple[socket.socket, socket.socket] | None = None

    def serve(self) -> None:
        """Start every node and obey until told to end; returns when all have ended."""
        self._catch_signals()
        if self._cluster.disk_mb:
            folders = [child.config.data_dir for child in self._children.values()]
            disks.mount_small(folders, self._cluster.disk_mb)
        self._listener = listen(self._directory)
        gc.freeze()  # keep the collector from touching, and so copying, the shared pages
        if self._carrier is not None:
            self._carrier.start(self._fork_carrier)
        for child in self._children.values():
            self._start(child)
        try:
            while not (self._ending and not self._alive()):
                self._wait_for_events()
                self._reap()
                self._kill_overdue()
        finally:
            (self._directory / CONTROL_SOCKET).unlink(missing_ok=True)
            if self._carrier is not None:
                self._carrier.close()

    # --- events ---

    def _catch_signals(self) -> None:
        self._signals = socket.socketpair()
        for end in self._signals:
            end.setblocking(False)
        signal.set_wakeup_fd(self._signals[1].fileno(), warn_on_full_buffer=False)
        for number in _CAUGHT:
            # A handler must exist for the number to be written to the wakeup descriptor;
            # acting only there keeps a signal from interrupting a start half-way.
            signal.signal(number, lambda *_: None)

    def _wait_for_events(self) -> None:
        assert self._listener is not None
        assert self._signals is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._signals[0], selectors.EVENT_READ)
            for key, _ in selector.select(self._timeout_s()):
                if key.fileobj is self._listener:
                    self._answer(self._listener.accept()[0])
                else:
                    with suppress(BlockingIOError):
                        if set(self._signals[0].recv(4096)) & _ENDING:
                            self._end()

    def _timeout_s(self) -> float | None:
        deadlines = [child.kill_at for child in self._alive() if child.kill_at is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _alive(self) -> list[Child]:
        return [child for child in self._children.values() if child.pid is not None]

    def _reap(self) -> None:
        while self._alive():
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if self._carrier is not None and pid == self._carrier.pid:
                _log("the WAN process ended: nothing reaches any node any more")
                self._carrier.pid = None
            for child in self._alive():
                if child.pid == pid:
                    self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: Child, exit_code: int) -> None:
        _log(f"{child.member.name} ({child.pid}) ended with {exit_code}")
        orderly = exit_code == 0 or (child.asked_to_stop and exit_code == -signal.SIGTERM)
        child.end = "stopped" if orderly else "dead"
        child.pid, child.kill_at, child.hung = None, None, False
        if child.restart and not self._ending:
            self._start(child)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for child in self._alive():
            if child.kill_at is not None and child.kill_at <= now:
                _log(f"{child.member.name} did not end in {self._stop_grace_s:g} s: killed")
                self._signal(child, signal.SIGKILL)
                child.kill_at = None

    # --- commands ---

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(2.0)
            with connection.makefile("rwb") as stream:
                answer = self._obey(stream.readline(REQUEST_BYTES_MAX))
                stream.write(json.dumps(answer).encode() + b"\n")

    def _obey(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
            command, node = message["command"], message.get("node", "")
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"error": "not a command"}
        try:
            match command:
                case "status":
                    return self._status()
                case "down":
                    self._end()
                    return self._status()
                case "shape":
                    return self._shape(message)
                case "kill" | "stop" | "restart" | "hang" | "resume":
                    child = self._children[self._cluster.member(node).name]
                    {
                        "kill": self._kill,
                        "stop": self._stop,
                        "restart": self._restart,
                        "hang": self._hang,
                        "resume": self._resume,
                    }[command](child)
                    return self._status()
        except PlaitError as error:
            return {"error": str(error), "remedy": error.remedy}
        return {"error": f"there is no command {command!r}"}

    def _status(self) -> dict[str, Any]:
        return {
            "network_id": self._cluster.network_id,
            "supervisor_pid": os.getpid(),
            "disk_mb": self._cluster.disk_mb,
            "wan": self._wan_status(),
            "nodes": [
                {
                    "name": child.member.name,
                    "peer": child.member.peer,
                    "roles": list(child.member.roles),
                    "model": child.member.model,
                    "span": [child.member.span.start, child.member.span.end]
                    if child.member.span
                    else None,
                    "state": child.state(),
                    "pid": child.pid,
                    "hung": child.hung,
                    "host": child.member.host,
                    "starts": child.starts + child.restart,
                }
                for child in self._children.values()
            ],
        }

    def _wan_status(self) -> dict[str, Any] | None:
        wan, carrier = self._cluster.wan, self._carrier
        if wan is None or carrier is None:
            return None
        return {
            "profile": wan.profile,
            "backend": wan.backend,
            "why": wan.why,
            "client_host": wan.client_address if wan.backend == "tun" else None,
            "behind_nat": wan.behind_nat or None,
            "pid": carrier.pid,
        }

    def _shape(self, message: dict[str, Any]) -> dict[str, Any]:
        """Tell the WAN of a change, if the message holds one, or ask what every link does."""
        if self._carrier is None:
            raise ConfigError(
                "this testnet has no WAN to shape", remedy="plait testnet up --wan PROFILE"
            )
        return self._carrier.ask({"change": message["change"]} if "change" in message else {})

    def _hang(self, child: Child) -> None:
        _must_run(child)
        child.hung = True
        self._signal(child, signal.SIGSTOP)

    def _resume(self, child: Child) -> None:
        _must_run(child)
        child.hung = False
        self._signal(child, signal.SIGCONT)

    def _kill(self, child: Child) -> None:
        _must_run(child)
        child.restart = False
        self._signal(child, signal.SIGKILL)

    def _stop(self, child: Child) -> None:
        _must_run(child)
        child.restart = False
        self._terminate(child)

    def _restart(self, child: Child) -> None:
        if child.pid is None:
            if self._cluster.wan is None:  # else it has addresses of its own
                check_free(child.member.ports.used())
            self._start(child)
        else:
            child.restart = True
            self._terminate(child)

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            for child in self._alive():
                self._terminate(child)

    # --- processes ---

    def _terminate(self, child: Child) -> None:
        if not child.asked_to_stop:
            child.asked_to_stop = True
            child.kill_at = time.monotonic() + self._stop_grace_s
            self._signal(child, signal.SIGTERM)
            if child.hung:  # a stopped process would not notice
                child.hung = False
                self._signal(child, signal.SIGCONT)

    def _signal(self, child: Child, number: signal.Signals) -> None:
        assert child.pid is not None
        os.kill(child.pid, number)  # not reaped yet, so the number is still this child's

    def _start(self, child: Child) -> None:
        child.config.data_dir.mkdir(parents=True, exist_ok=True)
        (child.config.data_dir / "state").write_text("starting\n")
        child.asked_to_stop, child.restart, child.kill_at = False, False, None
        child.starts += 1

        def run() -> int:
            if self._carrier is not None:
                self._carrier.enter(child.member.name)
            return self._run_node(child.config)

        child.pid = self._fork(child.member.name, run)
        if self._carrier is not None:
            self._carrier.started(child.member.name, child.pid)

    def _fork_carrier(self, run: Callable[[], int]) -> int:
        return self._fork(WAN_NAME, run)

    def _fork(self, name: str, run: Callable[[], int]) -> int:
        """Start a process that runs the function; returns its pid."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        # A signal meant for the child must not run the supervisor's handlers in it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT)
        pid = os.fork()
        if pid == 0:
            self._become(name, run, parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _CAUGHT)
        _log(f"{name} started ({pid})")
        return pid

    def _become(self, name: str, run: Callable[[], int], parent: int) -> NoReturn:
        """Turn the forked process into what it is to be. Never returns."""
        exit_code = 1
        try:
            die_with_parent(parent, signal.SIGKILL)
            self._leave_supervisor()
            _redirect_output(log_path(self._directory, name))
            _libc().prctl(_PR_SET_NAME, f"plait {name}".encode()[:15])
            exit_code = run()
        except SystemExit as request:
            exit_code = request.code if isinstance(request.code, int) else 1
        except BaseException:  # noqa: BLE001 - the top of a process: its log gets the traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)  # the parent's exit handlers are not ours to run

    def _leave_supervisor(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _CAUGHT)
        assert self._listener is not None
        assert self._signals is not None
        for open_socket in (self._listener, *self._signals):
            open_socket.close()
        self._children.clear()


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Ask the kernel to send us a signal when our parent dies; exit if it is dead already."""
    _libc().prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os._exit(1)


def supervise(directory: Path, run_node: RunNode, *, stop_grace_s: float) -> None:
    """Run the testnet in ``directory`` until it is told to end."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        _log(f"warning: forking with {threads} threads; a node may hang")
    Supervisor(directory, load(directory), run_node, stop_grace_s=stop_grace_s).serve()


def main(
    preload: Callable[[], RunNode] | None = None, *, stop_grace_s: float = STOP_GRACE_S
) -> int:
    """Entry of ``python -m plait.testnet.supervisor DIR [--parent PID]``.

    ``preload`` makes the function that runs a node; by default it imports the daemon.
    """
    parser = argparse.ArgumentParser(description="own the nodes of one testnet")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--parent", type=int, help="end when this process does")
    options = parser.parse_args()
    if options.parent is not None:
        die_with_parent(options.parent, signal.SIGTERM)
    run_node = (preload or _preloaded_node)()
    supervise(options.directory, run_node, stop_grace_s=stop_grace_s)
    return 0


def _preloaded_node() -> RunNode:
    """Import what every node needs, before any fork."""
    from plait.compute.load import preload
    from plait.node.daemon import main as run_node

    for name in _PRELOADED:
        import_module(name)
    preload()
    return run_node


def _must_run(child: Child) -> None:
    if child.pid is None:
        raise ConfigError(
            f"{child.member.name} is not running ({child.state()})",
            remedy=f"plait testnet restart {child.member.name}",
        )


def _redirect_output(path: Path) -> None:
    with path.open("ab") as log, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
