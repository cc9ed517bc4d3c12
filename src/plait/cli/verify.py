"""``plait verify``: check a bundle offline, naming every claim and what was not checked."""

from pathlib import Path
from typing import Annotated

import typer

from plait.errors import ConfigError


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle to check.", show_default=False)],
    network: Annotated[
        Path | None,
        typer.Option(
            "--network",
            "--policy",
            help="The network file whose keys to trust. Default: that of the last testnet.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a bundle offline. Exit code 0: verified, 1: false, 2: incomplete."""
    from plait.ledger.verify import verify_bundle
    from plait.locate import network_path
    from plait.network_file import load_network_file

    trusted = load_network_file(network_path(network))
    report = verify_bundle(_read(bundle), trusted)
    typer.echo(report.to_json() if json else "\n".join(report.lines()))
    raise typer.Exit(report.exit_code)


def _read(path: Path) -> bytes:
    from plait.ledger.bundle import BUNDLE_BYTES_MAX

    try:
        with path.open("rb") as file:
            # One byte more than a bundle may have, so that an endless file is refused.
            return file.read(BUNDLE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the bundle {path}: {error.strerror}") from error
