"""``plait net``: create and show networks."""

import re
from pathlib import Path
from secrets import token_hex
from typing import Annotated, cast, get_args

import typer

from plait.cli.output import emit_json, status, table
from plait.errors import ConfigError
from plait.locate import network_path
from plait.network_file import Admission, NetworkFile, load_network_file

app = typer.Typer(help="Create and show networks.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command()
def show(
    network: Annotated[Path | None, typer.Option(help="The network file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the network that commands would use, after checking its signature.

    Example: plait net show --json
    """
    path = network_path(network)
    loaded = load_network_file(path)
    if as_json:
        emit_json(_described(path, loaded))
        return
    rows = [["authority", item.peer, item.address] for item in loaded.authorities]
    rows += [["witness", item.name, item.address] for item in loaded.witnesses]
    rows += [["bootstrap", item.peer, item.public_address] for item in loaded.bootstrap]
    title = f"{loaded.network_id} ({loaded.admission}), founded by {loaded.founder}"
    table(["what", "peer", "address"], rows, title=title)
    status(f"network file: {path}")


@app.command()
def policy(
    network: Annotated[Path | None, typer.Option(help="The network file.")] = None,
) -> None:
    """Print whose checkpoints the network trusts, as C2SP tlog-policy text for other tools.

    Example: plait net policy > policy.txt
    """
    from plait.ledger.policy import policy_of

    typer.echo(policy_of(load_network_file(network_path(network))), nl=False)


@app.command()
def proof(
    entry: Annotated[int, typer.Argument(min=0, help="Index of the entry in the log.")],
    out: Annotated[Path, typer.Option("--out", help="Where to put it.")],
    authority: Annotated[int, typer.Option(min=1, help="Which of a committee's logs.")] = 1,
    network: Annotated[Path | None, typer.Option(help="The network file.")] = None,
) -> None:
    """Write a C2SP tlog-proof that the log holds an entry, with the entry in it.

    Example: plait net proof 7 --out entry-7.tlog-proof
    """
    import asyncio

    from plait.ledger.log_proof import write_log_proof
    from plait.ledger.service.proving import fetch_proof

    known = load_network_file(network_path(network)).authorities
    if authority > len(known):
        raise ConfigError(f"the network file names {len(known)} authorities")
    found = asyncio.run(fetch_proof(known[authority - 1], entry))
    try:
        out.write_text(write_log_proof(found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error
    status(f"wrote {out}")


@app.command("check-proof")
def check_proof(
    path: Annotated[Path, typer.Argument(help="A tlog-proof with the entry in it.")],
    policy_file: Annotated[
        Path | None,
        typer.Option("--policy", help="tlog-policy text. Default: that of the network file."),
    ] = None,
    network: Annotated[Path | None, typer.Option(help="The network file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a tlog-proof offline by a policy. Exit code 0: it holds, 1: it does not.

    Example: plait net check-proof entry-7.tlog-proof --policy policy.txt
    """
    from plait.errors import BadProof
    from plait.ledger.log_proof import check_log_proof, read_log_proof
    from plait.ledger.policy import policy_of, read_policy

    try:
        text = path.read_text(encoding="utf-8")
        data = policy_file.read_bytes() if policy_file else None
        if data is None:
            data = policy_of(load_network_file(network_path(network))).encode()
        rules = read_policy(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the proof or the policy: {error}") from error
    read = read_log_proof(text)
    if read.extra is None:
        raise BadProof("the proof does not bring the entry that it is about")
    checkpoint = check_log_proof(read, read.extra, rules)
    status(f"proven: entry {read.index} of {checkpoint.origin}, at size {checkpoint.size}")
    if as_json:
        emit_json({"index": read.index, "origin": checkpoint.origin, "size": checkpoint.size})


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and hyphens.")],
    authority: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the ledger will listen.")
    ] = "127.0.0.1:4600",
    node: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PUBLIC_PORT:P2P_PORT",
            help="A node that newcomers ask first; repeat for more.",
        ),
    ] = None,
    admission: Annotated[str, typer.Option(help="open, invite or allowlist.")] = "open",
    audit_rate_percent: Annotated[int, typer.Option(min=0, max=100)] = 2,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to put it; default: ./NAME.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a network: its file, founder and issuer keys, and data folders for its first nodes.

    Copy network.toml and network.toml.sig to everybody, each data folder to its machine,
    and keep issuer/ to yourself.

    Example: plait net create physics --authority ledger.example.org:4600
    """
    from plait.identity import load_or_create_key
    from plait.testnet.cluster import authority_of, bootstrap_of

    directory = directory or Path(name)
    _check(name, admission, directory)
    _host_and_ports(authority, 1)
    places = [_host_and_ports(text, 2) for text in node or []]
    network_id = f"{name}-{token_hex(4)}"
    founder_key = load_or_create_key(directory / "issuer" / "founder.key")
    network = NetworkFile(
        network_id=network_id,
        founder=founder_key.peer_id,
        admission=cast(Admission, admission),
        issuer_key=load_or_create_key(directory / "issuer" / "issuer.key").public,
        authorities=(
            authority_of(
                directory / "ledger-1", address=authority, log_origin=f"{network_id}/ledger-1"
            ),
        ),
        bootstrap=tuple(
            bootstrap_of(
                directory / f"node-{index}",
                host=str(host),
                public_port=int(public_port),
                p2p_port=int(p2p_port),
            )
            for index, (host, public_port, p2p_port) in enumerate(places, start=1)
        ),
        audit_rate_percent=audit_rate_percent,
    )
    path = directory / "network.toml"
    network.save(path, founder_key)
    status(f"made {path}, {directory / 'issuer'} and {1 + len(places)} data folders")
    if as_json:
        emit_json(_described(path, network))


def _described(path: Path, network: NetworkFile) -> dict[str, object]:
    return {
        "path": str(path),
        "network_id": network.network_id,
        "founder": network.founder,
        "admission": network.admission,
        "audit_rate_percent": network.audit_rate_percent,
        "issuer_key": network.issuer_key.hex(),
        "allowed_peers": sorted(network.allowed_peers),
        "authorities": [
            {"peer": item.peer, "address": item.address, "log_origin": item.log_origin}
            for item in network.authorities
        ],
        "witness_quorum": network.witness_quorum,
        "judge_quorum": network.judge_quorum,
        "judges": [{"name": item.name, "key": item.key.hex()} for item in network.judges],
        "escrow_percent": network.escrow_percent,
        "escrow_window_s": network.escrow_window_s,
        "witnesses": [{"name": item.name, "address": item.address} for item in network.witnesses],
        "bootstrap": [
            {
                "peer": item.peer,
                "multiaddr": item.multiaddr,
                "public_address": item.public_address,
            }
            for item in network.bootstrap
        ],
    }


def _check(name: str, admission: str, directory: Path) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name):
        raise ConfigError(
            f"not a network name: {name!r}", remedy="lower-case letters, digits and hyphens"
        )
    if admission not in get_args(Admission):
        raise ConfigError(f"unknown admission {admission!r}", remedy="open, invite or allowlist")
    if directory.exists():
        raise ConfigError(f"{directory} exists already", remedy="another --dir")


def _host_and_ports(text: str, ports: int) -> tuple[str | int, ...]:
    parts = text.rsplit(":", ports)
    try:
        host, numbers = parts[0], [int(part) for part in parts[1:]]
    except ValueError:
        host, numbers = "", []
    if not host or len(numbers) != ports or not all(0 < port < 65536 for port in numbers):
        expected = "HOST" + ":PORT" * ports
        raise ConfigError(f"not an address: {text!r}", remedy=f"write it as {expected}")
    return (host.strip("[]"), *numbers)
