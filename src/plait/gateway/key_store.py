"""API keys, holds and usage on disk: SQLite in WAL, every commit synced.

A hold is durable before its work begins and counts against the budget like spent money, so
a budget cannot be overspent however many requests come at once, from however many gateways
that share the file. One that nobody settles (the gateway died) is charged in full once it
expires: the stages may have been paid that much. Writes that come together share a commit.
"""

import asyncio
import hashlib
import json
import queue
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import apsw

from plait.errors import ConfigError
from plait.gateway.budgets import Key, Period, Team, day_of, period_start
from plait.logs import get_logger

log = get_logger(__name__)
T = TypeVar("T")

KEYS_FILE = "gateway.db"
KEY_PREFIX = "plait-"
_BATCH_MAX = 256
_BUSY_MS = 5_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
  id TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, terms TEXT NOT NULL,
  created_ms INTEGER NOT NULL, revoked_ms INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS holds (
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, model TEXT NOT NULL,
  amount INTEGER NOT NULL CHECK (amount >= 0), day TEXT NOT NULL, expires_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS teams (
  name TEXT PRIMARY KEY, budget INTEGER NOT NULL CHECK (budget >= 0), period TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS holds_by_key ON holds (key);
CREATE TABLE IF NOT EXISTS usage (
  key TEXT NOT NULL, day TEXT NOT NULL, model TEXT NOT NULL,
  requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL, cost INTEGER NOT NULL,
  PRIMARY KEY (key, day, model)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a request used."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0


@dataclass(frozen=True, slots=True)
class OverBudget:
    """A hold that was refused: what is asked, what is left, and of whose budget."""

    amount: int
    left: int
    budget: int
    period: Period
    whose: str = "the key"


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Usage of one key, on one day, of one model."""

    key: str
    label: str
    team: str
    day: str
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: int


class KeyStore:
    """The file. Raises ``ConfigError`` if it cannot be opened. ``close`` it."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._db = apsw.Connection(str(path))
            self._db.set_busy_timeout(_BUSY_MS)
            self._db.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;")
            self._db.execute(_SCHEMA)
        except (OSError, apsw.Error) as error:
            raise ConfigError(f"cannot open the keys in {path}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # Keys ---------------------------------------------------------------------------

    def create(self, key: Key) -> str:
        """Store a key's terms; return the secret, which is kept nowhere."""
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        row = (key.id, _digest(secret), _terms(key), key.created_ms)
        with self._db:
            self._db.execute(
                "INSERT INTO keys (id, digest, terms, created_ms) VALUES (?, ?, ?, ?)", row
            )
        return secret

    def revoke(self, key_id: str, now_ms: int) -> bool:
        """Make a key useless; False if there is no such key in use."""
        with self._db:
            changed = self._rows(
                "UPDATE keys SET revoked_ms = ? WHERE id = ? AND revoked_ms IS NULL RETURNING id",
                now_ms,
                key_id,
            )
        return bool(changed)

    def all_keys(self) -> list[Key]:
        """All keys, revoked ones too, the oldest first."""
        teams = {team.name: team for team in self.teams()}
        rows = self._rows(f"{_SELECT} ORDER BY created_ms, id")
        return [_with_pool(_key(row), teams) for row in rows]

    def find(self, secret: str) -> Key | None:
        """The key in use that a secret opens."""
        rows = self._rows(f"{_SELECT} WHERE digest = ? AND revoked_ms IS NULL", _digest(secret))
        if not rows:
            return None
        key = _key(rows[0])
        return _with_pool(key, {team.name: team for team in self.teams(key.team)})

    def set_team(self, team: Team) -> None:
        """Give a team its budget, or another one."""
        with self._db:
            self._db.execute(
                "INSERT INTO teams VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "
                "budget = excluded.budget, period = excluded.period",
                (team.name, team.budget, team.period),
            )

    def teams(self, name: str | None = None) -> list[Team]:
        """All teams with a budget, or the one named."""
        rows = self._rows("SELECT name, budget, period FROM teams ORDER BY name")
        return [Team(*row) for row in rows if name in (None, row[0])]

    # Holds --------------------------------------------------------------------------

    def hold(self, key: Key, model: str, amount: int, now_ms: int, ttl_ms: int) -> int | OverBudget:
        """Set money aside; the hold's number. Within a transaction."""
        self._charge_expired(now_ms)
        if key.budget is not None:
            left = key.budget - self.spent(key, now_ms)
            if amount > left:
                return OverBudget(amount, max(left, 0), key.budget, key.period)
        if key.pool is not None:
            left = key.pool.budget - self.spent_by_team(key.pool, now_ms)
            if amount > left:
                return OverBudget(
                    amount, max(left, 0), key.pool.budget, key.pool.period, "the key's team"
                )
        self._db.execute(
            "INSERT INTO holds (key, model, amount, day, expires_ms) VALUES (?, ?, ?, ?, ?)",
            (key.id, model, amount, day_of(now_ms), now_ms + ttl_ms),
        )
        return self._db.last_insert_rowid()

    def settle(self, hold: int, spent: Spent) -> None:
        """Replace a hold by what was used; nothing is no usage. Within a transaction."""
        rows = self._rows("DELETE FROM holds WHERE id = ? RETURNING key, day, model", hold)
        for key, day, model in rows:  # none if it expired: it was charged in full
            if spent != Spent():
                self._add(key, day, model, spent)

    def spent(self, key: Key, now_ms: int) -> int:
        """Microcredits used or held in the key's period."""
        start = period_start(key.period, now_ms)
        [(used,)] = self._rows(
            "SELECT coalesce(sum(cost), 0) FROM usage WHERE key = ? AND day >= ?", key.id, start
        )
        [(held,)] = self._rows("SELECT coalesce(sum(amount), 0) FROM holds WHERE key = ?", key.id)
        return int(used) + int(held)

    def spent_by_team(self, team: Team, now_ms: int) -> int:
        """Microcredits used or held in the team's period, by all its keys, revoked ones too."""
        members = "(SELECT id FROM keys WHERE json_extract(terms, '$.team') = ?)"
        [(used,)] = self._rows(
            f"SELECT coalesce(sum(cost), 0) FROM usage WHERE key IN {members} AND day >= ?",
            team.name,
            period_start(team.period, now_ms),
        )
        [(held,)] = self._rows(
            f"SELECT coalesce(sum(amount), 0) FROM holds WHERE key IN {members}", team.name
        )
        return int(used) + int(held)

    def usage(self, since: str = "", until: str = "9999-99-99") -> list[UsageRow]:
        """Usage by key, day and model, from one day to another, both included."""
        names = {key.id: key for key in self.all_keys()}
        nobody = Key(id="")
        rows = self._rows(
            "SELECT key, day, model, requests, prompt_tokens, completion_tokens, cost "
            "FROM usage WHERE day >= ? AND day <= ? ORDER BY day, key, model",
            since,
            until,
        )
        return [
            UsageRow(key, (known := names.get(key, nobody)).label, known.team, *rest)
            for key, *rest in rows
        ]

    def transact(self, operations: Iterable[Callable[[], T]]) -> list[T]:
        """Run operations in one transaction, synced before this returns."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            results = [operation() for operation in operations]
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        return results

    def _charge_expired(self, now_ms: int) -> None:
        for key, day, model, amount in self._rows(
            "DELETE FROM holds WHERE expires_ms <= ? RETURNING key, day, model, amount", now_ms
        ):
            self._add(key, day, model, Spent(cost=amount))

    def _add(self, key: str, day: str, model: str, spent: Spent) -> None:
        self._db.execute(
            "INSERT INTO usage VALUES (?, ?, ?, 1, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "requests = requests + 1, prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
            "completion_tokens = completion_tokens + excluded.completion_tokens, "
            "cost = cost + excluded.cost",
            (key, day, model, spent.prompt_tokens, spent.completion_tokens, spent.cost),
        )

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self._db.execute(query, values)]


def has_keys(path: Path) -> bool:
    """Whether a key was ever created: then nobody comes in without one, also after the last
    one is revoked."""
    store = KeyStore(path)
    try:
        return bool(store.all_keys())
    finally:
        store.close()


class Cashier:
    """Holds and settlements for an event loop: one thread writes, what comes together is
    committed together."""

    def __init__(self, path: Path, clock_ms: Callable[[], int], ttl_ms: int) -> None:
        self._path, self._clock_ms, self._ttl_ms = path, clock_ms, ttl_ms
        self._reader = KeyStore(path)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_forever, name="cashier", daemon=True)
        self._thread.start()

    def find(self, secret: str) -> Key | None:
        """The key in use that a secret opens."""
        return self._reader.find(secret)

    async def hold(self, key: Key, model: str, amount: int) -> int | OverBudget:
        """Set money aside, durably; the hold's number, or why not."""
        found = await self._do(
            lambda store: store.hold(key, model, amount, self._clock_ms(), self._ttl_ms)
        )
        return cast("int | OverBudget", found)

    def settle(self, hold: int, spent: Spent) -> None:
        """Replace a hold by what was used, soon."""
        self._jobs.put(_Job(lambda store: store.settle(hold, spent), None, None))

    async def flush(self) -> None:
        """Return once everything so far is on disk."""
        await self._do(lambda store: None)

    def close(self) -> None:
        """Write what is left, and end."""
        self._jobs.put(None)
        self._thread.join()
        self._reader.close()

    async def _do(self, operation: "Callable[[KeyStore], Any]") -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._jobs.put(_Job(operation, loop, future))
        return await future

    def _write_forever(self) -> None:
        store = KeyStore(self._path)
        try:
            while (job := self._jobs.get()) is not None:
                batch, ended = [job], False
                with suppress(queue.Empty):
                    while len(batch) < _BATCH_MAX and not ended:
                        more = self._jobs.get_nowait()
                        ended = more is None
                        batch += [] if more is None else [more]
                self._write(store, batch)
                if ended:
                    return
        finally:
            store.close()

    def _write(self, store: KeyStore, batch: "list[_Job]") -> None:
        try:
            results = store.transact([partial(job.operation, store) for job in batch])
        except apsw.Error as error:
            log.exception("usage could not be written")
            failure = ConfigError(f"the keys' file cannot be written: {error}")
            for job in batch:
                job.answer(None, failure)
            return
        for job, result in zip(batch, results, strict=True):
            job.answer(result, None)


@dataclass(frozen=True, slots=True)
class _Job:
    operation: "Callable[[KeyStore], Any]"
    loop: asyncio.AbstractEventLoop | None
    future: "asyncio.Future[Any] | None"

    def answer(self, result: Any, error: Exception | None) -> None:
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self.loop.call_soon_threadsafe(self._set, result, error)

    def _set(self, result: Any, error: Exception | None) -> None:
        if self.future is None or self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


_SELECT = "SELECT id, terms, created_ms, revoked_ms FROM keys"


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def _terms(key: Key) -> str:
    return json.dumps(
        {
            "label": key.label,
            "team": key.team,
            "budget": key.budget,
            "period": key.period,
            "rate": key.rate,
            "models": sorted(key.models),
            "peers": sorted(key.peers),
            "qos": key.qos,
        }
    )


def _with_pool(key: Key, teams: dict[str, Team]) -> Key:
    return replace(key, pool=teams[key.team]) if key.team in teams else key


def _key(row: tuple[Any, ...]) -> Key:
    key_id, terms, created_ms, revoked_ms = row
    read = json.loads(terms)
    read["models"], read["peers"] = frozenset(read["models"]), frozenset(read["peers"])
    return Key(id=key_id, created_ms=created_ms, revoked_ms=revoked_ms, **read)
