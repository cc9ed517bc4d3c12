"""Replacing a small file so that a crash at any moment leaves the old text or the new one."""

import os
from pathlib import Path


def replace_durably(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, as it is; on the disk, with its name, before this returns.

    For one writer at a time: what is written stands beside it, as ``.part``, until it is whole.
    Raises ``OSError``.
    """
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
