"""The one page: models, nodes and spend, rendered on the server, without scripts."""

from collections.abc import Sequence
from html import escape
from typing import Any

from starlette.responses import HTMLResponse, Response

from plait.router.view import View

_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8886; }
td { font-variant-numeric: tabular-nums; }
"""


def render(
    network_id: str, models: list[dict[str, Any]], view: View, spend: dict[str, dict[str, int]]
) -> Response:
    """The page as a response that allows no content but its own."""
    served = {model["digest"]: model["id"] for model in models}
    nodes = [
        (
            offer.peer,
            served.get(offer.model_digest.hex(), offer.model_digest.hex()[:12]),
            str(offer.span),
            offer.state,
            offer.region,
            offer.sessions_active,
            offer.kv_tokens_free,
            offer.prices.output,
        )
        for offer in sorted(view.offers.values(), key=lambda offer: (offer.span, offer.peer))
    ]
    body = [
        _table(
            "Models served now",
            ("model", "route", "context", "hosts", "fewest hosts of a layer"),
            [
                (
                    model["id"],
                    model["route"],
                    model["context_length"],
                    model["coverage"]["hosts"],
                    model["coverage"]["hosts_per_layer_min"],
                )
                for model in models
            ],
        ),
        _table(
            "Nodes",
            ("peer", "model", "layers", "state", "region", "sessions", "free KV tokens", "price"),
            nodes,
        ),
        _table(
            "Spent since the gateway started",
            ("model", "prompt tokens", "completion tokens", "microcredits"),
            [(name, *row.values()) for name, row in sorted(spend.items())],
        ),
    ]
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Plait</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="refresh" content="10"><link rel="stylesheet" href="/page.css">'
        f"</head><body><main><h1>Plait</h1><p>Network {escape(network_id)}. Every stage of a "
        "pipeline can reconstruct the prompts it computes on.</p>"
        + "".join(body)
        + "</main></body></html>"
    )
    headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
    return HTMLResponse(html, headers=headers)


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = [
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    ]
    if not rows:
        lines = [f'<tr><td colspan="{len(columns)}">none</td></tr>']
    return (
        f'<h2>{escape(title)}</h2><div tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
