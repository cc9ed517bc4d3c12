"""What counts as a leak of a node."""

import os
import tempfile
from pathlib import Path

from plait.testnet.leaks import TAPE_FOLDER, grown, holdings


def test_what_is_kept_for_audits_is_no_leak_and_what_is_spilt_is(tmp_path: Path) -> None:
    status = {"supervisor_pid": os.getpid(), "nodes": [{"name": "node-1", "pid": os.getpid()}]}
    for folder in (TAPE_FOLDER, "spill"):
        (tmp_path / folder).mkdir()
        before = holdings(status)
        files = [tempfile.TemporaryFile(dir=tmp_path / folder) for _ in range(30)]  # noqa: SIM115
        leaked = grown(before, holdings(status))["descriptors"]
        for file in files:
            file.close()
        assert leaked == ({} if folder == TAPE_FOLDER else {"node-1": 30})
