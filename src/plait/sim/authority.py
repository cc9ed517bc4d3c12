"""A ledger authority and a witness as hosts: the production services behind a modelled wire."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import grpc

from plait.errors import LedgerError, NetworkError, PeerUnreachable, PlaitError, RemoteProtocolError
from plait.identity import SigningKey
from plait.ledger.cosignature import open_cosignatures
from plait.ledger.journal import GRACE_MS
from plait.ledger.service.authority import LedgerServicer
from plait.ledger.service.recorder import LogIdentity
from plait.ledger.service.witness import WitnessedLog
from plait.ledger.witness import CONFLICT, LogWitness, WitnessRefusal
from plait.network_file import NetworkFile
from plait.sim.engine import MS, Engine, S
from plait.sim.host import Host, Reply
from plait.sim.ledger import MemoryDisk, VirtualRecorder, Wait, drive
from plait.sim.network import Wires

LEDGER = "ledger"
CHORES_US = 1 * S
COSIGNING_TIMEOUT_US = 1 * S

_ACKNOWLEDGED = {"Reserve", "Settle", "Issue"}
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class _Context:
    """What a servicer sees of gRPC."""

    async def abort(self, status: grpc.StatusCode, details: str) -> NoReturn:
        """End the call, as the client of the ledger will see it."""
        if status in _SILENT:
            raise PeerUnreachable(f"the ledger does not answer: {details}")
        raise LedgerError(f"the ledger refuses: {details}")


class LedgerHost(Host):
    """One authority. ``on_acknowledged`` is told what is on disk when a client hears a yes,
    ``on_signed`` each checkpoint that is signed."""

    def __init__(
        self,
        engine: Engine,
        wires: Wires,
        network: NetworkFile,
        keys: tuple[SigningKey, SigningKey],
        witnesses: Sequence["WitnessHost"],
        on_acknowledged: Callable[[MemoryDisk, int], None],
        on_signed: Callable[[str], None],
    ) -> None:
        super().__init__(engine, LEDGER)
        self.disk = MemoryDisk()
        self.recorder: VirtualRecorder
        self._on_signed = on_signed
        self._wires = wires
        self._network = network
        self._ledger_key, self._log_key = keys
        self._witnesses = witnesses
        self._on_acknowledged = on_acknowledged
        self._started_us = 0

    def on_start(self) -> None:
        """Rebuild the books from the disk."""
        self.disk.reopen()
        self._started_us = self.engine.now_us
        identity = LogIdentity(self._network.authorities[0].log_origin, self._log_key)
        self.recorder = VirtualRecorder(
            self, self.disk, self._network.network_id, identity, self._on_signed
        )
        self._log = _VirtualLog(self, self._wires, self.recorder, self._witnesses, self._network)
        self._servicer = LedgerServicer(
            self.recorder, self._network, self._ledger_key, self.now_ms, self._log
        )
        self.every(CHORES_US, "", self._chores)

    def on_call(self, caller: str, method: str, request: object, reply: Reply) -> None:
        """Answer as the gRPC edge does."""
        context: Any = _Context()
        life = self.life

        def finish(answer: object) -> None:
            if life != self.life:
                return
            if method in _ACKNOWLEDGED and not isinstance(answer, PlaitError):
                self._on_acknowledged(self.disk, self.recorder.committed_size)
            reply(answer)

        drive(getattr(self._servicer, method)(request, context), finish)

    def _chores(self) -> None:
        if self.recorder.failed:
            return
        drive(self._log.checkpoint(self.recorder.committed_size), lambda answer: None)
        if (self.engine.now_us - self._started_us) // MS >= GRACE_MS:
            drive(self.recorder.expire(self.now_ms()), lambda answer: None)


class _VirtualLog(WitnessedLog):
    """The witnessed log, which asks its witnesses over modelled wires."""

    def __init__(
        self,
        host: LedgerHost,
        wires: Wires,
        recorder: VirtualRecorder,
        witnesses: Sequence["WitnessHost"],
        network: NetworkFile,
    ) -> None:
        super().__init__(recorder)
        self._host = host
        self._wires = wires
        self._hosts = witnesses
        self._network = network

    async def checkpoint(self, covering: int = 0) -> tuple[int, str]:
        """A checkpoint of at least ``covering`` entries, cosigned by whoever answers."""
        if not self._note or self._size < covering:
            size, note = await self._recorder.checkpoint(covering)
            asked = [self._begin(witness, size, note) for witness in self._hosts]
            lines = [line for wait in asked if isinstance(line := await wait, str)]
            if size >= self._size:
                self._size, self._note = size, note + "".join(lines)
        return self._size, self._note

    def _begin(self, witness: "WitnessHost", size: int, note: str) -> Wait:
        wait = Wait()
        drive(self._line(witness, size, note), wait.finish)
        return wait

    async def _line(self, witness: "WitnessHost", size: int, note: str) -> str | None:
        """A valid signature line, or nothing."""
        old_size = min(self._sizes.get(witness.name, 0), size)
        try:
            answer = await self._submission(witness, old_size, size, note)
            if isinstance(answer, WitnessRefusal) and answer.status == CONFLICT and answer.size:
                if answer.fork is not None or not old_size != answer.size <= size:
                    return None
                answer = await self._submission(witness, answer.size, size, note)
        except (NetworkError, LedgerError):
            return None
        if not isinstance(answer, str):
            return None
        known = [one for one in self._network.witnesses if one.name == witness.name]
        if not open_cosignatures(note + answer, known):
            raise RemoteProtocolError("the answer of a witness is no cosignature of its own")
        self._sizes[witness.name] = size
        return answer

    async def _submission(
        self, witness: "WitnessHost", old_size: int, size: int, note: str
    ) -> object:
        wait = Wait()
        proof = tuple(self._proof(old_size, size))
        request = (old_size, proof, note)
        self._wires.call(
            self._host, witness, "add_checkpoint", request, COSIGNING_TIMEOUT_US, wait.finish
        )
        return await wait


class _Shelf:
    """A witness's disk."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.failing = False

    def latest(self, origin: str) -> str | None:
        """What was cosigned last."""
        return self.notes.get(origin)

    def advance(self, origin: str, previous: str | None, note: str) -> bool:
        """Keep a note; raises ``LedgerError`` when the disk fails."""
        if self.failing:
            raise LedgerError("the witness's disk failed")
        if self.notes.get(origin) != previous:
            return False
        self.notes[origin] = note
        return True


class WitnessHost(Host):
    """A witness of the ledger's log."""

    def __init__(self, engine: Engine, name: str, key: SigningKey, network: NetworkFile) -> None:
        super().__init__(engine, name)
        self.shelf = _Shelf()
        self._key = key
        self._logs = {one.log_origin: one.log_key for one in network.authorities}

    def on_start(self) -> None:
        """Read the disk."""
        self._witness = LogWitness(self.name, self._key, self._logs, self.shelf)

    def on_call(self, caller: str, method: str, request: object, reply: Reply) -> None:
        """Cosign, or say why not."""
        assert isinstance(request, tuple)
        old_size, proof, note = request
        now_s = self.now_ms() // 1000
        try:
            answer = self._witness.add_checkpoint(old_size, proof, note, now_s)
        except LedgerError as error:
            reply(error)
        else:
            reply(answer)
