"""``plait audit``: have the chunks of a bundle replayed, and judge evidence again."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.errors import BadProof, ConfigError

if TYPE_CHECKING:
    from plait.client.auditing import Audited
    from plait.ledger.audit_wire import Challenge

app = typer.Typer(no_args_is_help=True, help="Have chunks replayed by other hosts; evidence.")

Network = Annotated[
    Path | None, typer.Option(help="Network file; by default that of the last testnet.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model = Annotated[
    str | None, typer.Option(help="The model, by its name here; by default found by its digest.")
]


@app.command()
def request(
    bundle: Annotated[Path, typer.Argument(help="A bundle of your own session.")],
    network: Network = None,
    evidence: Annotated[
        Path | None, typer.Option(help="Folder for what was opened, one file for each verdict.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this peer may be the auditor; repeatable.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Have what the lottery drew of a session replayed by other hosts of the same layers.

    An auditor sees what crossed the stage: of a session that you pinned, restrict the
    auditors too. Exit code 1 if a stage is exposed.
    """
    import asyncio

    from plait.client import AsyncClient
    from plait.types import PeerId

    async def audited() -> "list[Audited]":
        async with AsyncClient(network, audits=False) as client:
            peers = frozenset(PeerId(one) for one in only or ())
            return await client.audit(_read(bundle), peers)

    found = asyncio.run(audited())
    files = [_kept(evidence, one) for one in found]
    figures = [_figures(one, path) for one, path in zip(found, files, strict=True)]
    if json_output:
        typer.echo(json.dumps({"lots": figures}))
    else:
        for one in figures:
            if one["outcome"] != "undrawn":
                typer.echo(_line(one))
        undrawn = sum(one["outcome"] == "undrawn" for one in figures)
        typer.echo(f"{len(figures) - undrawn} of {len(figures)} chunks of stages were drawn.")
    raise typer.Exit(int(any(one.outcome == "exposed" for one in found)))


@app.command("ls")
def ls(network: Network = None, json_output: Json = False) -> None:
    """What audits of your own sessions found, how many chunks each peer has passed, and reports.

    A passed chunk counts once the audit window is over. What others report is shown and counts
    for nothing: have the evidence and run plait audit check. Exit code 1 if a stage of yours
    was exposed.
    """
    import time
    from dataclasses import asdict

    from plait.client.audit_spool import AuditSpool, trust_of
    from plait.locate import client_dir

    records = AuditSpool(client_dir(network) / "audits").records()
    passed = trust_of(records, time.time_ns() // 1_000_000)
    reports = _reports(network)
    if json_output:
        found = {
            "audits": [asdict(one) for one in records],
            "passed": dict(passed),
            "reported": reports,
        }
        typer.echo(json.dumps(found))
    else:
        for record in records:
            if record.outcome != "consistent":
                typer.echo(_line(asdict(record)))
        for peer, count in sorted(passed.items()):
            typer.echo(f"{peer}  passed {count}")
        for one in reports:
            typer.echo(f"{one['peer']}  exposed, says {one['reporter']} ({one['reason']})")
        if not (records or reports):
            typer.echo("no audits yet")
    raise typer.Exit(int(any(one.outcome == "exposed" for one in records)))


@app.command()
def check(
    evidence: Annotated[Path, typer.Argument(help="A file that plait audit request kept.")],
    network: Network = None,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
    model: Model = None,
    record: Annotated[
        bool, typer.Option("--record", help="If it is exposed, count it as your own audit.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Judge the evidence of an audit again, by computing the stage here.

    Needs the weights, and trusts neither the auditor nor the stage. Exit code 0: consistent,
    1: exposed, 2: what was opened proves nothing.
    """
    figures, challenge = _judged(evidence, network, threads, model)
    if record and figures["outcome"] == "exposed" and figures["same_class"]:
        _record(network, challenge, figures, evidence)
    typer.echo(json.dumps(figures) if json_output else _line(figures))
    raise typer.Exit({"consistent": 0, "exposed": 1}.get(figures["outcome"], 2))


@app.command()
def judge(
    evidence: Annotated[Path, typer.Argument(help="Evidence of an exposure.")],
    key: Annotated[Path, typer.Option(help="Key of a judge that the network file names.")],
    out: Annotated[Path, typer.Option(help="Where to write the signed judgement.")],
    network: Network = None,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
    model: Model = None,
    json_output: Json = False,
) -> None:
    """As a judge: compute the stage here, and sign the exposure if it is one.

    ``plait audit file`` brings the judgements to the ledger, which forfeits the stage's
    escrow. Exit code 1 if nothing is exposed; nothing is signed then.
    """
    import hashlib
    import time

    from plait.identity import load_key
    from plait.ledger.exposure import sign_judgement
    from plait.locate import network_path
    from plait.network_file import load_network_file
    from plait.v1.ledger_pb2 import ExposureJudgement

    file, signer = load_network_file(network_path(network)), load_key(key)
    if signer.public not in {one.key for one in file.judges}:
        raise ConfigError(f"{key} is the key of none of the network's judges")
    figures, challenge = _judged(evidence, network, threads, model)
    typer.echo(json.dumps(figures) if json_output else _line(figures))
    if figures["outcome"] != "exposed" or not figures["same_class"]:
        raise typer.Exit(1)
    judgement = ExposureJudgement(
        network_id=file.network_id,
        session_id=challenge.terms.session_id,
        payee=challenge.stage.peer,
        receipt_digest=challenge.receipt_digest,
        evidence_digest=hashlib.sha256(_read(evidence)).digest(),
        issued_ms=time.time_ns() // 1_000_000,
    )
    try:
        out.write_bytes(sign_judgement(signer, judgement).SerializeToString())
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error


@app.command("file")
def file_exposure(
    judgements: Annotated[list[Path], typer.Argument(help="Signed judgements of one exposure.")],
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Bring judgements of a quorum to the ledger: the escrow of the exposed stage is forfeited.

    That of the judged session goes back to its client at once, that of the stage's other
    sessions when it would have matured. Filing twice forfeits once. In a committee a quorum of
    authorities must take it; who did not is told on stderr.
    """
    from google.protobuf.message import DecodeError

    from plait.cli.ledger_orders import ask_everybody, plain_poll, tell_missing
    from plait.ledger.exposure import check_judged, combine_judgements, judging_of
    from plait.locate import network_path
    from plait.network_file import load_network_file
    from plait.v1.identity_pb2 import SignedEnvelope

    trusted = load_network_file(network_path(network))

    def read_judgement(path: Path) -> SignedEnvelope:
        try:
            return SignedEnvelope.FromString(_read(path))
        except DecodeError as error:
            raise ConfigError(f"{path} is no judgement") from error

    signed = [read_judgement(path) for path in judgements]
    exposure = combine_judgements(signed)
    judged = check_judged(exposure, trusted.network_id, judging_of(trusted))

    poll = ask_everybody(network, lambda ledger: ledger.file_exposure(exposure))
    if (error := poll.shortfall("file")) is not None:
        error.remedy = error.remedy or "file it again: those that have it forfeit nothing twice"
        raise error
    amount = poll.confirmed()
    if json_output:
        forfeited = {"payee": judged.payee, "forfeited_microcredits": amount}
        typer.echo(json.dumps({**forfeited, **plain_poll(poll)}))
    else:
        amount_told = f"{amount} microcredits of this session forfeited"
        told = amount_told if amount else "the escrow of this session was forfeited before"
        many = f", at {len(poll.answers)} of {poll.asked} authorities" if poll.asked > 1 else ""
        typer.echo(f"{judged.payee}: {told}{many}")
    tell_missing(poll, "file it again")


def _judged(
    evidence: Path, network: Path | None, threads: int, model: str | None
) -> "tuple[dict[str, Any], Challenge]":
    """What computing the stage here finds, and what was challenged."""
    from google.protobuf.message import DecodeError

    from plait.compute.load import load_stage
    from plait.ledger.audit_rules import tolerance_of
    from plait.ledger.audit_wire import read_challenge
    from plait.locate import network_path
    from plait.model import catalog
    from plait.network_file import load_network_file
    from plait.node.auditing import replay_sampling, steps_of, verdict_on
    from plait.node.replaying import replay
    from plait.types import SessionId
    from plait.v1.stage_pb2 import AuditEvidence

    try:
        message = AuditEvidence.FromString(_read(evidence))
    except DecodeError as error:
        raise ConfigError(f"{evidence} is no evidence of an audit") from error
    challenge = read_challenge(message.challenge, load_network_file(network_path(network)))
    local = catalog.load(model or catalog.with_digest(challenge.terms.model_digest))
    if local.manifest.digest != challenge.terms.model_digest:
        raise ConfigError(f"{model} is not the model of this session", remedy="--model NAME")
    try:
        tolerance_of(challenge.numeric_class)
        steps = steps_of(challenge, message.openings)
    except BadProof as error:
        peer = challenge.stage.peer
        return {"outcome": "unresponsive", "peer": peer, "reason": str(error)}, challenge
    dtype = challenge.numeric_class.split("/")[1]
    stage = load_stage(local, challenge.stage.span, dtype, threads)
    session = SessionId(b"plait/rejudging!")
    findings = replay(
        stage,
        session,
        steps,
        challenge.stage.span,
        replay_sampling(challenge),
        wire_dtype=challenge.terms.wire_dtype,
    )
    verdict, worst, reason = verdict_on(challenge, findings)
    figures = {
        "outcome": verdict,
        "peer": challenge.stage.peer,
        "numeric_class": challenge.numeric_class,
        "same_class": stage.numeric_class() == challenge.numeric_class,
        "distance": worst.distance,
        "margin_logits": worst.margin,
        "reason": reason,
    }
    return figures, challenge


def _record(
    network: Path | None, challenge: "Challenge", figures: dict[str, Any], evidence: Path
) -> None:
    """Count what was computed here as an audit of one's own."""
    import time

    from plait.client.account import open_account
    from plait.client.audit_spool import AuditRecord, AuditSpool
    from plait.locate import client_dir

    folder, lot = client_dir(network), challenge.lot
    found = AuditRecord(
        at_ms=time.time_ns() // 1_000_000,
        session=challenge.terms.session_id.hex(),
        epoch=lot.epoch,
        chunk=lot.chunk,
        stage=lot.stage_index,
        peer=challenge.stage.peer,
        outcome="exposed",
        auditor=open_account(folder).peer,
        reason=figures["reason"],
        evidence=str(evidence),
    )
    AuditSpool(folder / "audits").record([found])


def _reports(network: Path | None) -> list[dict[str, Any]]:
    """The exposures that others reported, as the client's notices on disk have them."""
    from dataclasses import asdict

    from plait.ledger.notices import NoticeBoard
    from plait.ledger.service.notices import NoticeFile
    from plait.locate import client_dir, network_path
    from plait.network_file import load_network_file

    board = NoticeBoard(load_network_file(network_path(network)))
    NoticeFile(client_dir(network) / "notices").load(board)
    return [
        {name: v.hex() if isinstance(v, bytes) else v for name, v in asdict(one).items()}
        for one in board.exposures.all()
    ]


def _figures(one: "Audited", path: Path | None) -> dict[str, Any]:
    return {
        "epoch": one.lot.epoch,
        "chunk": one.lot.chunk,
        "stage": one.lot.stage_index,
        "peer": one.peer,
        "outcome": one.outcome,
        "auditor": one.auditor,
        "reason": one.reason,
        "evidence": None if path is None else str(path),
    }


def _line(figures: dict[str, Any]) -> str:
    place = f"stage {figures['stage']} chunk {figures['chunk']}: " if "stage" in figures else ""
    reason = f" ({figures['reason']})" if figures["reason"] else ""
    return f"{place}{figures['outcome']}  {figures['peer']}{reason}"


def _kept(folder: Path | None, one: "Audited") -> Path | None:
    if folder is None or one.evidence is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    lot = one.lot
    path = folder / f"epoch{lot.epoch}-stage{lot.stage_index}-chunk{lot.chunk}.audit"
    path.write_bytes(one.evidence.SerializeToString(deterministic=True))
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
