"""The client's account on disk: keys, and a durable sequence number per lane.

A reservation's signature is on disk before it is sent, and a new one is signed only after
the ledger answered the last: so a crash cannot make the client sign two different
reservations with one number. Several processes use one account through separate lanes.
"""

import asyncio
import contextlib
import fcntl
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from plait.durable import replace_durably
from plait.errors import CapacityError, ConfigError
from plait.identity import SigningKey, load_or_create_key
from plait.ledger.certs import make_key_cert
from plait.ledger.service.key_store import (
    FIRST_SERIAL,
    ledger_keys,
    newest_ledger_key,
    newest_serial,
)
from plait.net.tls import TlsIdentity, load_or_create
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope

LANES = 64
KEY_CERT_TTL_MS = 24 * 3_600_000
SERIAL_WAIT_S = 10.0
_SERIAL_POLL_S = 0.02


@dataclass(slots=True)
class Lane:
    """One lane, locked to this process while in use.

    A new lane gets a random number: a folder that lost its lane files then starts lanes that
    the ledger has never seen, instead of signing used numbers again.
    """

    number: int
    _path: Path

    def load(self) -> tuple[int, SignedEnvelope | None]:
        """The next sequence number, and a reservation sent but never answered."""
        if not self._path.exists():
            return 1, None
        try:
            state = json.loads(self._path.read_text())
            self.number = int(state["lane"])
            pending = state["pending"]
            envelope = SignedEnvelope.FromString(bytes.fromhex(pending)) if pending else None
            return int(state["next"]), envelope
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"the lane file {self._path} is damaged: {error}") from error

    def save(self, next_sequence: int, pending: SignedEnvelope | None) -> None:
        """Make the state durable before returning; raises ``ConfigError`` if the disk refuses.

        It waits for the disk: from an event loop use ``save_soon``.
        """
        text = json.dumps(
            {
                "lane": self.number,
                "next": next_sequence,
                "pending": pending.SerializeToString().hex() if pending else "",
            }
        )
        try:
            replace_durably(self._path, text)
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error

    async def save_soon(self, next_sequence: int, pending: SignedEnvelope | None) -> None:
        """``save`` without stopping the event loop.

        If it is cancelled it still waits for the disk: what is written late, by who has the
        lane no more, could undo what the next one wrote.
        """
        loop = asyncio.get_running_loop()
        saving = loop.run_in_executor(None, self.save, next_sequence, pending)
        try:
            await asyncio.shield(saving)
        except asyncio.CancelledError:
            await asyncio.wait([saving])
            raise


@dataclass(frozen=True, slots=True)
class Account:
    """A client's keys and lanes, in one folder."""

    folder: Path
    peer_key: SigningKey
    ledger_key: SigningKey
    tls: TlsIdentity
    key_serial: int = FIRST_SERIAL
    """Rises by rotation of the ledger key."""
    serial: bool = False
    """One lane only, with the number 0: a committee of authorities grants."""

    @property
    def peer(self) -> PeerId:
        """The client's peer id, which is also its account."""
        return self.peer_key.peer_id

    def certificate(self, network_id: str, now_ms: int) -> SignedEnvelope:
        """The peer key's delegation to the ledger key, from now on."""
        public = self.ledger_key.public
        ttl_ms = KEY_CERT_TTL_MS
        return make_key_cert(self.peer_key, public, network_id, now_ms, ttl_ms, self.key_serial)

    def with_key(self, public: bytes) -> "Account":
        """The same account with the ledger key that a session or reservation was signed by.

        Raises ``ConfigError`` if it is none of this account's keys.
        """
        if public == self.ledger_key.public:
            return self
        for key, serial in ledger_keys(self.folder):
            if key.public == public:
                return replace(self, ledger_key=key, key_serial=serial)
        raise ConfigError("this was signed with a ledger key that the account does not have")

    def renewed(self) -> "Account":
        """The same account with its newest ledger key: another process may have rotated it."""
        if newest_serial(self.folder) == self.key_serial:
            return self
        key, serial = newest_ledger_key(self.folder)
        return replace(self, ledger_key=key, key_serial=serial)

    @contextlib.contextmanager
    def lane(self, *, idle: bool = False) -> Iterator[Lane]:
        """Lock a free lane; raises ``CapacityError`` when all are in use.

        With ``idle``, one that has no unanswered reservation.
        """
        lanes = self.folder / "lanes"
        lanes.mkdir(exist_ok=True, mode=0o700)
        for number in ["serial"] if self.serial else range(LANES):
            with (lanes / f"{number}.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                first = 0 if self.serial else secrets.randbits(32)
                lane = Lane(first, lanes / f"{number}.json")
                if idle and lane.load()[1] is not None:
                    continue
                yield lane
                return
        raise CapacityError("all lanes of the account are in use", retry_after_s=1.0)

    @contextlib.asynccontextmanager
    async def free_lane(self, *, idle: bool = False) -> AsyncIterator[Lane]:
        """The same, but wait for the one lane of a serial account while it is in use."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + (SERIAL_WAIT_S if self.serial else 0.0)
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    # Its one lane resends first: there is no other that is idle.
                    lane = stack.enter_context(self.lane(idle=idle and not self.serial))
                    break
                except CapacityError:
                    if loop.time() >= deadline_s:
                        raise
                    await asyncio.sleep(_SERIAL_POLL_S)
            yield lane


def open_account(folder: Path, *, serial: bool = False) -> Account:
    """Load the keys of a folder, or make them on first use; raises ``ConfigError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        peer_key = load_or_create_key(folder / "identity.key")
        ledger_key, key_serial = newest_ledger_key(folder)
        return Account(
            folder=folder,
            peer_key=peer_key,
            ledger_key=ledger_key,
            tls=load_or_create(folder, peer_key.peer_id),
            serial=serial,
            key_serial=key_serial,
        )
    except OSError as error:
        raise ConfigError(f"cannot use the account folder {folder}: {error.strerror}") from error
