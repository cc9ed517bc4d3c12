import json
from dataclasses import replace
from pathlib import Path

import pytest

from plait.cli.root import invoke
from plait.ledger.bundle import build_bundle
from plait.testing.accounting import PaperSession, Plot, key_of, paper_network

PARTS = PaperSession(Plot()).play().bundle_parts()
BUNDLE = build_bundle(PARTS, key_of("client"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paper_network().save(tmp_path / "network.toml", key_of("founder"))
    (tmp_path / "bundle.json").write_bytes(BUNDLE)
    return tmp_path


def run(folder: Path, *options: str, bundle: str = "bundle.json") -> int:
    network = str(folder / "network.toml")
    return invoke(["verify", str(folder / bundle), "--network", network, *options])


def test_a_good_bundle_exits_0_and_says_what_is_not_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    shown = capsys.readouterr().out
    assert "✔ seal" in shown
    assert "✘" not in shown
    assert "Not checked:" in shown
    assert "Outcome: verified" in shown


def test_a_false_bundle_exits_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spoilt in (BUNDLE[:-1], b"\xff" * 100, BUNDLE.replace(b"Hi", b"Ho")):
        (folder / "bundle.json").write_bytes(spoilt)
        assert run(folder) == 1
        assert "✘" in capsys.readouterr().out


def test_missing_evidence_exits_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = replace(PARTS, entries=(), proofs=(), checkpoint=None)
    (folder / "bundle.json").write_bytes(build_bundle(bare, key_of("client")))
    assert run(folder) == 2
    assert "? journal" in capsys.readouterr().out


def test_json_is_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["outcome"] == "verified"
    assert {"name", "ok", "detail"} == set(report["claims"][0])
    assert report["unchecked"]


def test_policy_is_another_name_of_the_option(folder: Path) -> None:
    policy = str(folder / "network.toml")
    assert invoke(["verify", str(folder / "bundle.json"), "--policy", policy]) == 0


def test_a_missing_file_is_one_line_and_exits_3(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, bundle="none.json") == 3
    assert "none.json" in capsys.readouterr().err
    assert run(folder, bundle=".") == 3
    (folder / "bundle.json").write_bytes(b"")
    assert run(folder) == 3
    assert "is an empty file, no bundle" in capsys.readouterr().err
    (folder / "network.toml.sig").unlink()
    assert run(folder) == 3
