"""The scheduler as a process, over its sockets, with the fake engine as another."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
from step_engine import answer

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.protocol import Sampling
from ktransformers.scheduler.client import RequestFailed, SchedulerClient
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.protocol import Submit, Tenant

HERE = Path(__file__).parent


class Processes:
    def __init__(self, folder: Path, step_seconds: float) -> None:
        self.socket = str(folder / "s.sock")
        self._engine_socket = str(folder / "e.sock")
        self._step_seconds = step_seconds
        self.config = folder / "scheduler.json"
        engine = EngineConfig(model="none", socket=self._engine_socket)
        self.config.write_bytes(msgspec.json.encode(SchedulerConfig(engine=engine, socket=self.socket)))
        self.start_engine()
        self.start_scheduler()

    def start_engine(self) -> None:
        fake = str(HERE / "step_engine.py")
        self.engine = subprocess.Popen([sys.executable, fake, self._engine_socket, str(self._step_seconds)])

    def start_scheduler(self) -> None:
        self.scheduler = subprocess.Popen([sys.executable, "-m", "ktransformers.scheduler", str(self.config)])

    def close(self) -> None:
        for process in (self.scheduler, self.engine):
            process.kill()
            process.wait()


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:
        # pytest's own folders have paths too long for a socket.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def begin(step_seconds: float = 0.0) -> Processes:
            processes = Processes(folder, step_seconds)
            stack.callback(processes.close)
            return processes

        yield begin


@contextlib.asynccontextmanager
async def connected(processes: Processes):
    client = SchedulerClient.connect(processes.socket)
    client.start()
    try:
        await until(lambda: client.status is not None and client.status.ready)
        yield client
    finally:
        await client.close()


async def until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come"
        await asyncio.sleep(0.01)


def request(i: int, n_prompt: int = 10, max_tokens: int = 20, **more) -> Submit:
    tokens = [(i * 31 + j * 7) % 1000 for j in range(n_prompt)]
    return Submit(f"r{i}", Tenant("t"), tokens, Sampling(max_tokens=max_tokens, **more), 0.0, b"")


async def collect(client: SchedulerClient, submit: Submit) -> tuple[list[int], str]:
    tokens: list[int] = []
    try:
        async for event in client.submit(submit):
            tokens += event.tokens
            if event.finish:
                return tokens, event.finish
    except RequestFailed as failure:
        return tokens, failure.code
    raise AssertionError("no terminal event")


def test_many_streams_at_once(start):
    async def main() -> None:
        async with connected(start()) as client:
            submits = [request(i, n_prompt=5 + i) for i in range(40)]
            results = await asyncio.gather(*(collect(client, s) for s in submits))
            for submit, result in zip(submits, results, strict=True):
                assert result == answer(submit.tokens, submit.sampling)
            assert client.open_requests == 0

    asyncio.run(main())


def test_leaving_a_stream_cancels_it(start):
    async def main() -> None:
        async with connected(start(0.005)) as client:
            async with contextlib.aclosing(client.submit(request(0, max_tokens=400))) as stream:
                async for _ in stream:
                    break
            await until(lambda: client.status is not None and client.status.running == 0)
            assert client.status is not None and client.status.blocks_used == 0

    asyncio.run(main())


def test_the_engine_dies_in_the_middle(start):
    async def main() -> None:
        processes = start(0.005)
        async with connected(processes) as client:
            begun = asyncio.create_task(collect(client, request(0, max_tokens=300)))
            await until(lambda: client.status is not None and client.status.generated_tokens > 0)
            processes.engine.kill()
            processes.engine.wait()
            await until(lambda: client.status is not None and not client.status.ready)
            waiting = asyncio.create_task(collect(client, request(1)))
            assert (await begun)[1] == "engine_restarted"
            processes.start_engine()
            assert await waiting == answer(request(1).tokens, request(1).sampling)
            await until(lambda: client.status is not None and client.status.ready)

    asyncio.run(main())


def test_the_scheduler_dies_in_the_middle(start):
    async def main() -> None:
        processes = start(0.05)
        async with connected(processes) as client:
            begun = asyncio.create_task(collect(client, request(0, max_tokens=300)))
            await until(lambda: client.status is not None and client.status.generated_tokens > 0)
            processes.scheduler.kill()
            processes.scheduler.wait()
            assert (await begun)[1] == "engine_restarted"
            waiting = asyncio.create_task(collect(client, request(1)))
            assert client.status is None
            processes.start_scheduler()
            assert await waiting == answer(request(1).tokens, request(1).sampling)

    asyncio.run(main())


def test_sigterm_drains_and_exits_0(start):
    async def main() -> None:
        processes = start(0.005)
        async with connected(processes) as client:
            begun = asyncio.create_task(collect(client, request(0, max_tokens=300)))
            await until(lambda: client.status is not None and client.status.generated_tokens > 0)
            processes.scheduler.terminate()
            await until(lambda: client.status is not None and client.status.draining)
            assert (await collect(client, request(1)))[1] == "draining"
            assert (await begun)[1] == "length"
            await until(lambda: processes.scheduler.poll() == 0)

    asyncio.run(main())


def test_a_second_sigterm_cuts_off_and_exits_75(start):
    async def main() -> None:
        processes = start(0.005)
        async with connected(processes) as client:
            begun = asyncio.create_task(collect(client, request(0, max_tokens=400)))
            await until(lambda: client.status is not None and client.status.generated_tokens > 0)
            processes.scheduler.terminate()
            await until(lambda: client.status is not None and client.status.draining)
            processes.scheduler.terminate()
            assert (await begun)[1] == "draining"
            await until(lambda: processes.scheduler.poll() == 75)

    asyncio.run(main())


def test_bad_configuration_is_one_line_and_exit_1(tmp_path):
    config = tmp_path / "bad.json"
    config.write_text('{"engine": {"model": "x"}, "max_waiting": 0}')
    command = [sys.executable, "-m", "ktransformers.scheduler", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "max_waiting" in done.stderr


def test_an_idle_scheduler_sleeps(start):
    async def main() -> None:
        processes = start()
        async with connected(processes) as client:
            await collect(client, request(0))

            def cpu() -> float:
                fields = Path(f"/proc/{processes.scheduler.pid}/stat").read_text().rsplit(")", 1)[1].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

            before = cpu()
            await asyncio.sleep(3)
            assert cpu() - before <= 0.06

    asyncio.run(main())


def test_the_parent_takes_its_scheduler_along(start, tmp_path):
    processes = start()
    code = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()"
    other = tmp_path / "s.json"
    other.write_bytes(processes.config.read_bytes().replace(b"s.sock", b"t.sock"))
    command = [sys.executable, "-c", code, sys.executable, "-m", "ktransformers.scheduler", str(other)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    socket = Path(processes.socket).with_name("t.sock")
    end = time.monotonic() + 60
    while not socket.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)
