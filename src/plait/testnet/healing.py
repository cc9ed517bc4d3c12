"""What is wrong with a live testnet, found by looking at it, and the end of all that.

Harm outlives the run that did it, so nothing here relies on what a run remembers: cut links,
CPU quotas, stopped processes, full disks and ended nodes are looked for where they are.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from plait.errors import ConfigError, PlaitError
from plait.testnet import disks, slowdown
from plait.testnet.control import await_node, request
from plait.testnet.folder import data_dir

ResultT = TypeVar("ResultT")

RECOVERY_TIMEOUT_S = 120.0
"""For all nodes together, from the last restart until each is ready."""

_ENDED = ("dead", "stopped", "draining")
_TROUBLES_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something wrong, in words, and what ends it; None where only time does."""

    what: str
    cure: Callable[[], object] | None


@dataclass(frozen=True, slots=True)
class Healed:
    """What was ended, and what could not be, with the reason."""

    healed: tuple[str, ...]
    failed: tuple[str, ...]


def check_whole(directory: Path) -> None:
    """Raise ``ConfigError`` naming what is wrong, unless every node and link works."""
    unseen = list[str]()
    found = [trouble.what for trouble in _troubles(directory, unseen)] + unseen
    if found:
        more = f" and {len(found) - _TROUBLES_SHOWN} more" if len(found) > _TROUBLES_SHOWN else ""
        raise ConfigError(
            f"the testnet is not whole: {', '.join(found[:_TROUBLES_SHOWN])}{more}",
            remedy="plait testnet heal",
        )


def heal(directory: Path, *, timeout_s: float = RECOVERY_TIMEOUT_S) -> Healed:
    """End every trouble and wait until each node is ready; one failure stops no other cure.

    Raises ``NotRunning`` or ``NetworkError`` where no supervisor answers.
    """
    healed, failed = list[str](), list[str]()
    for trouble in _troubles(directory, failed):
        if trouble.cure is not None and _attempt(trouble.what, trouble.cure, failed):
            healed.append(trouble.what)
    deadline_s = time.monotonic() + timeout_s
    for node in request(directory, "status")["nodes"]:
        wait = partial(_await_ready, directory, node, deadline_s)
        _attempt(f"{node['name']} does not become ready", wait, failed)
    return Healed(tuple(healed), tuple(failed))


def _await_ready(directory: Path, node: Mapping[str, Any], deadline_s: float) -> None:
    left_s = max(1.0, deadline_s - time.monotonic())
    await_node(directory, node["name"], ("ready",), starts=node["starts"], timeout_s=left_s)


def _attempt(what: str, act: Callable[[], ResultT], failed: list[str]) -> list[ResultT]:
    """The result, or none, and why in ``failed``."""
    try:
        return [act()]
    except (PlaitError, OSError) as error:
        failed.append(f"{what}: {error}")
        return []


def _troubles(directory: Path, unseen: list[str]) -> list[Trouble]:
    """Everything that is wrong. What cannot be looked at is put in ``unseen``, in words."""
    status = request(directory, "status")
    looks = [(node["name"], partial(_of_node, directory, status, node)) for node in status["nodes"]]
    if status["wan"] is not None:
        looks.insert(0, ("the links", partial(_of_links, directory)))  # nodes need them
    return [
        trouble
        for what, look in looks
        for found in _attempt(what, look, unseen)
        for trouble in found
    ]


def _of_links(directory: Path) -> list[Trouble]:
    found = []
    for link in request(directory, "shape")["links"]:
        source, target = link["source"], link["target"]
        if link["cut"]:
            change = {"sources": [source], "targets": [target], "cut": False}
            found.append(
                Trouble(
                    f"the link from {source} to {target} is cut",
                    partial(request, directory, "shape", change=change),
                )
            )
    return found


def _of_node(directory: Path, status: Mapping[str, Any], node: Mapping[str, Any]) -> list[Trouble]:
    name, pid, state = node["name"], node["pid"], node["state"]
    found = []
    if pid is not None and slowdown.is_held(pid):
        found.append(Trouble(f"{name} is slowed", partial(slowdown.release, pid)))
    if pid is not None and (node["hung"] or slowdown.is_stopped(pid)):
        found.append(Trouble(f"{name} is hung", partial(request, directory, "resume", name)))
    if status["disk_mb"]:
        folder = disks.seen_by(status["supervisor_pid"], data_dir(directory, name))
        if disks.is_filled(folder):
            found.append(Trouble(f"the disk of {name} is full", partial(disks.empty, folder)))
    if state in _ENDED:
        found.append(Trouble(f"{name} is {state}", partial(request, directory, "restart", name)))
    elif state != "ready":
        found.append(Trouble(f"{name} is {state}", None))
    return found
