"""The examples run: those over HTTP against the obedient engine."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "plait.testing.obedient"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


def test_extract_fills_in_the_form(url: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "extract.py"), "Ada was 36."],
        env=os.environ | {"PLAIT_URL": url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"name": "a word", "age": 36}


def test_chat_streams(url: str) -> None:
    pytest.importorskip("openai")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "chat.py"), "Why?"],
        env=os.environ | {"PLAIT_URL": url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "The sky is blue" in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_to_run_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring is not None
    assert f"python examples/{path.name}" in docstring


@pytest.mark.parametrize("name", ["chat.py", "extract.py", "library.py"])
def test_what_is_wrong_is_said_in_words(name: str, tmp_path: Path) -> None:
    """Nobody answers at the address; the network file is not there, and neither are arguments."""
    if name == "chat.py":
        pytest.importorskip("openai")
    for arguments in ([], ["tiny-random", "Why?"]):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *arguments],
            env=os.environ
            | {"PLAIT_URL": "http://127.0.0.1:9/v1", "PLAIT_NETWORK": str(tmp_path / "none.toml")},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 1
        assert done.stderr.strip() and "Traceback" not in done.stderr
