"""Every ``plait`` command that a document shows or a remedy names exists, with its options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plait.cli import COMMANDS
from plait.cli.root import _load

pytestmark = pytest.mark.slow  # it imports every command

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks/README.md",
]
SOURCES = sorted((ROOT / "src/plait").rglob("*.py"))
EVERYWHERE = {"--help", "--version"}


def documented(path: Path) -> Iterator[str]:
    """Command lines: in code spans and in fenced code, without prompts and comments."""
    text = path.read_text()
    for fenced in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = fenced.replace("\\\n", " ").splitlines()
        yield from (line.removeprefix("$ ") for line in lines)
    yield from re.findall(r"`(plait [^`\n]*)`", text)


def remedies(path: Path) -> Iterator[str]:
    """What errors tell the user to try."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.keyword) and node.arg == "remedy":
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield from re.findall(r"(?:^|, or )(plait [^,]*)", part.value)


def faults(line: str) -> list[str]:
    """What a command line names that does not exist."""
    words = [word.strip("[](),.") for word in re.split(r"[|>#;&]|\.\.\.", line)[0].split()[1:]]
    if not words or words[0].startswith("-"):
        return []
    if words[0] not in COMMANDS:
        return [f"no command {words[0]}"]
    command: Any = _load(words.pop(0))
    if getattr(command, "commands", None) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return [f"no command {command.name} {words[0]}"]
        command = command.commands[words.pop(0)]
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    return [f"no option {one}" for one in options if one not in known | EVERYWHERE]


def wrong(path: Path, lines: Iterator[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {line}: {fault}"
        for line in lines
        if re.match(r"plait [a-z-]", line)
        for fault in faults(line)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands_exist(path: Path) -> None:
    assert not wrong(path, documented(path))


def test_remedies_name_commands_that_exist() -> None:
    found = [line for path in SOURCES for line in remedies(path)]
    assert len(found) > 20
    assert not [fault for path in SOURCES for fault in wrong(path, remedies(path))]


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("plait run smollm2-135m 'Why?' --max-tokens 3 --json", 0),
        ("plait testnet up --wan metro --detach   # comment --nonesuch", 0),
        ("plait ledger sub-account | sub-accounts", 0),
        ("plait sim run --seeds N [--first SEED]", 0),
        ("plait fly", 1),
        ("plait testnet fly", 1),
        ("plait testnet up --wings --detach", 1),
    ],
)
def test_a_command_line_is_examined(line: str, count: int) -> None:
    assert len(faults(line)) == count
