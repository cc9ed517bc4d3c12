"""What a long-running process has loaded when it begins to serve is out of the collector's sight.

Libraries and weights leave some hundred thousand objects that live as long as the process. A full
collection walks them all, with the event loop and the compute thread stopped: 0.15 s in a client,
half a second in a node. Frozen, they are never walked again.
"""

import gc


def freeze_heap() -> None:
    """Collect what is garbage and freeze the rest. Blocks for about as long as one collection."""
    gc.collect()
    gc.freeze()
