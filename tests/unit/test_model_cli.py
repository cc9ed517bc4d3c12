"""``plait models``: what it prints, and which errors it raises."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plait.cli.models import app
from plait.errors import ConfigError, ModelError, PlaitError
from plait.model import catalog


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path))
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def failure(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, arguments).exception


def test_ls_shows_what_can_be_had() -> None:
    assert "smollm2-135m" in run("ls")
    assert "tiny-random" not in run("ls")
    assert "random weights, for tests" in run("ls", "--all")
    (model,) = json.loads(run("ls", "--json"))["models"]
    assert (model["name"], model["layers"], model["installed"]) == ("smollm2-135m", 30, False)
    assert len(bytes.fromhex(model["digest"])) == 32


def test_pull_says_where_it_is(folder: Path) -> None:
    found = json.loads(run("pull", "tiny-random", "--json"))
    assert found["path"] == str(folder / "tiny-random" / "weights.gguf")
    assert found["digest"] == catalog.entry("tiny-random").manifest_digest
    assert run("pull", "tiny-random") == ""


def test_inspect_shows_the_tensors_of_a_span() -> None:
    found = json.loads(run("inspect", "tiny-random", "--span", "7:8", "--json"))
    names = {tensor["name"] for tensor in found["tensors"]}
    assert len(names) == 11  # nine of the layer, final norm, tied head
    assert {"blk.7.attn_q.weight", "output_norm.weight", "token_embd.weight"} <= names
    assert (found["span"], found["priced_layers"], found["layers"]) == ([7, 8], 2, 8)
    assert "blk.0.ffn_up.weight" in run("inspect", "tiny-random")


def test_a_file_of_ones_own_is_added_and_removed(folder: Path) -> None:
    run("pull", "tiny-random")
    weights = folder / "tiny-random" / "weights.gguf"
    own = folder / "My-Tiny.gguf"
    own.write_bytes(weights.read_bytes())
    found = json.loads(run("add", str(own), "--json"))
    assert (found["name"], found["architecture"], found["layers"]) == ("my-tiny", "llama", 8)
    assert "my-tiny" in run("ls")
    *_, listed = json.loads(run("ls", "--json"))["models"]
    assert (listed["name"], listed["own"], listed["installed"]) == ("my-tiny", True, True)
    assert json.loads(run("rm", "my-tiny", "--json"))["removed_bytes"] == own.stat().st_size
    assert "my-tiny" not in run("ls")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("inspect", "nothing"), ModelError),
        (("inspect", "smollm2-135m"), ModelError),
        (("inspect", "tiny-random", "--span", "x"), ConfigError),
        (("inspect", "tiny-random", "--span", "0:9"), ConfigError),
        (("pull", "tiny-random", "--from", "absent.whl"), ConfigError),
        (("add", "absent.gguf"), ConfigError),
        (("add", __file__, "--name", "tiny-random"), ModelError),
        (("add", __file__, "--name", "mine"), ModelError),
        (("rm", "nothing"), ModelError),
        (("rm", "smollm2-135m"), ModelError),
    ],
)
def test_errors_say_what_to_do(arguments: tuple[str, ...], kind: type[PlaitError]) -> None:
    assert isinstance(failure(*arguments), kind)
