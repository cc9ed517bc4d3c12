"""``plait testnet``: a real network of processes on this machine."""

import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.output import emit_json, status, table
from plait.errors import PlaitError
from plait.locate import (
    default_testnet_dir,
    forget_testnet,
    last_testnet,
    remember_testnet,
)
from plait.testnet import control
from plait.testnet.folder import NETWORK_FILE

app = typer.Typer(help="A real network of processes on this machine.", no_args_is_help=True)

DirOption = Annotated[
    Path | None, typer.Option("--dir", help="The testnet's folder; default: the last one started.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="A name, as in: status.")]


@app.command()
def up(
    nodes: Annotated[int | None, typer.Option("-n", help="Number of nodes; default 4.")] = None,
    model: Annotated[str, typer.Option(help="A model of the catalogue.")] = "smollm2-135m",
    replicas: Annotated[int | None, typer.Option(help="Hosts of each span.")] = None,
    stages: Annotated[int | None, typer.Option(help="Equal spans to cut the model in.")] = None,
    dtype: Annotated[str, typer.Option(help="Numeric type of the stages.")] = "fp32",
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is ready.")] = False,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to put it; default: the XDG state folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a testnet and wait until a complete route exists.

    Without --detach it stays until Ctrl-C and then ends every process.

    Example: plait testnet up -n 4 --model smollm2-135m --detach
    """
    from plait.compute.load import check_loadable
    from plait.model import catalog
    from plait.testnet import launch
    from plait.testnet.layout import place

    directory = (directory or default_testnet_dir()).resolve()
    local = catalog.load(model)
    check_loadable(local, None, dtype)
    placed = place(local.manifest.layers, nodes=nodes, stages=stages, replicas=replicas)
    process = launch.start(directory, placed, model=model, dtype=dtype, with_parent=not detach)
    with suppress(ValueError):  # only the main thread may: elsewhere the default stays
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    stays = False
    try:
        launch.wait_until_ready(directory, process, timeout_s=launch.START_TIMEOUT_S, tell=status)
        launch.issue_credit(directory)
        launch.wait_until_routable(directory, model, timeout_s=launch.ROUTE_TIMEOUT_S)
        remember_testnet(directory)
        _show(directory, as_json)
        stays = detach
        if not detach:
            _stay(process)
    finally:
        if not stays:
            _end(directory, process)


@app.command("status")
def show_status(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Show every node: its span, its state, its process."""
    _show(_running(directory), as_json)


@app.command()
def kill(node: NodeArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Kill a node's process at once (SIGKILL)."""
    _command(directory, "kill", node, ("dead",), as_json)


@app.command()
def stop(node: NodeArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Ask a node to end in order (SIGTERM) and wait for it."""
    _command(directory, "stop", node, ("stopped", "dead"), as_json)


@app.command()
def restart(node: NodeArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Start a node again with the same key and ports, and wait until it is ready."""
    _command(directory, "restart", node, ("ready",), as_json)


@app.command()
def down(directory: DirOption = None) -> None:
    """End every process and wait until none is left. Logs and keys stay in the folder."""
    directory = _running(directory)
    try:
        control.down(directory)
    except control.NotRunning:
        forget_testnet(directory)
        raise
    forget_testnet(directory)
    status(f"testnet in {directory} ended")


def _running(option: Path | None) -> Path:
    return (option or last_testnet() or default_testnet_dir()).resolve()


def _command(
    option: Path | None, command: str, name: str, states: tuple[str, ...], as_json: bool
) -> None:
    directory = _running(option)
    answer = control.request(directory, command, name)
    starts = next(node["starts"] for node in answer["nodes"] if node["name"] == name)
    node = control.await_node(directory, name, states, starts=starts)
    status(f"{name}: {node['state']}")
    if as_json:
        emit_json(node)


def _show(directory: Path, as_json: bool) -> None:
    answer: dict[str, Any] = control.request(directory, "status")
    if as_json:
        network = directory / NETWORK_FILE
        emit_json({"directory": str(directory), "network": str(network)} | answer)
        return
    rows = [
        [
            node["name"],
            "+".join(node["roles"]),
            node["model"],
            "{}:{}".format(*node["span"]) if node["span"] else None,
            node["state"],
            node["pid"],
            node["peer"],
        ]
        for node in answer["nodes"]
    ]
    table(["name", "roles", "model", "span", "state", "pid", "peer"], rows)
    status(f"network file: {directory / NETWORK_FILE}")


def _stay(process: subprocess.Popen[bytes]) -> None:
    with suppress(KeyboardInterrupt):
        status("press Ctrl-C to end the testnet")
        process.wait()


def _end(directory: Path, process: subprocess.Popen[bytes]) -> None:
    from plait.testnet.launch import abandon

    with suppress(PlaitError):
        status("ending the testnet")
    abandon(directory, process)
    forget_testnet(directory)
