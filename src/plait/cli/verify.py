"""``plait verify``: check a bundle offline, naming every claim and what was not checked."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.bundle_file import read_bundle_file
from plait.errors import ModelError
from plait.types import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plait.ledger.bundle import BundleParts
    from plait.ledger.verify import Replay
    from plait.ledger.verify_frames import EpochFrames
    from plait.types import Sampling


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
    replay: Annotated[
        bool,
        typer.Option(
            "--replay", help="Compute the answer again, from the prompt. Needs the weights."
        ),
    ] = False,
    threads: Annotated[int, typer.Option(help="Compute threads of --replay.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a bundle offline. Exit code 0: verified, 1: false, 2: incomplete."""
    from plait.ledger.verify import verify_bundle
    from plait.locate import network_path
    from plait.network_file import load_network_file

    trusted = load_network_file(network_path(network))
    report = verify_bundle(
        read_bundle_file(bundle), trusted, _replay_with(threads) if replay else None
    )
    typer.echo(report.to_json() if json else "\n".join(report.lines()))
    raise typer.Exit(report.exit_code)


def _replay_with(threads: int) -> "Replay":
    """Replays on the weights of this machine: without them, evidence is missing."""

    def replayed(
        parts: "BundleParts", frames: "Sequence[EpochFrames]", sampling: "Sampling"
    ) -> str:
        from plait.compute.bundle_replay import dtype_of, replay_bundle
        from plait.compute.load import load_stage
        from plait.ledger.report import Absent
        from plait.ledger.terms import accelerator_of
        from plait.ledger.verify_session import check_manifest
        from plait.model import catalog

        try:
            local = catalog.load(check_manifest(parts).name)
        except ModelError as error:
            raise Absent(f"{error}: {error.remedy}") from error
        kind = accelerator_of(parts.terms.stages[0].numeric_class)
        if kind:
            raise Absent(f"computed on {kind}, for which no tolerance is published")
        dtype = dtype_of(parts)
        whole = Span(0, local.manifest.layers)
        found = replay_bundle(parts, frames, sampling, load_stage(local, whole, dtype, threads))
        return (
            f"{found.exact} of {found.ids} ids are exactly those drawn here in {dtype}, "
            f"the others within {found.margin:.2g} logits"
            if found.exact < found.ids
            else f"all {found.ids} ids are exactly those drawn here in {dtype}"
        )

    return replayed
