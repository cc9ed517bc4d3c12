"""What conformance suites said: kept as JSON per upstream, written as CONFORMANCE.md."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

UPSTREAMS = {
    "engine": "an engine that obeys its instructions (`plait.testing.obedient`)",
    "network": "a testnet of four nodes and a ledger with random weights (`tiny-random`)",
    "words": "a testnet with a small model that writes sentences (`smollm2-135m` in int4), for the "
    "suites that want some",
}


@dataclass(frozen=True)
class Excuse:
    """A test that may fail, if it fails like this, and why. Both are regular expressions."""

    test: str
    error: str
    why: str


@dataclass
class Report:
    """What a suite said; ``failed`` has each test's error."""

    suite: str
    version: str
    what: str
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    excused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def fail(self, test: str, error: str, excuses: tuple[Excuse, ...] = ()) -> None:
        """Note a failure, as an excused one if it is of a kind that is known."""
        for excuse in excuses:
            if re.search(excuse.test, test) and re.search(excuse.error, error):
                self.excused[test] = excuse.why
                return
        self.failed[test] = error[:200]

    def check(self, test: str, ok: bool, error: str = "") -> None:
        """Note a check."""
        if ok:
            self.passed += 1
        else:
            self.fail(test, error)


def merge(path: Path, upstream: str, reports: list[Report]) -> dict[str, dict[str, Report]]:
    """Put reports in place of earlier ones of the same suites; gives all, by upstream."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(upstream, {}).update({one.suite: asdict(one) for one in reports})
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return {
        name: {suite: Report(**fields) for suite, fields in known.get(name, {}).items()}
        for name in UPSTREAMS
    }


def table(found: dict[str, dict[str, Report]], suites: list[str]) -> str:
    """The page; of upstreams that something was run on."""
    found = {name: reports for name, reports in found.items() if reports}
    lines = [
        "# Conformance",
        "",
        "Clients nobody here wrote, unchanged, each in its own environment, against the gateway.",
        "Made by `python benchmarks/conformance/run.py`, with `--network FILE` for a network and",
        "`--network FILE --model smollm2-135m` for one with words; do not edit. Behind the gateway",
        "stands",
        "",
        *(f"- **{name}**: {UPSTREAMS[name]};" for name in found),
        "",
        f"and figures are given as {' / '.join(found)}. Suites test the API, not a model's",
        "wit: what needs wit fails with random weights and is excused, if it fails in just that",
        "way. For schemathesis the count is of generated requests.",
        "",
        "| Suite | Version | What | Passed | Failed | Excused | Skipped by the suite |",
        "|---|---|---|---|---|---|---|",
    ]
    for suite in suites:
        ran = [reports.get(suite) for reports in found.values()]
        known = next((one for one in ran if one is not None), None)
        version, what = ("", "") if known is None else (known.version, known.what)
        lines.append("| " + " | ".join([suite, version, what, *_figures(ran)]) + " |")
    for name, reports in found.items():
        lines += _details(name, [reports[suite] for suite in suites if suite in reports])
    return "\n".join([*lines, ""])


def _figures(ran: list[Report | None]) -> list[str]:
    def both(count) -> str:
        return " / ".join("not run" if one is None else str(count(one)) for one in ran)

    return [
        both(lambda one: one.passed),
        both(lambda one: len(one.failed)),
        both(lambda one: len(one.excused)),
        both(lambda one: sum(one.skipped.values())),
    ]


def _details(upstream: str, reports: list[Report]) -> list[str]:
    failed = [f"{one.suite}: {name}: {why}" for one in reports for name, why in one.failed.items()]
    excused = []
    for one in reports:
        by_reason: dict[str, list[str]] = {}
        for name, why in one.excused.items():
            by_reason.setdefault(why, []).append(name)
        excused += [f"{one.suite}: {why}: {', '.join(by_reason[why])}" for why in by_reason]
    skipped = [
        f"{one.suite}: {count} × {why}"
        for one in reports
        for why, count in sorted(one.skipped.items())
    ]
    lines: list[str] = []
    for title, rows in (("Failed", failed), ("Excused", excused), ("Skipped", skipped)):
        if rows:
            lines += ["", f"## {title}, {upstream}", "", *(f"- {row}" for row in rows)]
    return lines
