"""``plait node``: the daemon, and how to look at it and end it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from plait.cli.output import emit_json, status, table
from plait.errors import ConfigError, DeadlineExceeded, NetworkError
from plait.types import Span

if TYPE_CHECKING:
    from plait.node.config import Role

app = typer.Typer(help="Serve a span of a model's layers.", no_args_is_help=True)

_WAIT_POLL_S = 0.1


DataDirOption = Annotated[
    Path | None, typer.Option(help="Keys and state; by default in the XDG data folder.")
]
ModelOption = Annotated[
    str | None, typer.Option(help="The model that a stage serves; pull it first.")
]
RoleOption = Annotated[
    list[str] | None, typer.Option(help="stage (default), witness, ledger; repeatable.")
]
SpanOption = Annotated[
    str, typer.Option(help="Layers start:end, or auto: what free memory holds and lacks most.")
]
BootstrapOption = Annotated[
    list[str] | None, typer.Option(help="Another multiaddr to dial; repeatable.")
]
PricePrompt = Annotated[
    int, typer.Option(min=0, help="Microcredits per million prompt tokens per layer.")
]
PriceOutput = Annotated[
    int, typer.Option(min=0, help="Microcredits per million output tokens per layer.")
]
UnwitnessedMax = Annotated[
    int, typer.Option(min=0, help="Microcredits settled but unwitnessed that end new sessions.")
]
UnwitnessedS = Annotated[
    int, typer.Option(min=0, help="How long witnesses may take before that counts.")
]
DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: cpu, auto, cuda, cuda:N or mps.")
]
PrefixDiskMb = Annotated[
    int, typer.Option(min=0, help="Disk for prompts and answers that clients have kept.")
]
KeepAliveSMax = Annotated[int, typer.Option(min=0, help="For so long at most; 0: not at all.")]
WithParent = Annotated[bool, typer.Option("--with-parent", help="End when standard input ends.")]


@app.command()
def run(
    model: ModelOption = None,
    role: RoleOption = None,
    span: SpanOption = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, int4, int8 or auto.")] = "fp32",
    device: DeviceOption = "cpu",
    price_prompt: PricePrompt = 5_000,
    price_output: PriceOutput = 20_000,
    region: Annotated[str, typer.Option(help="Where the node stands; clients may filter.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    public_port: Annotated[int, typer.Option(help="0: chosen free.")] = 0,
    peer_port: Annotated[int, typer.Option(help="0: chosen free.")] = 0,
    p2p_port: Annotated[int, typer.Option(help="0: chosen free.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Compute threads; 0: all cores.")] = 0,
    kv_tokens: Annotated[int, typer.Option(min=16, help="KV-cache capacity in tokens.")] = 16_384,
    retained_mb: Annotated[int, typer.Option(min=0, help="Memory to rebuild others from.")] = 512,
    spill_mb: Annotated[int, typer.Option(min=0, help="Disk for what goes beyond that.")] = 4096,
    prefix_disk_mb: PrefixDiskMb = 1024,
    keep_alive_s_max: KeepAliveSMax = 3600,
    drain_s: Annotated[float, typer.Option(min=0, help="How long a drain may take.")] = 30.0,
    unwitnessed_max: UnwitnessedMax = 100_000,
    unwitnessed_s: UnwitnessedS = 600,
    data_dir: DataDirOption = None,
    with_parent: WithParent = False,
    bootstrap: BootstrapOption = None,
    network: Annotated[Path | None, typer.Option(help="Network file.")] = None,
) -> None:
    """Run a node in the foreground.

    SIGTERM or Ctrl-C drains it: its clients are told to move, and it ends when they have, or
    after --drain-s. A second signal ends it at once.
    """
    from plait.compute.device import check_device
    from plait.locate import network_path, node_dir
    from plait.node.config import NodeConfig
    from plait.node.daemon import main
    from plait.types import Prices

    _check_multiaddrs(bootstrap or ())
    check_device(device)
    config = NodeConfig(
        name="node",
        network_file=network_path(network),
        data_dir=data_dir or node_dir(),
        roles=_roles(role or ["stage"]),
        model=model,
        span=_layers(span),
        dtype=dtype,
        device=device,
        prices=Prices(prompt=price_prompt, output=price_output),
        region=region,
        host=host,
        public_port=public_port,
        peer_port=peer_port,
        p2p_port=p2p_port,
        threads=threads,
        kv_tokens_max=kv_tokens,
        retained_mb=retained_mb,
        spill_mb=spill_mb,
        prefix_disk_mb=prefix_disk_mb,
        keep_alive_s_max=keep_alive_s_max,
        drain_s=drain_s,
        unwitnessed_max=unwitnessed_max,
        unwitnessed_s=unwitnessed_s,
        with_parent=with_parent,
        extra_bootstrap=tuple(bootstrap or ()),
    )
    raise typer.Exit(main(config))


def _roles(names: Sequence[str]) -> "frozenset[Role]":
    from plait.node.config import Role

    known = {name: name for name in get_args(Role)}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"unknown role {unknown[0]!r}", remedy=f"one of {', '.join(known)}")
    return frozenset(known[name] for name in names)


def _layers(span: str) -> Span | None:
    try:
        return None if span == "auto" else Span.parse(span)
    except ValueError as error:
        raise ConfigError(
            f"--span {span}: {error}", remedy="--span 0:10, or --span auto"
        ) from error


def _check_multiaddrs(texts: Sequence[str]) -> None:
    from plait.net.port import peer_of_multiaddr

    for multiaddr in texts:
        try:
            peer_of_multiaddr(multiaddr)
        except ValueError as error:
            raise ConfigError(
                f"--bootstrap {multiaddr}: {error}",
                remedy="--bootstrap /ip4/127.0.0.1/tcp/4001/p2p/12D3Koo…",
            ) from error


JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("rotate-key")
def rotate_key(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Make the node's next ledger key. A running node adopts it when no session is open.

    Sessions under way keep the old key, and what they earned is still settled.
    """
    from plait.ledger.service.key_store import rotate_ledger_key
    from plait.locate import node_dir

    serial = rotate_ledger_key(data_dir or node_dir())
    status(f"the ledger key has the serial {serial} now")
    if as_json:
        emit_json({"serial": serial})


@app.command("revoke-key")
def revoke_key(
    data_dir: DataDirOption = None,
    network: Annotated[Path | None, typer.Option(help="Network file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Void every ledger key but the newest, everywhere: an older one was stolen. Rotate first.

    Tells the ledger and the bootstrap nodes at once; they pass it on. What was signed with
    the voided keys and is not settled yet is lost.
    """
    import asyncio

    from plait.ledger.service.key_store import newest_serial
    from plait.ledger.service.revoking import revoke
    from plait.locate import network_path, node_dir
    from plait.network_file import load_network_file

    folder = data_dir or node_dir()
    serial = newest_serial(folder)
    if serial == 1:
        raise ConfigError("there is no newer key to go on with", remedy="plait node rotate-key")
    told = asyncio.run(revoke(folder, load_network_file(network_path(network)), serial))
    status(f"keys below the serial {serial} are void; {told} parties were told")
    if as_json:
        emit_json({"serial_min": serial, "told": told})


@app.command("protect-keys")
def protect_keys(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Encrypt every key file of the node with the passphrase in PLAIT_PASSPHRASE_FILE."""
    from plait.identity import PASSPHRASE_VARIABLE, passphrase_of_file, protect_key
    from plait.locate import node_dir

    passphrase = passphrase_of_file()
    if passphrase is None:
        raise ConfigError(
            "no passphrase", remedy=f"put it in a file and name that in {PASSPHRASE_VARIABLE}"
        )
    paths = sorted((data_dir or node_dir()).glob("*.key"))
    # The key of the TLS certificate is not one of ours: gRPC reads it.
    done = [p.name for p in paths if p.name != "tls.key" and protect_key(p, passphrase)]
    status(f"encrypted: {', '.join(done) or 'nothing, they are already'}")
    if as_json:
        emit_json({"encrypted": done})


@app.command("status")
def show_status(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show what the running node serves and holds.

    Example: plait node status --json
    """
    from plait.locate import node_dir
    from plait.node.control import ask

    _show(ask(data_dir or node_dir(), "status"), as_json)


@app.command()
def drain(
    data_dir: DataDirOption = None,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0, help="Wait so long for its end; 0: do not.")
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Move the running node's sessions elsewhere, then end it.

    It offers nothing and takes nothing new from now on, tells each client to move, and ends
    when no session is left or the time of its --drain-s is up. With --wait-s the exit code
    is 1 if sessions had to be ended, or the node did not say how it ended.

    Example: plait node drain --wait-s 60
    """
    from plait.locate import node_dir
    from plait.node.control import ask
    from plait.node.state import DrainFile

    folder = data_dir or node_dir()
    told = ask(folder, "drain")
    if not wait_s:
        status("the node is draining")
        _show(told, as_json)
        return
    _await_end(folder, wait_s)
    end = DrainFile(folder).read(told["pid"])
    if end is None:
        status("the node ended without saying how: read its log")
    elif end.sessions_ended:
        status(f"{end.sessions_ended} sessions were ended before they had moved: {end.reason}")
    else:
        status("the node is drained: every session has moved or ended by itself")
    left = end.sessions_ended if end is not None else None
    shown = {name: told[name] for name in ("name", "peer", "roles", "pid") if name in told}
    reason = end.reason if end is not None else "unknown"
    _show(shown | {"state": "stopped", "sessions_ended": left, "reason": reason}, as_json)
    if left != 0:
        raise typer.Exit(1)


def _await_end(folder: Path, wait_s: float) -> None:
    """Wait until no node answers in the folder; raises ``DeadlineExceeded``."""
    from plait.node.control import ask

    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            ask(folder, "status")
        except ConfigError:  # nobody listens: it has ended, or was killed
            return
        except NetworkError:  # it is busy, or about to end
            pass
        if time.monotonic() > deadline_s:
            raise DeadlineExceeded(
                f"the node still runs after {wait_s:g} s", remedy="plait node status"
            )
        time.sleep(_WAIT_POLL_S)


def _show(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(told)
    else:
        table(("", ""), [(name, _plain(value)) for name, value in told.items()])


def _plain(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value
