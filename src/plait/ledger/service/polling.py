"""One question to every authority of a network at once, and what their answers say together.

For whoever writes by hand: unlike ``RemoteCommittee`` it waits for all, and tells who did
not answer. What they missed is not brought later: the same order is given again.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from plait.errors import LedgerError, NetworkError, PlaitError, ProtocolError, VerificationError
from plait.ledger.committee import faults_max, quorum_of
from plait.ledger.service.committee import common_error
from plait.ledger.service.remote import RemoteLedger
from plait.network_file import Authority
from plait.task_scope import TaskScope

Result = TypeVar("Result")
Question = Callable[[RemoteLedger], Coroutine[Any, Any, Result]]


@dataclass(frozen=True, slots=True)
class Poll(Generic[Result]):
    """What authorities answered, or why they did not; ``asked`` is how many were asked.

    Who was too late to be waited for is in neither.
    """

    asked: int
    answers: tuple[tuple[Authority, Result], ...]
    failures: tuple[tuple[Authority, PlaitError], ...]

    @property
    def results(self) -> list[Result]:
        """The answers alone."""
        return [result for _, result in self.answers]

    def confirmed(self: "Poll[int]") -> int:
        """The largest figure of which one honest authority says that it is at least that.

        A quorum must have answered.
        """
        return sorted(self.results, reverse=True)[faults_max(self.asked)]

    def shortfall(self, what: str) -> PlaitError | None:
        """Why fewer than a quorum answered, if so: what most refuse, or that they are away."""
        if len(self.answers) >= quorum_of(self.asked):
            return None
        if self.asked == 1:
            return self.failures[0][1]
        told = f"{what}: {len(self.answers)} of {self.asked} authorities"
        return common_error([error for _, error in self.failures], told)


async def ask_all(
    authorities: Sequence[Authority], question: Question[Result], *, enough: int | None = None
) -> Poll[Result]:
    """Put a question to all; returns when each has answered or let its deadline pass.

    With ``enough`` it returns as soon as so many have answered.
    """
    answered: dict[Authority, Result] = {}
    failed: dict[Authority, PlaitError] = {}
    async with TaskScope() as tasks:
        waiting = {
            tasks.create_task(_asked(one, question), name=f"authority {one.address}"): one
            for one in authorities
        }
        pending = set(waiting)
        while pending and (enough is None or len(answered) < enough):
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                match task.result():
                    case PlaitError() as error:
                        failed[waiting[task]] = error
                    case result:
                        answered[waiting[task]] = result
    return Poll(
        len(authorities),
        tuple((one, answered[one]) for one in authorities if one in answered),
        tuple((one, failed[one]) for one in authorities if one in failed),
    )


async def _asked(authority: Authority, question: Question[Result]) -> Result | PlaitError:
    ledger = RemoteLedger(authority)
    try:
        return await question(ledger)
    except (LedgerError, NetworkError, ProtocolError, VerificationError) as error:
        return error
    finally:
        await ledger.close()
