"""Where bundles are written: whole or not at all."""

import os
from pathlib import Path

import pytest

from plait.cli.bundle_file import check_writable, read_bundle_file, write_bundle
from plait.cli.root import invoke
from plait.errors import ConfigError
from plait.testing.accounting import key_of, paper_network


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_that_fails_leaves_no_bundle(tmp_path: Path) -> None:
    paper_network().save(tmp_path / "network.toml", key_of("founder"))
    before = names(tmp_path)
    for old in (None, b"an earlier bundle"):
        if old is not None:
            (tmp_path / "bundle.json").write_bytes(old)
            before = names(tmp_path)
        run = ["run", "no-such-model", "Hello", "--bundle", str(tmp_path / "bundle.json")]
        assert invoke([*run, "--network", str(tmp_path / "network.toml")]) not in (0, None)
        assert names(tmp_path) == before
    assert read_bundle_file(tmp_path / "bundle.json") == b"an earlier bundle"


def test_a_bundle_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    bundle, link = tmp_path / "bundle.json", tmp_path / "link.json"
    link.symlink_to(bundle)
    for data in (b"one", b"another, longer"):
        check_writable(link)
        write_bundle(link, data)
        assert read_bundle_file(bundle) == data
        bundle.chmod(0o600)
    assert bundle.stat().st_mode & 0o777 == 0o600
    assert link.is_symlink()
    assert names(tmp_path) == ["bundle.json", "link.json"]


def test_a_bundle_goes_into_a_pipe_and_leaves_it_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe)
        write_bundle(pipe, b"a bundle")
        assert os.read(reader, 100) == b"a bundle"
        assert pipe.is_fifo()
    finally:
        os.close(reader)


def test_what_cannot_be_written_is_said_before_anything_is_paid(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "no" / "bundle.json", tmp_path / ("x" * 300)):
        for use in (check_writable, lambda path: write_bundle(path, b"a bundle")):
            with pytest.raises(ConfigError, match="cannot write the bundle"):
                use(wrong)
    assert names(tmp_path) == []
