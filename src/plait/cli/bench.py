"""``plait bench``: what this machine computes, measured."""

from typing import TYPE_CHECKING, Annotated

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
def compute(
    model: Annotated[str, typer.Option(help="As `plait models ls` shows.")] = "smollm2-135m",
    dtypes: Annotated[str, typer.Option(help="Numeric types.")] = "fp32,bf16,int4,int8",
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    batches: Annotated[str, typer.Option(help="Numbers of sessions at once.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time decoding and prefill of a whole model, in interleaved rounds.

    Example: plait bench compute --dtypes fp32,int4 --threads 1
    """
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
    figures = measure_compute(local, plan, lambda done, total: status(f"round {done} of {total}"))
    if as_json:
        emit_json(figures)
        return
    _show(figures)


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
