"""What is known of a model before its weights are read; entries of own models are files."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from plait.errors import ModelError

ENTRY_FILE = "entry.json"
_ENTRY_BYTES_MAX = 1 << 16
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that can be had. ``requirement`` is the Python package that carries its
    weights, empty if there is none; ``own`` marks one added from a file on this machine,
    else it is generated. ``hidden`` keeps it out of ordinary lists."""

    name: str
    description: str
    license: str
    layers: int
    size: int
    sha256: str
    manifest_digest: str
    requirement: str = ""
    hidden: bool = False
    own: bool = False

    @property
    def generated(self) -> bool:
        """Whether it is made on the spot."""
        return not self.requirement and not self.own


def is_name(name: str) -> bool:
    """Whether ``name`` can be a model's, and a folder's."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raise ``ModelError`` unless ``name`` can be a model's."""
    if not is_name(name):
        raise ModelError(
            f"{name!r} cannot be a model's name",
            remedy="use up to 63 of a-z, 0-9, dot, underscore and hyphen: --name my-model",
        )


def write_entry(folder: Path, entry: CatalogEntry) -> None:
    """Keep an own model's entry in ``folder``. Raises ``OSError``."""
    (folder / ENTRY_FILE).write_text(json.dumps(asdict(entry), indent=2) + "\n")


def read_entry(folder: Path) -> CatalogEntry | None:
    """The own model's entry in ``folder``; None if there is none that can be read."""
    try:
        with (folder / ENTRY_FILE).open("rb") as file:
            found = CatalogEntry(**json.loads(file.read(_ENTRY_BYTES_MAX)))
    except (OSError, ValueError, TypeError):
        return None
    texts = (found.description, found.license, found.sha256, found.manifest_digest)
    numbers = (found.layers, found.size)
    sound = all(isinstance(text, str) for text in texts)
    sound = sound and all(isinstance(number, int) for number in numbers)
    return found if sound and found.own and found.name == folder.name else None
