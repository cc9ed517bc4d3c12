"""How many files a node may have open, and how many sessions it can keep for audits with them.

Each kept session holds one nameless file open per kind of frame until its audit window ends.
"""

import resource
import sys
from contextlib import suppress

from plait.node.retained import KINDS
from plait.node.tape import SESSIONS_MAX

OTHER_FILES = 512
"""Set aside for links, logs, spill files and the ledger's client."""


def raise_file_limit() -> int:
    """Let this process have as many files open as the system allows; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems say "unlimited" and mean less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if files == resource.RLIM_INFINITY else files


def tapes_within(files: int) -> int:
    """How many sessions to keep for audits where ``files`` may be open; at least one."""
    return max(1, min(SESSIONS_MAX, (files - OTHER_FILES) // len(KINDS)))
