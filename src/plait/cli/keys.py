"""``plait keys``: who may ask a gateway, for how much."""

import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from plait.cli.output import emit_json, status, table
from plait.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="API keys of the gateway: budgets, rates, teams.")

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON value on stdout.")]
NetworkOption = Annotated[
    Path | None, typer.Option(help="Network file; by default the last testnet started.")
]


@app.command()
def create(
    label: Annotated[str, typer.Argument(help="What the key is for.")],
    team: Annotated[str, typer.Option(help="Whose usage it counts as.")] = "",
    budget: Annotated[int | None, typer.Option(min=0, help="Most microcredits per period.")] = None,
    period: Annotated[
        Literal["day", "week", "month", "total"], typer.Option(help="Of the budget, in UTC.")
    ] = "month",
    rate: Annotated[int | None, typer.Option(min=1, help="Most requests a minute.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may use.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="A peer its routes may use.")] = None,
    qos: Annotated[
        Literal["interactive", "standard", "batch"], typer.Option(help="How urgent it is.")
    ] = "standard",
    network: NetworkOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key and print it once; only its SHA-256 is kept.

    As long as one key is in use, plait serve lets nobody in without one.

    Example: plait keys create editor --team physics --budget 5000000 --period day
    """
    from plait.gateway.budgets import Key

    _check_terms(label, model or (), peer or ())
    key = Key(
        id="key-" + secrets.token_hex(4),
        label=label,
        team=team,
        budget=budget,
        period=period,
        rate=rate,
        models=frozenset(model or ()),
        peers=frozenset(peer or ()),
        qos=qos,
        created_ms=time.time_ns() // 1_000_000,
    )
    store = open_store(network)
    try:
        secret = store.create(key)
    finally:
        store.close()
    if as_json:
        emit_json(described(key, 0) | {"key": secret})
        return
    status("a gateway that was started before there was any key asks for one once it is restarted")
    status(f"{key.id} is created; the key is shown this once:")
    typer.echo(secret)


@app.command("team")
def set_team(
    name: Annotated[str, typer.Argument(help="The team, as keys create --team names it.")],
    budget: Annotated[int, typer.Option(min=0, help="Most microcredits of all its keys.")],
    period: Annotated[
        Literal["day", "week", "month", "total"], typer.Option(help="Of the budget, in UTC.")
    ] = "month",
    network: NetworkOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a team a budget, or another one: it bounds all its keys together.

    Example: plait keys team physics --budget 20000000 --period month
    """
    from plait.gateway.budgets import Team

    store = open_store(network)
    try:
        store.set_team(Team(name, budget, period))
    finally:
        store.close()
    if as_json:
        emit_json({"team": name, "budget": budget, "period": period})
    else:
        status(f"team {name} may spend {budget} microcredits per {period}")


@app.command("ls")
def list_keys(network: NetworkOption = None, as_json: JsonOption = False) -> None:
    """List keys with what they have spent in their period.

    Example: plait keys ls --json
    """
    store = open_store(network)
    try:
        now_ms = time.time_ns() // 1_000_000
        rows = [described(key, store.spent(key, now_ms)) for key in store.all_keys()]
    finally:
        store.close()
    if as_json:
        emit_json(rows)
        return
    table(
        ["key", "label", "team", "spent", "budget", "rate", "models", "peers", "qos", "state"],
        [
            (
                row["id"],
                row["label"],
                row["team"] + _per(" of ", row["team_budget"], row["team_period"]),
                row["spent"],
                _per("", row["budget"], row["period"]) or "none",
                "none" if row["rate"] is None else f"{row['rate']}/min",
                " ".join(row["models"]) or "all",
                " ".join(row["peers"]) or "all",
                row["qos"],
                "revoked" if row["revoked_ms"] else "in use",
            )
            for row in rows
        ],
    )


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as plait keys ls shows it.")],
    network: NetworkOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key useless, at once and for good; its usage stays.

    Example: plait keys revoke key-1a2b3c4d
    """
    store = open_store(network)
    try:
        found = store.revoke(key_id, time.time_ns() // 1_000_000)
    finally:
        store.close()
    if not found:
        raise ConfigError(f"no key {key_id} is in use", remedy="plait keys ls")
    if as_json:
        emit_json({"id": key_id, "revoked": True})
    else:
        status(f"{key_id} is revoked")


def _check_terms(label: str, models: Iterable[str], peers: Iterable[str]) -> None:
    """Raise ``ConfigError`` for a label or terms that no request could ever fit."""
    from plait.identity import public_key_of
    from plait.model import catalog

    if not label.strip():
        raise ConfigError("a key needs a label that tells what it is for")
    for model in models:
        if not catalog.exists(model):
            raise ConfigError(f"there is no model {model!r}", remedy="plait models ls")
    for peer in peers:
        try:
            public_key_of(peer)
        except ValueError as error:
            raise ConfigError(str(error), remedy="plait peers") from error


def _per(before: str, budget: int | None, period: str) -> str:
    return "" if budget is None else f"{before}{budget}/{period}"


def described(key: Any, spent: int) -> dict[str, Any]:
    """A key, JSON-ready."""
    return {
        "id": key.id,
        "label": key.label,
        "team": key.team,
        "budget": key.budget,
        "period": key.period,
        "spent": spent,
        "rate": key.rate,
        "models": sorted(key.models),
        "peers": sorted(key.peers),
        "qos": key.qos,
        "team_budget": None if key.pool is None else key.pool.budget,
        "team_period": None if key.pool is None else key.pool.period,
        "created_ms": key.created_ms,
        "revoked_ms": key.revoked_ms,
    }


def open_store(network: Path | None) -> Any:
    """The keys of the client that a network belongs to."""
    try:
        from plait.gateway.key_store import KEYS_FILE, KeyStore
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the gateway's keys need {error.name}, which is not installed",
            remedy="pip install 'plait[gateway]'",
        ) from error
    from plait.locate import client_dir

    return KeyStore(client_dir(network) / KEYS_FILE)
