"""What copies of blocks cost the steps beside them: `python tests/bench/moves.py [--rate 300]`.

Four sequences decode on the native executor, with the default model, in turns with and without so many
copies a second between device and host, then from the device to disk. Printed: milliseconds a step.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.load import open_model
from ktransformers.engine.moves import BlockMoves
from ktransformers.engine.protocol import BlockName, Go, Move, Moves, NewSeq, Sampling, Step, StepDone
from ktransformers.engine.runner import Limits, Runner
from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.memory import HostBlocks
from ktransformers.server.library import resolve

SEQUENCES, EACH, PROMPT, HOST = 4, 400, 128, 512
"""Blocks of a sequence, and of the host."""


def between_device_and_host(i: int) -> Move:
    """Out of blocks of the sequences, and into blocks of nobody."""
    if i % 2:
        return Move(id=i, source="device", source_block=i % 8, target="host", target_block=i % HOST)
    to = SEQUENCES * EACH + i // 2 % 100
    return Move(id=i, source="host", source_block=(i + HOST // 2) % HOST, target="device", target_block=to)


def to_disk(i: int) -> Move:
    """Each under a name of its own."""
    name = BlockName(i.to_bytes(32, "little"), bytes(32), bytes(16), bytes(64))
    return Move(id=i, source="device", source_block=i % 8, target="disk", name=name)


class Decoding:
    """Sequences that go on for ever, and the moves beside them."""

    def __init__(self, folder: Path) -> None:
        program, _ = open_model(EngineConfig(model=str(resolve(""))))
        blocks = SEQUENCES * EACH + 100
        threads = len(os.sched_getaffinity(0))
        executor = NativeExecutor(program, threads=threads, blocks=blocks, max_tokens=512, max_rows=64)
        disk = DiskStore.open(folder, bytes(32), executor.block_bytes, 1 << 30)
        self.moves = BlockMoves(executor, HostBlocks(HOST, executor.block_bytes), disk, lambda: None)
        limits = Limits(blocks, executor.block_tokens, EACH * 16, 64, 512, program.vocab)
        self.runner = Runner(executor, limits, self.moves.arriving)
        self.step = self.asked = self.ended = 0
        sampling = Sampling(temperature=0.0, max_tokens=1 << 30)
        new = [NewSeq(s, list(range(1, PROMPT + 1)), PROMPT, 0, sampling) for s in range(SEQUENCES)]
        tables = [list(range(s * EACH, (s + 1) * EACH)) for s in range(SEQUENCES)]
        self.runner.step(Step(0, [], new, [Go(s, PROMPT, tables[s]) for s in range(SEQUENCES)]))

    def run(self, seconds: float, rate: float, move: Callable[[int], Move]) -> list[float]:
        """Seconds of each step; `rate` moves a second are asked for meanwhile."""
        times: list[float] = []
        end, due = time.perf_counter() + seconds, time.perf_counter()
        while (begin := time.perf_counter()) < end:
            moves = []
            while rate and due < begin:
                due += 1 / rate
                self.asked += 1
                moves.append(move(self.asked))
            if moves:
                self.moves.start(Moves(moves, []))
            self.step += 1
            done = self.runner.step(Step(self.step, [], [], [Go(s, 1, []) for s in range(SEQUENCES)]))
            if not isinstance(done, StepDone) or any(token.finish for token in done.tokens):
                raise SystemExit("the sequences have come to their end: fewer rounds, please")
            if (news := self.moves.news()) is not None:
                self.ended += sum(moved.ok for moved in news.moves)
            times.append(time.perf_counter() - begin)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=300.0, help="moves a second")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each side in each round")
    given = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as folder:
        for name, move in (("device and host", between_device_and_host), ("device to disk", to_disk)):
            decoding = Decoding(Path(folder) / name)
            with_moves: list[float] = []
            without: list[float] = []
            for _ in range(given.rounds):
                without += decoding.run(given.seconds, 0.0, move)
                with_moves += decoding.run(given.seconds, given.rate, move)
            pair = [statistics.fmean(times) * 1e3 for times in (without, with_moves)]
            slow = [statistics.quantiles(times, n=20)[18] * 1e3 for times in (without, with_moves)]
            print(
                f"{name:<16} {decoding.ended} moves: {pair[1]:.2f} ms a step, {pair[0]:.2f} without "
                f"({pair[1] / pair[0]:.1%}); p95 {slow[1]:.2f} and {slow[0]:.2f}"
            )
            decoding.moves.close(5)


if __name__ == "__main__":
    main()
