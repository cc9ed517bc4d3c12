"""A testnet's supervisor whose nodes only pretend: ready at once, gone at SIGTERM.

Run as ``python -m plait.testing.standin DIR [--parent PID]`` in place of the real one. A
file ``crash`` or ``deaf`` in a node's data folder makes it fail at its start or ignore
SIGTERM; ``PLAIT_STANDIN_CRASH`` names a node that fails at the very first start.
"""

import os
import signal
import sys
from typing import NoReturn

from plait.node.config import NodeConfig
from plait.testnet import supervisor

STOP_GRACE_S = 0.3
CRASH_MESSAGE = "no luck today"


def run_node(config: NodeConfig) -> NoReturn:
    """Stand in for a node's daemon."""
    crashes = os.environ.get("PLAIT_STANDIN_CRASH") == config.name
    if crashes or (config.data_dir / "crash").exists():
        raise RuntimeError(CRASH_MESSAGE)
    if (config.data_dir / "deaf").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(config.name, "serves", config.span, flush=True)
    (config.data_dir / "state").write_text("ready")
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(supervisor.main(lambda: run_node, stop_grace_s=STOP_GRACE_S))
