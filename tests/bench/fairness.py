"""The balance scheduler on the real server, with first come, first served beside it in the same run.

    python tests/bench/fairness.py shares      8 tenants of different weight, all with a backlog
    python tests/bench/fairness.py noisy       one floods with long requests, another asks once a second
    python tests/bench/fairness.py overload    ten times of what the server can do

Each starts its own servers with the default model on free ports, stops them, prints a table, and takes about
four minutes; `shares` as long as this machine needs for its figures to mean something. `--seconds` says how
long instead. Where two are compared both are up, and asked in turns.
"""

import argparse
import asyncio
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop
from tenants_load import Reply, Server, prompt, started

PROMPT, OUTPUT = 1.0, 2.0
"""Cost of a token, as the scheduler charges (scheduler/charges.py)."""


def quantile(values: Sequence[float], share: float) -> float:
    """NaN for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def cost(reply: Reply) -> float:
    """Of what was done for a request."""
    return PROMPT * reply.prompt_tokens + OUTPUT * reply.output_tokens


async def service(server: Server) -> dict[str, float]:
    """Cost of what was done for each tenant until now, by the server's own counts."""
    done: dict[str, float] = {}
    for (name, labels), value in (await asyncio.to_thread(server.series)).items():
        price = {"prompt_tokens_total": PROMPT, "generation_tokens_total": OUTPUT}.get(
            name.removeprefix("ktransformers_tenant_")
        )
        if price is not None and labels.startswith('tenant="'):
            tenant = labels.split('"')[1]
            done[tenant] = done.get(tenant, 0.0) + price * value
    return done


def row(*cells: object) -> None:
    """A line of a table."""
    print("".join(f"{cell:<26}" if i == 0 else f"{cell:>13}" for i, cell in enumerate(cells)), flush=True)


async def keep_asking(
    server: Server, tenant: str, clients: int, words: int, tokens: int, replies: list[Reply]
) -> None:
    """Until cancelled: clients that ask, wait for the answer and ask again."""

    async def one(number: int) -> None:
        rng = random.Random(f"{tenant} {number}")
        await asyncio.sleep(rng.random())  # who is first is in debt for a while: let it be anybody
        while True:
            replies.append(await server.ask(tenant, prompt(rng, words), tokens))
            if replies[-1].status != 200:
                await asyncio.sleep(1.0)

    await asyncio.gather(*(one(i) for i in range(clients)))


async def stopped(tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Cancelled, and all they had open is closed."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ---- shares


WEIGHTS = {
    f"{'ABCDEFGH'[i]} (weight {w:g})": w for i, w in enumerate((1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0))
}
CLIENTS_PER_WEIGHT, MORE_CLIENTS = 5, 4
WARM_SECONDS = 12.0
PACE_SECONDS = 8.0
LONGEST_WINDOW = 120.0
ENOUGH_REQUESTS = 40
"""Of the lightest tenant in each window: one more or less, as a window begins or ends, is then 2.5 % of it,
and there are two windows."""


async def saturate(server: Server, seconds: float, replies: list[Reply]) -> dict[str, float]:
    """Service of each tenant in so many seconds of a full load."""
    tasks = [
        asyncio.create_task(
            keep_asking(server, name, MORE_CLIENTS + round(CLIENTS_PER_WEIGHT * weight), 40, 24, replies)
        )
        for name, weight in WEIGHTS.items()
    ]
    await asyncio.sleep(WARM_SECONDS)
    before, begin = await service(server), time.perf_counter()
    await asyncio.sleep(seconds)
    after, elapsed = await service(server), time.perf_counter() - begin
    await stopped(tasks)
    await asyncio.sleep(1.0)
    return {name: (after[name] - before.get(name, 0.0)) / elapsed for name in WEIGHTS}


def long_enough(server: Server) -> float:
    """Seconds in which the lightest tenant is served ENOUGH_REQUESTS at this machine's pace."""
    replies: list[Reply] = []
    rates = uvloop.run(saturate(server, PACE_SECONDS, replies))
    lightest = sum(rates.values()) * min(WEIGHTS.values()) / sum(WEIGHTS.values())
    each = statistics.mean(cost(reply) for reply in replies if reply.status == 200)
    return min(LONGEST_WINDOW, ENOUGH_REQUESTS * each / lightest)


def shares(folder: Path, seconds: float | None) -> None:
    """Shares against shares due, Jain's index, and throughput against first come, first served."""
    rounds = 2
    totals: dict[str, list[dict[str, float]]] = {"fair": [], "fifo": []}
    with started(folder / "fair", WEIGHTS) as fair, started(folder / "fifo", WEIGHTS, policy="fifo") as fifo:
        if seconds is None:
            each = long_enough(fair)
        else:
            each = max(3.0, (seconds - 20) / (2 * rounds) - WARM_SECONDS - 2)
        print(f"{rounds} windows of {each:.0f} s for each policy", flush=True)
        for turn in range(rounds):
            both = [("fair", fair), ("fifo", fifo)]
            for name, server in both if turn % 2 == 0 else both[::-1]:
                totals[name].append(uvloop.run(saturate(server, each, [])))
    whole = sum(WEIGHTS.values())
    row("tenant", "due", "fair", "off by", "fifo")
    got = {p: {n: sum(r[n] for r in rounds_) for n in WEIGHTS} for p, rounds_ in totals.items()}
    for name, weight in WEIGHTS.items():
        due = weight / whole
        fair_share, fifo_share = (got[p][name] / sum(got[p].values()) for p in ("fair", "fifo"))
        row(name, f"{due:.2%}", f"{fair_share:.2%}", f"{fair_share / due - 1:+.1%}", f"{fifo_share:.2%}")
    rates = {p: statistics.median(sum(r.values()) for r in rounds_) for p, rounds_ in totals.items()}
    row("Jain (goal >= 0.95)", "", f"{jain(got['fair']):.4f}", "", f"{jain(got['fifo']):.4f}")
    row("units/s", "", f"{rates['fair']:.0f}", "", f"{rates['fifo']:.0f}")
    ratios = [sum(a.values()) / sum(b.values()) for a, b in zip(totals["fair"], totals["fifo"], strict=True)]
    each_round = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"throughput fair / fifo: {statistics.median(ratios):.3f} (goal >= 0.97; rounds {each_round})")


def jain(got: Mapping[str, float]) -> float:
    """Of service by weight: 1 is even."""
    by_weight = [value / WEIGHTS[name] for name, value in got.items()]
    return sum(by_weight) ** 2 / (len(by_weight) * sum(x * x for x in by_weight))


# ---- noisy neighbour


NOISY = {"A": 1.0, "B": 1.0}
FLOOD, LONG_WORDS, LONG_TOKENS = 100, 350, 100
SHORT_WORDS, SHORT_TOKENS = 30, 16


async def once_a_second(server: Server, seconds: float) -> list[Reply]:
    """B's requests, each at its time whether or not the last one has been answered."""
    rng = random.Random(1)
    tasks = []
    begin = time.perf_counter()
    n = 0
    while n < seconds:
        # Not in step with anything.
        await asyncio.sleep(max(0.0, begin + n + rng.random() * 0.5 - time.perf_counter()))
        tasks.append(asyncio.create_task(server.ask("B", prompt(rng, SHORT_WORDS), SHORT_TOKENS)))
        n += 1
    await asyncio.wait(tasks, timeout=15.0)
    for task in tasks:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    # Who was not answered waited for at least so long.
    return [r if isinstance(r, Reply) else Reply(200, {}, 15.0, 15.0) for r in done]


async def flooded(server: Server, seconds: float) -> tuple[list[Reply], float]:
    """B's replies while A floods, and what the server does in a second for both."""
    long: list[Reply] = []
    flood = asyncio.create_task(keep_asking(server, "A", FLOOD, LONG_WORDS, LONG_TOKENS, long))
    await asyncio.sleep(WARM_SECONDS)
    before, work, begin = await service(server), await steps(server), time.perf_counter()
    replies = await once_a_second(server, seconds)
    elapsed = time.perf_counter() - begin
    rate = (sum((await service(server)).values()) - sum(before.values())) / elapsed
    count, busy = (b - a for a, b in zip(work, await steps(server), strict=True))
    gaps = [gap * 1e3 for reply in long for gap in reply.gaps]
    print(f"  beside A: {count:.0f} steps of {busy / count * 1e3:.0f} ms, {busy / elapsed:.0%} of the time;")
    print(f"  A's tokens {quantile(gaps, 0.5):.0f} ms apart, 99 % at most {quantile(gaps, 0.99):.0f} ms")
    await stopped([flood])
    return replies, rate


async def steps(server: Server) -> tuple[float, float]:
    """Steps that the engine has done, and seconds in them."""
    found = await asyncio.to_thread(server.series)
    return found["ktransformers_engine_steps_total", ""], found["ktransformers_engine_step_seconds_total", ""]


def noisy(folder: Path, seconds: float | None) -> None:
    """B's time to the first token alone, beside A's flood under fair, and under fifo."""
    each = ((seconds or 190.0) - 40) / 3.5
    with started(folder / "fair", NOISY) as fair, started(folder / "fifo", NOISY, policy="fifo") as fifo:
        uvloop.run(once_a_second(fair, 3))
        alone = uvloop.run(once_a_second(fair, each / 2))
        beside, rate = uvloop.run(flooded(fair, each))
        time.sleep(1.0)
        alone += uvloop.run(once_a_second(fair, each / 2))
        waiting, fifo_rate = uvloop.run(flooded(fifo, each))
    row("B's first token", "p50", "p95", "max", "requests")
    firsts = {"alone": alone, "beside A, fair": beside, "beside A, fifo": waiting}
    for name, replies in firsts.items():
        f = [r.first for r in replies]
        row(name, f"{quantile(f, 0.5):.3f} s", f"{quantile(f, 0.95):.3f} s", f"{max(f):.3f} s", len(f))
    p95 = {name: quantile([r.first for r in replies], 0.95) for name, replies in firsts.items()}
    print(f"p95 beside A / alone: fair {p95['beside A, fair'] / p95['alone']:.1f} (goal <= 2), "
          f"fifo {p95['beside A, fifo'] / p95['alone']:.0f}")  # fmt: skip
    print(
        f"throughput fair / fifo: {rate / fifo_rate:.3f} (goal >= 0.97; {rate:.0f}, {fifo_rate:.0f} units/s)"
    )


# ---- overload


OVERLOAD = {"A": 1.0, "B": 1.0, "C": 1.0, "D": 1.0}
MAX_WAITING = 32
POOL_BYTES = 512 << 20
"""Of KV: so few that all are in use before memory is looked at. A page is there when it is first used."""
REQUEST = (60, 40)
"""Words and output tokens."""


async def capacity(server: Server) -> float:
    """Requests a second that it can do: those that are cut off count as far as they came."""
    replies: list[Reply] = []
    tasks = [asyncio.create_task(keep_asking(server, name, 8, *REQUEST, replies)) for name in OVERLOAD]
    await asyncio.sleep(5.0)
    before, begin = sum((await service(server)).values()), time.perf_counter()
    await asyncio.sleep(8.0)
    rate = (sum((await service(server)).values()) - before) / (time.perf_counter() - begin)
    while not replies:
        await asyncio.sleep(0.1)
    await stopped(tasks)
    return rate / statistics.mean(cost(reply) for reply in replies)


async def overloaded(server: Server, rate: float, seconds: float) -> list[tuple[float, Reply]]:
    """All replies and when they were asked for: `rate` a second, whatever becomes of the others."""
    rng = random.Random(2)
    replies: list[tuple[float, Reply]] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one(at: float, tenant: str) -> None:
        replies.append((at, await server.ask(tenant, prompt(rng, REQUEST[0]), REQUEST[1])))

    begin = due = time.perf_counter()
    while due < begin + seconds:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(due - begin, rng.choice(list(OVERLOAD))))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.wait(tasks, timeout=60.0)
    return replies


async def probe(server: Server, seconds: float) -> list[float]:
    """Times to the first token of one client alone, for so long."""
    rng = random.Random(3)
    firsts = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        reply = await server.ask("A", prompt(rng, 60), 8)
        firsts.append(reply.first if reply.status == 200 else float("inf"))
    return firsts


def overload(folder: Path, seconds: float | None) -> None:
    """Refusals, accepted requests, memory and recovery at ten times of what the server can do."""
    seconds = seconds or 180.0
    with started(folder / "fair", OVERLOAD, max_waiting=MAX_WAITING, device_bytes=POOL_BYTES) as server:
        before = uvloop.run(probe(server, 3.0))
        full = uvloop.run(capacity(server))
        uvloop.run(overloaded(server, 10 * full, seconds / 6))
        begin_memory = server.memory()
        replies = uvloop.run(overloaded(server, 10 * full, seconds))
        ended = time.perf_counter()
        recovered = None
        while recovered is None and time.perf_counter() < ended + 30:
            if quantile(uvloop.run(probe(server, 1.0)), 0.5) <= 2 * quantile(before, 0.95):
                recovered = time.perf_counter() - ended
            if recovered is None:
                time.sleep(0.2)
        end_memory = server.memory()
    refused = [r for _, r in replies if r.status != 200]
    done = [r for _, r in replies if r.status == 200 and not r.code]
    row("requests", "refused", "p50", "p95", "p99")
    times = [r.first * 1e3 for r in refused]
    row(
        f"{len(replies)} at {10 * full:.0f}/s",
        len(refused),
        *(f"{quantile(times, q):.1f} ms" for q in (0.5, 0.95, 0.99)),
    )
    inside = [
        float(r.headers["openai-processing-ms"]) for r in refused if "openai-processing-ms" in r.headers
    ]
    row("  in the server", len(inside), *(f"{quantile(inside, q):.1f} ms" for q in (0.5, 0.95, 0.99)))
    codes = Counter(f"{r.status} {r.code}" for r in refused)
    hints = [int(r.headers.get("retry-after", "0")) for r in refused]
    print(f"  answers: {dict(codes)}; Retry-After {min(hints, default=0)} to {max(hints, default=0)} s")
    row("accepted", "", "p50", "p95", "max")
    for label, group in (
        ("first half", [r for at, r in replies if at < seconds / 2]),
        ("second half", [r for at, r in replies if at >= seconds / 2]),
    ):
        f = [r.first for r in group if r.status == 200 and not r.code]
        row(
            f"  {label}: {len(f)}",
            "",
            f"{quantile(f, 0.5):.2f} s",
            f"{quantile(f, 0.95):.2f} s",
            f"{max(f, default=0):.2f} s",
        )
    print(f"  {len(done)} done in {seconds:.0f} s, {full * seconds:.0f} would fill it")
    print(f"  at most {MAX_WAITING} wait, which is {MAX_WAITING / full:.1f} s of work")
    print(
        "memory, MiB: "
        + ", ".join(f"{role} {begin_memory[role]:.0f} -> {size:.0f}" for role, size in end_memory.items())
    )
    print(
        "recovered (first token as before) after "
        + (f"{recovered:.1f} s (goal < 10)" if recovered else "more than 30 s")
    )


def main() -> None:
    """One of the three."""
    kinds = {"shares": shares, "noisy": noisy, "overload": overload}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--seconds", type=float, help="about how long it measures")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is stopped
    with tempfile.TemporaryDirectory(prefix="ktransformers-bench-") as folder:
        kinds[arguments.kind](Path(folder), arguments.seconds)


if __name__ == "__main__":
    main()
