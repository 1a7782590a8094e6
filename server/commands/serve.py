"""`ktransformers serve`: settle what is to be served, then supervise it."""

import asyncio
import ctypes
import os
import resource
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ktransformers.engine.logs import start_logging
from ktransformers.server.config import (
    CONFIG_FILE_VARIABLE,
    ConfigError,
    ServerConfig,
    cache_dir,
    config_dir,
    load_config,
    tenants_dir,
)
from ktransformers.server.key_file import read_key_file
from ktransformers.server.library import resolve
from ktransformers.server.run_folder import run_folder, write_configurations
from ktransformers.server.supervisor import Supervisor, check_listening, commands
from ktransformers.server.tenants.database import FILE
from ktransformers.server.tenants.store import Store

_PR_SET_CHILD_SUBREAPER = 36


def run(file: Path | None, overrides: Mapping[str, Any]) -> int:
    """Serve until told to stop; the exit code. Errors: ConfigError, before anything is started."""
    begin = time.monotonic()
    config = check_listening(settle(file, overrides))
    if config.api_key_file is not None:
        read_key_file(Path(config.api_key_file))  # what is wrong with it is said before a model is loaded
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a dead child leaves behind is ours to end, not process 1's, which may not care.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # Of all processes the last to be ended for memory. Only a privileged user may ask for it.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-200")
    with run_folder() as folder:
        config = write_configurations(config, folder)
        listener = start_logging("server", config.log_level)
        try:
            supervisor = Supervisor(config, commands(folder))
            return asyncio.run(supervisor.run(lambda url: _announce(url, time.monotonic() - begin)))
        finally:
            listener.stop()


def settle(file: Path | None, overrides: Mapping[str, Any]) -> ServerConfig:
    """Merge all settings, and find the model's file. Errors: ConfigError."""
    config = load_config(file or default_file(), os.environ, overrides, has_tenants())
    engine = config.scheduler.engine
    cache = engine.cache
    cache = msgspec.structs.replace(cache, cache_dir=cache.cache_dir or str(cache_dir() / "kv"))
    # Absolute: the engine need not run in this folder.
    placement = engine.placement
    if placement not in ("", "auto"):
        placement = str(Path(placement).absolute())
    engine = msgspec.structs.replace(
        engine, model=str(resolve(engine.model)), placement=placement, cache=cache
    )
    scheduler = msgspec.structs.replace(config.scheduler, engine=engine)
    return msgspec.structs.replace(config, scheduler=scheduler)


def has_tenants() -> bool:
    """Whether there is a tenant, whose keys make it safe to listen for other machines. Errors: StoreError."""
    folder = tenants_dir()
    if not (folder / FILE).exists():
        return False
    store = Store.open(folder)
    try:
        return store.load()[3]
    finally:
        store.close()


def default_file() -> Path | None:
    """The configuration file when none is named on the command line."""
    if named := os.environ.get(CONFIG_FILE_VARIABLE):
        return Path(named)
    usual = config_dir() / "config.toml"
    try:
        return usual if usual.exists() else None
    except OSError as error:
        raise ConfigError(f"{usual}: {error.strerror}") from None


def _announce(url: str, seconds: float) -> None:
    lines = f"Ready: {url}  (chat page; OpenAI API under /v1, Ollama API under /api)"
    if sys.stdout.isatty():
        lines = (
            f"\n  \x1b[1mReady\x1b[0m after {seconds:.1f} s\n\n"
            f"  Chat page    \x1b[1m{url}/\x1b[0m\n"
            f"  OpenAI API   {url}/v1\n"
            f"  Ollama API   {url}\n"
            f"  Terminal     {_own_command()} chat --url {url}\n\n"
            "  Ctrl-C stops it, after the answers that are being written.\n"
        )
    # In a thread, which may take for ever where nobody reads.
    threading.Thread(target=_write, args=(f"{lines}\n".encode(),), daemon=True).start()


def _own_command() -> str:
    """What a user types to get this program: `make serve` has it in a folder that is not searched."""
    name = "ktransformers"
    own = Path(sys.argv[0])
    return name if shutil.which(name) or own.name != name else shlex.quote(os.path.relpath(own))


def _write(text: bytes) -> None:
    with suppress(OSError):  # a full disk or a closed pipe: it serves all the same
        os.write(sys.stdout.fileno(), text)
