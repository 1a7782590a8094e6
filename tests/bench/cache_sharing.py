"""What the tiers do for many, and what they tell of others: `python tests/bench/cache_sharing.py`.

Against the real server with the default model: conversations with shared system prompts and a device pool a
quarter of what they need, with the tiers on and off and with a pool that holds all; a tenant that tries to
tell by the time whether another has sent a prompt, and whether one is public; and a tenant that floods.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prefix_cache import BLOCK_BYTES, Answer, model, serving

KEYS = {"alice": "alice-key-of-the-bench", "bob": "bob-key-of-the-bench"}
WORDS = "sea storm lamp ship night gull rock letter captain fog bell rope harbour candle anchor".split()  # noqa: SIM905


def text(seed: object, words: int) -> str:
    rng = random.Random(str(seed))
    return f"{rng.getrandbits(48)} " + " ".join(rng.choice(WORDS) for _ in range(words))


def ask(port: int, who: str, prompt: str) -> tuple[float, int, int]:
    """Seconds until an answer of one token is there, tokens of the prompt, and those that were cached."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEYS[who]}"}
    connection.request("GET", "/v1/models", headers=headers)
    name = json.load(connection.getresponse())["data"][0]["id"]
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0})
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", body, headers)
    answer = json.load(connection.getresponse())
    seconds = time.perf_counter() - begin
    usage = answer["usage"]
    return seconds, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


# ---- conversations


def conversations(port: int, sessions: int, turns: int) -> tuple[float, float, float, float]:
    """Share of the prompt tokens that was cached; median and 95th percentile of the time to the first token;
    prompt tokens a second."""
    model(port)
    histories = [text(f"system {i % 4}", 120) for i in range(sessions)]
    answers: list[Answer] = []
    begin = time.perf_counter()

    def turn(i: int, n: int) -> None:
        histories[i] += "\n" + text(f"{i} {n}", 30)
        answers.append(Answer(port, histories[i], 8))
        histories[i] += "\n" + text(f"answer {i} {n}", 8)

    with ThreadPoolExecutor(4) as pool:
        for n in range(turns):
            list(pool.map(lambda i, n=n: turn(i, n), range(sessions)))
    seconds = time.perf_counter() - begin
    tokens = sum(answer.prompt_tokens for answer in answers)
    firsts = sorted(answer.first for answer in answers)
    cached = sum(answer.cached for answer in answers) / tokens
    return cached, statistics.median(firsts), firsts[int(0.95 * (len(firsts) - 1))], tokens / seconds


def trace(sessions: int, turns: int) -> None:
    need = sessions * (130 + turns * 50) // 16 * BLOCK_BYTES
    sides = {
        "a pool for all": {"device_bytes": 4 * need, "host_bytes": 0, "disk_bytes": 0},
        "tiers off": {"device_bytes": need // 4, "host_bytes": 0, "disk_bytes": 0},
        "tiers on": {"device_bytes": need // 4, "host_bytes": 2 * need, "disk_bytes": 8 * need},
        "disk alone": {"device_bytes": need // 4, "host_bytes": 0, "disk_bytes": 8 * need},
    }
    print(f"{sessions} conversations of {turns} turns, {need / 1e6:.0f} MB of KV in all")
    print(f"{'':16}{'cached':>8}{'of all':>8}{'TTFT p50':>10}{'p95':>8}{'tokens/s':>10}")
    most = 0.0
    for name, settings in sides.items():
        with tempfile.TemporaryDirectory() as folder, serving(folder, **settings) as port:
            cached, p50, p95, rate = conversations(port, sessions, turns)
        most = most or cached
        print(f"{name:16}{cached:8.1%}{cached / most:8.1%}{p50:10.3f}{p95:8.3f}{rate:10.0f}", flush=True)


# ---- what another can tell


def auc(hits: list[float], misses: list[float]) -> float:
    """How likely a hit takes less time than a miss."""
    return sum((h < m) + (h == m) / 2 for h in hits for m in misses) / (len(hits) * len(misses))


def probes(folder: str, port: int, count: int, words: int) -> None:
    private: tuple[list[float], list[float]] = ([], [])
    public: tuple[list[float], list[float]] = ([], [])
    secret = Path(folder, "public.txt")
    secret.write_text(text("public", words))
    command = [sys.executable, "-m", "ktransformers.server.cli", "tenants", "publish", "bench", str(secret)]
    subprocess.run(command, env={**os.environ, "XDG_DATA_HOME": folder}, check=True)
    time.sleep(5)
    for i in range(count):
        sent, unsent = text(f"sent {i}", words), text(f"unsent {i}", words)
        ask(port, "alice", sent)
        for prompt, times in ((sent, private[0]), (unsent, private[1])):
            times.append(ask(port, "bob", prompt)[0])
        known = f"{secret.read_text()} {i}"
        for prompt, times in ((known, public[0]), (text(f"other {i}", words), public[1])):
            times.append(ask(port, "bob", prompt)[0])
    print(f"AUC of {count} + {count} probes: another's prompt {auc(*private):.3f}, public {auc(*public):.3f}")


def flood(port: int, words: int, pool_blocks: int) -> None:
    """Alice holds less than her half; Bob sends ten times his."""
    mine = [text(f"mine {i}", words) for i in range(max(1, pool_blocks * 16 // 4 // words))]

    def share() -> float:
        found = [ask(port, "alice", prompt)[1:] for prompt in mine]
        return sum(cached for _, cached in found) / sum(tokens for tokens, _ in found)

    share()
    before = share()
    for i in range(10 * pool_blocks * 16 // 2 // words):
        ask(port, "bob", text(f"flood {i}", words))
    print(f"alice finds {before:.1%} of her prompts; after bob sent ten times his share, {share():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--probes", type=int, default=40, help="500 for the record")
    parser.add_argument("--words", type=int, default=250, help="of a probe")
    options = parser.parse_args()
    trace(options.sessions, options.turns)
    pool = 4 * options.words // 16 * 2
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.touch(0o600)
        keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
        device, host = max(pool, 160) * BLOCK_BYTES, pool * BLOCK_BYTES
        with serving(
            folder, api_key_file=keys, device_bytes=device, host_bytes=host, disk_bytes=0
        ) as port:
            probes(folder, port, options.probes, options.words)
            flood(port, options.words, pool)


if __name__ == "__main__":
    main()
