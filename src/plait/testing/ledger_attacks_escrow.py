"""Attacks on escrow, played among the others (``ledger_attacks``)."""

from plait.envelope import digest
from plait.ledger.escrow import EscrowTerms
from plait.ledger.journal import Accepted, Books, Expire, Forfeit, Refusal
from plait.testing.ledger_attacks import CLIENTS, ENDS_MS, NETWORK, PAYEES, Session, World
from plait.types import AccountId, Digest

WINDOW_MS = 5 * ENDS_MS
TERMS = EscrowTerms(percent=10, window_ms=WINDOW_MS)


class EscrowWorld(World):
    """A ledger that keeps a share of what it pays in escrow."""

    def new_books(self) -> Books:
        """Books with escrow."""
        return Books(NETWORK, TERMS)

    def judged(self, session: Session, payee: AccountId) -> Forfeit:
        """What a quorum signed of a payee, each time anew."""
        return Forfeit(session.id, payee, Digest(digest(self.number())))

    def standing(self, session: Session) -> dict[AccountId, int]:
        """What stands in escrow for each payee of a session."""
        return {payee: self.books.escrows.standing(session.id, payee) for payee in PAYEES}

    def honest_judgement(self) -> None:
        """Judgement: what stands in that session goes back to its client, to the microcredit."""
        session, payee = self.some(), self.rng.choice(PAYEES)
        before, standing = self.books.balances.of(session.client), self.standing(session)[payee]
        known = self.books.escrows.forfeited(session.id, payee) is not None
        outcome = self.run(self.judged(session, payee))
        gained = self.books.balances.of(session.client) - before
        assert gained == (0 if known else standing)
        assert isinstance(outcome, Accepted) or not standing

    def attack_08_a_share_farmed_by_tiny_settlements(self) -> None:
        """A share farmed by tiny settlements."""
        session = self.open()
        assert session is not None
        payee = self.rng.choice(PAYEES)
        paid = min(session.caps[payee], 15)
        for amount in range(1, paid + 1):
            self.settle(session, {payee: amount}, payee)
        assert self.standing(session)[payee] == TERMS.share(paid)

    def attack_10_forfeited_twice_or_after_the_window(self) -> None:
        """Forfeited twice or after the window."""
        session, other = self.open(), self.open()
        assert session is not None and other is not None
        exposed, late = PAYEES[0], PAYEES[1]
        self.settle(session, session.caps, exposed)
        self.settle(other, other.caps, exposed)
        self.run(self.judged(session, exposed))
        again, size = self.run(self.judged(session, exposed)), self.books.balances.size
        assert isinstance(again, Refusal) or again == Accepted((), (), 0)
        # Somebody else's escrow is not touched, nor can it be taken later than the window.
        assert self.standing(session)[late] == TERMS.share(session.caps[late])
        assert self.books.balances.size == size
        before, due = self.books.balances.of(other.client), self.standing(other)
        self.now_ms += WINDOW_MS
        while any(self.books.escrows.of(payee) for payee in PAYEES):
            outcome = self.run(Expire())
            assert isinstance(outcome, Accepted) and outcome.entries
        assert self.books.balances.of(other.client) >= before + due[exposed]
        # If this one had been exposed before, its escrow has gone to the client already.
        too_late = self.run(self.judged(other, late))
        assert isinstance(too_late, Refusal) or too_late == Accepted((), (), 0)

    def attack_10_a_judgement_again_for_what_was_earned_since(self) -> None:
        """A judgement again for what was earned since."""
        session, payee = self.open(), self.rng.choice(PAYEES)
        assert session is not None
        self.settle(session, {payee: max(1, session.caps[payee] // 2)}, payee)
        self.run(self.judged(session, payee))
        self.settle(session, session.caps, payee)
        standing, size = self.standing(session), self.books.balances.size
        again = self.run(self.judged(session, payee))
        assert isinstance(again, Refusal) or again == Accepted((), (), 0)
        assert (self.standing(session), self.books.balances.size) == (standing, size)

    def check(self) -> None:
        """The share of what was paid is in escrow, unless it went back or was forfeited."""
        super().check()
        assert sum(self.books.escrows.of(payee) for payee in PAYEES) >= 0
        for session in self.sessions:
            for payee, standing in self.standing(session).items():
                assert standing <= TERMS.share(self.books.paid(session.id, payee))
        assert all(not self.books.escrows.of(client) for client in CLIENTS)
