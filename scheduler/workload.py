"""Who asks for what, and when: arrivals for the simulator, made from a seed or read from a file."""

import heapq
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Arrival:
    """One request."""

    seconds: float
    tenant: str
    prompt: int
    """Tokens."""
    output: int
    """Tokens after which it stops by itself."""
    user: str = ""
    weight: float = 1.0
    prefix: int = 0
    """Tokens of the prompt's beginning that all prompts of this tenant with this `topic` have in common."""
    topic: int = 0
    max_tokens: int = 0
    """What it says it may draw; 0: exactly what it does."""
    deadline: float = 0.0
    again: bool = False
    """Its client sends another one when it has ended."""


@dataclass(frozen=True)
class Load:
    """One tenant's way of asking. Lengths are drawn around their means, from a quarter to four times."""

    name: str = ""
    kind: str = "poisson"
    """poisson; burst: as many at once, as rarely; diurnal: poisson whose rate swings between 0 and twice the
    mean in `period`; flood: `count` at the start; closed: `count` clients that ask, wait and ask again."""
    rate: float = 1.0
    """Requests a second."""
    count: int = 10
    period: float = 60.0
    weight: float = 1.0
    prompt: int = 200
    output: int = 100
    prefix: int = 0
    topics: int = 1
    users: int = 1
    max_tokens: int = 0
    deadline: float = 0.0
    fixed: bool = False
    """Lengths are the means."""


class WorkloadError(ValueError):
    """A description that cannot be used; the message says what of it."""


KINDS = ("poisson", "burst", "diurnal", "flood", "closed")


def parse_load(text: str) -> list[Load]:
    """`NAME[*COPIES][:key=value,...]`, the keys being Load's fields. Errors: WorkloadError."""
    name, _, rest = text.partition(":")
    name, _, copies = name.partition("*")
    known = {f.name: f.type for f in fields(Load)}
    values: dict[str, Any] = {}
    del known["name"]
    try:
        for item in filter(None, rest.split(",")):
            key, _, value = item.partition("=")
            if key not in known:
                raise ValueError(f"unknown key {key!r} (keys: {', '.join(sorted(known))})")
            kind = known[key]
            values[key] = value == "true" if kind is bool else kind(value)  # type: ignore[operator]
        count = int(copies or 1)
    except ValueError as error:
        raise WorkloadError(f"{text!r}: {error}") from None
    load = Load(name=name, **values)
    if load.kind not in KINDS:
        raise WorkloadError(f"{text!r}: kind is one of {', '.join(KINDS)}")
    lengths = (load.count, load.prompt, load.output, load.users, load.topics)
    numbers = (load.rate, load.period, load.weight, *lengths)
    if not all(math.isfinite(n) and n > 0 for n in numbers) or not 0 <= load.prefix < 4 * load.prompt:
        raise WorkloadError(f"{text!r}: numbers have to be positive")
    return [load] if not copies else [replace(load, name=f"{name}{i}") for i in range(count)]


def generate(loads: list[Load], seconds: float, seed: int) -> Iterator[Arrival]:
    """All arrivals of the first `seconds`, in order. The same seed gives the same ones."""
    streams = [
        _arrivals(load, seconds, random.Random(f"{seed} {load.name} {i}")) for i, load in enumerate(loads)
    ]
    return heapq.merge(*streams, key=lambda arrival: arrival.seconds)


def again(arrival: Arrival, now: float, seed: int, n: int) -> Arrival:
    """What a client asks next whose n-th request has ended."""
    rng = random.Random(f"{seed} {arrival.tenant} {n}")
    return replace(
        arrival, seconds=now, prompt=_near(rng, arrival.prompt, 0.5), output=_near(rng, arrival.output, 0.5)
    )


def _near(rng: random.Random, mean: int, spread: float) -> int:
    """Within a step of the last one, and back to it on the average."""
    return max(1, round(mean * math.exp(rng.uniform(-spread, spread) / 4)))


def _arrivals(load: Load, seconds: float, rng: random.Random) -> Iterator[Arrival]:
    for at in _times(load, seconds, rng):
        prompt = load.prompt if load.fixed else _length(rng, load.prompt)
        yield Arrival(
            seconds=at,
            tenant=load.name,
            prompt=max(prompt, load.prefix + 1),
            output=load.output if load.fixed else _length(rng, load.output),
            user=f"u{rng.randrange(load.users)}" if load.users > 1 else "",
            weight=load.weight,
            prefix=load.prefix,
            topic=rng.randrange(load.topics) if load.topics > 1 else 0,
            max_tokens=load.max_tokens,
            deadline=load.deadline,
            again=load.kind == "closed",
        )


def _length(rng: random.Random, mean: int) -> int:
    return max(1, round(min(max(rng.expovariate(1 / mean), mean / 4), 4 * mean)))


def _times(load: Load, seconds: float, rng: random.Random) -> Iterator[float]:
    if load.kind in ("flood", "closed"):
        yield from [0.0] * load.count
        return
    now = 0.0
    while True:
        match load.kind:
            case "burst":
                now += rng.expovariate(load.rate / load.count)
                times = [now] * load.count
            case "diurnal":
                # Thinning: of a stream at twice the rate, as many as the hour asks for.
                now += rng.expovariate(2 * load.rate)
                swing = (1 - math.cos(2 * math.pi * now / load.period)) / 2
                times = [now] if rng.random() < swing else []
            case _:
                now += rng.expovariate(load.rate)
                times = [now]
        if now >= seconds:
            return
        yield from times


def read_trace(file: Path) -> list[Arrival]:
    """Lines of JSON with Arrival's fields (`seconds`, `tenant`, `prompt`, `output`, ...), in order of time.

    Errors: WorkloadError.
    """
    known = {f.name for f in fields(Arrival)}
    arrivals = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise WorkloadError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{file}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise WorkloadError("not an object")
            if unknown := set(values) - known:
                raise WorkloadError(f"unknown fields: {', '.join(sorted(unknown))}")
            arrivals.append(Arrival(**values))
        except (ValueError, TypeError) as error:
            raise WorkloadError(f"{file}:{number}: {error}") from None
    arrivals.sort(key=lambda arrival: arrival.seconds)
    return arrivals
