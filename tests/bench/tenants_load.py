"""Servers with tenants of their own, and clients that count: what fairness.py measures with.

On plain sockets, one connection for each request as most clients do it, and no event is parsed but the usage
at the end: the clients share the CPUs of the server that they measure.
"""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

from ktransformers.server.bench.clients import lines
from ktransformers.server.tenants.store import Store

START_SECONDS = 120.0
STOP_SECONDS = 20.0
_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child",
    "world", "school", "state", "family", "student", "group", "country", "problem", "hand", "part",
    "place", "case", "week", "company", "system", "program", "question", "work", "government", "number",
    "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact",
)  # fmt: skip
_SERIES = re.compile(r"(\w+)(?:\{(.*)\})? ([0-9.eE+-]+)$")


def prompt(rng: random.Random, words: int) -> str:
    """Of about as many tokens; no two begin alike."""
    return " ".join(rng.choice(_WORDS) for _ in range(words))


@dataclass
class Reply:
    """What became of one request. Times are seconds from when it was sent."""

    status: int
    headers: dict[str, str]
    first: float = 0.0
    """To the first event with text; of a refusal, to its end."""
    seconds: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    code: str = ""
    """Of an error."""
    gaps: list[float] = field(default_factory=list)
    """Between its events with text."""


@dataclass(frozen=True)
class Server:
    """One that runs."""

    port: int
    keys: Mapping[str, str]
    """Of each tenant."""
    admin_key: str
    process: int

    async def ask(self, tenant: str, text: str, tokens: int) -> Reply:
        """A streamed chat of exactly so many tokens. Errors: OSError where the connection breaks."""
        body = json.dumps(
            {
                "model": "default",
                "messages": [{"role": "user", "content": text}],
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Authorization: Bearer {self.keys[tenant]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        begin = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.encode() + body)
            return await _read(reader, begin)
        finally:
            writer.close()

    def series(self) -> dict[tuple[str, str], float]:
        """The metrics, by (name, labels as they are written)."""
        request = Request(
            f"http://127.0.0.1:{self.port}/metrics", headers={"Authorization": f"Bearer {self.admin_key}"}
        )
        with urlopen(request, timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        found = [match for line in lines if (match := _SERIES.match(line))]
        return {(m[1], m[2] or ""): float(m[3]) for m in found}

    def memory(self) -> dict[str, float]:
        """MiB that each process holds."""
        sizes = {}
        for child in psutil.Process(self.process).children(recursive=True):
            words = " ".join(child.cmdline())
            for role in ("engine", "scheduler", "server"):
                if f"ktransformers.{role} " in f"{words} ":
                    sizes[role] = child.memory_info().rss / (1 << 20)
        return sizes


async def _read(reader: asyncio.StreamReader, begin: float) -> Reply:
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    reply = Reply(status, headers)
    usage, last = b"", 0.0
    async for line in lines(reader):
        if status != 200:
            if line.startswith(b"{"):
                reply.code = str(json.loads(line)["error"]["code"])
        elif line.startswith(b"data: {"):
            if b'"content":"' in line and b'"content":""' not in line:
                now = time.perf_counter()
                reply.first = reply.first or now - begin
                if last:
                    reply.gaps.append(now - last)
                last = now
            if b'"usage":{' in line:
                usage = line
            elif b'"error":{' in line:
                reply.code = str(json.loads(line[6:])["error"]["code"])
    reply.seconds = time.perf_counter() - begin
    reply.first = reply.first or reply.seconds
    if usage:
        counted = json.loads(usage[6:])["usage"]
        reply.prompt_tokens, reply.output_tokens = counted["prompt_tokens"], counted["completion_tokens"]
    return reply


@contextmanager
def started(folder: Path, tenants: Mapping[str, float], **settings: object) -> Iterator[Server]:
    """A server with these tenants (name -> weight), on a free port, all its files in `folder`."""
    folder.mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KTRANSFORMERS_")}
    environment |= {f"KTRANSFORMERS_{name.upper()}": str(value) for name, value in settings.items()}
    environment |= {
        f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "STATE", "CACHE")
    }
    keys, admin_key = _make_tenants(folder / "data" / "ktransformers" / "tenants", tenants)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-P", "-m", "ktransformers.server.cli", "serve", "--port", str(port)]
    command += ["--admin-port", "0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        _wait(port, process, folder / "log")
        yield Server(port, keys, admin_key, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _make_tenants(folder: Path, tenants: Mapping[str, float]) -> tuple[dict[str, str], str]:
    folder.parent.mkdir(parents=True)
    store = Store.open(folder)
    keys = {}
    for name, weight in tenants.items():
        project = store.create_project(name, "bench", weight=weight)
        account = store.create_account(project.id, "user", "bench")
        keys[name] = store.create_key(account, "key", "bench")[1]
    admin_key = store.create_key(None, "bench", "bench")[1]
    store.close()
    return keys, admin_key


def _wait(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        try:
            with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server does not become ready:\n{log.read_text()[-2000:]}")
