"""What was used, by the minute and by the day: two tables of the tenants' database."""

from collections.abc import Mapping, Sequence

import msgspec

from ktransformers.server.tenants.database import Database
from ktransformers.server.tenants.records import UsageRow, Used

MINUTES_KEPT = 8 * 24 * 60
"""The usage API asks for minutes of a day and hours of a week; older usage is kept by day."""
DAY = 86400
_COLUMNS = "start, project, key, model, requests, input, cached, output, reasoning"
"""In the order of UsageRow."""


class UsageTables:
    """On the connection of a store, in its thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, at: int, rows: Sequence[UsageRow], used: Mapping[str, int]) -> None:
        """Add what was used since the last time (`start` of the rows is not looked at), and when keys were
        last used."""
        with self._database.transaction() as db:
            for table, width in (("usage_minutes", 60), ("usage_days", DAY)):
                db.executemany(
                    f"INSERT INTO {table} ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT "
                    "DO UPDATE SET requests = requests + excluded.requests, input = input + excluded.input, "
                    "cached = cached + excluded.cached, output = output + excluded.output, "
                    "reasoning = reasoning + excluded.reasoning",
                    [(at - at % width, *msgspec.structs.astuple(row)[1:]) for row in rows],
                )
            db.executemany(
                "UPDATE keys SET last_used_at = max(coalesce(last_used_at, 0), ?) WHERE id = ?",
                [(when, key) for key, when in used.items()],
            )

    def forget_minutes(self, now: int) -> None:
        """Drop usage by the minute that is older than what is ever asked for."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM usage_minutes WHERE start < ?", (now - MINUTES_KEPT * 60,))

    def between(self, begin: int, end: int, by_day: bool) -> list[UsageRow]:
        """All rows that start in begin ≤ start < end."""
        table = "usage_days" if by_day else "usage_minutes"
        rows = self._database.connection.execute(
            f"SELECT {_COLUMNS} FROM {table} WHERE start >= ? AND start < ? "
            "ORDER BY start, project, key, model",
            (begin, end),
        )
        return [UsageRow(*row) for row in rows]

    def on_day(self, day: int) -> dict[str, Used]:
        """By project id and by key id, on the day that contains the time `day`."""
        found: dict[str, Used] = {}
        for row in self.between(day - day % DAY, day - day % DAY + DAY, by_day=True):
            for subject in (row.project, row.key):
                before = found.get(subject, Used())
                tokens = before.tokens + row.input + row.output
                found[subject] = Used(before.requests + row.requests, tokens)
        return found
