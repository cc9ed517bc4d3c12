"""What a user says of links, as a change of the WAN: milliseconds and megabits to SI. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plait.errors import ConfigError
from plait.testnet.wan import profile_shape

_SCALE = {
    "delay_ms": ("delay_s", 1e-3),
    "jitter_ms": ("jitter_s", 1e-3),
    "rate_mbit": ("rate_bps", 1e6),
    "loss": ("loss", 1.0),
}


def changes(
    profile: str | None,
    sources: Sequence[str],
    targets: Sequence[str],
    figures: Mapping[str, float | None],
    *,
    cut: bool | None,
) -> dict[str, Any] | None:
    """The change to send, None if nothing is to change.

    Figures named beside a profile win over it. Raises ``ConfigError`` for an unknown
    profile, and for ends without anything to change.
    """
    change: dict[str, Any] = {}
    if profile is not None:
        change |= asdict(profile_shape(profile))
    for name, value in figures.items():
        if value is not None:
            field, scale = _SCALE[name]
            change[field] = value * scale
    if cut is not None:
        change["cut"] = cut
    if not change:
        if sources or targets:
            raise ConfigError("nothing to change", remedy="--cut, --heal, --delay-ms, …")
        return None
    return change | {"sources": list(sources), "targets": list(targets)}
