"""The one page: models, nodes and spend, rendered on the server, without scripts."""

from collections.abc import Sequence
from html import escape
from typing import Any

from starlette.responses import HTMLResponse, Response

from plait.router.view import View

_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8886; }
tbody th { font-weight: normal; min-width: 8rem; overflow-wrap: anywhere; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
"""
_FOLLOW = '<a href="/?follow=1">Load again every 10 seconds</a>'
_STOP = 'Loads again every 10 seconds. <a href="/">Stop</a>'
_SHORT = "A route names a peer by the end of its id, and the layers that it computes."
_PRICE = "A price is microcredits per million output tokens and layer."


def render(
    network_id: str,
    models: list[dict[str, Any]],
    view: View,
    spend: dict[str, dict[str, int]],
    *,
    follow: bool = False,
) -> Response:
    """The page as a response that allows no content but its own.

    It loads itself again every 10 seconds only if that is asked for (``follow``): to whoever
    has it read aloud, or magnified, a page that jumps is of no use.
    """
    served = {model["digest"]: model["id"] for model in models}
    nodes = [
        (
            offer.peer,
            served.get(offer.model_digest.hex(), offer.model_digest.hex()[:12]),
            str(offer.span),
            offer.state,
            offer.region or "unknown",
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
            _SHORT,
        ),
        _table(
            "Nodes",
            ("peer", "model", "layers", "state", "region", "sessions", "free KV tokens", "price"),
            nodes,
            _PRICE,
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
        + ('<meta http-equiv="refresh" content="10">' if follow else "")
        + '<link rel="stylesheet" href="/page.css"></head><body><main><h1>Plait</h1>'
        f"<p>Network {escape(network_id)}. Every stage of a pipeline can reconstruct the prompts "
        f"it computes on.</p><p>{_STOP if follow else _FOLLOW}</p>"
        + "".join(body)
        + "</main></body></html>"
    )
    headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
    return HTMLResponse(html, headers=headers)


def _table(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]], note: str = ""
) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = [
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    ]
    if not rows:
        lines = [f'<tr><td colspan="{len(columns)}">none</td></tr>']
    return (
        f"<h2>{escape(title)}</h2>{f'<p>{escape(note)}</p>' if note else ''}"
        f'<div tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
