"""What a worker of run.py does with its engine: it answers lines of JSON (server/bench/sides.py)."""

import json
import sys
from typing import Protocol


class Engine(Protocol):
    """Tokens per second, measured for about `seconds`."""

    def prefill(self, tokens: int, seconds: float) -> float: ...

    def decode(self, streams: int, context: int, seconds: float) -> float: ...


def answer_jobs(name: str, package: str, engine: Engine) -> None:
    """Say which engine this is, and measure what is asked for until nothing more is."""
    print(json.dumps({"engine": name, "package": package}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if job["kind"] == "prefill":
            rate = engine.prefill(job["tokens"], job["seconds"])
        else:
            rate = engine.decode(job["streams"], job["context"], job["seconds"])
        print(json.dumps({"rate": rate}), flush=True)
