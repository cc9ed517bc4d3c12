"""``plait bench``: what this machine computes, measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.output import emit_json, status, table
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.compute.benchmark import ComputeFigures

app = typer.Typer(help="What this machine computes, measured.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """What this machine computes, measured."""


@app.command()
def gateway(
    streams: Annotated[int, typer.Option(help="Streams at once.", min=1)] = 50,
    tokens: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 50,
    interval_ms: Annotated[float, typer.Option(help="Time between tokens.", min=0)] = 20.0,
    rounds: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 5,
    port: Annotated[int, typer.Option(help="Of the bare engine; 0: chosen free.", min=0)] = 0,
    proxy: Annotated[
        list[str] | None,
        typer.Option(help="NAME=URL=MODEL of a proxy in front of that port, to compare with."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time what the gateway adds to a request, over calling a fixed-rate engine directly.

    A proxy is measured in front of the same engine behind the least HTTP server there is.

    Example: plait bench gateway --streams 50 --json
    """
    from plait.gateway.benchmark import LoadPlan, measure_gateway

    proxies = []
    for text in proxy or ():
        name, _, rest = text.partition("=")
        url, _, model = rest.rpartition("=")
        if not (name and url and model):
            raise ConfigError(f"{text!r} is not a proxy", remedy="--proxy NAME=URL=MODEL")
        proxies.append((name, url, model))
    plan = LoadPlan(
        streams=streams,
        tokens=tokens,
        interval_ms=interval_ms,
        rounds=rounds,
        proxies=tuple(proxies),
        port=port,
    )
    figures = measure_gateway(plan, status)
    if as_json:
        emit_json(figures)
        return
    rows = [
        [name, *(row[f"{part}_p50_ms"] for part in ("first", "every", "end"))]
        for name, row in figures["added"].items()
    ]
    title = f"Added lag by median, in ms, at {streams} streams (proxies: over bare):"
    table(["through", "first token", "every token", "end"], rows, title=title)


@app.command()
def compute(
    model: Annotated[str, typer.Option(help="As `plait models ls` shows.")] = "smollm2-135m",
    dtypes: Annotated[str, typer.Option(help="Numeric types.")] = "fp32,bf16,int4,int8",
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    batches: Annotated[str, typer.Option(help="Numbers of sessions at once.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 5,
    quality: Annotated[
        int, typer.Option(help="Also compare with fp32 over this many tokens of text.", min=0)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time decoding and prefill of a whole model, in interleaved rounds.

    Example: plait bench compute --dtypes fp32,int4 --threads 1 --quality 2048
    """
    from dataclasses import asdict

    from plait.compute.benchmark import BenchPlan, measure_compute
    from plait.compute.load import check_loadable
    from plait.model import catalog

    plan = BenchPlan(
        dtypes=tuple(dtypes.split(",")),
        threads=_numbers("--threads", threads),
        batches=_numbers("--batches", batches),
        rounds=rounds,
    )
    local = catalog.load(model)
    for dtype in plan.dtypes:
        check_loadable(local, None, dtype)
    figures = measure_compute(local, plan, _round)
    compared: list[dict[str, object]] = []
    if quality:
        from plait.compute.quality import measure_quality

        others = [dtype for dtype in plan.dtypes if dtype != "fp32"]
        found = measure_quality(local, others, quality, progress=_window)
        compared = [asdict(figure) for figure in found]
    if as_json:
        emit_json(asdict(figures) | {"quality": compared})
        return
    _show(figures)
    if compared:
        table(list(compared[0]), [list(row.values()) for row in compared], title="Against fp32")


@app.command()
def pipeline(
    model: Annotated[str, typer.Option(help="As `plait models ls` shows.")] = "smollm2-135m",
    stages: Annotated[int, typer.Option(help="Of the longer pipeline.", min=2)] = 3,
    dtype: Annotated[str, typer.Option(help="Numeric type.")] = "int4",
    rounds: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Of each answer.", min=2)] = 48,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time a token through one stage and through several, on two testnets, in turns.

    Example: plait bench pipeline --dtype int4 --rounds 3
    """
    from dataclasses import asdict

    from plait.cli.bench_network import measure_pipeline

    _check_dtype(model, dtype)
    _emit(asdict(measure_pipeline(model, stages, dtype, rounds, tokens, _round)), as_json)


@app.command()
def batch(
    model: Annotated[str, typer.Option(help="As `plait models ls` shows.")] = "smollm2-135m",
    stages: Annotated[int, typer.Option(help="Of the pipeline.", min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="Numeric type.")] = "int4",
    batches: Annotated[str, typer.Option(help="Numbers of sessions at once.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Of each answer.", min=2)] = 48,
    threads: Annotated[int, typer.Option(help="Of llama.cpp.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tokens per second of many sessions through one pipeline of a testnet.

    Example: plait bench batch --batches 1,16 --rounds 3
    """
    from dataclasses import asdict

    from plait.cli.bench_network import measure_batch

    sizes = _numbers("--batches", batches)
    _check_dtype(model, dtype)
    figures = measure_batch(model, stages, dtype, sizes, rounds, tokens, threads, _round)
    _emit(asdict(figures), as_json, "batches")


@app.command()
def draft(
    model: Annotated[str, typer.Option(help="As `plait models ls` shows.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="Numeric type.")] = "int4",
    stages: Annotated[int, typer.Option(help="Of the pipeline.", min=1)] = 3,
    delay_ms: Annotated[float, typer.Option(help="One way, per hop; 0 is loopback.", min=0)] = 0.0,
    rounds: Annotated[int, typer.Option(help="Pairs of answers per task.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Of each answer, at most.", min=8)] = 128,
    tasks: Annotated[str, typer.Option(help="Names, or all.")] = "all",
    draft: Annotated[
        str | None, typer.Option("--draft", help="A small local model that guesses, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time answers through a testnet with and without drafts, in turns.

    Example: plait bench draft --delay-ms 25 --rounds 20 --tasks chat
    """
    from dataclasses import asdict

    from plait.cli.bench_drafts import TASKS, DraftPlan, measure_drafts

    names = tuple(TASKS) if tasks == "all" else tuple(tasks.split(","))
    if not set(names) <= set(TASKS):
        raise ConfigError(f"--tasks {tasks}: there are {', '.join(TASKS)}")
    _check_dtype(model, dtype)
    plan = DraftPlan(model, dtype, stages, delay_ms, rounds, tokens, names, draft)
    figures = [asdict(figure) for figure in measure_drafts(plan, status)]
    if not as_json:
        for figure in figures:
            del figure["plain_ms"], figure["drafted_ms"]
    report = {"model": model, "dtype": dtype, "stages": stages, "delay_ms": delay_ms}
    report |= {"draft": draft}
    _emit(report | {"rounds": rounds, "tasks": figures}, as_json, "tasks")


def _check_dtype(model: str, dtype: str) -> None:
    """Before a testnet is started that would refuse it."""
    from plait.compute.load import check_loadable
    from plait.model import catalog

    check_loadable(catalog.load(model), None, dtype)


def _round(done: int, total: int) -> None:
    status(f"round {done} of {total}")


def _window(done: int, total: int) -> None:
    status(f"window {done} of {total}")


def _emit(report: dict[str, Any], as_json: bool, rows: str = "") -> None:
    """Print a report; ``rows`` names the member that is a list of figures, if there is one."""
    if as_json:
        emit_json(report)
        return
    if rows:
        figures = report.pop(rows)
        table(list(figures[0]), [list(figure.values()) for figure in figures])
    table(["figure", "value"], [[name, str(value)] for name, value in report.items()])


@app.command()
def ledger(
    settlements: Annotated[int, typer.Option(help="Sessions to settle.", min=64)] = 2_000,
    tokens: Annotated[int, typer.Option(help="Of the answer in the bundle.", min=32)] = 10_000,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="A folder on the disk to measure.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time vouchers, settlements, audits and a bundle, without any model.

    Example: plait bench ledger --dir ~/.local/share/plait
    """
    import tempfile
    from dataclasses import asdict

    from plait.ledger.service.benchmark import measure_ledger
    from plait.testing.bundle_benchmark import measure_bundle

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        figures = asdict(measure_ledger(Path(scratch), settlements, status))
    status("bundle")
    figures |= asdict(measure_bundle(tokens))
    if as_json:
        emit_json(figures)
    else:
        table(["figure", "value"], [[name, value] for name, value in figures.items()])


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or max(numbers) > 256:
        raise ConfigError(f"{option} {text}: numbers from 1 to 256 with commas between them")
    return numbers


def _show(figures: "ComputeFigures") -> None:
    table(
        ["dtype", "threads", "sessions", "ms per step", "min", "tokens/s"],
        [
            [
                figure.dtype,
                figure.threads,
                figure.batch,
                figure.step_ms_median,
                figure.step_ms_min,
                figure.tokens_per_s,
            ]
            for figure in figures.decode
        ],
        title="Decoding",
    )
    table(
        ["dtype", "threads", "rows", "tokens/s", "max"],
        [
            [
                figure.dtype,
                figure.threads,
                figure.rows,
                figure.tokens_per_s_median,
                figure.tokens_per_s_max,
            ]
            for figure in figures.prefill
        ],
        title="Prefill",
    )
