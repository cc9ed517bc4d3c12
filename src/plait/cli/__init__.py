"""The ``plait`` command.

The table below names every command; a command's module is imported only when it is
invoked, so that ``plait --help`` needs neither typer nor anything heavier.
"""

import os
import sys
from typing import NamedTuple

from plait import __version__


class Command(NamedTuple):
    """Where a command lives: ``attribute`` of ``module`` is a typer app or a function."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "run": Command("plait.cli.run", "run", "Generate an answer to one prompt."),
    "chat": Command("plait.cli.run", "chat", "Talk with a model."),
    "serve": Command("plait.cli.serve", "serve", "An OpenAI-compatible API on this machine."),
    "keys": Command("plait.cli.keys", "app", "API keys of the gateway, and their budgets."),
    "usage": Command("plait.cli.usage", "usage", "What the gateway's keys have spent."),
    "testnet": Command("plait.cli.testnet", "app", "A real network on this machine."),
    "node": Command("plait.cli.node", "app", "Serve a span of a model's layers."),
    "net": Command("plait.cli.net", "app", "Create and show networks."),
    "models": Command("plait.cli.models", "app", "Catalogue and weights."),
    "peers": Command("plait.cli.peers", "peers", "The offers the router sees."),
    "route": Command("plait.cli.peers", "route", "The route that would be taken, and why."),
    "quote": Command("plait.cli.peers", "quote", "What a request would cost."),
    "ledger": Command("plait.cli.ledger", "app", "Accounts, history and the log."),
    "bench": Command("plait.cli.bench", "app", "What this machine computes, measured."),
    "sim": Command("plait.cli.sim", "app", "The network under faults, from seeds."),
    "verify": Command("plait.cli.verify", "verify", "Check a bundle offline."),
    "audit": Command("plait.cli.audit", "app", "Have chunks replayed by other hosts; evidence."),
}

_EXIT_CODES = "0 done, 1 false or failed, 2 incomplete (verify), 3 wrong usage or configuration"


def overview() -> str:
    """The text of ``plait --help``."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "Usage: plait COMMAND [OPTIONS] [ARGUMENTS]",
            "",
            "A peer-to-peer network that routes LLM tokens through pipelines of layer spans,",
            "with a signed ledger anybody can check offline.",
            "",
            "Commands:",
            *(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
            "",
            "Options:",
            "  --version             Show the version.",
            "  --install-completion  Install completion for the current shell.",
            "  --help                Show this message; COMMAND --help says more.",
            "",
            f"Exit codes: {_EXIT_CODES};",
            "all of them: docs/exit-codes.md.",
            "",
            "Example:",
            "  plait testnet up --model smollm2-135m --detach",
            '  plait run smollm2-135m "Why is the sky blue?" --bundle answer.json',
            "  plait verify answer.json",
        ]
    )


def main() -> int:
    """Run the command line in ``sys.argv``; returns the exit code."""
    # gRPC's C core writes to stderr on its own; every failure it has reaches us as an error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    arguments = sys.argv[1:]
    if arguments in ([], ["--help"], ["-h"], ["help"]):
        print(overview())
        return 0
    if arguments in (["--version"], ["-V"], ["version"]):
        print(f"plait {__version__}")
        return 0
    try:
        from plait.cli.root import invoke

        return invoke(arguments)
    except KeyboardInterrupt:  # while importing
        return 130
