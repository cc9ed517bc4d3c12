"""The network file: who a network is, and which keys its members trust.

``network.toml`` is plain TOML with a detached signature by the network's founder in
``network.toml.sig`` (base64 of an envelope over the file's SHA-256). It holds public keys
only. It is the source of every trust anchor: a bundle never brings its own.
"""

import base64
import binascii
import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import DecodeError

from plait.envelope import open_envelope, seal
from plait.errors import ConfigError, PlaitError
from plait.identity import SigningKey, public_key_of
from plait.types import PeerId
from plait.v1.identity_pb2 import NetworkFileDigest, SignedEnvelope

Admission = Literal["open", "invite", "allowlist"]
ESCROW_PERCENT = 10
ESCROW_WINDOW_S = 86_400
ESCROW_WINDOW_S_MAX = 31_622_400
"""A leap year."""
_ADMISSIONS: tuple[Admission, ...] = ("open", "invite", "allowlist")


@dataclass(frozen=True, slots=True)
class Authority:
    """A ledger authority: where it listens and with which keys it signs."""

    peer: PeerId
    address: str
    ledger_key: bytes
    log_key: bytes
    log_origin: str
    certificate: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """A node to ask first: its libp2p multiaddr and its public port with pinned certificate."""

    peer: PeerId
    multiaddr: str
    public_address: str
    certificate: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Witness:
    """Who watches that the authorities' logs only grow: its note key's name and public key.

    ``address`` and ``certificate`` say where the authorities reach it; empty if they do not.
    """

    name: str
    key: bytes
    address: str = ""
    certificate: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Judge:
    """Who computes exposed stages again and says whether their escrow is forfeited."""

    name: str
    key: bytes


@dataclass(frozen=True, slots=True)
class NetworkFile:
    """The parsed and verified network file. DER certificates, raw 32-byte keys."""

    network_id: str
    founder: PeerId
    admission: Admission
    issuer_key: bytes
    authorities: tuple[Authority, ...]
    bootstrap: tuple[Bootstrap, ...]
    audit_rate_percent: int = 2
    allowed_peers: frozenset[PeerId] = frozenset()
    witnesses: tuple[Witness, ...] = ()
    witness_quorum: int = 0
    """How many witnesses must have cosigned a checkpoint; 0 asks for none."""
    judges: tuple[Judge, ...] = ()
    judge_quorum: int = 0
    """How many judges must find a stage exposed; 0: there is no escrow."""
    escrow_percent: int = 0
    escrow_window_s: int = 0

    def admits(self, peer: PeerId) -> bool:
        """Whether the peer may take part."""
        return self.admission == "open" or peer in self.allowed_peers

    def to_toml(self) -> str:
        """Render as TOML; ``parse`` reads it back."""
        lines = [
            "# A Plait network: public keys only. Signed by its founder in network.toml.sig.",
            "[network]",
            f"id = {_quoted(self.network_id)}",
            f'founder = "{self.founder}"',
            f'admission = "{self.admission}"',
            f'issuer_key = "{self.issuer_key.hex()}"',
            f"audit_rate_percent = {self.audit_rate_percent}",
            f"allowed_peers = [{', '.join(map(_quoted, sorted(self.allowed_peers)))}]",
        ]
        if self.witness_quorum:
            lines.append(f"witness_quorum = {self.witness_quorum}")
        if self.judge_quorum:
            lines += [
                f"judge_quorum = {self.judge_quorum}",
                f"escrow_percent = {self.escrow_percent}",
                f"escrow_window_s = {self.escrow_window_s}",
            ]
        for authority in self.authorities:
            lines += [
                "",
                "[[authority]]",
                f'peer = "{authority.peer}"',
                f"address = {_quoted(authority.address)}",
                f'ledger_key = "{authority.ledger_key.hex()}"',
                f'log_key = "{authority.log_key.hex()}"',
                f"log_origin = {_quoted(authority.log_origin)}",
                f'certificate = "{base64.b64encode(authority.certificate).decode()}"',
            ]
        for node in self.bootstrap:
            lines += [
                "",
                "[[bootstrap]]",
                f'peer = "{node.peer}"',
                f"multiaddr = {_quoted(node.multiaddr)}",
                f"public_address = {_quoted(node.public_address)}",
                f'certificate = "{base64.b64encode(node.certificate).decode()}"',
            ]
        for witness in self.witnesses:
            lines += [
                "",
                "[[witness]]",
                f"name = {_quoted(witness.name)}",
                f'key = "{witness.key.hex()}"',
            ]
            if witness.address:
                lines += [
                    f"address = {_quoted(witness.address)}",
                    f'certificate = "{base64.b64encode(witness.certificate).decode()}"',
                ]
        for judge in self.judges:
            lines += ["", "[[judge]]", f"name = {_quoted(judge.name)}"]
            lines.append(f'key = "{judge.key.hex()}"')
        return "\n".join(lines) + "\n"

    def save(self, path: Path, founder_key: SigningKey) -> None:
        """Write the file and its detached signature."""
        data = self.to_toml().encode()
        statement = NetworkFileDigest(
            network_id=self.network_id, sha256=hashlib.sha256(data).digest()
        )
        envelope = seal(founder_key, statement).SerializeToString(deterministic=True)
        path.write_bytes(data)
        path.with_name(path.name + ".sig").write_bytes(base64.b64encode(envelope) + b"\n")


def load_network_file(path: Path) -> NetworkFile:
    """Read and verify a network file; raises ``ConfigError`` naming what is wrong."""
    signature_path = path.with_name(path.name + ".sig")
    try:
        data, signature = path.read_bytes(), signature_path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the network file {error.filename}: {error.strerror}",
            remedy="start one with: plait testnet up",
        ) from error
    network = parse_network_file(data, str(path))
    _check_signature(network, data, signature, str(signature_path))
    return network


def parse_network_file(data: bytes, name: str = "network.toml") -> NetworkFile:
    """Parse TOML bytes without checking the signature; raises ``ConfigError``."""
    try:
        document = tomllib.loads(data.decode())
        head = document["network"]
        if head["admission"] not in _ADMISSIONS:
            raise ValueError(f"admission must be one of {', '.join(_ADMISSIONS)}")
        network = NetworkFile(
            network_id=str(head["id"]),
            founder=_peer(head["founder"]),
            admission=head["admission"],
            issuer_key=_key(head["issuer_key"]),
            authorities=tuple(_authority(item) for item in document.get("authority", [])),
            bootstrap=tuple(_bootstrap(item) for item in document.get("bootstrap", [])),
            audit_rate_percent=int(head.get("audit_rate_percent", 2)),
            allowed_peers=frozenset(_peer(item) for item in head.get("allowed_peers", [])),
            witnesses=tuple(_witness(item) for item in document.get("witness", [])),
            witness_quorum=int(head.get("witness_quorum", 0)),
            judges=tuple(_judge(item) for item in document.get("judge", [])),
            **_escrow(head),
        )
        _check_witnesses(network)
        _check_judges(network)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"the network file {name} is not valid: {detail}") from error
    return network


def _quoted(text: str) -> str:
    # A TOML basic string is a JSON string, but for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _key(text: str) -> bytes:
    key = bytes.fromhex(text)
    if len(key) != 32:
        raise ValueError("a public key is 32 bytes of hex")
    return key


def _peer(text: str) -> PeerId:
    public_key_of(text)
    return PeerId(text)


def _authority(item: dict[str, Any]) -> Authority:
    return Authority(
        peer=_peer(item["peer"]),
        address=str(item["address"]),
        ledger_key=_key(item["ledger_key"]),
        log_key=_key(item["log_key"]),
        log_origin=str(item["log_origin"]),
        certificate=base64.b64decode(item["certificate"], validate=True),
    )


def _bootstrap(item: dict[str, Any]) -> Bootstrap:
    return Bootstrap(
        peer=_peer(item["peer"]),
        multiaddr=str(item["multiaddr"]),
        public_address=str(item["public_address"]),
        certificate=base64.b64decode(item["certificate"], validate=True),
    )


def _witness(item: dict[str, Any]) -> Witness:
    name = str(item["name"])
    if not name or "+" in name or any(letter.isspace() for letter in name):
        raise ValueError("a witness's name has no spaces and no +")
    address = str(item.get("address", ""))
    certificate = item["certificate"] if address else ""
    return Witness(name, _key(item["key"]), address, base64.b64decode(certificate, validate=True))


def _judge(item: dict[str, Any]) -> Judge:
    name = str(item["name"])
    if not name:
        raise ValueError("a judge has a name")
    return Judge(name, _key(item["key"]))


def _escrow(head: dict[str, Any]) -> dict[str, int]:
    quorum = int(head.get("judge_quorum", 0))
    if not quorum:
        if "escrow_percent" in head or "escrow_window_s" in head:
            raise ValueError("there is no escrow without a judge_quorum")
        return {}
    return {
        "judge_quorum": quorum,
        "escrow_percent": int(head.get("escrow_percent", ESCROW_PERCENT)),
        "escrow_window_s": int(head.get("escrow_window_s", ESCROW_WINDOW_S)),
    }


def _check_judges(network: NetworkFile) -> None:
    keys = {judge.key for judge in network.judges}
    if len(keys) != len(network.judges) or len({one.name for one in network.judges}) != len(keys):
        raise ValueError("two judges have one name or key")
    if not 0 <= network.judge_quorum <= len(keys):
        raise ValueError("judge_quorum is more than there are judges")
    if not 0 <= network.escrow_percent <= 100:
        raise ValueError("escrow_percent is a share of 0 to 100")
    if not 0 <= network.escrow_window_s <= ESCROW_WINDOW_S_MAX:
        raise ValueError(f"escrow_window_s is at most {ESCROW_WINDOW_S_MAX}")


def _check_witnesses(network: NetworkFile) -> None:
    # A cosignature does not cover its witness's name, so that one key is one witness.
    names = {witness.name for witness in network.witnesses}
    keys = {witness.key for witness in network.witnesses}
    if not len(names) == len(keys) == len(network.witnesses):
        raise ValueError("two witnesses have one name or key")
    if keys.intersection(authority.log_key for authority in network.authorities):
        raise ValueError("a log is its own witness")
    if not 0 <= network.witness_quorum <= len(keys):
        raise ValueError("witness_quorum is more than there are witnesses")


def _check_signature(network: NetworkFile, data: bytes, signature: bytes, name: str) -> None:
    try:
        envelope = SignedEnvelope.FromString(base64.b64decode(signature.strip(), validate=True))
        founder = public_key_of(network.founder)
        statement = open_envelope(envelope, NetworkFileDigest, signer=founder)
    except (binascii.Error, DecodeError, PlaitError) as error:
        raise ConfigError(f"the signature {name} is not valid: {error}") from error
    if statement.network_id != network.network_id or (
        statement.sha256 != hashlib.sha256(data).digest()
    ):
        raise ConfigError(f"the signature {name} is for another network file")
