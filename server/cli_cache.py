"""`ktransformers cache …`: what the command line takes; commands/cache.py does it."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The prefixes on disk, which outlive a restart of the server.")

Folder = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", help="Folder of the prefixes on disk [as the settings have it].", show_default=False
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings [~/.config/ktransformers/config.toml].")
]


@app.command()
def stats(cache_dir: Folder = None, config: ConfigFile = None) -> None:
    """What is there, by model. A running server is not disturbed."""
    from ktransformers.server.commands import cache as command

    command.stats(cache_dir, config)


@app.command()
def verify(cache_dir: Folder = None, config: ConfigFile = None) -> None:
    """Read all of it, and compare every byte with its checksum. No server may be running on it."""
    from ktransformers.server.commands import cache as command

    raise typer.Exit(command.verify(cache_dir, config))


@app.command()
def clear(cache_dir: Folder = None, config: ConfigFile = None) -> None:
    """Delete all of it. No server may be running on it."""
    from ktransformers.server.commands import cache as command

    command.clear(cache_dir, config)
