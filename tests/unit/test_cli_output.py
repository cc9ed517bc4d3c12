"""Results on stdout, the rest on stderr."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from plait.cli.output import download_progress, emit_json, status, table
from plait.types import Span


@dataclass(frozen=True, slots=True)
class Row:
    span: Span
    digest: bytes


def test_json_is_one_line_and_knows_our_values(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"rows": [Row(Span(0, 3), b"\x01\xff")], "path": Path("a/b"), "set": {"b", "a"}})
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == {
        "rows": [{"span": [0, 3], "digest": "01ff"}],
        "path": "a/b",
        "set": ["a", "b"],
    }
    with pytest.raises(TypeError, match="object"):
        emit_json(object())


def test_status_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    status("starting")
    assert capsys.readouterr() == ("", "starting\n")


def test_a_piped_table_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    peer = "12D3Koo" + "W" * 45
    table(["name", "peer", "pid"], [["node-1", peer, None], ["[red]", "x", 3]], title="nodes")
    out = capsys.readouterr().out
    assert out.startswith("nodes\n")
    assert peer in out
    assert "[red]" in out, "names are not markup"
    assert out.split(peer)[1].split()[0] == "-"


def test_progress_is_drawn_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with download_progress() as progress:
        progress("weights.gguf", 10, 100)
        progress("weights.gguf", 100, 100)
        progress("unknown size", 5, 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "weights.gguf" in captured.err
