"""Ours against llama.cpp on the default model: same file, same threads, same machine, in one run.

Both sides are worker processes that load once and then take turns, so that whatever else the machine is
doing falls on both; the figure is the median over the rounds of each round's ratio.

    make bench                        # builds llama.cpp natively into build/peer the first time (minutes)
    make bench ARGS="--rounds 9 --model PATH.gguf --threads 2"
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Worker:
    """A side of the comparison: a process that answers one JSON line for each JSON line."""

    def __init__(self, python: str, script: Path, model: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [python, str(script), model, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        self.about = self._read()

    def _read(self) -> dict[str, object]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a worker died with code {self.process.wait()}")

    def measure(self, **job: object) -> float:
        """Tokens per second of one job."""
        assert self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return float(self._read()["rate"])  # type: ignore[arg-type]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def build_peer(venv: Path) -> str:
    """llama.cpp as llama-cpp-python, compiled for this machine, in a virtual environment of its own."""
    python = venv / "bin" / "python"
    if (
        subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode
        if python.exists()
        else True
    ):
        print("Building the peer (llama.cpp, native): minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        subprocess.run(
            [python, "-m", "pip", "-q", "install", "llama-cpp-python", "--no-binary", "llama-cpp-python"],
            check=True,
            env=environment,
        )
    return str(python)


JOBS = (
    ("prefill, 512 tokens", {"kind": "prefill", "tokens": 512}),
    ("decode, 1 stream", {"kind": "decode", "streams": 1, "tokens": 64}),
    ("decode, 16 streams", {"kind": "decode", "streams": 16, "tokens": 16}),
)


def main() -> None:
    """Parse, measure, print, write build/bench.json."""
    from ktransformers.server.library import resolve

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-python", help="a python that has llama_cpp; default: built into build/peer")
    options = parser.parse_args()
    model = str(resolve(options.model or ""))
    peer_python = options.peer_python or build_peer(ROOT / "build" / "peer")

    ours = Worker(sys.executable, HERE / "worker_ours.py", model, options.threads)
    peer = Worker(peer_python, HERE / "worker_llamacpp.py", model, options.threads)
    print(f"{model}\n{options.threads} threads; ours: {ours.about}; peer: {peer.about}")
    print(f"{'tokens/s, min/median/max':28} {'ours':>22} {'llama.cpp':>22} {'ratio':>18}")
    report: dict[str, object] = {
        "model": model,
        "threads": options.threads,
        "ours": ours.about,
        "peer": peer.about,
    }
    for name, job in JOBS:
        rounds = []
        for worker in (ours, peer):
            worker.measure(**job)  # warm
        for i in range(options.rounds):
            first, second = (ours, peer) if i % 2 == 0 else (peer, ours)
            a, b = first.measure(**job), second.measure(**job)
            rounds.append((a, b) if first is ours else (b, a))
        ratios = sorted(a / b for a, b in rounds)
        columns = [
            "/".join(f"{f(side):.0f}" for f in (min, statistics.median, max))
            for side in zip(*rounds, strict=True)
        ]
        spread = f"{ratios[0]:.2f}/{statistics.median(ratios):.2f}/{ratios[-1]:.2f}"
        print(f"{name:28} {columns[0]:>22} {columns[1]:>22} {spread:>18}", flush=True)
        report[name] = {
            "ours": [a for a, _ in rounds],
            "peer": [b for _, b in rounds],
            "ratio": statistics.median(ratios),
        }
    ours.close()
    peer.close()
    target = ROOT / "build" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=1))
    print(f"written to {target}")


if __name__ == "__main__":
    main()
