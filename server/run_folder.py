"""The folder of one running server: its sockets, and its processes' configurations (with the API keys)."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ktransformers.server.config import ConfigError, ServerConfig, state_dir

MAX_SOCKET_PATH = 107
"""Bytes in sockaddr_un.sun_path, less the NUL."""


@contextmanager
def run_folder(bases: Sequence[Path] | None = None) -> Iterator[Path]:
    """A new folder that nobody else can open, removed at the end; if we are killed, by the next server.

    It lies in the first of `bases` whose path is short enough for a socket's: of itself the user's runtime
    folder, the state folder, or one among the temporary files.

    Errors: ConfigError.
    """
    base = _first_short_enough(_bases() if bases is None else bases)
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(base)
        with _locked(base / "lock"):
            _sweep(base)
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=base))
            lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise ConfigError(f"cannot make a folder for sockets in {base}: {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def write_configurations(config: ServerConfig, folder: Path) -> ServerConfig:
    """Name the sockets in `folder`, and write engine.json, scheduler.json and server.json there (0600).

    Errors: ConfigError.
    """
    engine = msgspec.structs.replace(config.scheduler.engine, socket=str(folder / "engine.sock"))
    socket = str(folder / "scheduler.sock")
    scheduler = msgspec.structs.replace(config.scheduler, engine=engine, socket=socket)
    config = msgspec.structs.replace(config, scheduler=scheduler)
    for role, settings in (("engine", engine), ("scheduler", scheduler), ("server", config)):
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        try:
            encoded = msgspec.json.encode(settings)
        except UnicodeEncodeError as error:
            raise ConfigError(f"{error.object!r}: not UTF-8, as paths and text have to be") from None
        path = folder / f"{role}.json"
        try:
            with open(os.open(path, flags, 0o600), "wb") as stream:
                stream.write(encoded)
        except OSError as error:  # of a write it does not name the file
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    return config


def _bases() -> list[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = os.path.isabs(runtime) and os.access(runtime, os.W_OK)
    temporary = Path(tempfile.gettempdir()) / f"ktransformers-{os.geteuid()}"
    return [*([Path(runtime) / "ktransformers"] if usable else []), state_dir(), temporary]


def _first_short_enough(bases: Sequence[Path]) -> Path:
    for base in bases:
        if len(os.fsencode(base / "run-xxxxxxxx" / "scheduler.sock")) <= MAX_SOCKET_PATH:
            return base
    raise ConfigError(f"{bases[-1]} is too long a path for sockets: set XDG_RUNTIME_DIR to a shorter one")


def _check_owner(base: Path) -> None:
    """Errors: ConfigError, when another user put it there, if only as a link to a folder of ours, or could
    put things into it: what looks like a dead server's folder in it is removed."""
    owners = {base.lstat().st_uid, base.stat().st_uid}
    if owners != {os.geteuid()}:
        raise ConfigError(f"{base} belongs to another user: set XDG_RUNTIME_DIR to a folder of your own")
    if base.stat().st_mode & 0o002:
        raise ConfigError(f"{base} can be written by others: chmod o-w {base}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(base: Path) -> None:
    """Remove the folders whose lock nobody holds: their servers were killed."""
    for lock in base.glob("run-*/lock"):
        with open(lock, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(lock.parent, ignore_errors=True)
