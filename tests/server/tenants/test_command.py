"""`ktransformers tenants`: what it prints, what it refuses, and that it needs no server."""

import hashlib
import re
import sys
import time
from pathlib import Path

import pytest

from ktransformers.server import cli
from ktransformers.server.tenants.database import FILE
from ktransformers.server.tenants.store import Store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    def run_one(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ktransformers", "tenants", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run_one


@pytest.fixture
def store(tmp_path: Path):
    store = Store.open(tmp_path / "ktransformers" / "tenants")
    yield store
    store.close()


def test_a_tenant_and_its_keys(run, store: Store) -> None:
    code, out, _ = run("create", "team", "--weight", "2.5", "--priority", "high", "--tokens-per-day", "1000")
    project = store.project("team")
    assert code == 0 and project.id in out
    assert (project.weight, project.priority, project.limits.tokens_per_day) == (2.5, "high", 1000)
    code, out, err = run("key", "team", "--name", "alice", "--expires", "30d", "--requests-per-minute", "5")
    assert code == 0 and re.fullmatch(r"kt-[A-Za-z0-9_-]{43}\n", out)  # a script can take it
    (key,) = store.keys(project.id)
    assert key.id in err and key.limits.requests_per_minute == 5
    assert abs(key.expires_at - time.time() - 30 * 86400) < 10
    run("key", project.id, "--name", "alice", "--scope", "api.model.read", "--expires", "2999-01-31")
    assert len(store.accounts(project.id)) == 1 and len(store.keys(project.id)) == 2
    _, out, _ = run("show", "team")
    assert "api.model.read" in out and "2999-01-31" in out and "tokens per day 1,000" in out
    assert run("revoke", key.id)[0] == 0 and len(store.keys(project.id)) == 1
    _, out, _ = run("list")
    assert out.splitlines()[1].split()[:5] == ["team", project.id, "2.5", "high", "1"]


def test_what_is_named_is_changed_and_nothing_else(run, store: Store) -> None:
    run("create", "team", "--requests-per-minute", "60", "--max-running", "4", "--models", "a,b")
    run("set", "team", "--requests-per-minute", "0", "--max-waiting", "8", "--rename", "crew")
    project = store.project("crew")
    limits = project.limits
    assert (limits.requests_per_minute, limits.max_running, limits.max_waiting) == (None, 4, 8)
    assert project.models == {"a", "b"}
    run("set", "crew", "--models", "all")
    assert store.project("crew").models == frozenset()
    assert run("delete", "crew")[0] == 0 and store.projects() == []
    _, out, _ = run("audit")
    assert [line.split()[3] for line in out.splitlines()[1:]] == [
        "project.archived", "project.updated", "rate_limit.updated", "project.updated", "project.created",
    ]  # fmt: skip


def test_a_key_is_changed_and_replaced(run, store: Store) -> None:
    run("create", "team")
    given = ["--name", "bot", "--expires", "10d", "--scope", "api.model.request", "--max-running", "2"]
    run("key", "team", *given)
    (old,) = store.keys(store.project("team").id)
    code, out, _ = run("set-key", old.id, "--tokens-per-day", "500", "--max-running", "0")
    old = store.find_key(old.id)
    assert code == 0 and "500" in out and (old.limits.tokens_per_day, old.limits.max_running) == (500, None)
    assert old.scopes == {"api.model.request"} and abs(old.expires_at - time.time() - 10 * 86400) < 10

    code, out, err = run("rotate", old.id, "--grace", "1h")
    assert code == 0 and re.fullmatch(r"kt-[A-Za-z0-9_-]{43}\n", out)
    before, after = store.keys(old.project)
    assert before.id == old.id and abs(before.expires_at - time.time() - 3600) < 10  # both work
    assert after.id in err and after.digest == hashlib.sha256(out.strip().encode()).digest()
    same = ("account", "name", "scopes", "limits", "project")
    assert [getattr(after, field) for field in same] == [getattr(old, field) for field in same]
    assert abs(after.expires_at - time.time() - 10 * 86400) < 10
    run("set-key", after.id, "--expires", "never", "--scope", "all")
    assert run("rotate", after.id)[0] == 0  # the old one ends at once
    assert [k.id == before.id for k in store.keys(old.project)] == [True, False]
    (_, last) = store.keys(old.project)
    assert (last.expires_at, last.scopes, last.limits.tokens_per_day) == (None, frozenset(), 500)
    run("rotate", before.id, "--grace", "9999d")  # no way to let a key live longer
    assert store.find_key(before.id).expires_at == before.expires_at

    run("admin-key", "boss")
    code, out, _ = run("rotate", store.keys("")[0].id)
    assert code == 0 and out.startswith("kt-admin-") and [k.name for k in store.keys("")] == ["boss"]


def test_keys_of_administrators(run, store: Store) -> None:
    code, out, _ = run("admin-key", "boss", "--expires", "1h")
    assert code == 0 and out.startswith("kt-admin-")
    assert [key.name for key in store.keys("")] == ["boss"]
    assert run("revoke", store.keys("")[0].id)[0] == 0 and store.keys("") == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "a\nb"], "printable"),
        (["create", "taken"], "already"),
        (["create", "x", "--weight", "0"], "weight"),
        (["create", "x", "--priority", "root"], "priority"),
        (["show", "nobody"], "nobody"),
        (["set", "taken"], "nothing to change"),
        (["delete", "nobody"], "nobody"),
        (["key", "nobody"], "nobody"),
        (["key", "taken", "--expires", "soon"], "--expires"),
        (["key", "taken", "--expires", "2001-01-01"], "expired"),
        (["key", "taken", "--scope", "root"], "scope"),
        (["revoke", "key_none"], "key_none"),
        (["rotate", "key_none"], "key_none"),
        (["set-key", "key_none", "--max-running", "1"], "key_none"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, store: Store, arguments: list[str], says: str) -> None:
    store.create_project("taken", "test")
    code, out, err = run(*arguments)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("ktransformers: ") and says in err
    assert [p.name for p in store.projects()] == ["taken"] and store.keys(store.project("taken").id) == []


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        ("", [], "empty"),
        ("no JSON", ["--messages"], "line 1"),
        ('{"role": "user"}', ["--messages"], "list of messages"),
        ("[]", ["--messages"], "must not be empty"),
        ("[1]", ["--messages"], "messages[0]"),
        ('[{"role": ["user"], "content": "x"}]', ["--messages"], "role"),
        ('[{"role": "user"}]', ["--messages"], "content"),
        (None, [], "No such file"),
    ],
)
def test_what_cannot_be_a_prompt_is_not_published(
    run, store: Store, tmp_path: Path, text: str | None, flags: list[str], says: str
) -> None:
    file = tmp_path / "prefix"
    if text is not None:
        file.write_text(text)
    code, out, err = run("publish", "p", str(file), *flags)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith(f"ktransformers: {file}: ") and says in err and "Errno" not in err
    assert store.public_prefixes() == []


def test_a_damaged_store_is_said_in_a_line(run, tmp_path: Path) -> None:
    folder = tmp_path / "ktransformers" / "tenants"
    folder.mkdir(parents=True)
    (folder / FILE).write_text("no database at all, but long enough to be looked at as one. " * 20)
    code, out, err = run("list")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert str(folder / FILE) in err
