"""`ktransformers cache` on folders that a store has made."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.server import cli
from ktransformers.server.commands import doctor
from ktransformers.server.config import ConfigError, load_config

SIZE = 5000


def block(i: int) -> tuple[SimpleNamespace, bytes]:
    key = hashlib.sha256(b"%d" % i).digest()
    name = SimpleNamespace(key=key, parent=key, owner=bytes([i % 2]) * 16, content=key)
    return name, hashlib.shake_128(key).digest(SIZE)


def opened(folder: Path, model: bytes = b"m") -> DiskStore:
    return DiskStore.open(folder, model * 32, SIZE, 1 << 20)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Thirty blocks of one model and three of another, in the user's own cache folder."""
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    folder = tmp_path / "XDG_CACHE_HOME/ktransformers/kv"
    for model, blocks in ((b"m", range(30)), (b"n", range(3))):
        store = opened(folder, model)
        for i in blocks:
            assert store.put(*block(i))
        store.close()
    return folder


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["cache", *args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_stats(folder) -> None:
    store = opened(folder)
    for _ in range(3):
        assert store.get_into(block(1)[0], bytearray(SIZE))
    store.close()
    code, said = run("stats")
    assert code == 0
    assert said.startswith(f"{folder}: 0.5 MiB\n")
    first, second = said.splitlines()[2:]
    assert re.fullmatch(r"6d6d6d6d6d6d +0.4 MiB +4 +30 +5,000 +2 +3 +20..-..-.. ..:..:..Z", first)
    assert re.fullmatch(r"6e6e6e6e6e6e +0.0 MiB +1 +3 +5,000 +2 +0 +20..-..-.. ..:..:..Z", second)


def test_stats_while_a_server_runs(folder) -> None:
    store = opened(folder)
    store.put(*block(50))
    code, said = run("stats")
    assert code == 0 and "in use by a server" in said
    assert re.search(r"6d6d6d6d6d6d +0.5 MiB +5 +30 ", said)
    assert store.get_into(block(50)[0], bytearray(SIZE))
    store.close()


@pytest.mark.parametrize("what", ["verify", "clear"])
def test_a_folder_in_use_is_left_alone(folder, what) -> None:
    store = opened(folder)
    with pytest.raises(ConfigError, match=f"{folder} is in use by process"):
        run(what)
    assert store.get_into(block(1)[0], bytearray(SIZE))
    store.close()


def test_verify(folder) -> None:
    assert run("verify") == (0, f"{folder}: 33 blocks are whole (0.4 MiB read)\n")
    store = opened(folder)
    assert all(store.get_into(block(i)[0], bytearray(SIZE)) for i in range(30))
    store.close()


def test_verify_finds_each_damage(folder) -> None:
    files = sorted((folder / "seg").iterdir())
    for path, at in (
        (files[0], 9000),
        (files[0], 30_000),
        (files[1], 5),
        (files[2], files[2].stat().st_size - 9),
    ):
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)
    code, said = run("verify")
    assert code == 1
    assert said.splitlines()[:3] == [
        "0000000001.kvs: 2 of 9 records are damaged",
        "0000000002.kvs: its head is damaged",
        "0000000003.kvs: its footer is damaged; 9 records are whole",
    ]
    assert ": 22 blocks are whole" in said


def test_verify_of_an_index_that_lies(folder) -> None:
    import sqlite3

    db = sqlite3.connect(folder / "index.sqlite")
    db.execute("UPDATE block SET key = ? WHERE segment = 2 AND offset = 4096", (bytes(32),))
    db.commit()
    db.close()
    assert run("verify")[1].startswith("index.sqlite: 1 rows of 0000000002.kvs are not what is there\n")
    (folder / "index.sqlite").write_bytes(b"?" * 5000)
    code, said = run("verify")
    assert code == 1 and said.startswith("index.sqlite: ") and ": 33 blocks are whole" in said


def test_clear(folder) -> None:
    assert run("clear") == (0, f"{folder}: 0.4 MiB deleted\n")
    assert sorted(path.name for path in folder.rglob("*")) == ["LOCK", "seg"]
    store = opened(folder)
    assert store.entries() == [] and store.put(*block(1))
    store.close()


def test_another_folder(folder, tmp_path) -> None:
    opened(tmp_path / "other").close()
    assert run("stats", "--cache-dir", str(tmp_path / "other"))[1].startswith(f"{tmp_path}/other: 0.0 MiB\n")
    with pytest.raises(ConfigError, match="there is no cache"):
        run("clear", "--cache-dir", str(tmp_path / "none"))
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "home/thesis").write_text("precious")
    with pytest.raises(ConfigError, match="holds other things"):
        run("clear", "--cache-dir", str(tmp_path / "home"))
    assert (tmp_path / "home/thesis").exists()


def test_what_the_doctor_says(folder, tmp_path) -> None:
    def says(**settings: object) -> tuple[str, str]:
        found = doctor._disk_tier(load_config(None, {}, settings))
        return found.state, found.detail

    assert says() == ("ok", f"0.0 GiB in {folder}")
    assert says(disk_bytes=0) == ("ok", "switched off")
    assert says(cache_dir=str(tmp_path / "new")) == ("ok", f"none yet, will be {tmp_path}/new")
    store = opened(folder)
    assert says() == ("ok", f"0.0 GiB in {folder}, in use by a server")
    store.close()
    folder.chmod(0o777)
    assert says() == ("slow", f"{folder} can be written by others: chmod go-w {folder}")
