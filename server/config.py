"""Settings of the whole server: what they are, where they come from, and the folders of the user.

Every setting has one flat name that is unique over all tables, so that the file, the environment and the
command line speak of it alike: `port` under `[server]` in TOML, `KTRANSFORMERS_PORT`, `--port`. Later sources
win in that order.
"""

import ipaddress
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from ktransformers.scheduler.config import SchedulerConfig

ENV_PREFIX = "KTRANSFORMERS_"
CONFIG_FILE_VARIABLE = "KTRANSFORMERS_CONFIG"
"""Names the TOML file itself; read by the command line, not a setting."""
ADMIN_HOST: Final = "127.0.0.1"
"""Where the admin API listens. Who administers from elsewhere comes through a tunnel of his own."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and where it came from."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The API process, and below it everything else that one `ktransformers serve` starts."""

    scheduler: SchedulerConfig
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs API keys."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """0 lets the system choose."""
    api_key_file: str | None = None
    """One key a line, `name:key` or bare; readable by its owner only."""
    allowed_hosts: tuple[str, ...] = ()
    """Host headers that are accepted beside the address listened on and, on loopback, its names; "*" is any.
    """
    allowed_origins: tuple[str, ...] = ()
    """Origins (`https://chat.example.org`) whose pages may call the server, beside its own page."""
    model_name: str = ""
    """Name that clients see; "" is taken from the model's file."""
    drain_timeout: Annotated[float, Meta(ge=0, le=86400)] = 30.0
    """Seconds that running requests may still take after SIGTERM."""
    request_timeout: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """Seconds after which any request fails with code "deadline"; 0 is never."""
    admin_port: Annotated[int, Meta(ge=0, le=65535)] = 8001
    """Of the admin API, which listens on loopback and is there once there is an admin key (`ktransformers
    tenants admin-key`); 0 lets the system choose."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def _nested(struct: type[msgspec.Struct], name: str) -> type[msgspec.Struct]:
    """The struct that is the field `name`: each room's settings hold those of the room below it."""
    found: type[msgspec.Struct] = next(f.type for f in msgspec.structs.fields(struct) if f.name == name)
    return found


_ENGINE = _nested(SchedulerConfig, "engine")
TABLES: dict[str, type[msgspec.Struct]] = {
    "server": ServerConfig,
    "scheduler": SchedulerConfig,
    "engine": _ENGINE,
    "cache": _nested(_ENGINE, "cache"),
}
_NOT_SETTINGS = frozenset({"scheduler", "engine", "cache", "socket", "block_tokens"})
"""The tables within tables, and what the processes tell each other."""


def settings() -> dict[str, tuple[str, msgspec.structs.FieldInfo]]:
    """Every setting by its flat name: the TOML table it lives in, and its field (type and default)."""
    found: dict[str, tuple[str, msgspec.structs.FieldInfo]] = {}
    for table, struct in TABLES.items():
        for field in msgspec.structs.fields(struct):
            if field.name not in _NOT_SETTINGS:
                found[field.name] = (table, field)
    return found


def load_config(
    file: Path | None, env: Mapping[str, str], overrides: Mapping[str, Any], tenants: bool = False
) -> ServerConfig:
    """Merge the TOML file, `KTRANSFORMERS_*` of `env`, and `overrides` (flat name -> value; None: not given).

    `tenants`: there is a tenant store, which may hold keys beside those of the settings. A model that nobody
    named is left as "", which stands for the embedded default model. Raises ConfigError for a file that
    cannot be read, an unknown name, a value of the wrong type or out of bounds.
    """
    values: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    values["engine"]["model"] = ""
    known = settings()
    for name, value, source, strict in _sources(file, env, overrides):
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} ({source})")
        table, field = known[name]
        try:
            values[table][name] = msgspec.convert(value, field.type, strict=strict)
        except msgspec.ValidationError as error:
            what = _choices(field.type) or _lower_first(str(error))
            raise ConfigError(f"setting {name!r} ({source}): {what}") from None
    engine = {**values["engine"], "cache": values["cache"]}
    scheduler = {**values["scheduler"], "engine": engine}
    config = msgspec.convert({**values["server"], "scheduler": scheduler}, ServerConfig)
    if not tenants and config.api_key_file is None and not is_loopback(config.host):
        raise ConfigError(
            f"setting 'host': listening on {config.host} needs a tenant (`ktransformers tenants create`) "
            "or 'api_key_file' (without keys only a loopback address such as 127.0.0.1 is allowed)"
        )
    return config


def _sources(
    file: Path | None, env: Mapping[str, str], overrides: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str, bool]]:
    """(name, value, where it is from, whether its type must match without parsing), the strongest last."""
    if file is not None:
        yield from _file_settings(file)
    known = settings()
    for variable in sorted(env):
        # An empty variable is how compose files say "not given".
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_FILE_VARIABLE or not env[variable]:
            continue
        name, text = variable[len(ENV_PREFIX) :].lower(), env[variable]
        is_list = name in known and str(known[name][1].type).startswith("tuple")
        value = [part.strip() for part in text.split(",") if part.strip()] if is_list else text
        yield name, value, f"environment variable {variable}", False
    for name, value in overrides.items():
        if value is not None:
            yield name, value, f"flag --{name.replace('_', '-')}", False


def _file_settings(file: Path) -> Iterator[tuple[str, Any, str, bool]]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from None
    known = settings()
    for table, content in document.items():
        if table not in TABLES or not isinstance(content, dict):
            if table in known:
                raise ConfigError(f"{file}: setting {table!r} belongs into table [{known[table][0]}]")
            raise ConfigError(f"{file}: unknown table or setting {table!r} (tables: {', '.join(TABLES)})")
        for name, value in content.items():
            if name not in known or known[name][0] != table:
                raise ConfigError(f"unknown setting {name!r} in [{table}] ({file})")
            yield name, value, f"{file} [{table}]", True


def is_loopback(host: str) -> bool:
    """Whether listening on `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _choices(kind: Any) -> str:
    """What a setting of few values may be; "" for one of another kind."""
    if get_origin(kind) is Literal:
        return f"must be one of {', '.join(get_args(kind))}"
    described = (meta.description for meta in getattr(kind, "__metadata__", ()) if meta.description)
    return next((f"must be {text}" for text in described), "")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


# ---- folders (XDG base directory specification: a relative path in the variable is ignored)


def config_dir(env: Mapping[str, str] = os.environ) -> Path:
    """Where `config.toml` is looked for."""
    return _xdg(env, "XDG_CONFIG_HOME", ".config")


def data_dir(env: Mapping[str, str] = os.environ) -> Path:
    """Model files that were pulled, and the tenant store."""
    return _xdg(env, "XDG_DATA_HOME", ".local/share")


def tenants_dir(env: Mapping[str, str] = os.environ) -> Path:
    """The folder of the tenant store, readable by its owner only."""
    return data_dir(env) / "tenants"


def state_dir(env: Mapping[str, str] = os.environ) -> Path:
    """What should outlive a restart but may be lost: logs, history."""
    return _xdg(env, "XDG_STATE_HOME", ".local/state")


def cache_dir(env: Mapping[str, str] = os.environ) -> Path:
    """What can be made again."""
    return _xdg(env, "XDG_CACHE_HOME", ".cache")


def _xdg(env: Mapping[str, str], variable: str, fallback: str) -> Path:
    given = env.get(variable, "")
    base = Path(given) if os.path.isabs(given) else Path(env.get("HOME") or Path.home()) / fallback
    return base / "ktransformers"
