"""Settings: three sources, one flat name each, errors that name the setting and where it came from."""

from pathlib import Path

import msgspec
import pytest

from ktransformers.server.config import (
    ConfigError,
    ServerConfig,
    cache_dir,
    config_dir,
    data_dir,
    is_loopback,
    load_config,
    settings,
    state_dir,
)


def test_there_are_few_settings() -> None:
    """What can be computed, or has one value that works, is none."""
    assert len(settings()) <= 30


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        '[server]\nport = 1\nlog_level = "debug"\n[engine]\nthreads = 2\nmodel = "a"\n'
        "[cache]\nhost_bytes = 32\n[scheduler]\nmax_waiting = 5\n"
    )
    env = {"KTRANSFORMERS_PORT": "2", "KTRANSFORMERS_THREADS": "3", "OTHER": "x", "KTRANSFORMERS_CONFIG": "x"}
    config = load_config(file, env, {"port": 3, "model": None})
    assert (config.port, config.log_level) == (3, "debug")
    engine = config.scheduler.engine
    assert (engine.threads, engine.model, engine.cache.host_bytes) == (3, "a", 32)
    assert config.scheduler.max_waiting == 5


def test_environment_is_text() -> None:
    env = {
        "KTRANSFORMERS_ALLOWED_HOSTS": "a.test, b.test",
        "KTRANSFORMERS_PREFIX_REUSE": "false",
        "KTRANSFORMERS_DRAIN_TIMEOUT": "1.5",
        "KTRANSFORMERS_CONTEXT": "2048",
        "KTRANSFORMERS_HOST": "",
    }
    config = load_config(None, env, {})
    assert config.allowed_hosts == ("a.test", "b.test")
    assert not config.scheduler.engine.cache.prefix_reuse
    assert config.drain_timeout == 1.5 and config.scheduler.engine.context == 2048
    assert config.host == "127.0.0.1"


def test_it_crosses_to_the_process_as_json() -> None:
    config = load_config(None, {}, {"model": "/m.gguf", "allowed_hosts": ["a.test"]})
    assert msgspec.json.decode(msgspec.json.encode(config), type=ServerConfig) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[server]\nport = 'x'", "port"),
        ("[server]\nport = 70000", "port"),
        ("[server]\nport = -1", "port"),
        ("[server]\nport = true", "port"),
        ("[server]\nprt = 1", "prt"),
        ("[nope]\nx = 1", "nope"),
        ("port = 1", "port"),
        ("[engine]\nport = 1", "port"),
        ("[server", "config.toml"),
        ("[engine]\nthreads = 0", "threads"),
        ("[server]\nscheduler = 1", "scheduler"),
        ("[engine]\nsocket = '/tmp/x'", "socket"),
        ("[engine]\nexecutor = 'magic'", "executor"),
        ("[server]\ndrain_timeout = nan", "drain_timeout"),
        ("[server]\ndrain_timeout = inf", "drain_timeout"),
        ("[server]\nallowed_hosts = 'abcdefgh'", "allowed_hosts"),
        ("[server]\napi_keys = ['12345678']", "api_keys"),
        ("[cache]\nblock_tokens = 32", "block_tokens"),
        ("[engine]\nexecutor = 'torch:'", "executor"),
        ("[cache]\nprefix_reuse = 1", "prefix_reuse"),
        ("[server]\nlog_level = 'loud'", "log_level"),
        ("[server]\nhost = '0.0.0.0'", "host"),
    ],
)
def test_a_bad_file_names_the_setting(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(file, {}, {})
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("env", "flags", "says"),
    [
        ({"KTRANSFORMERS_PORT": "x"}, {}, "KTRANSFORMERS_PORT"),
        ({"KTRANSFORMERS_PRT": "1"}, {}, "KTRANSFORMERS_PRT"),
        ({"KTRANSFORMERS_DRAIN_TIMEOUT": "nan"}, {}, "KTRANSFORMERS_DRAIN_TIMEOUT"),
        ({}, {"max_sequences": 0}, "--max-sequences"),
        ({}, {"nope": 1}, "--nope"),
        ({}, {"host": "::"}, "host"),
        ({}, {"host": "example.org"}, "host"),
    ],
)
def test_a_bad_value_names_its_source(env: dict[str, str], flags: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(None, env, flags)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "binary"):
        with pytest.raises(ConfigError, match=str(path)):
            load_config(path, {}, {})


def test_keys_allow_other_addresses(tmp_path: Path) -> None:
    assert load_config(None, {}, {"host": "0.0.0.0", "api_key_file": "/keys"}).api_key_file == "/keys"


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("localhost.evil.test", False),
        ("", False),
    ],
)
def test_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


def test_folders() -> None:
    env = {"HOME": "/home/u", "XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "relative"}
    assert str(config_dir(env)) == "/home/u/.config/ktransformers"
    assert str(state_dir(env)) == "/s/ktransformers"
    assert str(cache_dir(env)) == "/home/u/.cache/ktransformers"
    assert str(data_dir(env)) == "/home/u/.local/share/ktransformers"
