"""What the prefix cache saves, and costs: `python tests/bench/prefix_cache.py [--peer-python PYTHON]`.

First token of a prompt of 4,000 tokens at the real server with the default model: cold, from the device, from
disk once other prompts have taken its place, and from disk after a restart of everything; with a python that
has xllamacpp, the same at llama.cpp's server, which keeps nothing on disk. Then the tokens per second of
prompts that nobody asks for twice, with all tiers and with none, in turns. Then first tokens with a disk on
which each call takes 50 ms, beside a server without a disk tier (this needs a C compiler).
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ktransformers.server.library import resolve

HERE = Path(__file__).resolve().parent
WORDS = ("sea", "storm", "lamp", "ship", "night", "gull", "rock", "letter", "captain", "fog", "bell", "rope")
BLOCK_BYTES = 368_640
"""Of the default model: 16 tokens."""


def prompt(seed: int, words: int) -> str:
    """A text that begins like no other."""
    rng = random.Random(seed)
    return f"{rng.getrandbits(64)} " + " ".join(rng.choice(WORDS) for _ in range(words))


@cache
def model(port: int) -> str:
    """The name that the server has for what it serves."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/v1/models")
    name: str = json.load(connection.getresponse())["data"][0]["id"]
    connection.close()
    return name


class Answer:
    """One streamed completion."""

    def __init__(self, port: int, text: str, tokens: int) -> None:
        body = {
            "model": model(port),
            "prompt": text,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        begin = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status}: {response.read().decode()}")
        self.first = 0.0
        """Seconds to the first token."""
        self.cached = self.prompt_tokens = 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if not self.first and event.get("choices"):
                self.first = time.perf_counter() - begin
            if usage := event.get("usage"):
                self.prompt_tokens = usage["prompt_tokens"]
                self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        connection.close()


@contextmanager
def serving(folder: str, preload: dict[str, str] | None = None, **settings: object) -> Iterator[int]:
    """The port of a server whose cache is in `folder`; `preload` are more environment variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KTRANSFORMERS_")}
    environment |= {f"XDG_{kind}_HOME": folder for kind in ("STATE", "CONFIG", "CACHE", "DATA")}
    environment |= {f"KTRANSFORMERS_{name.upper()}": str(value) for name, value in settings.items()}
    environment |= preload or {}
    command = [sys.executable, "-m", "ktransformers.server.cli", "serve", "--port", "0"]
    yield from announced(command, environment)


@contextmanager
def serving_llamacpp(python: str, context: int) -> Iterator[int]:
    """The port of llama.cpp's server, which keeps the KV of the last prompt."""
    options = [str(resolve("")), str(os.cpu_count()), "1", str(context), "cache"]
    yield from announced([python, str(HERE / "serve_llamacpp.py"), *options], dict(os.environ))


def announced(command: list[str], environment: dict[str, str]) -> Iterator[int]:
    """Run a server until the generator ends; the port that it says when it is ready."""
    process = subprocess.Popen(
        command,
        env=environment,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        for line in process.stdout or ():
            if line.startswith("Ready: "):
                yield int(line.split()[1].rsplit(":", 1)[1])
                return
        raise SystemExit(f"a server ended with {process.wait()}")
    finally:
        process.terminate()
        process.wait()


def first_tokens(rounds: int, words: int) -> dict[str, list[Answer]]:
    """Answers by where the KV of the prompt was. The device pool holds a third more than one prompt."""
    texts = [prompt(i, words) for i in range(rounds)]
    found: dict[str, list[Answer]] = {"cold": [], "device": [], "disk": [], "after a restart": []}
    with tempfile.TemporaryDirectory() as folder:
        pool = int(words * 1.34 / 16) * BLOCK_BYTES
        with serving(folder, device_bytes=pool) as port:
            Answer(port, "hello", 4)
            for text in texts:
                found["cold"].append(Answer(port, text, 4))
                found["device"].append(Answer(port, text, 4))
                Answer(port, text, 4)
                time.sleep(1)  # what is worth it is written to disk beside the steps
            for text in texts:
                found["disk"].append(Answer(port, text, 4))
        with serving(folder, device_bytes=pool) as port:
            Answer(port, "hello", 4)
            for text in texts:
                found["after a restart"].append(Answer(port, text, 4))
    return found


def first_tokens_llamacpp(python: str, rounds: int, words: int) -> dict[str, list[Answer]]:
    """The same, as far as it goes."""
    texts = [prompt(i, words) for i in range(rounds)]
    found: dict[str, list[Answer]] = {"cold": [], "device": [], "after a restart": []}
    with serving_llamacpp(python, int(words * 1.34)) as port:
        Answer(port, "hello", 4)
        for text in texts:
            found["cold"].append(Answer(port, text, 4))
            found["device"].append(Answer(port, text, 4))
    for text in texts:
        with serving_llamacpp(python, int(words * 1.34)) as port:
            Answer(port, "hello", 4)
            found["after a restart"].append(Answer(port, text, 4))
    return found


def show(who: str, found: dict[str, list[Answer]]) -> None:
    """One line for each place."""
    cold = statistics.median(a.first for a in found["cold"])
    for place, answers in found.items():
        times = [a.first for a in answers]
        median = statistics.median(times)
        spread = f"{min(times) * 1e3:.0f} to {max(times) * 1e3:.0f}"
        cached = statistics.median(a.cached for a in answers)
        tokens = statistics.median(a.prompt_tokens for a in answers)
        print(
            f"{who:<15}{place:<18}{median * 1e3:>8.0f} ms {median / cold:>7.1%} of cold  ({spread})  "
            f"{cached:.0f} of {tokens:.0f} tokens cached"
        )


def rate(port: int, seed: int, clients: int, seconds: float) -> float:
    """Tokens per second, in and out, of closed-loop clients whose prompts are all new."""
    end = time.perf_counter() + seconds

    def client(number: int) -> int:
        done = 0
        rng = random.Random(seed * 1000 + number)
        while time.perf_counter() < end:
            done += Answer(port, prompt(rng.getrandbits(60), 150), 32).prompt_tokens + 32
        return done

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        done = sum(pool.map(client, range(clients)))
    return done / (time.perf_counter() - begin)


def throughput(rounds: int, clients: int, seconds: float) -> None:
    """Both servers run at once, and one of them works at a time, each first in every other round."""
    # A pool that is full soon, so that blocks are evicted all the time.
    pool = 600 * BLOCK_BYTES
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(f"{folder}/on", device_bytes=pool, host_bytes=pool // 2) as on,
        serving(f"{folder}/off", device_bytes=pool, prefix_reuse="false") as off,
    ):
        ratios = []
        for i in range(rounds + 1):
            found = {port: rate(port, i, clients, seconds) for port in ((on, off) if i % 2 else (off, on))}
            if i:  # the first round fills the pools
                ratios.append(found[on] / found[off])
                print(f"all tiers {found[on]:8.0f} tokens/s   none {found[off]:8.0f}   {ratios[-1]:.1%}")
    print(f"throughput without reuse, all tiers against none: {statistics.median(ratios):.1%} (median)")


def slow_disk(asks: int, words: int) -> None:
    """Prompts in random order, each asked for a few times, of which the device holds a third."""
    texts = [prompt(1000 + i, words) for i in range(max(asks // 4, 1))]
    pool = int((len(texts) * words / 3 + 2 * words) / 16) * BLOCK_BYTES
    with tempfile.TemporaryDirectory() as folder:
        library, slow = f"{folder}/slow_disk.so", f"{folder}/slow"
        source = str(HERE / "slow_disk.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"], check=True)
        preload = {"LD_PRELOAD": library, "SLOW_DISK_FOLDER": slow, "SLOW_DISK_MS": "50"}
        rng = random.Random(4)
        times: dict[str, list[float]] = {"a disk of 50 ms a call": [], "no disk tier": []}
        with (
            serving(slow, preload, device_bytes=pool) as on,
            serving(f"{folder}/none", device_bytes=pool, disk_bytes=0) as off,
        ):
            for i in range(asks):
                text = rng.choice(texts)
                for port in (on, off) if i % 2 else (off, on):
                    times["no disk tier" if port == off else "a disk of 50 ms a call"].append(
                        Answer(port, text, 4).first
                    )
    found = {}
    for name, firsts in times.items():
        found[name] = statistics.quantiles(firsts, n=20)[18]
        median = statistics.median(firsts)
        print(f"{name:<24} first token {median * 1e3:6.0f} ms median, {found[name] * 1e3:6.0f} ms p95")
    print("p95 with against without: {:.2f}".format(found["a disk of 50 ms a call"] / found["no disk tier"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=3960, help="of the prompt; a word is a token")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each side in each round")
    parser.add_argument("--peer-python", help="a python with xllamacpp")
    parser.add_argument("--only", choices=("first", "throughput", "slow-disk"))
    parser.add_argument("--asks", type=int, default=60, help="of each server beside the slow disk")
    given = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    wanted = (given.only,) if given.only else ("first", "throughput", "slow-disk")
    if "first" in wanted:
        show("ktransformers", first_tokens(given.rounds, given.words))
        if given.peer_python:
            show("llama.cpp", first_tokens_llamacpp(given.peer_python, given.rounds, given.words))
    if "throughput" in wanted:
        throughput(2 * given.rounds, given.clients, given.seconds)
    if "slow-disk" in wanted:
        slow_disk(given.asks, given.words // 10)


if __name__ == "__main__":
    main()
