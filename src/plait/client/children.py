"""Processes that a client starts and owns: they end with it, however it ends."""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

_END_S = 10.0
_WORDS_MAX = 300
_LOG_READ_MAX = 64 * 1024


class Child:
    """``plait`` with these arguments, which must tell it to end with its standard input.

    It has a temporary folder of its own: ``folder``, for its data and its log.
    """

    def __init__(self, folder: "tempfile.TemporaryDirectory[str]", arguments: Sequence[str]):
        self._folder = folder
        self._log = Path(folder.name) / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "plait", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    @classmethod
    def start(cls, arguments: Sequence[str]) -> Self:
        """Start one that needs no folder of its own."""
        return cls(tempfile.TemporaryDirectory(prefix="plait-"), arguments)

    @property
    def ended(self) -> bool:
        """Whether the process is over."""
        return self._process.poll() is not None

    def log(self) -> str:
        """What it has written, from the beginning."""
        with self._log.open("rb") as log:
            return log.read(_LOG_READ_MAX).decode("utf-8", "replace")

    def last_words(self) -> str:
        """Its error line, or the last one."""
        lines = [line.strip() for line in self.log().splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1][:_WORDS_MAX]

    async def close(self) -> None:
        """End it, and forget its folder."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        await asyncio.to_thread(self._wait)
        self._folder.cleanup()

    def _wait(self) -> None:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
