"""`ktransformers cache`: looks at the disk tier's folder, checks it, empties it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from ktransformers.kvcache.stores import inspection
from ktransformers.kvcache.stores.store import StoreError
from ktransformers.server.commands.serve import default_file, has_tenants
from ktransformers.server.config import ConfigError, cache_dir, load_config


def stats(folder: Path | None, config: Path | None) -> None:
    """A line for each model. Errors: ConfigError."""
    with _folder(folder, config) as path:
        found = inspection.survey(path)
        total = sum(model.size for model in found.models) + found.other_bytes
        print(f"{path}: {_size(total)}{', in use by a server' if found.in_use else ''}")
        rows = [("MODEL", "SIZE", "SEGMENTS", "BLOCKS", "OF BYTES", "OWNERS", "HITS", "LAST USE")]
        rows += [
            (
                model.fingerprint.hex()[:12], _size(model.size), f"{model.segments:,}", f"{model.blocks:,}",
                f"{model.block_bytes:,}", f"{model.owners:,}", f"{model.hits:,}", _when(model.last_use),
            )
            for model in found.models
        ]  # fmt: skip
        if found.models:
            _table(rows)
            if found.in_use:
                print("What the server has written in the last minutes is counted in SIZE alone.")


def verify(folder: Path | None, config: Path | None) -> int:
    """Check everything; 1 when something is damaged. Errors: ConfigError."""
    console = Console(stderr=True)
    bars = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with _folder(folder, config) as path, Progress(*bars, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        verdict = inspection.verify(path, progress)
    for problem in verdict.problems:
        print(problem)
    print(f"{path}: {verdict.records:,} blocks are whole ({_size(verdict.size)} read)")
    if verdict.problems:
        print("The server never uses what is damaged. `ktransformers cache clear` gets rid of everything.")
    return int(bool(verdict.problems))


def clear(folder: Path | None, config: Path | None) -> None:
    """Delete everything. Errors: ConfigError."""
    with _folder(folder, config) as path:
        print(f"{path}: {_size(inspection.clear(path))} deleted")


@contextmanager
def _folder(folder: Path | None, config: Path | None) -> Iterator[Path]:
    """Where it is. Errors: ConfigError, also for what goes wrong inside."""
    if folder is None:
        settings = load_config(config or default_file(), os.environ, {}, has_tenants())
        folder = Path(settings.scheduler.engine.cache.cache_dir or cache_dir() / "kv")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no cache")
    try:
        yield folder
    except StoreError as error:
        raise ConfigError(str(error)) from None


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if at else "-"


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
