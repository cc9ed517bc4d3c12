"""A model whose weights are on this machine."""

from dataclasses import dataclass
from pathlib import Path

from plait.model.manifest import Manifest


@dataclass(frozen=True, slots=True)
class LocalModel:
    """What a name stands for here; made by ``plait.model.catalog.load``."""

    name: str
    manifest: Manifest
    weights_path: Path
