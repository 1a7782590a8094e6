"""What a server costs before it answers anything: `python tests/bench/startup.py [--idle 30]`.

Prints, for the default model with its file in the page cache: seconds from `ktransformers serve` to /readyz
200 and to the first token, where they go, seconds from the death of each process to readiness, CPU when idle,
and the memory of each process. Nothing is asserted: tests/e2e holds the bounds.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

ROLES = ("engine", "scheduler", "server")


def status(port: int, path: str, body: dict[str, object] | None = None) -> int:
    """HTTP status of a request; 0 when there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def until_ready(port: int, gone: bool = True) -> float:
    """Seconds until /readyz says 200, after it has not (`gone`: it does not now)."""
    begin = time.monotonic()
    while time.monotonic() - begin < 120:
        code = status(port, "/readyz")
        gone = gone or code != 200
        if gone and code == 200:
            return time.monotonic() - begin
        time.sleep(0.005)
    raise SystemExit("the server does not become ready")


@contextmanager
def running(port: int, folder: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server with default settings."""
    command = [sys.executable, "-m", "ktransformers.server.cli", "serve", "--port", str(port)]
    environment = os.environ | {"XDG_STATE_HOME": folder, "XDG_CONFIG_HOME": folder}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def roles(process: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """The processes by what they are called."""
    found = {"supervisor": psutil.Process(process.pid)}
    for child in found["supervisor"].children():
        name = next(part for part in child.cmdline() if part.startswith("ktransformers."))
        found[name.removeprefix("ktransformers.")] = child
    return found


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time since its start."""
    return sum(process.cpu_times()[:2])


def import_seconds(module: str) -> float:
    """CPU that importing a process's main module takes, beyond Python itself."""

    def cpu(code: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(cpu(f"import {module}") for _ in range(3)) - min(cpu("pass") for _ in range(3))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--idle", type=float, default=30, help="seconds of idleness to measure")
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    port = free_port()
    question = {"model": "default", "prompt": "1, 2, 3,", "max_tokens": 1}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.starts):
            begin = time.monotonic()
            with running(port, folder) as process:
                ready = until_ready(port)
                # Before the first answer: afterwards it is what serving takes.
                spent = {role: cpu_seconds(p) for role, p in roles(process).items()}
                status(port, "/v1/completions", question)
                first = time.monotonic() - begin
            cost = ", ".join(f"{role} {seconds:.2f}" for role, seconds in spent.items())
            print(f"start {i + 1}: ready after {ready:.2f} s, answers after {first:.2f} s; CPU s: {cost}")
        for module in ("server.cli", "server.commands.serve", *(f"{role}.__main__" for role in ROLES)):
            name = f"ktransformers.{module}"
            print(f"import {name:<38}{import_seconds(name):6.2f} s of CPU")
        with running(port, folder) as process:
            until_ready(port)
            for role in ROLES:
                roles(process)[role].send_signal(signal.SIGKILL)
                print(f"{role} killed: ready again after {until_ready(port, gone=False):.2f} s")
            status(port, "/v1/completions", question)
            time.sleep(2)
            before = {role: cpu_seconds(p) for role, p in roles(process).items()}
            time.sleep(options.idle)
            for role, p in roles(process).items():
                share = (cpu_seconds(p) - before[role]) / options.idle
                memory = p.memory_full_info()
                print(
                    f"{role:<11}idle {share:6.2%} of a core; RSS {memory.rss / 2**20:6.1f} MiB, "
                    f"of its own {memory.uss / 2**20:6.1f} MiB; {p.num_threads()} threads, {p.num_fds()} fds"
                )


if __name__ == "__main__":
    main()
