"""``plait peers``, ``plait route`` and ``plait quote``: what the router sees and chooses."""

from typing import Annotated

import typer

from plait.cli.run import Ignore, MaxPrice, Network, Only, Pin, Sort, _client, _options, _peers
from plait.errors import NoRoute, reworded

Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]

_REASONS = ("alternates", "rejected", "eligible")
"""What --explain adds to a route."""


def peers(network: Network = None, json_output: Json = False) -> None:
    """List the valid offers that this client sees, with its measured round trip to each."""
    from plait.cli.output import emit_json, table

    with _client(network) as client:
        client.wait_settled()
        view, me = client.view(), client.peer
    rows = [
        {
            "peer": offer.peer,
            "model_digest": offer.model_digest.hex(),
            "span": offer.span,
            "rtt_ms": _milliseconds(view.link_rtt_us(me, offer.peer)),
            "state": offer.state,
            "numeric_class": offer.numeric_class,
            "region": offer.region,
            "price_output": offer.prices.output,
            "sessions_active": offer.sessions_active,
            "kv_tokens_free": offer.kv_tokens_free,
            "decode_us": offer.decode_us,
            "public_address": offer.public_address,
        }
        for offer in sorted(view.offers.values(), key=lambda offer: (offer.span, offer.peer))
    ]
    if json_output:
        emit_json({"peers": rows})
        return
    columns = [
        "peer",
        "span",
        "state",
        "rtt_ms",
        "region",
        "price_output",
        "sessions_active",
        "kv_tokens_free",
    ]
    table(columns, [[row[column] for column in columns] for row in rows])


def route(
    model: Annotated[str, typer.Argument(help="A model of the catalogue.")],
    explain: Annotated[bool, typer.Option("--explain", help="Why each peer won or lost.")] = False,
    prompt_tokens: Annotated[int, typer.Option("--in", min=1, help="Prompt tokens.")] = 64,
    output_tokens: Annotated[int, typer.Option("--out", min=1, help="Output tokens.")] = 256,
    max_price: MaxPrice = None,
    sort: Sort = "latency",
    pin: Pin = None,
    only: Only = None,
    ignore: Ignore = None,
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Show the route that a request would take now."""
    from plait.cli.output import emit_json, flag
    from plait.router.explain import explain_lines

    options = _options(
        max_tokens=output_tokens, max_price=max_price, sort=sort, **_peers(pin, only, ignore)
    )
    with _client(network) as client:
        client.wait_settled()
        account = client.explain(model, prompt_tokens, options)
    if "error" in account:
        account["error"]["remedy"] = reworded(account["error"]["remedy"], flag)
    if not explain:
        account = {key: value for key, value in account.items() if key not in _REASONS}
    if json_output:
        emit_json(account)
    else:
        for line in explain_lines(account | {key: [] for key in _REASONS if key not in account}):
            print(line)
    if "error" in account:
        raise typer.Exit(NoRoute.exit_code)


def quote(
    model: Annotated[str, typer.Argument(help="A model of the catalogue.")],
    prompt_tokens: Annotated[int, typer.Option("--in", min=1, help="Prompt tokens.")],
    output_tokens: Annotated[int, typer.Option("--out", min=1, help="Output tokens.")],
    sort: Sort = "price",
    network: Network = None,
    json_output: Json = False,
) -> None:
    """Tell what a request would cost and how fast it would be."""
    from plait.cli.output import emit_json

    options = _options(max_tokens=output_tokens, sort=sort)
    with _client(network) as client:
        client.wait_settled()
        predicted = client.plan(model, prompt_tokens, options).predicted
    if json_output:
        emit_json(
            {
                "price_microcredits": predicted.price_microcredits,
                "ttft_s": predicted.ttft_s,
                "tpot_s": predicted.tpot_s,
            }
        )
        return
    print(
        f"{predicted.price_microcredits} microcredits at most, first token after "
        f"{predicted.ttft_s:.2f} s, then {predicted.tpot_s * 1000:.1f} ms per token"
    )


def _milliseconds(rtt_us: int | None) -> float | None:
    return None if rtt_us is None else round(rtt_us / 1000, 2)
