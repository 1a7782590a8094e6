"""What may go wrong around a running server, each on the real thing: every client gets exactly one ending
(`stream` asserts it), the KV blocks come back, and the next request is answered."""

import asyncio
import fcntl
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import zmq
from clients import LONG, PROMPT, SHORT, ask, client, drained, stream

from ktransformers.engine.weights.gguf import read

ENDS = {"length", "stop", "engine_restarted", "internal", "http 503", "http 500"}


async def steady(server, until: asyncio.Event, width: int) -> list[str]:
    """Keep `width` streams open until told otherwise; how each ended. A broken connection is no ending."""
    ends: list[str] = []

    async def one(http: httpx.AsyncClient, body: dict) -> None:
        while not until.is_set():
            try:
                _, end = await stream(http, server.url, body)
            except httpx.HTTPError as error:
                end = type(error).__name__
            ends.append(end)
            if end not in ("length", "stop"):
                await asyncio.sleep(0.05)

    async with client() as http:
        await asyncio.gather(*(one(http, LONG if i % 2 else SHORT) for i in range(width)))
    return ends


async def ready_again(server, seconds: float = 120) -> float:
    """Seconds until /readyz has said 503, or nothing, and then 200."""
    begin, gone = time.monotonic(), False
    async with client() as http:
        while time.monotonic() - begin < seconds:
            try:
                code = (await http.get(f"{server.url}/readyz", timeout=2)).status_code
            except httpx.HTTPError:
                code = 0
            gone = gone or code != 200
            if gone and code == 200:
                return time.monotonic() - begin
            await asyncio.sleep(0.01)
    raise AssertionError(f"not ready again within {seconds} s (gone: {gone})")


def kill_under_load(server, victim: str, kills: int, seed: int) -> tuple[list[str], list[float]]:
    """Kill it at random moments: how the streams ended, and how long each time to the next readiness."""
    rng = random.Random(seed)

    async def run() -> tuple[list[str], list[float]]:
        until = asyncio.Event()
        load = asyncio.create_task(steady(server, until, 12))
        seconds = []
        for _ in range(kills):
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            server.role(victim).send_signal(signal.SIGKILL)
            seconds.append(await ready_again(server))
        until.set()
        return await load, seconds

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("victim", "allowed"),
    [
        ("engine", ENDS),
        ("scheduler", ENDS),
        # Its clients lose their connections; what they had asked for is dropped.
        ("server", ENDS | {"ConnectError", "ReadError", "RemoteProtocolError"}),
    ],
)
def test_killed_at_random_moments(start, victim: str, allowed: set[str]) -> None:
    server = start()
    ends, seconds = kill_under_load(server, victim, 3, seed=7)
    print(f"{victim}: ready again after {', '.join(f'{s:.2f}' for s in seconds)} s; {len(ends)} streams")
    assert set(ends) <= allowed, set(ends)
    assert ask(server).status_code == 200
    assert drained(server)["ktransformers_kv_blocks_used"] == 0


def test_the_blocks_of_a_dead_front_end_come_back(start) -> None:
    server = start()

    async def run() -> None:
        async with client() as http:
            load = [asyncio.create_task(stream(http, server.url, LONG)) for _ in range(4)]
            await asyncio.sleep(1)
            server.role("server").send_signal(signal.SIGKILL)
            await asyncio.gather(*load, return_exceptions=True)

    asyncio.run(run())
    server.wait_ready(120)
    assert drained(server)["ktransformers_kv_blocks_used"] == 0


def test_a_front_end_that_stood_still_ends_its_streams(start) -> None:
    """The scheduler gives it up after 3 s; when it wakes its clients must not wait for ever."""
    server = start()

    async def run() -> list[str]:
        async with client() as http:
            load = [asyncio.create_task(stream(http, server.url, LONG)) for _ in range(4)]
            await asyncio.sleep(0.7)
            front = server.role("server")
            front.send_signal(signal.SIGSTOP)
            await asyncio.sleep(5)
            front.send_signal(signal.SIGCONT)
            return [end for _, end in await asyncio.wait_for(asyncio.gather(*load), 120)]

    ends = asyncio.run(run())
    assert set(ends) <= ENDS, ends
    assert ask(server).status_code == 200
    assert drained(server)["ktransformers_kv_blocks_used"] == 0


def test_a_scheduler_that_stood_still_goes_on(start) -> None:
    server = start()

    async def run() -> list[str]:
        async with client() as http:
            load = [asyncio.create_task(stream(http, server.url, LONG)) for _ in range(4)]
            await asyncio.sleep(0.5)
            scheduler = server.role("scheduler")
            scheduler.send_signal(signal.SIGSTOP)
            await asyncio.sleep(4)
            code = (await http.get(f"{server.url}/readyz")).status_code
            scheduler.send_signal(signal.SIGCONT)
            assert code == 503
            return [end for _, end in await asyncio.wait_for(asyncio.gather(*load), 120)]

    assert set(asyncio.run(run())) == {"length"}
    assert drained(server)["ktransformers_kv_blocks_used"] == 0


@pytest.mark.slow
def test_an_engine_that_hangs_is_replaced(start) -> None:
    server = start()
    assert ask(server).status_code == 200

    async def run() -> tuple[list[str], float]:
        async with client() as http:
            load = [asyncio.create_task(stream(http, server.url, LONG)) for _ in range(4)]
            await asyncio.sleep(0.5)
            server.role("engine").send_signal(signal.SIGSTOP)
            seconds = await ready_again(server, 60)
            return [end for _, end in await asyncio.gather(*load)], seconds

    ends, seconds = asyncio.run(run())
    print(f"ready again after {seconds:.1f} s")
    assert set(ends) <= ENDS and seconds < 40
    assert ask(server).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("role", ["server", "scheduler"])
def test_a_process_that_hangs_is_replaced(start, role: str) -> None:
    server = start()
    time.sleep(30)  # half of what a new process is given
    hung = server.role(role)
    hung.send_signal(signal.SIGSTOP)
    seconds = asyncio.run(ready_again(server, 90))
    print(f"{role}: ready again after {seconds:.1f} s")
    assert not hung.is_running() and ask(server).status_code == 200


@pytest.mark.slow
def test_an_engine_that_dies_again_and_again(start) -> None:
    """After five deaths it stays away: nobody is kept waiting for it, and the others live."""
    server = start()
    for _ in range(4):
        server.role("engine").send_signal(signal.SIGKILL)
        asyncio.run(ready_again(server))
    server.role("engine").send_signal(signal.SIGKILL)
    time.sleep(1)
    for _ in range(10):
        refused = ask(server)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert httpx.get(f"{server.url}/livez").status_code == 200
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    assert re.search(r"engine was ended by SIGKILL.*restarting in 2\d\d", server.log.read_text())


def test_sigterm_under_load(start) -> None:
    """Whatever cannot end in time is told so, nobody's connection is just cut."""
    server = start(drain_timeout=3.0)

    async def run() -> list[str]:
        async with client() as http:
            bodies = [LONG | {"max_tokens": 4000}, SHORT] * 12
            load = [asyncio.create_task(stream(http, server.url, body)) for body in bodies]
            await asyncio.sleep(1)
            server.process.send_signal(signal.SIGTERM)
            while (await http.get(f"{server.url}/readyz")).status_code != 503:
                await asyncio.sleep(0.05)
            refused = await http.post(f"{server.url}/v1/completions", json=SHORT)
            assert refused.status_code == 503 and refused.headers["connection"] == "close"
            ends = [end for _, end in await asyncio.gather(*load)]
            while server.process.poll() is None:
                await asyncio.sleep(0.05)
            return ends

    ends = asyncio.run(run())
    assert set(ends) <= {"length", "stop", "server_shutdown", "http 503"} and "server_shutdown" in ends, ends
    assert server.process.returncode == 75


def reader_that_stopped() -> int:
    """The writing end of a small pipe that nobody reads."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    STOPPED.append(reading)  # left open
    return writing


STOPPED: list[int] = []


@pytest.mark.parametrize("log", ["full disk", "stopped reader", "reader gone"])
def test_the_log_does_not_stop_the_server(start, log: str) -> None:
    """Not even its end."""
    if log == "full disk":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        output = reader_that_stopped()
        if log == "reader gone":
            os.close(STOPPED.pop())
    server = start(output=output, log_level="debug")
    os.close(output)
    for victim in ("engine", "scheduler"):
        server.role(victim).send_signal(signal.SIGKILL)
        asyncio.run(ready_again(server))
    for _ in range(50):
        assert ask(server, max_tokens=1).status_code == 200
    assert server.stop() == 0


def test_the_model_file_is_truncated_under_it(start, default_model: Path, tmp_path: Path) -> None:
    """The weights are in memory: what runs goes on. A new engine refuses the file, says why, and takes it
    when it is whole again."""
    model = tmp_path / "model.gguf"
    shutil.copy(default_model, model)
    server = start(model=model)
    before = ask(server, max_tokens=16).json()["choices"][0]["text"]
    os.truncate(model, 1 << 20)
    assert ask(server, max_tokens=16).json()["choices"][0]["text"] == before
    server.role("engine").send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while "restarting in 1.0 s" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    refused = ask(server)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert "model.gguf" in server.log.read_text()
    shutil.copy(default_model, model)
    server.wait_ready(120)
    assert ask(server, max_tokens=16).json()["choices"][0]["text"] == before


POISON = 1000
"""A token whose embedding is not a number in the file that `poisoned` writes."""


def poisoned(model: Path, to: Path) -> None:
    """A copy of a model (Q8_0 embedding, tied) whose output matrix is a tensor of its own, so that the poison
    is only in what reads the token."""
    file, name = read(model), b"token_embd.weight"
    start, raw = file.header_bytes[0], model.read_bytes()
    names = [n.encode() for n in file.tensors]
    places = {n: raw.rfind(len(n).to_bytes(8, "little") + n, 0, start) for n in names}

    def after(info: bytes) -> int:
        """Where the type of a tensor ends: its name, dimensions and type lie before."""
        begin = places[info] + 8 + len(info)
        return begin + 4 + 8 * int.from_bytes(raw[begin : begin + 4], "little") + 4

    end = after(max(places, key=lambda n: places[n])) + 8
    data, embedding = bytearray(raw[start:]), file.tensor_bytes("token_embd.weight").tobytes()
    data += bytes(-len(data) % 32)
    output = b"output.weight"
    shape = raw[places[name] + 8 + len(name) : after(name)]
    info = len(output).to_bytes(8, "little") + output + shape + len(data).to_bytes(8, "little")
    head = raw[:8] + (len(file.tensors) + 1).to_bytes(8, "little") + raw[16:end] + info
    data += embedding
    row = file.tensors["token_embd.weight"].offset - start + POISON * (len(embedding) // 49152)
    data[row : row + 2] = b"\x00\x7e"  # the scale of its first group of 32: float16 NaN
    to.write_bytes(head + bytes(-len(head) % 32) + data)


def test_not_a_number_fails_one_request_and_no_other(start, default_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "poisoned.gguf"
    poisoned(default_model, model)
    server = start(model=model)
    common = list(range(2000, 2032))

    async def run() -> list[tuple[int, str]]:
        async with client() as http:

            async def one(prompt: list[int]) -> tuple[int, str]:
                body = {"model": "default", "prompt": prompt, "max_tokens": 8, "temperature": 0}
                reply = await http.post(f"{server.url}/v1/completions", json=body)
                document = reply.json()
                if reply.status_code != 200:
                    return reply.status_code, document["error"]["code"]
                return 200, document["choices"][0]["text"]

            alone = await one([*common, 7])
            mixed = [one([*common, POISON, 7] if i % 4 == 0 else [*common, 7]) for i in range(16)]
            return [alone, *await asyncio.gather(*mixed), await one([*common, 7])]

    alone, *mixed, last = asyncio.run(run())
    assert alone[0] == 200 and last == alone
    assert mixed == [(500, "numerical_error") if i % 4 == 0 else alone for i in range(16)]
    metrics = drained(server)
    assert metrics["ktransformers_engine_restarts_total"] == metrics["ktransformers_kv_blocks_used"] == 0


def test_too_little_address_space(tmp_path: Path) -> None:
    """The pool shrinks to what there is; where nothing useful fits the start fails with one line."""

    def serve(limit: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ktransformers.server.cli", "serve", "--port", "0"]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )

    too_little = serve(500 << 20)
    _, error = too_little.communicate(timeout=120)
    assert too_little.returncode == 1 and "Traceback" not in error and "memory" in error, error
    enough = serve(3 << 30)
    assert enough.stdout is not None
    lines = iter(enough.stdout.readline, "")
    assert any("Ready" in line for line in lines)
    enough.terminate()
    enough.communicate(timeout=120)
    assert enough.returncode == 0


def test_garbage_in_the_sockets(start) -> None:
    """From a process of the same user, the only ones that can open them: counted and dropped."""
    server = start()
    rng = random.Random(11)
    folder = Path(server.role("engine").cmdline()[-1]).parent
    sockets = sorted(folder.glob("*.sock"))
    assert [path.name for path in sockets] == ["engine.sock", "scheduler.sock"]
    context = zmq.Context()
    for path in sockets:
        peer = context.socket(zmq.DEALER)
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.SNDTIMEO, 10_000)
        peer.connect(f"ipc://{path}")
        for i in range(5_000):
            epoch = rng.randbytes(16 if i % 3 else rng.randrange(20))
            peer.send_multipart([epoch, rng.randbytes(rng.randrange(200))][: 1 + (i % 5 > 0)])
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(str(path))
        raw.sendall(rng.randbytes(4096))
        raw.close()
        assert ask(server).status_code == 200
        peer.close()
    context.term()
    assert ask(server).status_code == 200
    assert server.metrics()["ktransformers_engine_restarts_total"] == 0


def test_a_request_that_kills_the_engine_twice_is_given_up(start) -> None:
    server = start()

    async def run() -> tuple[str, str]:
        async with client() as http:
            poison = {"model": "default", "prompt": PROMPT * 500, "max_tokens": 4, "stream": True}
            task = asyncio.create_task(stream(http, server.url, poison))
            for _ in range(2):
                computed = server.metrics()["ktransformers_computed_tokens_total"]
                while server.metrics()["ktransformers_computed_tokens_total"] == computed:
                    await asyncio.sleep(0.02)  # until it is in a step
                server.role("engine").send_signal(signal.SIGKILL)
                await ready_again(server)
            innocent = await stream(http, server.url, SHORT)
            return (await task)[1], innocent[1]

    poison, innocent = asyncio.run(run())
    assert poison == "http 500" and innocent == "length"
    assert "quarantined" in server.log.read_text()


def test_nothing_outlives_a_killed_supervisor(start) -> None:
    server = start()
    processes = server.processes()
    server.process.kill()
    server.process.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, [p.cmdline() for p in alive]


def test_nothing_outlives_a_supervisor_killed_at_its_start(tmp_path: Path) -> None:
    """Its children may not have had the time to tie their lives to it."""
    rng = random.Random(3)
    for _ in range(3):
        command = [sys.executable, "-m", "ktransformers.server.cli", "serve", "--port", "0"]
        log, environment = subprocess.DEVNULL, os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
        process, deadline = psutil.Process(server.pid), time.monotonic() + 60
        while not process.children():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        children = process.children()
        server.kill()
        server.wait()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive, [p.cmdline() for p in alive]


def test_descriptors_and_threads_do_not_grow(start) -> None:
    """300 clients that leave, and two deaths of engine and scheduler: no process keeps anything of it."""
    server = start()

    def leave() -> None:
        async def run() -> None:
            async with client() as http:
                for _ in range(10):
                    await asyncio.gather(*(stream(http, server.url, LONG, read=1) for _ in range(30)))

        asyncio.run(run())
        drained(server)

    def counts() -> dict[str, tuple[int, int]]:
        processes = {role: server.role(role) for role in ("scheduler", "server")}
        processes["supervisor"] = server.processes()[0]
        return {role: (process.num_fds(), process.num_threads()) for role, process in processes.items()}

    for victim in ("engine", "scheduler"):
        server.role(victim).send_signal(signal.SIGKILL)
        asyncio.run(ready_again(server))
    leave()
    before = counts()
    server.role("engine").send_signal(signal.SIGKILL)
    asyncio.run(ready_again(server))
    leave()
    after = counts()
    for role, (files, threads) in after.items():
        assert files <= before[role][0] + 3 and threads <= before[role][1] + 1, (before, after)
    assert not re.search("Traceback|Exception", server.log.read_text())
