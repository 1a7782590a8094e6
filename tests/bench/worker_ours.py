"""Our side of run.py: the engine's executor alone, without processes around it."""

import json
import sys
import time

import numpy as np

from ktransformers.engine.batch import Batch, SamplingBatch
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.load import build_executor, open_model, plan
from ktransformers.kvcache.config import CacheConfig


def greedy(rows: int) -> SamplingBatch:
    """Draw the likeliest token in each of the rows."""
    f, i, w = np.zeros(rows, np.float32), np.zeros(rows, np.int32), np.zeros(rows, np.int64)
    ones, starts, none = np.ones(rows, np.float32), np.zeros(rows + 1, np.int32), np.zeros(0, np.int32)
    return SamplingBatch(
        temperature=f,
        top_k=i,
        top_p=ones,
        min_p=f,
        repetition=ones,
        presence=f,
        frequency=f,
        seed=w,
        position=w,
        logprobs=i - 1,
        history_starts=starts,
        history=none,
        history_output=i,
        bias_starts=starts,
        bias_tokens=none,
        bias_values=np.zeros(0, np.float32),
    )


def batch(sequences: list[tuple[list[int], int, np.ndarray]]) -> Batch:
    """One step of (new tokens, tokens in the cache, block table) sequences; each draws one token."""
    lengths = np.array([len(tokens) for tokens, _, _ in sequences], np.int32)
    tables = [table[: -(-(context + len(tokens)) // 16)] for tokens, context, table in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Batch(
        tokens=np.concatenate([np.array(tokens, np.int32) for tokens, _, _ in sequences]),
        starts=starts,
        context=np.array([context for _, context, _ in sequences], np.int32),
        block_starts=np.concatenate([[0], np.cumsum([len(t) for t in tables])]).astype(np.int32),
        blocks=np.concatenate(tables).astype(np.int32),
        logit_rows=starts[1:] - 1,
    )


def main() -> None:
    config = EngineConfig(model=sys.argv[1], threads=int(sys.argv[2]), cache=CacheConfig(device_bytes=2**30))
    program, facts = open_model(config)
    executor = build_executor(config, program, plan(config, program, facts), lambda done, total: None)
    print(json.dumps({"engine": "ktransformers", "table": executor.isa}), flush=True)
    tokens = [(i * 7919 + 13) % (program.vocab - 1000) + 500 for i in range(8192)]

    for line in sys.stdin:
        job = json.loads(line)
        context = job.get("context", 0)
        tables = [np.arange(i * 64, (i + 1) * 64, dtype=np.int32) for i in range(32)]
        if job["kind"] == "prefill":
            table = np.arange(-(-(context + job["tokens"]) // 16), dtype=np.int32)
            start = time.perf_counter()
            for begin in range(0, job["tokens"], config.max_batch_tokens):
                part = tokens[begin : min(begin + config.max_batch_tokens, job["tokens"])]
                executor.step(batch([(part, begin, table)]), greedy(1))
            count = job["tokens"]
        else:
            streams = job["streams"]
            for s in range(streams):
                executor.step(batch([(tokens[s : s + 16], 0, tables[s])]), greedy(1))
            start = time.perf_counter()
            for step in range(job["tokens"]):
                rows = [([tokens[step * 17 + s]], 16 + step, tables[s]) for s in range(streams)]
                executor.step(batch(rows), greedy(streams))
            count = streams * job["tokens"]
        print(json.dumps({"rate": count / (time.perf_counter() - start)}), flush=True)


if __name__ == "__main__":
    main()
