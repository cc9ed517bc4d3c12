"""The way of a client or stage to its network's ledger: one authority, or a committee.

``connect`` gives what fits the network file; both kinds have the methods of
``RemoteLedger``, ask nothing of an authority that was caught signing twice, and call a
session settled only under a checkpoint with the network's quorum of witnesses. What an
authority of a committee missed while it was away waits on disk and is brought to it later.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from plait.envelope import digest
from plait.errors import (
    LedgerError,
    NetworkError,
    PeerUnreachable,
    PlaitError,
    ProtocolError,
    VerificationError,
)
from plait.ledger.checkpoint import open_checkpoint
from plait.ledger.committee import (
    combine_grants,
    faults_max,
    granters,
    quorum_of,
)
from plait.ledger.cosignature import open_cosignatures
from plait.ledger.notices import Told
from plait.ledger.service.notices import NoticeExchange
from plait.ledger.service.remote import (
    DEADLINE_S,
    AccountState,
    Evidence,
    RemoteLedger,
    voucher_in,
)
from plait.ledger.sub_accounts import SubAccountUse
from plait.logs import get_logger
from plait.network_file import Authority, NetworkFile
from plait.task_scope import TaskScope
from plait.types import Digest, SessionId
from plait.v1 import ledger_pb2 as pb
from plait.v1.committee_pb2 import LearnRequest, LearnResponse
from plait.v1.committee_pb2_grpc import CommitteeServiceStub
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

RETRY_S = 2.0
SLOW_S = 0.2
"""Who answers so late has missed nothing."""
BACKLOG_MAX = 4_096
"""Messages that wait for one authority; beyond, the newest are not kept."""

_SUFFIXES = (".sub-account", ".learn", ".settle")
"""Of what waits, in the order in which it is brought."""
_NOT_READY = ("session", "sequence", "credit")

Result = TypeVar("Result")


class CommitteeRefusal(LedgerError):
    """No quorum; ``refused`` authorities have said no themselves."""

    def __init__(self, message: str, refused: int, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.refused = refused


class WatchedLedger(RemoteLedger):
    """One authority, under the eyes of a notice board. Raises ``LedgerError`` for what would
    be trusted to an authority that was caught."""

    def __init__(
        self,
        authority: Authority,
        network: NetworkFile,
        notices: NoticeExchange,
        *,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        super().__init__(authority, deadline_s=deadline_s)
        self.authority = authority
        self._network = network
        self._notices = notices
        self._committee = CommitteeServiceStub(self._channel)

    async def reserve(self, reservation: SignedEnvelope, cert: SignedEnvelope) -> SignedEnvelope:
        """Ask for a reservation, but of nobody who has lied."""
        statement = self._notices.board.frozen.get(self.authority.peer)
        if statement is not None:
            raise LedgerError(
                f"the ledger authority {self.authority.peer} is frozen: it {statement}",
                remedy="ask the network's founder for a new network file",
            )
        return await super().reserve(reservation, cert)

    async def evidence(self, session_id: SessionId) -> Evidence:
        """What the log says; settled only under a checkpoint that the quorum has cosigned."""
        evidence = await super().evidence(session_id)
        return replace(evidence, settled=evidence.settled and self._witnessed(evidence.checkpoint))

    async def checkpoint(self) -> str:
        """The last signed checkpoint; the notice board sees it too."""
        note = await super().checkpoint()
        self._witnessed(note)
        return note

    async def learn(self, request: LearnRequest) -> int:
        """Bring a reservation that the others granted."""
        response = await self._call(self._committee.Learn, request, LearnResponse)
        return response.entry_index

    def _witnessed(self, note: str) -> bool:
        try:
            open_checkpoint(note, self.authority.log_origin, self.authority.log_key)
            count = len(open_cosignatures(note, self._network.witnesses))
        except VerificationError as error:
            raise self._broken(f"its checkpoint is not valid: {error}") from error
        self._notices.take(Told(checkpoints=(note,)))
        return count >= self._network.witness_quorum


class RemoteCommittee:
    """Several authorities behind the methods of ``RemoteLedger``.

    A method returns once a quorum has answered alike and raises ``LedgerError`` when it
    cannot any more because authorities refuse, ``PeerUnreachable`` when they do not answer.
    ``backlog`` is a folder for what authorities missed; use ``run`` in a task to bring it.
    """

    def __init__(
        self, members: Sequence[WatchedLedger], network: NetworkFile, backlog: Path
    ) -> None:
        self._members = tuple(members)
        self._network = network
        self._quorum = quorum_of(len(members))
        self._faults = faults_max(len(members))
        self._backlogs = [
            _Backlog(member, backlog / str(index)) for index, member in enumerate(members)
        ]
        self._tasks = TaskScope()

    async def start(self) -> None:
        """Begin to bring what waits."""
        await self._tasks.__aenter__()
        for one in self._backlogs:
            self._tasks.create_task(one.run(), name=f"backlog {one.member.authority.address}")

    async def reserve(self, reservation: SignedEnvelope, cert: SignedEnvelope) -> SignedEnvelope:
        """Ask all for a reservation; returns a quorum's grants in one envelope."""
        granted: set[int] = set()
        message = pb.BudgetReservation.FromString(reservation.payload)
        name = f"{message.lane:010d}-{message.sequence:020d}.learn"

        async def ask(index: int) -> SignedEnvelope:
            grant = await self._members[index].reserve(reservation, cert)
            # A quorum of one: only this authority's own signature is wanted here.
            granters(grant, reservation, [self._members[index].authority])
            granted.add(index)
            self._backlogs[index].drop(name)
            return grant

        try:
            grants = await self._of_quorum(ask, "reserve")
        except CommitteeRefusal as error:
            if error.refused == len(self._members):
                raise
            # Somebody may have granted it: the number must not be used for another.
            raise PeerUnreachable(f"{error}; the same reservation is sent again") from error
        combined = combine_grants(grants, self._network.authorities)
        learn = LearnRequest(reservation=reservation, grant=combined, account_cert=cert)
        self._missed(granted, name, learn.SerializeToString())
        return combined

    async def settle(
        self, request: SignedEnvelope, cert: SignedEnvelope, voucher: SignedEnvelope | None
    ) -> int:
        """Present a voucher, or without one a release, to all.

        Returns what a quorum says has been paid at least.
        """
        settled: set[int] = set()
        name = f"{digest(request.payload).hex()}.settle"

        async def ask(index: int) -> int:
            paid = await self._members[index].settle(request, cert, voucher)
            settled.add(index)
            self._backlogs[index].drop(name)
            return paid

        paid = await self._of_quorum(ask, "settle")
        message = pb.SettleRequest(request=request, payee_cert=cert, voucher=voucher)
        self._missed(settled, name, message.SerializeToString())
        return sorted(paid, reverse=True)[self._faults]

    async def set_sub_account(self, order: SignedEnvelope, cert: SignedEnvelope) -> int:
        """Book an owner's terms with all; what was missed is brought later."""
        terms = pb.SubAccountOrder.FromString(order.payload).terms
        heard: set[int] = set()
        name = f"{terms.name}-{terms.sequence:020d}.sub-account"

        async def ask(index: int) -> int:
            entry = await self._members[index].set_sub_account(order, cert)
            heard.add(index)
            self._backlogs[index].drop(name)
            return entry

        entries = await self._of_quorum(ask, "sub-account")
        message = pb.SetSubAccountRequest(order=order, account_cert=cert)
        self._missed(heard, name, message.SerializeToString())
        return max(entries)

    async def sub_accounts(
        self, query: SignedEnvelope, cert: SignedEnvelope | None = None
    ) -> list[SubAccountUse]:
        """Sub-accounts as the authority has them, of a quorum, that has taken most orders."""
        answers = await self._of_quorum(
            lambda i: self._members[i].sub_accounts(query, cert), "sub-accounts"
        )
        return newest_uses(answers)

    async def account(
        self, query: SignedEnvelope, cert: SignedEnvelope | None = None
    ) -> AccountState:
        """Balances that one honest authority at least confirms."""
        states = await self._of_quorum(lambda i: self._members[i].account(query, cert), "account")
        return confirmed_state(states, self._faults)

    async def history(
        self, query: SignedEnvelope, cert: SignedEnvelope | None = None, limit: int = 50
    ) -> list[pb.JournalEntry]:
        """The newest entries of an account in one authority's journal, the first to answer."""
        return await self._of_any(lambda i: self._members[i].history(query, cert, limit))

    async def evidence(self, session_id: SessionId) -> Evidence:
        """What one log says about a session, of one that has settled it if there is any."""
        answers: list[Evidence] = []
        async for answer in self._answers(lambda i: self._members[i].evidence(session_id)):
            if isinstance(answer, Evidence):
                if answer.settled:
                    return answer
                answers.append(answer)
            elif isinstance(answer, LedgerError) and not answers:
                refusal = answer
        if answers:
            return answers[0]
        raise refusal

    async def checkpoint(self) -> str:
        """A checkpoint of the first authority to answer."""
        return await self._of_any(lambda i: self._members[i].checkpoint())

    async def consistency(self, first_size: int, second_size: int) -> list[Digest]:
        """Of the first authority of the network file: sizes are of one log."""
        return await self._members[0].consistency(first_size, second_size)

    def export(self, first_index: int = 0) -> AsyncIterator[bytes]:
        """The journal of the first authority of the network file."""
        return self._members[0].export(first_index)

    async def close(self) -> None:
        """Close all connections; what waits stays on disk."""
        await self._tasks.__aexit__(None, None, None)
        for member in self._members:
            await member.close()

    def _missed(self, heard: set[int], name: str, data: bytes) -> None:
        """Keep a message for those who have not heard it; who only was slow drops it."""
        for index, backlog in enumerate(self._backlogs):
            if index not in heard:
                backlog.add(name, data)

    async def _of_quorum(self, ask: Callable[[int], Awaitable[Result]], what: str) -> list[Result]:
        results: list[Result] = []
        errors: list[PlaitError] = []
        async for answer in self._answers(ask):
            if isinstance(answer, PlaitError):
                errors.append(answer)
            else:
                results.append(answer)
            if len(results) == self._quorum:
                return results
        raise common_error(
            errors, f"{what}: {len(results)} of {len(self._members)} authorities agree"
        )

    async def _of_any(self, ask: Callable[[int], Awaitable[Result]]) -> Result:
        errors: list[PlaitError] = []
        async for answer in self._answers(ask):
            if not isinstance(answer, PlaitError):
                return answer
            errors.append(answer)
        raise common_error(errors, "no authority answers")

    async def _answers(
        self, ask: Callable[[int], Awaitable[Result]]
    ) -> AsyncIterator[Result | PlaitError]:
        """Answers and errors as they come; those too late for the caller are not waited for."""

        async def one(index: int) -> Result | PlaitError:
            try:
                return await ask(index)
            except (LedgerError, NetworkError, ProtocolError, VerificationError) as error:
                return error

        waiting = {
            self._tasks.create_task(_named(one(index)), name=f"authority {index}")
            for index in range(len(self._members))
        }
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()


class _Backlog:
    """What one authority has not heard, oldest first, in a folder of its own."""

    def __init__(self, member: WatchedLedger, folder: Path) -> None:
        self.member = member
        self._folder = folder
        self._news = asyncio.Event()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._count = sum(1 for _ in folder.iterdir())
        if self._count:
            self._news.set()

    def add(self, name: str, data: bytes) -> None:
        """Keep a message until the authority has taken it."""
        if self._count >= BACKLOG_MAX:
            log.error("too much waits for a ledger authority", folder=str(self._folder))
            return
        part = self._folder / f"{name}.part"
        try:
            part.write_bytes(data)
            part.replace(self._folder / name)
        except OSError as error:
            log.error("what an authority missed cannot be kept", reason=str(error))
            return
        self._count += 1
        self._news.set()

    def drop(self, name: str) -> None:
        """The authority has taken a message after all."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()
            self._count = max(0, self._count - 1)

    async def run(self) -> None:
        """Bring what waits, for ever."""
        while True:
            await self._news.wait()
            await asyncio.sleep(SLOW_S)
            if await self.bring():
                self._news.clear()
            else:
                await asyncio.sleep(RETRY_S)

    async def bring(self) -> bool:
        """One attempt at all that waits; false if some of it still does."""
        # Names sort reservations by number, and before settlements of what they reserve.
        waiting = sorted(self._folder.iterdir())
        for path in [path for suffix in _SUFFIXES for path in waiting if path.suffix == suffix]:
            try:
                await self._bring(path)
            except (NetworkError, ProtocolError) as error:
                log.debug("an authority is still away", reason=str(error))
                return False
            except LedgerError as error:
                if str(error).partition(": ")[2].startswith(_NOT_READY):
                    log.info("an authority is not ready for it yet", reason=str(error))
                    return False
                log.warning("an authority refuses what it missed", reason=str(error))
            except (DecodeError, OSError) as error:
                log.error("what waits for an authority cannot be read", reason=str(error))
            self.drop(path.name)
        return True

    async def _bring(self, path: Path) -> None:
        data = path.read_bytes()
        if path.suffix == ".learn":
            await self.member.learn(LearnRequest.FromString(data))
        elif path.suffix == ".sub-account":
            order = pb.SetSubAccountRequest.FromString(data)
            await self.member.set_sub_account(order.order, order.account_cert)
        else:
            message = pb.SettleRequest.FromString(data)
            await self.member.settle(message.request, message.payee_cert, voucher_in(message))


Ledger = WatchedLedger | RemoteCommittee
"""What ``connect`` gives."""


async def connect(network: NetworkFile, notices: NoticeExchange, backlog: Path) -> Ledger:
    """The network's ledger; close it. ``backlog`` is a folder that a committee may use."""
    members = [WatchedLedger(one, network, notices) for one in network.authorities]
    if len(members) == 1:
        return members[0]
    committee = RemoteCommittee(members, network, backlog)
    await committee.start()
    return committee


async def _named(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return await coroutine


def confirmed_state(states: Sequence[AccountState], faults: int) -> AccountState:
    """Of a quorum's balances those that one honest authority at least has, or larger ones.

    So many as ``faults`` may lie; more states than that are needed.
    """

    def figure(of: Callable[[AccountState], int]) -> int:
        return sorted(map(of, states), reverse=True)[faults]

    return AccountState(
        figure(lambda state: state.available),
        figure(lambda state: state.pending),
        figure(lambda state: state.next_sequence),
        figure(lambda state: state.credit_limit),
        figure(lambda state: state.escrow),
    )


def newest_uses(answers: Sequence[list[SubAccountUse]]) -> list[SubAccountUse]:
    """Of a quorum's lists that of an authority that has taken most orders."""
    return max(answers, key=lambda uses: sum(use.terms.sequence for use in uses))


def common_error(errors: Sequence[PlaitError], what: str) -> PlaitError:
    """The refusal that most authorities gave, or that they do not answer."""
    refusals = [error for error in errors if isinstance(error, LedgerError)]
    if not refusals:
        reasons = "; ".join(sorted({str(error) for error in errors}))
        return PeerUnreachable(f"{what} ({reasons})")
    most, _ = Counter(map(str, refusals)).most_common(1)[0]
    remedy = next(error.remedy for error in refusals if str(error) == most)
    return CommitteeRefusal(f"{most} ({what})", len(refusals), remedy=remedy)
