"""``plait node``: the daemon."""

from pathlib import Path
from typing import Annotated

import typer

from plait.errors import ConfigError

app = typer.Typer(help="Serve a span of a model's layers.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``run`` a subcommand while it is the only one."""


@app.command()
def run(
    model: Annotated[str, typer.Option(help="The model to serve; pull it first.")],
    span: Annotated[
        str, typer.Option(help="Layers start:end, or auto: what free memory holds and lacks most.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, int4, int8 or auto.")] = "fp32",
    price_prompt: Annotated[
        int, typer.Option(min=0, help="Microcredits per million prompt tokens per layer.")
    ] = 5_000,
    price_output: Annotated[
        int, typer.Option(min=0, help="Microcredits per million output tokens per layer.")
    ] = 20_000,
    region: Annotated[str, typer.Option(help="Where the node stands; clients may filter.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    public_port: Annotated[int, typer.Option(help="0: chosen free.")] = 0,
    peer_port: Annotated[int, typer.Option(help="0: chosen free.")] = 0,
    p2p_port: Annotated[int, typer.Option(help="0: chosen free.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Compute threads; 0: all cores.")] = 0,
    kv_tokens: Annotated[int, typer.Option(min=16, help="KV-cache capacity in tokens.")] = 16_384,
    data_dir: Annotated[
        Path | None, typer.Option(help="Keys and state; by default in the XDG data folder.")
    ] = None,
    bootstrap: Annotated[
        list[str] | None, typer.Option(help="Another multiaddr to dial; repeatable.")
    ] = None,
    network: Annotated[Path | None, typer.Option(help="Network file.")] = None,
) -> None:
    """Run a node in the foreground until SIGTERM or Ctrl-C, which end it cleanly."""
    from plait.locate import network_path, node_dir
    from plait.net.port import peer_of_multiaddr
    from plait.node.config import NodeConfig
    from plait.node.daemon import main
    from plait.types import Prices, Span

    try:
        layers = None if span == "auto" else Span.parse(span)
    except ValueError as error:
        raise ConfigError(
            f"--span {span}: {error}", remedy="--span 0:10, or --span auto"
        ) from error
    for multiaddr in bootstrap or ():
        try:
            peer_of_multiaddr(multiaddr)
        except ValueError as error:
            raise ConfigError(
                f"--bootstrap {multiaddr}: {error}",
                remedy="--bootstrap /ip4/127.0.0.1/tcp/4001/p2p/12D3Koo…",
            ) from error
    config = NodeConfig(
        name="node",
        network_file=network_path(network),
        data_dir=data_dir or node_dir(),
        model=model,
        span=layers,
        dtype=dtype,
        prices=Prices(prompt=price_prompt, output=price_output),
        region=region,
        host=host,
        public_port=public_port,
        peer_port=peer_port,
        p2p_port=p2p_port,
        threads=threads,
        kv_tokens_max=kv_tokens,
        extra_bootstrap=tuple(bootstrap or ()),
    )
    raise typer.Exit(main(config))
