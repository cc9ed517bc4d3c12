"""``plait serve``: the OpenAI-compatible gateway."""

from pathlib import Path
from typing import Annotated

import typer

from plait.errors import ConfigError

WithParent = Annotated[bool, typer.Option("--with-parent", help="End when standard input ends.")]
Draft = Annotated[
    str | None,
    typer.Option(help="A small local model that drafts for those with its tokenizer."),
]


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: chosen free.")] = 4700,
    api_key_file: Annotated[
        Path | None, typer.Option(help="One key, or sha256:HEX of one, per line; mode 0600.")
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Let this machine in although there are keys.")
    ] = False,
    bundles: Annotated[
        bool, typer.Option("--bundles", help="Collect the evidence of every answer.")
    ] = False,
    sessions_max: Annotated[int, typer.Option(min=1, help="Most answers at once.")] = 256,
    waiting_max: Annotated[int, typer.Option(min=0, help="Most requests that wait.")] = 64,
    audit: Annotated[
        bool, typer.Option("--audit/--no-audit", help="Hold the audit lottery over the answers.")
    ] = True,
    with_parent: WithParent = False,
    draft: Draft = None,
    network: Annotated[
        Path | None, typer.Option(help="Network file; by default the last testnet started.")
    ] = None,
) -> None:
    """Serve the network under OpenAI's HTTP API until SIGTERM or Ctrl-C.

    The address for clients is http://127.0.0.1:4700/v1. Answers are paid from this client's
    account, so any other address than loopback needs API keys. Once plait keys create has
    made one, every request needs one.

    Example: plait serve --port 4700
    """
    try:
        from plait.gateway.config import GatewayConfig
        from plait.gateway.key_store import KEYS_FILE, has_keys
        from plait.gateway.keys import load_keys
        from plait.gateway.server import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the gateway needs {error.name}, which is not installed",
            remedy="pip install 'plait[gateway]'",
        ) from error
    from plait import __version__
    from plait.cli.output import status
    from plait.locate import client_dir, network_path

    account = client_dir(network)
    path = account / KEYS_FILE
    managed = path.exists() and not no_keys and has_keys(path)
    config = GatewayConfig(
        host=host,
        port=port,
        keys=None if api_key_file is None else load_keys(api_key_file),
        key_store=path if managed else None,
        always_bundle=bundles,
        audits=audit,
        sessions_max=sessions_max,
        waiting_max=waiting_max,
        with_parent=with_parent,
        draft=draft,
        version=__version__,
    )
    raise typer.Exit(
        run(
            config,
            network_path(network),
            account,
            lambda url: status(f"serving {url}/v1, page at {url}/; Ctrl-C ends it"),
        )
    )
