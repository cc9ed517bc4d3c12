"""The last checkpoint that a log signed, in a file of its own.

When the ledger's journal alone is restored from an old backup, the head it has already
signed is still known, and the authority refuses to sign a second history over it.
"""

from pathlib import Path

from plait.durable import replace_durably
from plait.errors import LedgerError


class HeadFile:
    """One file with one signed note."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[int, str] | None:
        """Size and note, or ``None`` before the first; raises ``LedgerError`` if damaged."""
        try:
            note = self._path.read_text()
            return int(note.split("\n")[1]), note
        except FileNotFoundError:
            return None
        except (OSError, ValueError, IndexError) as error:
            raise LedgerError(f"the ledger's head {self._path} is damaged") from error

    def keep(self, note: str) -> None:
        """Replace the note durably; raises ``OSError``."""
        replace_durably(self._path, note)
