"""The benchmark command's parts: the clients, the peers, the tables; and the command on a small model."""

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from ktransformers.engine.bench.synthetic import Shape, write
from ktransformers.engine.limits import Limits
from ktransformers.server.bench.clients import Measured, ServerError, Target, Traffic, lines, quantile
from ktransformers.server.bench.processes import listener, usage
from ktransformers.server.bench.report import (
    OURS,
    Report,
    Row,
    process_lines,
    ratio,
    rows_table,
    serving_table,
)
from ktransformers.server.bench.serving import Footprint, Peer, Serving, asleep, measure, peer
from ktransformers.server.bench.sides import LlamaBench, SideError, WorkerSide
from ktransformers.server.commands import bench

LIMITS = Limits("reference", 2, {1: 1e9, 2: 2e9}, {"int8": 1e12, "bf16": 0.0, "f32": 1e11})


class FakeServer:
    """Answers each request with as many events as it asks for; counts words as tokens, and BOS as one."""

    def __init__(self, short: int = 0) -> None:
        self.prompts: list[str] = []
        self.short = short

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(h.split(":")[1]) for h in head.split("\r\n") if h.startswith("Content-Length"))
        body = json.loads(await reader.readexactly(length) or b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        if head.startswith("GET /v1/models "):
            writer.write(b'{"data":[{"id":"m"}]}')
        elif body["stream"]:
            assert body["model"] == "m" and body["ignore_eos"] and body["temperature"] == 0
            self.prompts.append(body["prompt"])
            tokens = body["max_tokens"] - self.short
            for _ in range(tokens):
                writer.write(b'data: {"choices":[{"text":"x"}]}\n\n')
            writer.write(b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % tokens)
            writer.write(b"data: [DONE]\n\n")
        else:
            used = len(body["prompt"].split()) + 1
            writer.write(json.dumps({"usage": {"prompt_tokens": used}}).encode())
        await writer.drain()
        writer.close()


def against(fake: FakeServer, traffic: Traffic) -> Measured:
    async def go() -> Measured:
        async with await asyncio.start_server(fake.handle, "127.0.0.1", 0) as server:
            target = Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
            await target.open()
            await target.calibrate(traffic.prompt)
            return await target.load(traffic, 7)

    return asyncio.run(go())


def test_clients() -> None:
    fake = FakeServer()
    measured = against(fake, Traffic(clients=3, requests=2, prompt=20, output=5))
    assert measured.output_tokens == 3 * 2 * 5
    assert measured.tokens_per_second == pytest.approx(30 / measured.seconds)
    assert 0 < measured.first_p50 <= measured.first_p95 and 0 <= measured.between_p50 <= measured.between_p95
    assert len(set(fake.prompts)) == 6
    assert {len(prompt.split()) for prompt in fake.prompts} == {19}  # and the token of the beginning


def test_a_server_that_stops_early_is_not_measured() -> None:
    with pytest.raises(ServerError, match="4 tokens in 4 events instead of 5"):
        against(FakeServer(short=1), Traffic(clients=1, requests=1, prompt=20, output=5))


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:1"):
        asyncio.run(Target("http://127.0.0.1:1").open())
    with pytest.raises(ServerError, match="not a URL"):
        Target("ftp://host")


@contextmanager
def in_a_thread(fake: FakeServer) -> Iterator[str]:
    """The URL of a server beside this thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        start = asyncio.run_coroutine_threadsafe(asyncio.start_server(fake.handle, "127.0.0.1", 0), loop)
        yield f"http://127.0.0.1:{start.result().sockets[0].getsockname()[1]}"
        loop.call_soon_threadsafe(start.result().close)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_servers_take_turns() -> None:
    ours, other = FakeServer(), FakeServer()
    traffic = Traffic(clients=2, requests=2, prompt=20, output=5)
    seen = []

    def alone(traffic: Traffic) -> float:
        seen.append((len(ours.prompts), len(other.prompts)))
        return 100.0

    with in_a_thread(ours) as our_url, in_a_thread(other) as url:
        peers = [Peer("other", Target(url))]
        serving = measure(traffic, 2, (OURS, Target(our_url), os.getpid()), peers, alone)
    assert [len(serving.rounds[name]) for name in (OURS, "other")] == [2, 2] and serving.alone == [100, 100]
    assert seen == [(0, 0), (2, 2), (6, 6)]  # a request of each client to warm up, then rounds
    # Two clients at once: which of them comes first is chance.
    assert sorted(ours.prompts) == sorted(other.prompts)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_peers_stand_still_but_in_their_turn() -> None:
    code = (
        "import os, socket, time\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "child = os.fork()\n"
        "if child: print(server.getsockname()[1], child, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port, child = map(int, process.stdout.readline().split())
        try:
            assert listener(port) == process.pid
            found = peer(f"name=http://127.0.0.1:{port}/v1")
            assert (found.name, found.pid) == ("name", process.pid)

            def wait_for(states: str) -> None:
                while not {state(process.pid), state(child)} <= set(states):
                    assert process.poll() is None

            with asleep([found]):
                wait_for("T")
                with found.awake():
                    wait_for("SR")
                wait_for("T")
            wait_for("SR")
        finally:
            os.kill(child, signal.SIGKILL)
            process.kill()
    assert peer("http://192.0.2.1:80").pid is None  # elsewhere


def test_quantile() -> None:
    assert [quantile([3, 1, 2], share) for share in (0, 0.5, 0.95, 1)] == [1, 2, 3, 3]
    assert quantile([], 0.5) == 0


def test_usage_of_a_process_tree() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()', 'ktransformers.engine'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        while "engine" not in usage(process.pid).cpu:
            assert process.poll() is None
        found = usage(process.pid)
        process.communicate(b"\n")
    assert set(found.cpu) == set(found.peak_bytes) == {"supervisor", "engine"}
    assert all(size > 1e6 for size in found.peak_bytes.values())
    assert usage(process.pid).cpu == {}


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_workers(tmp_path: Path) -> None:
    program = script(
        tmp_path / "worker",
        "import json, sys\n"
        "print('noise'); print(json.dumps({'engine': 'other'}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    job = json.loads(line)\n"
        "    if job['tokens'] == 0: break\n"
        "    print(json.dumps({'rate': job['tokens'] * job['seconds']}), flush=True)\n",
    )
    side = WorkerSide([str(program)])
    assert side.name == "other" and side.rate({"tokens": 8}, 0.5) == 4.0
    while state(side.pid) != "T":
        pass  # it stands still until the next question
    with pytest.raises(SideError, match="died with code 0"):
        side.rate({"tokens": 0}, 0.5)
    side.close()


def test_llama_bench(tmp_path: Path) -> None:
    program = script(
        tmp_path / "llama-bench",
        "import sys\n"
        "a = sys.argv\n"
        "open('llama.log', 'w').close()\n"
        "if '--help' in a: print('-d, --n-depth <n>'); sys.exit()\n"
        "if '-n' in a and '99' in a: sys.exit('bad model')\n"
        "rate = 100 if a[a.index('-n') + 1] == '0' else int(a[a.index('-d') + 1])\n"
        "print('[\\n {\"samples_ts\": [9, %d]}\\n]' % rate); print('bye', file=sys.stderr)\n",
    )
    side = LlamaBench(program, Path("m.gguf"), 2)
    assert side.rate({"kind": "prefill", "tokens": 512}, 0.5) == 100
    assert side.rate({"kind": "prefill", "tokens": 512}, 0.0) is None
    assert side.rate({"kind": "decode", "streams": 1, "context": 4096}, 0.5) == 4096
    many = {"kind": "decode", "streams": 8, "context": 128}
    assert side.rate(many, 0.5) is None
    script(
        tmp_path / "llama-batched-bench",
        "import sys\n"
        "assert sys.argv[sys.argv.index('-npl') + 1] == '8'\n"
        "print('|    PP | S_TG t/s |\\n|-----|-----|\\n|   128 |   55.5 |', file=sys.stderr)\n",
    )
    assert side.rate(many, 0.5) == 55.5
    side.close()
    assert not Path("llama.log").exists(), "it litters the folder that we are called in"
    with pytest.raises(SideError, match="ended with 1: bad model"):
        LlamaBench(program, Path("m.gguf"), 99).rate({"kind": "prefill", "tokens": 512}, 0.5)
    with pytest.raises(SideError, match="No such file"):
        LlamaBench(tmp_path / "absent", Path("m.gguf"), 2)


def test_llama_bench_of_forks(tmp_path: Path) -> None:
    """ik_llama.cpp's has another option for a depth; older ones have none, and decode from nothing."""
    text = (
        "import sys\n"
        "a = sys.argv\n"
        "if '--help' in a: print(HELP); sys.exit()\n"
        "print('[\\n {\"samples_ts\": [9, %s]}\\n]' % a[a.index('-gp') + 1].split(',')[0])\n"
    )
    one = {"kind": "decode", "streams": 1, "context": 128}
    fork = script(tmp_path / "fork", text.replace("HELP", "'  -gp <pp,tg>  (default: )'"))
    assert LlamaBench(fork, Path("m.gguf"), 2).rate(one, 0.5) == 128
    old = script(tmp_path / "old", text.replace("HELP", "'  -p, --n-prompt <n>'"))
    assert LlamaBench(old, Path("m.gguf"), 2).rate(one, 0.5) is None


def text_of(*things: object) -> str:
    console = Console(width=160, highlight=False)
    with console.capture() as capture:
        for thing in things:
            console.print(thing)
    return capture.get()


def test_tables() -> None:
    rates: dict[str, list[float | None]] = {OURS: [50.0, 100.0, 150.0], "other": [25.0, None, 50.0]}
    # The share is the median of 1/2, 1/4 and 1/2, not the best or the middle rate's.
    rows = [Row("decode 1", rates, [LIMITS] * 3, [100.0, 400.0, 300.0])]
    shown = text_of(rows_table(rows))
    assert "50.0/100.0/150.0" in shown and "100/300/400" in shown and "50%" in shown and "2.50" in shown
    assert "2.0/2.0/2.0" in shown  # GB/s
    assert ratio([1.0], [None]) is None

    def measured(rate: float) -> Measured:
        return Measured(rate, 0.1, 0.2, 0.003, 0.004, 64, 1.0)

    serving = Serving(Traffic(clients=4), {OURS: [measured(90.0)], "http://x": [measured(45.0)]}, [100.0])
    serving.cpu["server"] = [0.05]
    shown = text_of(serving_table([serving]))
    assert "100/200" in shown and "3/4" in shown and "90% of 100" in shown and "2.00" in shown
    report = Report("cpu", "model", LIMITS, 0.5, rows, [serving], Footprint(1.25, 0.01, {"engine": 10**8}))
    assert process_lines(report) == [
        "CPU s for 1,000 tokens, 4 clients: server 0.050",
        "start to first token 1.25 s; idle 1.0% of a CPU; peak memory 100 MB (engine 100)",
    ]


@pytest.mark.parametrize("profile", [False, True])
def test_the_command(tmp_path: Path, profile: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "small.gguf"
    write(model, Shape("small", 1, 256, 512, 4, 2, 640, context=1024), "Q8_0")
    options = bench.Options(
        model=str(model), threads=1, rounds=2, seconds=0.0, profile=profile, clients=(), out=tmp_path / "out"
    )
    assert bench.run(options) == 0
    report = msgspec.json.decode((tmp_path / "out" / "bench.json").read_bytes())
    assert report["limits"]["threads"] == 1 and report["cpu"]
    printed = capsys.readouterr().out
    assert os.fspath(model) in printed.replace("\n", "") and report["limits"]["isa"] in printed
    if profile:
        assert [p["load"]["kind"] for p in report["profiles"]][:2] == ["prefill", "decode"]
        assert "Attention" in printed and "of it" in printed
    else:
        assert {r["name"] for r in report["rows"]} >= {"prefill 512", "decode 32 at 128"}
        assert all(len(r["rates"][OURS]) == len(r["bounds"]) == len(r["limits"]) == 2 for r in report["rows"])
        assert all(bound > 0 for r in report["rows"] for bound in r["bounds"])
        assert "decode 1 at 4096" not in printed


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (bench.Options(only=("nothing",)), "--only nothing: no such load"),
        (bench.Options(random="qwen2.5-1.5b:Q3"), "--random qwen2.5-1.5b:Q3: not of the form"),
    ],
)
def test_what_is_refused(options: bench.Options, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        bench.run(options)


def test_a_side_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "small.gguf"
    write(model, Shape("small", 1, 256, 512, 4, 2, 640, context=1024), "Q8_0")
    peers = (partial(LlamaBench, tmp_path / "absent"),)
    options = bench.Options(
        model=str(model), threads=1, rounds=1, seconds=0.0, clients=(), peers=peers, out=tmp_path / "out"
    )
    assert bench.run(options) == 1
    assert "absent" in capsys.readouterr().out and (tmp_path / "out" / "bench.json").exists()


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_come_whole_however_they_arrive(end: str) -> None:
    """The last one, too: the body of an error ends without one."""

    async def read() -> list[bytes]:
        reader = asyncio.StreamReader()
        for piece in ("a", "b\n", "\nc\nd", end):
            reader.feed_data(piece.encode())
        reader.feed_eof()
        return [line async for line in lines(reader)]

    assert asyncio.run(read()) == [b"ab", b"", b"c", b"d"]
