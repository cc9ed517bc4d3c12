"""Structured logs over the standard library's: one event per line, ``key=value``.

Importing configures nothing: a library user's own logging decides. Commands and daemons
call ``to_stderr``.
"""

import logging
import sys

import structlog


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger that renders its event and values as one line."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger


def to_stderr(level: int) -> None:
    """Write records of ``level`` and above to standard error, with time and level."""
    handler = logging.StreamHandler(sys.stderr)
    line = logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s %(message)s")
    line.datefmt = "%Y-%m-%dT%H:%M:%S"
    handler.setFormatter(line)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # libp2p reports every peer's slip as an error; what matters of it is logged by us.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)
