"""The traffic of closed-loop clients on the engine alone: the steps of a server, without its processes."""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from ktransformers.engine.bench.loads import STEP_TOKENS, Bench, batch, greedy
from ktransformers.engine.executors.native import NativeExecutor


@dataclass
class _Request:
    slot: int
    computed: int = 0
    """Tokens in the cache, of the prompt and of the answer."""
    drawn: int = 0


def closed_loop(bench: Bench, clients: int, requests: int, prompt: int, output: int) -> float:
    """Output tokens per second of `clients` that each send `requests` requests, one when the last is done.

    Running answers get a token in each step; what is left of its tokens goes to prompts in the order of their
    arrival. The bench must have room for a decode of `clients` streams at a context of prompt + output.
    """
    size = -(-(prompt + output) // NativeExecutor.block_tokens)
    tables = [np.arange(s * size, (s + 1) * size, dtype=np.int32) for s in range(clients)]
    left = [requests - 1] * clients
    waiting = deque(_Request(slot) for slot in range(clients))
    running: list[_Request] = []
    begin, done = time.perf_counter(), 0
    while waiting or running:
        parts = [(request, 1) for request in running]
        budget = STEP_TOKENS - len(parts)
        for request in waiting:
            if budget > 0:
                parts.append((request, min(budget, prompt - request.computed)))
                budget -= parts[-1][1]
        step = [(bench.tokens(17 * r.slot + r.computed, n), r.computed, tables[r.slot]) for r, n in parts]
        bench.executor.step(batch(step), greedy(len(parts)))
        for request, tokens in parts:
            request.computed += tokens
            request.drawn += request.computed >= prompt
        started = [r for r in waiting if r.drawn]
        running += started
        waiting = deque(r for r in waiting if not r.drawn)
        for request in [r for r in running if r.drawn == output]:
            running.remove(request)
            done += output
            if left[request.slot]:
                left[request.slot] -= 1
                waiting.append(_Request(request.slot))
    return done / (time.perf_counter() - begin)
