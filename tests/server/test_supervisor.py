"""Starting, restarting and taking down, over children that are small scripts; the folder they live in."""

import asyncio
import ctypes
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from asyncio import unix_events
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from ktransformers.engine.config import EngineConfig
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.server.config import ConfigError, ServerConfig
from ktransformers.server.run_folder import run_folder, write_configurations
from ktransformers.server.supervisor import Child, Restarts, Supervisor, check_listening, commands

T = TypeVar("T")
PR_SET_CHILD_SUBREAPER = 36
FAST = Restarts(first_seconds=0.05)

IDLE = "import os, signal; signal.signal(signal.SIGTERM, lambda *_: (ended(), os._exit(0))); signal.pause()"
READY = """
    import http.server, signal, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ok = self.path == "/readyz" and self.headers["Host"] == f"127.0.0.1:{sys.argv[1]}"
            self.send_response(200 if ok else 404)
            self.end_headers()
        def log_message(self, *args):
            pass
    def stop(*args):
        import time
        time.sleep(float(sys.argv[2]))
        ended()
        sys.exit(int(sys.argv[3]))
    signal.signal(signal.SIGTERM, stop)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def make_config(**changes: Any) -> ServerConfig:
    engine = EngineConfig(model="m")
    return check_listening(ServerConfig(scheduler=SchedulerConfig(engine=engine), port=0, **changes))


class Trial:
    """A supervisor over scripts, which note their pids in a file, and the order in which they end."""

    def __init__(self, folder: Path, drain_seconds: float = 0.0, drain_code: int = 0, **scripts: str) -> None:
        self.folder = folder
        self.config = make_config(drain_timeout=0.5)
        ready = [str(self.config.port), str(drain_seconds), str(drain_code)]
        texts = {"engine": IDLE, "scheduler": IDLE, "server": READY} | scripts
        self.supervisor = Supervisor(
            self.config, {role: self.command(role, text, ready) for role, text in texts.items()}, FAST
        )
        self.urls: asyncio.Queue[str] = asyncio.Queue()

    def command(self, role: str, text: str, arguments: list[str]) -> list[str]:
        file = self.folder / f"{role}.py"
        note = f"import os\nopen({str(self.folder / role)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        note += f"def ended(): open({str(self.folder / 'ended')!r}, 'a').write('{role} ')\n"
        file.write_text(note + textwrap.dedent(text))
        return [sys.executable, "-S", str(file), *arguments]

    def pids(self, role: str) -> list[int]:
        file = self.folder / role
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    async def starts(self, role: str, n: int) -> int:
        """Wait until the role was started `n` times; its pid."""
        while len(self.pids(role)) < n:
            await asyncio.sleep(0.01)
        return self.pids(role)[-1]

    def run(self) -> "asyncio.Task[int]":
        return asyncio.get_running_loop().create_task(self.supervisor.run(self.urls.put_nowait))


def run(main: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(main, 120)

    return asyncio.run(limited())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_ready_restart_and_clean_end(tmp_path: Path) -> None:
    async def main() -> None:
        trial = Trial(tmp_path)
        task = trial.run()
        assert await trial.urls.get() == f"http://127.0.0.1:{trial.config.port}"
        for n, role in enumerate(("engine", "scheduler", "server", "engine")):
            start = len(trial.pids(role))
            pid = await trial.starts(role, 1)
            os.kill(pid, signal.SIGKILL)
            assert await trial.starts(role, start + 1) != pid, n
        assert not task.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 0
        for role in ("engine", "scheduler", "server"):
            assert not any(map(alive, trial.pids(role)))

    run(main())


def test_children_are_in_groups_of_their_own_and_take_their_children_along(tmp_path: Path) -> None:
    async def main() -> None:
        child = f"""
            import subprocess, sys
            p = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
            open({str(tmp_path / "grandchild")!r}, "w").write(str(p.pid))
            {IDLE}
        """
        trial = Trial(tmp_path, engine=child)
        task = trial.run()
        await trial.urls.get()
        pid = await trial.starts("engine", 1)
        while not (tmp_path / "grandchild").exists() or not (tmp_path / "grandchild").read_text():
            await asyncio.sleep(0.01)
        assert os.getpgid(pid) == pid
        grandchild = int((tmp_path / "grandchild").read_text())
        os.kill(pid, signal.SIGKILL)
        await trial.starts("engine", 2)
        assert not alive(grandchild)
        os.kill(os.getpid(), signal.SIGINT)
        assert await task == 0

    run(main())


def test_orphans_are_reaped(tmp_path: Path) -> None:
    """A grandchild in a session of its own outlives its parent, becomes ours, and leaves no zombie."""

    async def main() -> None:
        child = f"""
            import os, signal, subprocess, sys
            code = "import sys; sys.stdin.read()"
            p = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
            open({str(tmp_path / "orphan")!r}, "w").write(f"{{p.pid}} ")
            {IDLE}
        """
        trial = Trial(tmp_path, engine=child)
        task = trial.run()
        await trial.urls.get()
        while not (file := tmp_path / "orphan").exists() or not file.read_text().endswith(" "):
            await asyncio.sleep(0.01)
        orphan = int(file.read_text())
        os.kill(await trial.starts("engine", 1), signal.SIGKILL)
        while Path(f"/proc/{orphan}").exists():
            await asyncio.sleep(0.01)
        await trial.starts("engine", 2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 0

    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        run(main())
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


@pytest.mark.parametrize("code", [0, 75, 70])
def test_exit_code_of_a_drain(tmp_path: Path, code: int) -> None:
    async def main() -> int:
        trial = Trial(tmp_path, drain_seconds=0.1, drain_code=code)
        task = trial.run()
        await trial.urls.get()
        for role in ("engine", "scheduler"):
            await trial.starts(role, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        return await task

    assert run(main()) == code
    # The API first: the others serve its last requests.
    assert (tmp_path / "ended").read_text() == "server scheduler engine "


def test_an_engine_that_hangs_does_not_stop_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktransformers.server.supervisor.STOP_SECONDS", 2.0)

    async def main() -> None:
        trial = Trial(tmp_path)
        task = trial.run()
        await trial.urls.get()
        os.kill(await trial.starts("engine", 1), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 70
        assert not alive(trial.pids("engine")[0])

    run(main())


def test_what_cannot_be_started_for_now_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        trial = Trial(tmp_path)
        task = trial.run()
        await trial.urls.get()
        real, failed = asyncio.create_subprocess_exec, []

        async def fail_twice(*command: str, **options: Any) -> asyncio.subprocess.Process:
            if len(failed) < 2:
                failed.append(command)
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return await real(*command, **options)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", fail_twice)
        os.kill(await trial.starts("engine", 1), signal.SIGKILL)
        await trial.starts("engine", 2)
        assert len(failed) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 0

    run(main())


def test_a_hung_api_or_scheduler_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PROBE", 0.05), ("GRACE", 0.2), ("ANSWER", 1.0)):
        monkeypatch.setattr(f"ktransformers.server.supervisor.{name}_SECONDS", value)
    monkeypatch.setattr("ktransformers.server.supervisor.HUNG_PROBES", 3)
    mute, full = tmp_path / "mute", tmp_path / "full"
    server = READY.replace(
        "def do_GET(self):",
        f"""def do_GET(self):
            import os
            if os.path.exists({str(full)!r}):
                return""",
    ).replace(
        "self.end_headers()",
        f"""self.end_headers()
            if self.path == "/healthz":
                there = not os.path.exists({str(mute)!r})
                self.wfile.write(b"{{\\"scheduler\\": %s}}" % str(there).lower().encode())""",
    )

    async def main() -> None:
        trial = Trial(tmp_path, server=server)
        task = trial.run()
        await trial.urls.get()
        await asyncio.sleep(1)
        assert [len(trial.pids(role)) for role in ("engine", "scheduler", "server")] == [1, 1, 1]
        os.kill(trial.pids("server")[0], signal.SIGSTOP)
        await trial.starts("server", 2)
        mute.touch()
        await trial.starts("scheduler", 2)
        mute.unlink()
        # Hanging up at once, as on a connection too many, is no hanging.
        full.touch()
        await asyncio.sleep(1)
        assert [len(trial.pids(role)) for role in ("engine", "scheduler", "server")] == [1, 2, 2]
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 0

    run(main())


def test_the_code_of_a_child_that_has_just_ended_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ctrl-C reaches it before it is in its own group, and asyncio has not seen it end yet."""
    names = ("ThreadedChildWatcher", "_ThreadedChildWatcher")  # until and from Python 3.14 on
    watcher = next(getattr(unix_events, name) for name in names if hasattr(unix_events, name))
    wait = watcher._do_waitpid

    def late(*arguments: Any) -> None:
        time.sleep(0.3)
        wait(*arguments)

    monkeypatch.setattr(watcher, "_do_waitpid", late)

    async def main() -> None:
        supervisor = Trial(tmp_path).supervisor
        child = supervisor._children["engine"]
        child.command = ["sleep", "60"]
        for number in (signal.SIGTERM, signal.SIGINT):
            process = await supervisor._start(child)
            os.kill(process.pid, number)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert await supervisor._stop("engine", 60) == -number

    run(main())


def test_second_signal_is_immediate(tmp_path: Path) -> None:
    async def main() -> None:
        trial = Trial(tmp_path, drain_seconds=60)
        task = trial.run()
        await trial.urls.get()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # the same again, from a wrapper
        await asyncio.sleep(0.4)
        assert not task.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 75  # long before the minute is over

    run(main())


def test_configuration_error_of_a_child_is_final(tmp_path: Path) -> None:
    async def main() -> None:
        trial = Trial(tmp_path, engine="raise SystemExit(1)")
        assert await trial.run() == 1
        assert len(trial.pids("engine")) == 1

    run(main())


def test_exit_code_1_after_readiness_is_a_death(tmp_path: Path) -> None:
    async def main() -> None:
        once = f"""
            import os, time
            if len(open({str(tmp_path / "scheduler")!r}).readlines()) == 1:
                while not os.path.exists({str(tmp_path / "go")!r}):
                    time.sleep(0.01)
                raise SystemExit(1)
            {IDLE}
        """
        trial = Trial(tmp_path, scheduler=once)
        task = trial.run()
        await trial.urls.get()
        (tmp_path / "go").touch()
        await trial.starts("scheduler", 2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 0

    run(main())


def test_gives_up_on_a_child_that_never_lets_it_be_ready(tmp_path: Path) -> None:
    async def main() -> None:
        trial = Trial(tmp_path, server="import os; os.abort()")
        assert await trial.run() == 70
        assert len(trial.pids("server")) == 5
        assert not alive(trial.pids("engine")[0])

    run(main())


def test_the_circuit_opens_and_closes() -> None:
    """The pause doubles; after five deaths in a row it lasts until the first of them is old."""
    rules, child, now = Restarts(), Child("engine", ["x"]), 1000.0
    pauses = []
    for _ in range(6):
        child.started = now
        now += 1.0  # it lives for a second
        pauses.append(rules.delay(child, now))
        now += pauses[-1]
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    fifth = 1001.0 + 4 + sum(pauses[:4])
    assert pauses[4] == 1001.0 + rules.window_seconds - fifth
    second = 1001.0 + 1.0 + pauses[0]
    assert pauses[5] == second + rules.window_seconds - (1001.0 + rules.window_seconds + 1.0)
    child.started, now = now, now + rules.window_seconds + 1.0  # settled: as if nothing had been
    assert rules.delay(child, now) == rules.first_seconds


def test_port_is_checked_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port}: Address already in use.*--port"):
            check_listening(msgspec.structs.replace(make_config(), port=port))
    assert check_listening(msgspec.structs.replace(make_config(), port=port)).port == port
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        check_listening(msgspec.structs.replace(make_config(), host="192.0.2.1"))


def test_a_host_that_is_not_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_server", unknown)
    with pytest.raises(ConfigError, match="Name or service not known"):
        check_listening(config)


def test_folder_is_ours_alone_and_removed(tmp_path: Path) -> None:
    base = tmp_path / "runtime"
    with run_folder([base]) as folder:
        config = write_configurations(make_config(), folder)
        assert stat.S_IMODE(base.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
        kinds = {"engine": EngineConfig, "scheduler": SchedulerConfig, "server": ServerConfig}
        for role, kind in kinds.items():
            file = folder / f"{role}.json"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            msgspec.json.decode(file.read_bytes(), type=kind)
            assert commands(folder)[role][-1] == str(file)
        assert config.scheduler.engine.socket == str(folder / "engine.sock")
    assert not folder.exists()


def test_a_path_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    config = make_config()
    engine = msgspec.structs.replace(config.scheduler.engine, model="/models/\udcff.gguf")
    scheduler = msgspec.structs.replace(config.scheduler, engine=engine)
    config = msgspec.structs.replace(config, scheduler=scheduler)
    not_utf8 = pytest.raises(ConfigError, match=r"udcff\.gguf': not UTF-8")
    with run_folder([tmp_path / "runtime"]) as folder, not_utf8:
        write_configurations(config, folder)


def test_a_configuration_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a file, as of a write

    with run_folder([tmp_path / "runtime"]) as folder:
        monkeypatch.setattr(os, "open", full)
        with pytest.raises(ConfigError, match=rf"{folder}/engine\.json: No space left"):
            write_configurations(make_config(), folder)
        monkeypatch.undo()


def test_folders_of_killed_servers_are_swept_and_no_others(tmp_path: Path) -> None:
    code = "import sys, os, signal; from pathlib import Path\n"
    code += "from ktransformers.server.run_folder import run_folder\n"
    code += "with run_folder([Path(sys.argv[1])]) as f: print(f, flush=True); signal.pause()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with run_folder([tmp_path]):
            assert theirs.exists()
        other.kill()
    assert theirs.exists()
    with run_folder([tmp_path]) as folder:
        assert not theirs.exists()
        assert folder.exists()


def test_nothing_is_removed_where_others_may_have_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "ours" / "run-of-importance"
    precious.mkdir(parents=True)
    (precious / "lock").touch()
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    lstat = Path.lstat
    planted = os.stat_result((0o120777, 1, 1, 1, os.geteuid() + 1, 0, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "lstat", lambda path: planted if path.name == "link" else lstat(path))
    with pytest.raises(ConfigError, match="another user"), run_folder([tmp_path / "link"]):
        pass
    (tmp_path / "ours").chmod(0o777)
    with pytest.raises(ConfigError, match="by others"), run_folder([tmp_path / "ours"]):
        pass
    assert precious.exists()


def test_long_paths_are_passed_over(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    with run_folder([long, tmp_path]) as folder:
        assert folder.parent == tmp_path
    with pytest.raises(ConfigError, match="shorter"), run_folder([long]):
        pass


def test_idle_supervisor_uses_no_cpu(tmp_path: Path) -> None:
    async def main() -> None:
        trial = Trial(tmp_path)
        task = trial.run()
        await trial.urls.get()
        begin = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - begin < 0.01
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 0

    run(main())
