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
_CARRIERS = {
    "tun": "network namespaces",
    "forwarder": "a forwarder between loopback addresses",
}
_TERMINATED = 128 + signal.SIGTERM
DeviceOption = Annotated[
    str, typer.Option(help="Where they compute: cpu, auto, cuda, cuda:N or mps.")
]
DiskOption = Annotated[
    int, typer.Option(min=0, help="A disk of this size for each node; needs root.")
]
AuthoritiesOption = Annotated[
    int, typer.Option(min=1, help="Ledger authorities: 1, or a committee of 4, 7, …")
]
UnprivilegedOption = Annotated[
    bool, typer.Option("--unprivileged", help="Shape without namespaces, even as root.")
]
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="A name, as in: status.")]


@app.command()
def up(
    nodes: Annotated[int | None, typer.Option("-n", help="Number of nodes; default 4.")] = None,
    model: Annotated[str, typer.Option(help="A model of the catalogue.")] = "smollm2-135m",
    replicas: Annotated[int | None, typer.Option(help="Hosts of each span.")] = None,
    stages: Annotated[int | None, typer.Option(help="Equal spans to cut the model in.")] = None,
    dtype: Annotated[str, typer.Option(help="Numeric type of the stages.")] = "fp32",
    device: DeviceOption = "cpu",
    wan: Annotated[
        str | None, typer.Option(help="lan, metro, continental, global, lossy or nat.")
    ] = None,
    unprivileged: UnprivilegedOption = False,
    disk_mb: DiskOption = 0,
    authorities: AuthoritiesOption = 1,
    witnesses: Annotated[
        int | None, typer.Option(min=0, help="Nodes that witness the log; default 3.")
    ] = None,
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
    from plait.compute.device import CPU, check_device
    from plait.compute.load import check_loadable
    from plait.model import catalog
    from plait.testnet import launch
    from plait.testnet.layout import place

    directory = (directory or default_testnet_dir()).resolve()
    local = catalog.load(model)
    check_device(device)
    # A stage looks for its device itself: asking here would start a driver that forks.
    check_loadable(local, None, dtype, CPU if device == CPU.name else None)
    placed = place(local.manifest.layers, nodes=nodes, stages=stages, replicas=replicas)
    network = launch.choose_wan(wan, placed, unprivileged=unprivileged) if wan else None
    if network is not None:
        _tell_wan(network.profile, network.backend, network.why)
    process = launch.start(
        directory,
        placed,
        model=model,
        dtype=dtype,
        device=device,
        wan=network,
        disk_mb=disk_mb,
        with_parent=not detach,
        authorities=authorities,
        witnesses=witnesses,
    )
    _end_on_signals()
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
def hang(node: NodeArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Stop a node's process without ending it (SIGSTOP): it holds its connections, silent."""
    _command(directory, "hang", node, ("ready", "starting", "draining"), as_json)


@app.command()
def resume(node: NodeArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Let a hung node go on (SIGCONT)."""
    _command(directory, "resume", node, ("ready", "starting", "draining"), as_json)


@app.command()
def links(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Measure the round trip between every pair of ends, the client's among them."""
    from plait.testnet.rtt import measure_links

    rows = measure_links(_running(directory))
    if as_json:
        emit_json({"links": rows})
        return
    columns = ("source", "target", "rtt_ms", "method")
    table(columns, [[row[column] for column in columns] for row in rows])


@app.command()
def shape(
    profile: Annotated[str | None, typer.Option(help="All figures of a profile.")] = None,
    source: Annotated[list[str] | None, typer.Option("--from", help="Default: all.")] = None,
    target: Annotated[list[str] | None, typer.Option("--to", help="Default: all.")] = None,
    delay_ms: Annotated[float | None, typer.Option(help="One way.")] = None,
    jitter_ms: Annotated[float | None, typer.Option(help="Half width, one way.")] = None,
    rate_mbit: Annotated[float | None, typer.Option(help="0 is unlimited.")] = None,
    loss: Annotated[float | None, typer.Option(help="Share of packets, 0 to 1.")] = None,
    cut: Annotated[bool, typer.Option("--cut", help="Let nothing through.")] = False,
    mend: Annotated[bool, typer.Option("--heal", help="Let everything through again.")] = False,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what the links of a --wan testnet do, at once; without a change, show it.

    Ends are nodes' names and "client". One direction only: name both for both.

    Example: plait testnet shape --to node-2 --cut
    """
    from plait.errors import ConfigError
    from plait.testnet.shape import changes

    if cut and mend:
        raise ConfigError("a link cannot be cut and healed at once", remedy="--cut or --heal")
    directory = _running(directory)
    figures = {"delay_ms": delay_ms, "jitter_ms": jitter_ms, "rate_mbit": rate_mbit, "loss": loss}
    change = changes(
        profile, source or [], target or [], figures, cut=cut or (False if mend else None)
    )
    if change is not None:
        answer = control.request(directory, "shape", change=change)
        status(f"{answer['links_changed']} links changed")
    answer = control.request(directory, "shape")
    if as_json:
        emit_json(answer)
    elif change is None:
        columns = ("source", "target", "delay_s", "jitter_s", "rate_bps", "loss", "cut")
        table(columns, [[link[column] for column in columns] for link in answer["links"]])


@app.command()
def chaos(
    plan: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Faults and times, TOML.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--random", help="Draw them from a seed.")] = None,
    duration_s: Annotated[float, typer.Option("--duration", help="Seconds of load.")] = 60.0,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between faults.")] = 10.0,
    load: Annotated[int, typer.Option(min=0, help="Generations at a time.")] = 4,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Only these faults; repeatable.")
    ] = None,
    allow_gaps: Annotated[
        bool, typer.Option("--allow-gaps", help="A layer may lose its last host.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Do harm to a live testnet under load and report what its users noticed.

    Every answer is compared with the undisturbed one. Exit code 1 if a request failed, a
    token is wrong, the ledger does not hold, something leaked, or no fault was applied.
    Ctrl-C and SIGTERM heal and report; after SIGTERM the exit code is 143.

    Example: plait testnet chaos --random 7 --duration 60 --every 10
    """
    import asyncio
    from random import Random

    from plait.errors import ConfigError
    from plait.testnet.chaos import hosts_of, run_chaos
    from plait.testnet.chaos_plan import DISRUPTIVE, parse_plan, random_plan

    if (plan is None) == (seed is None):
        raise ConfigError("say what is to happen", remedy="--random SEED, or --plan FILE")
    directory = _running(directory)
    if plan is not None:
        chosen = parse_plan(plan.read_text())
    else:
        answer = control.request(directory, "status")
        without = set[str]() if answer["wan"] else {"cut"}
        without |= set[str]() if answer["disk_mb"] else {"fill"}
        for kind in sorted(without - set(kinds or ())):
            status(f"no {kind}: up {'--wan PROFILE' if kind == 'cut' else '--disk-mb N'} allows it")
        chosen = random_plan(
            Random(seed).random,
            hosts_of(answer),
            duration_s=duration_s,
            every_s=every_s,
            load=load,
            kinds=tuple(kinds or (kind for kind in DISRUPTIVE if kind not in without)),  # type: ignore[arg-type]
            allow_gaps=allow_gaps,
        )
    report = asyncio.run(run_chaos(directory, chosen, max_tokens=max_tokens, tell=status))
    if as_json:
        emit_json(report | {"seed": seed})
    else:
        _show_chaos(report)
    if report["signal"] == "SIGTERM":
        raise typer.Exit(_TERMINATED)
    if report["wrong"]:
        raise typer.Exit(1)


@app.command()
def heal(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """End all harm: cut links, quotas, hung, full and ended nodes, whoever left them so.

    Waits until every node is ready. Exit code 1 if something could not be healed.

    Example: plait testnet heal
    """
    from plait.testnet.healing import heal as heal_testnet

    done = heal_testnet(_running(directory))
    if as_json:
        emit_json({"healed": done.healed, "failed": done.failed})
    for what in done.healed:
        status(f"healed: {what}")
    for what in done.failed:
        status(f"NOT healed: {what}")
    if not done.healed and not done.failed:
        status("nothing was wrong")
    if done.failed:
        raise typer.Exit(1)


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
            f"{node['state']} (hung)" if node["hung"] else node["state"],
            node["pid"],
            node["peer"],
        ]
        for node in answer["nodes"]
    ]
    table(["name", "roles", "model", "span", "state", "pid", "peer"], rows)
    if (wan := answer["wan"]) is not None:
        _tell_wan(wan["profile"], wan["backend"], wan["why"])
    status(f"network file: {directory / NETWORK_FILE}")


def _show_chaos(report: dict[str, Any]) -> None:
    requests, gaps = report["requests"], report["gap_s"]
    applied = sum(fault["outcome"].startswith("applied") for fault in report["faults"])
    status(f"{applied} of {len(report['faults'])} faults applied in {report['duration_s']} s")
    for name in ("ok", "failed", "rerouted", "tokens_delivered", "tokens_wrong"):
        print(f"{name.replace('_', ' ')}: {requests[name]}")
    for failure in requests["failures"]:
        print(f"  {failure['count']} x {failure['code']}, first: {failure['example']}")
    for name, figures in gaps.items():
        if count := figures["count"]:
            spread = ", ".join(f"{part} {figures[part]:.2f} s" for part in ("p50", "p99", "max"))
            print(f"longest pause, {name.replace('_', ' ')}: {spread} ({count} answers)")
    print("\n".join(f"WRONG: {what}" for what in report["wrong"]) or "nothing is wrong")


def _tell_wan(profile: str, backend: str, why: str) -> None:
    status(f"wan {profile}: carried by {_CARRIERS[backend]} ({why})")


def _end_on_signals() -> None:
    with suppress(ValueError):  # only the main thread may: elsewhere the default stays
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.default_int_handler)


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
