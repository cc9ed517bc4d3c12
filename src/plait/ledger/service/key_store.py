"""Ledger keys in the folder of a node or client: rotation by one new file.

``ledger.key`` has the serial 1, ``ledger-2.key`` the serial 2 and so on; the newest counts.
A rotation is one exclusive creation, so that no crash leaves half of one. The older files
stay: what was signed with them may still have to be settled.
"""

import re
from pathlib import Path

from plait.errors import ConfigError
from plait.identity import SigningKey, load_key, load_or_create_key, save_key

FIRST_SERIAL = 1
_NAME = re.compile(r"ledger-([1-9][0-9]{0,8})\.key")


def newest_serial(folder: Path) -> int:
    """Serial of the newest ledger key in a data folder; 1 if there was no rotation."""
    try:
        names = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    except OSError:
        return FIRST_SERIAL
    return max((int(name[1]) for name in names if name), default=FIRST_SERIAL)


def newest_ledger_key(folder: Path) -> tuple[SigningKey, int]:
    """The ledger key that counts, made on first use, and its serial; raises ``ConfigError``."""
    serial = newest_serial(folder)
    if serial == FIRST_SERIAL:
        return load_or_create_key(folder / "ledger.key"), serial
    return load_key(folder / f"ledger-{serial}.key"), serial


def ledger_keys(folder: Path) -> list[tuple[SigningKey, int]]:
    """All ledger keys in a folder with their serials, the newest first; raises ``ConfigError``."""
    found = []
    for path in folder.iterdir():
        name = _NAME.fullmatch(path.name)
        if name or path.name == "ledger.key":
            found.append((load_key(path), int(name[1]) if name else FIRST_SERIAL))
    return sorted(found, key=lambda one: -one[1])


def rotate_ledger_key(folder: Path) -> int:
    """Make the next ledger key; returns its serial.

    Raises ``ConfigError`` if the folder has no keys or cannot be written.
    """
    if not (folder / "ledger.key").is_file():
        raise ConfigError(f"there is no ledger key in {folder}", remedy="name it with --data-dir")
    serial = newest_serial(folder) + 1
    save_key(folder / f"ledger-{serial}.key", SigningKey.generate())
    return serial
