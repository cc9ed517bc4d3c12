"""What a verification found: named claims, each true, false or without evidence."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar

from plait.errors import PlaitError
from plait.ledger.canonical import encode_canonical

Outcome = Literal["verified", "false", "incomplete"]

_EXIT_CODES: dict[Outcome, int] = {"verified": 0, "false": 1, "incomplete": 2}
_MARKS = {True: "✔", False: "✘", None: "?"}

ValueT = TypeVar("ValueT")


class Absent(Exception):
    """Optional evidence is not in the bundle: neither true nor false."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement that the bundle makes; ``ok`` is ``None`` where evidence is missing."""

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """The verdict. ``unchecked`` says what no claim covers."""

    outcome: Outcome
    claims: tuple[Claim, ...]
    unchecked: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 verified, 1 false, 2 incomplete."""
        return _EXIT_CODES[self.outcome]

    def to_json(self) -> str:
        """One line of JSON: ``outcome``, ``claims`` and ``unchecked``."""
        claims = [asdict(claim) for claim in self.claims]
        members = {"outcome": self.outcome, "claims": claims, "unchecked": self.unchecked}
        return encode_canonical(members).decode()

    def lines(self) -> tuple[str, ...]:
        """The report for a reader: one line a claim, then what was not checked."""
        width = max((len(claim.name) for claim in self.claims), default=0)
        shown = [f"{_MARKS[c.ok]} {c.name:<{width}}  {c.detail}" for c in self.claims]
        not_checked = [f"  - {item}" for item in self.unchecked]
        return (*shown, "", "Not checked:", *not_checked, "", f"Outcome: {self.outcome}")


@dataclass(slots=True)
class Findings:
    """Collects claims while a bundle is checked."""

    claims: list[Claim] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def claim(
        self, name: str, check: Callable[[], ValueT], detail: Callable[[ValueT], str]
    ) -> ValueT | None:
        """Run a check and note its result; returns its value, ``None`` unless it holds."""
        try:
            value = check()
        except Absent as absence:
            self.claims.append(Claim(name, None, str(absence)))
            return None
        except (PlaitError, ValueError, OverflowError) as error:
            self.claims.append(Claim(name, False, printable(str(error))))
            return None
        self.claims.append(Claim(name, True, printable(detail(value))))
        return value

    def blocked(self, name: str, by: str) -> None:
        """Note a claim that cannot be examined because another does not hold."""
        self.unchecked.append(f"{name}: cannot be examined, because of: {by}")

    def report(self) -> Report:
        """The verdict over all claims."""
        states = {claim.ok for claim in self.claims}
        outcome: Outcome = "verified"
        if False in states:
            outcome = "false"
        elif None in states:
            outcome = "incomplete"
        return Report(outcome, tuple(self.claims), tuple(self.unchecked))


def printable(text: str) -> str:
    """Text from a stranger, without what could steer a terminal or fill it."""
    shown = text if len(text) <= 400 else text[:400] + "…"
    return "".join(c if c.isprintable() else "�" for c in shown)
