"""`ktransformers serve`: settle what is to be served, then supervise it."""

import asyncio
import ctypes
import logging
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ktransformers.server.config import (
    CONFIG_FILE_VARIABLE,
    ConfigError,
    ServerConfig,
    config_dir,
    load_config,
)
from ktransformers.server.library import resolve
from ktransformers.server.run_folder import run_folder, write_configurations
from ktransformers.server.supervisor import Supervisor, check_listening, commands

_PR_SET_CHILD_SUBREAPER = 36


def run(file: Path | None, overrides: Mapping[str, Any]) -> int:
    """Serve until told to stop; the exit code. Errors: ConfigError, before anything is started."""
    config = check_listening(settle(file, overrides))
    level = config.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s supervisor %(levelname)s %(message)s")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a dead child leaves behind is ours to end, not process 1's, which may not care.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # Of all processes the last to be ended for memory. Only a privileged user may ask for it.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-200")
    with run_folder() as folder:
        config = write_configurations(config, folder)
        return asyncio.run(Supervisor(config, commands(folder)).run(_announce))


def settle(file: Path | None, overrides: Mapping[str, Any]) -> ServerConfig:
    """Merge all settings, and find the model's file. Errors: ConfigError."""
    config = load_config(file or default_file(), os.environ, overrides)
    engine = config.scheduler.engine
    engine = msgspec.structs.replace(engine, model=str(resolve(engine.model)))
    scheduler = msgspec.structs.replace(config.scheduler, engine=engine)
    return msgspec.structs.replace(config, scheduler=scheduler)


def default_file() -> Path | None:
    """The configuration file when none is named on the command line."""
    if named := os.environ.get(CONFIG_FILE_VARIABLE):
        return Path(named)
    usual = config_dir() / "config.toml"
    try:
        return usual if usual.exists() else None
    except OSError as error:
        raise ConfigError(f"{usual}: {error.strerror}") from None


def _announce(url: str) -> None:
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    print(f"Ready: {bold}{url}{plain}  (chat page; OpenAI API under /v1, Ollama API under /api)", flush=True)
