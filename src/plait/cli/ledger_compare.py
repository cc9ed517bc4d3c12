"""``plait ledger compare | fork``: whether a log only grew, and what proves that it did not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.ledger_connection import (
    Json,
    Network,
    NoWitnesses,
    ask,
    authority_of,
    network_file,
    newest_checkpoint,
    uncosigned,
    witnesses_of,
)
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.ledger.checkpoint import Checkpoint
    from plait.ledger.fork import ForkProof
    from plait.ledger.merkle import Tree
    from plait.ledger.service.remote import RemoteLedger
    from plait.network_file import Authority
    from plait.types import Digest


def compare(
    earlier: Annotated[Path, typer.Argument(help="A checkpoint saved before, or got elsewhere.")],
    proof: Annotated[Path, typer.Option(help="Where to write the proof of a fork.")] = Path(
        "fork-proof.json"
    ),
    no_witnesses: NoWitnesses = False,
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Check that a log only grew since a checkpoint, which says whose log it is.

    Exit code 1 if it did not: then the proof of the fork is written, unless the log shrank or
    withholds its tree, which proves nothing to others. Exit code 1 also if the log's checkpoint
    of now lacks the quorum of witnesses that the network asks for.
    """
    from plait.cli.output import emit_json
    from plait.errors import BadProof
    from plait.ledger.checkpoint import open_checkpoint

    file = network_file(network)
    saved = _read_bytes(earlier).decode(errors="replace")
    named = authority_of(network, saved)
    origin, log_key = named.log_origin, named.log_key
    known = open_checkpoint(saved, origin, log_key)

    async def fetch(ledger: "RemoteLedger") -> "tuple[str, list[Digest]]":
        note = await newest_checkpoint(ledger, file)
        size = open_checkpoint(note, origin, log_key).size
        grown = 0 < known.size < size
        return note, await ledger.consistency(known.size, size) if grown else []

    _, (note, hashes) = ask(network, named.peer, fetch)
    current = open_checkpoint(note, origin, log_key)
    _check_growth(
        (saved, note), (known, current), hashes, proof, lambda size: _tree(network, named, size)
    )
    lacking = uncosigned(note, file)
    if lacking and not no_witnesses:
        raise BadProof(lacking, remedy="--no-witnesses to compare all the same")
    if json_output:
        emit_json(
            {
                "authority": named.peer,
                "origin": origin,
                "earlier_size": known.size,
                "tree_size": current.size,
                "witnesses": witnesses_of(note, file),
                "witness_quorum": file.witness_quorum,
                "witnessed": not lacking,
            }
        )
    else:
        told = f" ({lacking})" if lacking else ""
        print(f"{origin} only grew: from {known.size} to {current.size} entries{told}")


def fork(
    proof: Annotated[Path, typer.Argument(help="A fork proof, as a file.")],
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Check offline that somebody signed twice. Exit code 1 if the file proves nothing."""
    from plait.cli.output import emit_json
    from plait.errors import BadProof
    from plait.ledger.fork import check_fork_proof, read_fork_proof

    try:
        opened = read_fork_proof(_read_bytes(proof))
    except ValueError as error:
        raise BadProof(f"{proof} is no fork proof: {error}") from error
    verdict = check_fork_proof(opened, network_file(network))
    if json_output:
        emit_json({"culprit": verdict.culprit, "statement": verdict.statement})
    else:
        print(f"proven: {verdict.culprit} {verdict.statement}")


def _check_growth(
    notes: tuple[str, str],
    checkpoints: "tuple[Checkpoint, Checkpoint]",
    hashes: "Sequence[Digest]",
    proof: Path,
    tree: "Callable[[int], Tree]",
) -> None:
    """Raise ``BadProof`` unless the log only grew, and write what proves that it forked."""
    from plait.errors import BadProof
    from plait.ledger.fork import LogFork, grown_apart
    from plait.ledger.merkle import verify_consistency

    known, current = checkpoints
    if current.size < known.size:
        raise BadProof(
            f"the log shrank from {known.size} to {current.size} entries: suspicious, but no "
            "proof to others, since an earlier checkpoint is no lie"
        )
    if known.size == current.size and known.root != current.root:
        _write_proof(proof, LogFork(known.origin, notes))
        raise BadProof(f"the log forked at size {known.size}: the proof is in {proof}")
    if known.size == 0:
        return
    try:
        verify_consistency(known.size, current.size, known.root, current.root, hashes)
    except BadProof as error:
        grown = grown_apart(notes, known, current, tree(current.size))
        if grown is None:
            raise
        _write_proof(proof, grown)
        raise BadProof(
            f"the log forked: its tree of {current.size} entries does not contain that of "
            f"{known.size}; the proof is in {proof}"
        ) from error


def _tree(network: Path | None, authority: "Authority", size: int) -> "Tree":
    """The log's tree of that size, from its entries; raises ``BadProof`` if it has fewer."""
    from plait.errors import BadProof
    from plait.ledger.merkle import Tree, leaf_hash

    tree = Tree()

    async def read(ledger: "RemoteLedger") -> None:
        async for page in ledger.export_pages():
            for leaf in page.entries[: size - tree.size]:
                tree.append(leaf_hash(leaf))

    ask(network, authority.peer, read)
    if tree.size < size:
        raise BadProof(f"the log shows {tree.size} entries of the {size} that its checkpoint signs")
    return tree


def _write_proof(path: Path, proof: "ForkProof") -> None:
    from plait.ledger.fork import write_fork_proof

    try:
        path.write_bytes(write_fork_proof(proof))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _read_bytes(path: Path) -> bytes:
    from plait.ledger.fork import FORK_BYTES_MAX

    try:
        with path.open("rb") as file:
            return file.read(FORK_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
