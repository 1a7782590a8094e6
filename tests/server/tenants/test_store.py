"""The file: who may open it, what survives, what is said when it is damaged."""

import hashlib
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktransformers.server.tenants.database import FILE, Database, explain
from ktransformers.server.tenants.directory import SECRET_FILE, Directory
from ktransformers.server.tenants.records import Conflict, Limits, Missing, StoreError, UsageRow, Used
from ktransformers.server.tenants.schema import STEPS, migrate
from ktransformers.server.tenants.store import Store
from ktransformers.server.tenants.usage import DAY

ODD_NAMES = [
    "'; DROP TABLE projects; --", '" OR 1=1 --', "Robert'); DELETE FROM keys;", "東京 チーム", "a" * 64,
    "%s%n{0}", "../../etc/passwd", "$(reboot)", "<script>", "emoji 🙂", "\\x00", "null", "0", "-rf", "_%",
]  # fmt: skip
BAD_NAMES = ["", "a" * 65, " a", "a ", "a\nb", "a\x00b", "\x1b[31m", "proj_1", "\u202e", "\t"]


@pytest.fixture
def store(tmp_path: Path):
    store = Store.open(tmp_path / "t")
    yield store
    store.close()


def test_nobody_else_can_open_it(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir(mode=0o755)
    store = Store.open(folder)
    store.create_project("a", "test")
    Directory.open(folder).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert {f.name for f in files} >= {FILE, SECRET_FILE}
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)
    store.close()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_names(store: Store, name: str) -> None:
    project = store.create_project(name, "test")
    account = store.create_account(project.id, name, "test")
    key, _ = store.create_key(account, name, "test")
    assert store.project(name) == store.project(project.id) == project
    assert store.keys(project.id) == [key] and store.accounts(project.id) == [account]
    with pytest.raises(Conflict):
        store.create_project(name, "test")
    assert store.archive_project(project.id, "test").archived_at is not None
    with pytest.raises(Missing):
        store.project(name)
    store.create_project(name, "test")  # free again


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused(store: Store, name: str) -> None:
    with pytest.raises(StoreError):
        store.create_project(name, "test")
    assert store.projects() == []


@given(st.text(max_size=80))
def test_any_text_as_name_or_id(name: str) -> None:
    store = Store(Database(sqlite3.connect(":memory:", isolation_level=None), Path("memory")))
    migrate(store._db)
    try:
        store.create_project(name, "test")
    except StoreError:
        assert store.projects() == []
    else:
        assert [p.name for p in store.projects()] == [name]
    for look in (store.project, store.project_by_id, store.find_key):
        with pytest.raises(Missing):
            look(name + "'")
    store.close()


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e9])
def test_bad_weights(store: Store, weight: float) -> None:
    with pytest.raises(StoreError):
        store.create_project("a", "test", weight=weight)


@pytest.mark.parametrize("limit", [0, -1, 1 << 53, 10**20])
def test_a_limit_that_could_not_be_read_back_is_not_written(store: Store, limit: int) -> None:
    bad, project = Limits(tokens_per_day=limit), store.create_project("a", "test")
    key, _ = store.create_key(store.create_account(project.id, "b", "test"), "b", "test")
    for write in (
        lambda: store.create_project("c", "test", limits=bad),
        lambda: store.change_limits(project.id, "test", {"tokens_per_day": limit}),
        lambda: store.create_key(None, "d", "test", limits=bad),
        lambda: store.change_key(key, "test", limits=bad),
    ):
        with pytest.raises(StoreError, match="tokens per day"):
            write()
    assert store.projects() == [project] and store.keys(project.id) == [key]


def test_a_key_is_kept_as_its_hash_only(store: Store) -> None:
    project = store.create_project("a", "test")
    account = store.create_account(project.id, "u", "test")
    key, value = store.create_key(account, "k", "test")
    assert value.startswith("kt-") and len(value) == 3 + 43
    assert key.digest == hashlib.sha256(value.encode()).digest()
    for file in store.database.path.parent.iterdir():
        assert value.encode() not in file.read_bytes() and value[3:].encode() not in file.read_bytes()
    assert value not in str(store.audit()) and key.digest.hex() not in str(store.audit())
    assert store.create_key(account, "k", "test")[1] != value


def test_archiving_ends_keys_and_deleting_an_account_its_own(store: Store) -> None:
    one, two = (store.create_project(name, "test") for name in "ab")
    for project in (one, two):
        for user in "uv":
            store.create_key(store.create_account(project.id, user, "test"), user, "test")
    store.delete_account(one.id, store.accounts(one.id)[0].id, "test")
    assert [k.name for k in store.keys(one.id)] == ["v"]
    store.archive_project(two.id, "test")
    projects, accounts, keys, in_use = store.load()
    assert (projects, len(accounts), [k.project for k in keys], in_use) == ([one], 1, [one.id], True)
    with pytest.raises(Missing):
        store.create_account(two.id, "w", "test")


def test_every_act_is_in_the_audit_log(store: Store) -> None:
    project = store.create_project("a", "me")
    store.change_project(project.id, "me", weight=2.0)
    store.change_limits(project.id, "me", {"tokens_per_day": 5})
    account = store.create_account(project.id, "u", "me")
    key, _ = store.create_key(account, "k", "me", limits=Limits(requests_per_minute=1))
    key = store.change_key(key, "me", scopes=frozenset({"api.model.read"}))
    store.revoke_key(key, "me")
    store.delete_account(project.id, account.id, "me")
    store.archive_project(project.id, "me")
    store.revoke_key(store.create_key(None, "boss", "me")[0], "me")
    assert [entry.action for entry in store.audit()][::-1] == [
        "project.created", "project.updated", "rate_limit.updated", "service_account.created",
        "api_key.created", "api_key.updated", "api_key.deleted", "service_account.deleted",
        "project.archived", "tenant.admin_api_key.created", "tenant.admin_api_key.deleted",
    ]  # fmt: skip
    assert {entry.actor for entry in store.audit()} == {"me"}
    store.create_project("b", "me")
    with pytest.raises(Conflict):
        store.create_project("b", "me")
    assert len(store.audit()) == 12  # what failed is not there


def test_usage_adds_up_and_old_minutes_go(store: Store) -> None:
    now = 1_800_000_000
    row = UsageRow(0, "p", "k", "m", 1, 10, 4, 5, 2)
    for at in (now - 9 * DAY, now - 60, now, now):
        store.usage.add(at, [row], {})
    store.usage.forget_minutes(now)
    minutes = store.usage.between(0, now + DAY, by_day=False)
    assert [(r.start, r.requests) for r in minutes] == [(now - 60, 1), (now, 2)]
    days = store.usage.between(0, now + DAY, by_day=True)
    assert [(r.requests, r.cached, r.reasoning) for r in days] == [(1, 4, 2), (3, 12, 6)]
    assert sum(r.input + r.output for r in days) == 4 * 15
    assert store.usage.on_day(now) == {"p": Used(3, 45), "k": Used(3, 45)}


# ---- what may happen to a file


def test_an_older_file_is_taken_along(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "t")
    project = store.create_project("kept", "test")
    migrate(store._db, (*STEPS, ("ALTER TABLE projects ADD COLUMN colour TEXT",)))
    assert store._db.execute("PRAGMA user_version").fetchone() == (len(STEPS) + 1,)
    assert store.project("kept") == project
    with pytest.raises(sqlite3.OperationalError):
        migrate(store._db, (*STEPS, ("SELECT 1",), ("ALTER TABLE projects ADD COLUMN x TEXT", "nonsense")))
    columns = [row[1] for row in store._db.execute("PRAGMA table_info(projects)")]
    assert "colour" in columns and "x" not in columns  # all of a step, or nothing
    store.close()
    with pytest.raises(StoreError, match=r"newer version .*; run that$"):
        Store.open(tmp_path / "t")


def test_a_ledger_from_before_reasoning_was_counted_is_kept(tmp_path: Path) -> None:
    """A file as the version before wrote it: its counts are there, with no reasoning, and go on."""
    folder = tmp_path / "t"
    folder.mkdir()
    old = sqlite3.connect(folder / FILE, isolation_level=None)
    migrate(old, STEPS[:2])
    old.execute("INSERT INTO projects VALUES ('proj_1', 'kept', 1, NULL, 1.0, 'normal', '{}', '[]')")
    day = 1_800_000_000 // DAY * DAY
    for table in ("usage_minutes", "usage_days"):
        assert "reasoning" not in [row[1] for row in old.execute(f"PRAGMA table_info({table})")]
        old.execute(f"INSERT INTO {table} VALUES (?, 'proj_1', 'k', 'm', 7, 70, 3, 14)", (day,))
    old.close()
    store = Store.open(folder)
    before = UsageRow(day, "proj_1", "k", "m", 7, 70, 3, 14, 0)
    for by_day in (True, False):
        assert store.usage.between(0, 1 << 40, by_day) == [before]
    assert store.project("kept").id == "proj_1"
    store.usage.add(day, [UsageRow(0, "proj_1", "k", "m", 1, 10, 1, 5, 4)], {})
    store.close()
    store = Store.open(folder)
    for by_day in (True, False):
        (row,) = store.usage.between(0, 1 << 40, by_day)
        assert row == UsageRow(day, "proj_1", "k", "m", 8, 80, 4, 19, 4)
    store.close()


@pytest.mark.parametrize("damage", ["text", "truncated", "middle", "unknown limit", "folder"])
def test_damage_is_said_in_a_line(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "t"
    store = Store.open(folder)
    with store.database.transaction():
        for i in range(300):
            row = (f"proj_{i}", f"project {i}", 1, 1.0, "normal", "{}", "[]")
            store._db.execute("INSERT INTO projects VALUES (?, ?, ?, NULL, ?, ?, ?, ?)", row)
    if damage == "unknown limit":
        store._db.execute("UPDATE projects SET limits = '{\"nope\": 1}' WHERE name = 'project 7'")
    store.close()
    file = folder / FILE
    if damage == "text":
        file.write_text("this is not a database, not at all, and has more than a hundred bytes in it" * 9)
    elif damage == "truncated":
        os.truncate(file, 10_000)
    elif damage == "middle":
        with file.open("r+b") as stream:
            stream.seek(8192)
            stream.write(b"\xff" * 16384)
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    with pytest.raises(StoreError) as raised:
        Store.open(folder)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)
    assert ("put a copy back" in str(raised.value)) == (damage != "folder")


def test_a_full_database_says_so_and_goes_on(store: Store) -> None:
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    for name in "ab":
        with pytest.raises(sqlite3.OperationalError, match="full") as raised:
            for i in range(2000):
                store.create_project(f"{name} {i}", "test")
        said = explain(store.database.path, raised.value)
        assert "the disk is full; make room" in said and "put a copy back" not in said
    store._db.execute("PRAGMA max_page_count = 100000")
    store.create_project("later", "test")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("size", ["16k", "64k", "400k"])
def test_a_full_disk_is_no_damage(tmp_path: Path, size: str) -> None:
    """The disk has no room for the database, for its tables, for one more tenant."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root may not mount here")
    try:
        said = filled(disk / "t", resource.RLIM_INFINITY)
        assert said.startswith(f"tenant store {disk / 't' / FILE}: the disk is full; make room")
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = Store.open(disk / "t")
        again.create_project("fits", "test")
        again.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("limit", [4096, 20_000, 120_000, 400_000])
def test_a_limit_on_the_size_of_files_is_no_damage(tmp_path: Path, limit: int) -> None:
    said = filled(tmp_path / "t", limit)
    assert f"at most {limit} bytes here (`ulimit -f`)" in said and "copy back" not in said
    Store.open(tmp_path / "t").close()


FILL = """
import resource, sqlite3, sys
from pathlib import Path
from ktransformers.server.tenants.database import explain
from ktransformers.server.tenants.records import StoreError
from ktransformers.server.tenants.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    store = Store.open(Path(sys.argv[1]))
    try:
        for i in range(5000):
            store.create_project(f"tenant {i}", "test")
    except sqlite3.Error as error:
        print(explain(store.database.path, error))
except StoreError as error:
    print(error)
"""
"""Makes tenants until that fails, and prints why."""


def filled(folder: Path, limit: int) -> str:
    command = [sys.executable, "-c", FILL, str(folder), str(limit)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_a_damaged_secret_is_said(tmp_path: Path) -> None:
    Directory.open(tmp_path / "t").close()
    first = (tmp_path / "t" / SECRET_FILE).read_bytes()
    Directory.open(tmp_path / "t").close()
    assert (tmp_path / "t" / SECRET_FILE).read_bytes() == first and len(first) == 32
    (tmp_path / "t" / SECRET_FILE).write_bytes(b"short")
    with pytest.raises(StoreError, match="32 bytes"):
        Directory.open(tmp_path / "t")


def test_killed_while_writing_nothing_is_half_there(tmp_path: Path) -> None:
    """kill -9 in a loop of acts: each that was answered is there with its line in the log; the file is
    whole."""
    code = (
        "import sys; from pathlib import Path\n"
        "from ktransformers.server.tenants.store import Store\n"
        "store = Store.open(Path(sys.argv[1]))\n"
        "for i in range(10**6):\n"
        "    p = store.create_project(f'{sys.argv[2]} {i}', 'test')\n"
        "    print(p.id, flush=True)\n"
        "    store.create_key(store.create_account(p.id, 'u', 'test'), 'k', 'test')\n"
    )
    answered = []
    for turn in range(4):
        command = [sys.executable, "-c", code, str(tmp_path / "t"), str(turn)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        answered.append(process.stdout.readline().strip())
        time.sleep(0.05 * turn)
        process.kill()
        answered += process.stdout.read().split()
        process.wait()
    store = Store.open(tmp_path / "t")
    ids = {p.id for p in store.projects()}
    # The last line of each may have been cut off by the pipe's end.
    assert {id_ for id_ in answered if len(id_) == 21} <= ids
    assert len(ids) <= len(answered) + 4
    created = [e.target for e in store.audit(limit=10**6) if e.action == "project.created"]
    assert set(created) == ids and len(created) == len(ids)
    store.close()
