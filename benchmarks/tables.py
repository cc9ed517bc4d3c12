"""Write the tables of docs/performance.md from the JSON in benchmarks/results/.

    python benchmarks/tables.py [--check]

Everything between the two marks in that file is replaced; ``--check`` only says whether it
is up to date (exit code 1 if not).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tables: begin (benchmarks/tables.py) -->", "<!-- tables: end -->"


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of dicts with the same keys."""
    names = list(rows[0])
    lines = [f"### {title}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [
        f"| {' | '.join('–' if row[n] is None else str(row[n]) for n in names)} |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def decode_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens/s by dtype and threads, one column per number of sessions."""
    batches = sorted({figure["batch"] for figure in report["decode"]})
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for figure in report["decode"]:
        start = {"dtype": figure["dtype"], "threads": figure["threads"]}
        row = rows.setdefault((figure["dtype"], figure["threads"]), start)
        row[f"{figure['batch']} sessions, tokens/s"] = figure["tokens_per_s"]
    names = ["dtype", "threads", *(f"{batch} sessions, tokens/s" for batch in batches)]
    prefill = {(f["dtype"], f["threads"]): f["tokens_per_s_median"] for f in report["prefill"]}
    return [
        {name: row.get(name) for name in names} | {"prefill, tokens/s": prefill.get(key)}
        for key, row in rows.items()
    ]


def figure_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures as they are."""
    rows: list[dict[str, Any]] = report["figures"]
    return rows


def tables() -> str:
    """All tables of which there are results."""
    parts = []
    for name, title, rows_of in (
        ("compute_llama_cpp", "One stage with all layers, and llama.cpp", decode_rows),
        (
            "compute_int4_avx2",
            "The same without AVX-512, int4 by ggml and by onnxruntime",
            decode_rows,
        ),
        ("compute", "All number formats, another run, both cores busy", decode_rows),
        ("quality", "Divergence from fp32, in nats, int4 by torch, before ADR 16", figure_rows),
        ("quality_int4_avx2", "Divergence from fp32, int4 by onnxruntime and by ggml", figure_rows),
        ("draft", "n-gram drafts, one stage", lambda report: report["tasks"]),
        ("batch", "Sessions at once through a pipeline", lambda report: report["batches"]),
    ):
        path = RESULTS / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            dtype = f", {report['dtype']}" if "dtype" in report else ""
            parts.append(table(f"{title} ({report['model']}{dtype})", rows_of(report)))
    return "\n".join(parts)


def main() -> None:
    """Replace what is between the marks, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"
    if arguments.check:
        if fresh != page:
            sys.exit("docs/performance.md is stale: python benchmarks/tables.py")
        return
    PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
