"""The file of API keys that the setting api_key_file names."""

import os
import stat
from pathlib import Path

from ktransformers.server.config import ConfigError


def read_key_file(path: Path) -> list[tuple[str, str]]:
    """(name or "", key) of each. Errors: ConfigError, which names the file and what to do."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC), encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"API key file {path}: not a regular file")
            if stat.S_IMODE(mode) & 0o077:
                raise ConfigError(f"API key file {path}: others can read it; chmod 600 {path}")
            lines = [line.strip() for line in file]
    except OSError as error:
        raise ConfigError(f"API key file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"API key file {path}: not ASCII text") from None
    keys = []
    for line in lines:
        if line and not line.startswith("#"):
            name, _, key = line.rpartition(":")
            keys.append((name.strip(), key.strip()))
    if not keys:
        raise ConfigError(f"API key file {path}: no key in it")
    return keys
