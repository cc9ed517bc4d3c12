"""Bundles as files: written whole or not at all, and never where no answer came."""

import errno
import os
import secrets
import shutil
from pathlib import Path

from plait.errors import ConfigError


def check_writable(bundle: Path) -> None:
    """Fail before anything is paid for, and leave nothing behind; raises ``ConfigError``."""
    try:
        if bundle.exists() and (bundle.is_dir() or not os.access(bundle, os.W_OK)):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if _replaceable(bundle):
            part = _part(bundle)
            part.open("xb").close()
            part.unlink()
    except OSError as error:
        raise _unwritable(bundle, error) from error


def write_bundle(bundle: Path, data: bytes) -> None:
    """Put a bundle in the place of what is there, in one step; raises ``ConfigError``."""
    try:
        if not _replaceable(bundle):
            bundle.write_bytes(data)
            return
        target, part = bundle.resolve(), _part(bundle)
        try:
            with part.open("xb") as file:
                file.write(data)
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(bundle, error) from error


def read_bundle_file(path: Path) -> bytes:
    """A bundle's bytes, one too many of a file that is longer; raises ``ConfigError``."""
    from plait.ledger.bundle import BUNDLE_BYTES_MAX

    try:
        with path.open("rb") as file:
            # One byte more than a bundle may have, so that an endless file is refused.
            data = file.read(BUNDLE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the bundle {path}: {error.strerror}") from error
    if not data:
        raise ConfigError(
            f"{path} is an empty file, no bundle", remedy="plait run --bundle FILE writes one"
        )
    return data


def _replaceable(path: Path) -> bool:
    """Whether a rename may put a file there: a pipe or a device stays what it is."""
    return path.is_file() or not path.exists()


def _part(bundle: Path) -> Path:
    target = bundle.resolve()
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


def _unwritable(bundle: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write the bundle {bundle}: {error.strerror}")
