"""Replacing a file: whatever fails, the old text or the new one stands there."""

import os
from pathlib import Path

import pytest

from plait.durable import replace_durably


def test_the_text_is_written_as_it_is_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "head"
    for text in ("old\n", "— new\r\nline\n"):
        replace_durably(path, text)
        assert path.read_bytes() == text.encode()
    assert [item.name for item in tmp_path.iterdir()] == ["head"]


def test_the_text_is_on_the_disk_before_its_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "head", list[str]()
    sync, rename = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        sync(descriptor)
        done.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "text")

    def noted_rename(self: Path, target: Path) -> Path:
        done.append("name")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_rename)
    replace_durably(path, "text")
    assert done == ["text", "name", "folder"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "head"
    replace_durably(path, "old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    owner: object = os if failing == "fsync" else Path
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(OSError, match="Input/output"):
        replace_durably(path, "new")
    assert path.read_text() == "old"
