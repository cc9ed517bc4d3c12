"""Whose checkpoints are trusted: the text of c2sp.org/tlog-policy, and the judgement by it.

A policy names logs and witnesses by verifier key (c2sp.org/signed-note), groups of
witnesses with a threshold, and the one group or witness that is the quorum.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.errors import BadProof
from plait.ledger.checkpoint import (
    Checkpoint,
    canonical_base64,
    check_name,
    key_id,
    open_checkpoint,
    parse_note,
)
from plait.ledger.cosignature import cosignature_key_id, open_cosignatures
from plait.network_file import NetworkFile, Witness

LINES_MAX = 1_024
_LENGTH_MAX = 262_144
_NONE = "none"
_LOG_KEY, _WITNESS_KEY = b"\x01", b"\x04"


@dataclass(frozen=True, slots=True)
class Group:
    """At least ``threshold`` of the members, witnesses or groups, must have cosigned."""

    threshold: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """Logs by origin with their public keys; witnesses and groups by the policy's own names.

    ``quorum`` None asks for no cosignature.
    """

    logs: Mapping[str, bytes]
    witnesses: Mapping[str, Witness]
    groups: Mapping[str, Group]
    quorum: str | None


def read_policy(data: bytes) -> Policy:
    """Read a policy's text strictly; raises ``ValueError`` naming the line."""
    if len(data) > _LENGTH_MAX or any(byte < 32 and byte not in b"\t\n" for byte in data):
        raise ValueError("a policy is short text without control characters")
    if b"\x7f" in data:
        raise ValueError("a policy is short text without control characters")
    # Names are opaque octets: each is one letter here, and compared as such.
    lines = data.decode("latin-1").split("\n")
    if len(lines) > LINES_MAX:
        raise ValueError(f"a policy has at most {LINES_MAX} lines")
    reader = _Reader()
    for number, line in enumerate(lines, 1):
        items = [item for part in line.split("\t") for item in part.split(" ") if item]
        if items and not items[0].startswith("#"):
            try:
                reader.read(items)
            except ValueError as error:
                raise ValueError(f"line {number} of the policy: {error}") from error
    if not reader.finished:
        raise ValueError("the policy has no quorum line")
    return Policy(reader.logs, reader.witnesses, reader.groups, reader.quorum)


class _Reader:
    """What has been read of a policy so far."""

    def __init__(self) -> None:
        self.logs: dict[str, bytes] = {}
        self.witnesses: dict[str, Witness] = {}
        self.groups: dict[str, Group] = {}
        self.quorum: str | None = None
        self.finished = False
        self._members: set[str] = set()

    def read(self, items: Sequence[str]) -> None:
        match items:
            case ["log", vkey] | ["log", vkey, _]:
                self._log(vkey)
            case ["witness", name, vkey] | ["witness", name, vkey, _]:
                self._witness(name, vkey)
            case ["group", name, threshold, *members]:
                self._group(name, threshold, members)
            case ["quorum", name]:
                self._quorum(name)
            case _:
                raise ValueError(f"it is no line of a policy: {' '.join(items)[:80]!r}")

    def _log(self, vkey: str) -> None:
        origin, key = read_vkey(vkey, _LOG_KEY)
        if origin in self.logs or key in self.logs.values():
            raise ValueError("a log or its key is named twice")
        self.logs[origin] = key

    def _witness(self, name: str, vkey: str) -> None:
        key_name, key = read_vkey(vkey, _WITNESS_KEY)
        self._new(name)
        if any(known.key == key for known in self.witnesses.values()):
            raise ValueError("a witness's key is named twice")
        self.witnesses[name] = Witness(key_name, key)

    def _group(self, name: str, threshold: str, members: Sequence[str]) -> None:
        self._new(name)
        for member in members:
            if member not in self.witnesses and member not in self.groups:
                raise ValueError(f"{member[:80]!r} is not defined before it")
            if member in self._members:
                raise ValueError(f"{member[:80]!r} is a member twice")
            self._members.add(member)
        count = {"any": 1, "all": len(members)}.get(threshold) or _decimal(threshold)
        if not 1 <= count <= len(members):
            raise ValueError(f"{count} of {len(members)} members cannot be")
        self.groups[name] = Group(count, tuple(members))

    def _quorum(self, name: str) -> None:
        if self.finished:
            raise ValueError("there is a quorum line before")
        if name != _NONE and name not in self.witnesses and name not in self.groups:
            raise ValueError(f"{name[:80]!r} is not defined before it")
        self.quorum, self.finished = None if name == _NONE else name, True

    def _new(self, name: str) -> None:
        if name == _NONE or name in self.witnesses or name in self.groups:
            raise ValueError(f"the name {name[:80]!r} is taken")


def check_policy(note: str, policy: Policy) -> Checkpoint:
    """Open a checkpoint of one of the policy's logs that its quorum has cosigned.

    Raises ``BadSignature`` for a bad signature and ``BadProof`` for an unknown log or a
    quorum not met.
    """
    origin = parse_note(note)[0].partition("\n")[0]
    if _opaque(origin) not in policy.logs:
        raise BadProof(f"the policy names no log {origin[:80]!r}")
    checkpoint = open_checkpoint(note, origin, policy.logs[_opaque(origin)])
    if policy.quorum is None:
        return checkpoint
    cosigned = {
        name
        for name, witness in policy.witnesses.items()
        if open_cosignatures(note, [Witness(_text(witness.name), witness.key)])
    }
    if not _met(policy.quorum, policy, cosigned):
        raise BadProof(f"the quorum {policy.quorum!r} has not cosigned, {sorted(cosigned)} have")
    return checkpoint


def policy_of(network: NetworkFile) -> str:
    """The logs, witnesses and quorum of a network file as a policy's text."""
    logs = [f"log {vkey(one.log_origin, one.log_key)}" for one in network.authorities]
    names = [f"w{number}" for number, _ in enumerate(network.witnesses, 1)]
    witnesses = [
        f"witness {name} {vkey(one.name, one.key, witness=True)}"
        for name, one in zip(names, network.witnesses, strict=True)
    ]
    if not network.witness_quorum:
        quorum = [f"quorum {_NONE}"]
    else:
        quorum = [f"group q {network.witness_quorum} {' '.join(names)}", "quorum q"]
    return "\n".join([f"# Network {network.network_id}", *logs, *witnesses, *quorum]) + "\n"


def vkey(name: str, public_key: bytes, *, witness: bool = False) -> str:
    """A verifier key (c2sp.org/signed-note): name, key id, and algorithm with key in base64."""
    identifier = (cosignature_key_id if witness else key_id)(name, public_key)
    algorithm = _WITNESS_KEY if witness else _LOG_KEY
    return f"{name}+{identifier.hex()}+{base64.b64encode(algorithm + public_key).decode()}"


def read_vkey(text: str, algorithm: bytes) -> tuple[str, bytes]:
    """Name and public key of an Ed25519 verifier key; raises ``ValueError``."""
    name, identifier, encoded = [*text.split("+", 2), "", ""][:3]
    check_name(_text(name))
    raw = canonical_base64(encoded)
    kind, key = raw[:1], raw[1:]
    if kind != algorithm or len(key) != 32:
        raise ValueError("its key is not of the Ed25519 kind that is needed")
    known = cosignature_key_id if algorithm == _WITNESS_KEY else key_id
    if known(_text(name), key).hex() != identifier:
        raise ValueError("its key id is not that of its name and key")
    return name, key


def _met(name: str, policy: Policy, cosigned: set[str]) -> bool:
    group = policy.groups.get(name)
    if group is None:
        return name in cosigned
    return sum(_met(member, policy, cosigned) for member in group.members) >= group.threshold


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or str(int(text)) != text:
        raise ValueError(f"not a threshold: {text[:80]!r}")
    return int(text)


def _opaque(text: str) -> str:
    return text.encode().decode("latin-1")


def _text(opaque: str) -> str:
    """A name as the text of a note; raises ``ValueError`` if its octets are not UTF-8."""
    return opaque.encode("latin-1").decode()
