"""A mixture-of-experts model about as large as the memory, served whole, and with experts on disk.

    PYTHONPATH=build/ns python tests/bench/serve_experts.py [--layers 48] [--quant Q4_0] [--expert-gib 6]

Makes a file of Qwen3-30B-A3B's shape with random weights (17 GB, in the cache folder; or --model names one)
and serves it twice to closed-loop streaming clients: all experts in memory, then what --expert-gib holds.
Random weights route evenly, which is the worst case for what is kept: a trained router has favourites.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import uvloop

from ktransformers.engine.bench.synthetic import SHAPES, write
from ktransformers.server.bench.clients import Target, Traffic
from ktransformers.server.bench.processes import usage
from ktransformers.server.bench.serving import footprint, started

NAME = "qwen3-30b-a3b"


def serve(model: Path, threads: int, traffic: Traffic, what: str) -> None:
    """Serve the file, and print one line of figures."""
    with tempfile.TemporaryDirectory() as folder, started(model, threads, Path(folder) / "log") as server:
        url, pid, begin = server
        target = Target(url)
        first, _ = footprint(target, pid, begin)
        uvloop.run(target.calibrate(traffic.prompt))
        measured = uvloop.run(target.load(traffic, 0))
        peak = usage(pid).peak_bytes["engine"]
        rate = f"{measured.tokens_per_second:.2f} tokens/s, first after {measured.first_p50:.1f} s"
        print(
            f"{what}: start to first token {first:.1f} s; {rate}, others {measured.between_p50:.3f} s apart; "
            f"the engine's peak {peak / 2**30:.1f} GiB",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=SHAPES[NAME].layers)
    parser.add_argument("--quant", default="Q4_0")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--output", type=int, default=16)
    parser.add_argument("--expert-gib", type=float, default=6.0)
    parser.add_argument("--only", choices=("memory", "disk"))
    given = parser.parse_args()
    model = given.model
    if model is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ktransformers"
        model = cache / f"{NAME}-{given.quant}-{given.layers}.gguf"
        if not model.exists():
            write(model, SHAPES[NAME], given.quant, given.layers)
    traffic = Traffic(clients=given.clients, requests=1, prompt=given.prompt, output=given.output)
    if given.only != "disk":
        serve(model, given.threads, traffic, "all experts in memory")
    if given.only != "memory":
        os.environ["KTRANSFORMERS_EXPERT_BYTES"] = str(int(given.expert_gib * 2**30))
        serve(model, given.threads, traffic, f"experts on disk, {given.expert_gib:g} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
